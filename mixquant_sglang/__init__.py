"""One SGLang server that prefills in low precision and decodes in BF16, from one BF16 checkpoint.

Importing this package imports neither torch nor sglang; SGLang finds it by the entry point
``sglang.srt.plugins`` (see ``host/plugin.py``).
"""

from importlib.metadata import version

__version__ = version("mixquant-sglang")

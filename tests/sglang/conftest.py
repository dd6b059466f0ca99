"""SGLang and what it imports warn at import; our own warnings, and theirs when we call them, stay errors."""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import sglang.srt.layers.quantization.modelopt_quant
    import sglang.srt.managers.scheduler  # noqa: F401

    import mixquant_sglang.layers.linear  # noqa: F401

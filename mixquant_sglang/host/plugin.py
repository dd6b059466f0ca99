"""The entry point ``sglang.srt.plugins``: SGLang calls ``register`` in the launcher and in every scheduler process.

In the launcher it only offers the name and the flag; everything else waits until ``--quantization mixquant`` is asked
for, so an idle plugin cannot disturb another model's server.  In a scheduler process of a server that asked, it sets
the hooks and lets SGLang know the quantization config, in this order: a server whose hooks are missing never knows the
name.
"""

from __future__ import annotations

import logging
import sys

from mixquant_sglang.errors import MixQuantError, refusing
from mixquant_sglang.host.hooks import launcher, registry
from mixquant_sglang.versions import machine

logger = logging.getLogger(__name__)


def register() -> None:
    """Called by SGLang's ``load_plugins``, once per process, before server arguments are parsed."""
    if machine.is_scheduler_process():
        with refusing():
            machine.allow_cpu()
            registry.register_hooks(registry.hooks_of("asked", "scheduler"))
            launcher.register_config()
        return
    try:
        registry.register_hooks(registry.hooks_of("launcher"))
    except MixQuantError as error:
        if any(machine.NAME in argument for argument in sys.argv[1:]):
            raise SystemExit(f"mixquant: {error}") from None
        logger.warning("mixquant is not available: %s", error)
        return
    offer_name()


def offer_name() -> None:
    """Makes ``mixquant`` a choice of ``--quantization``."""
    from sglang.srt import server_args

    if machine.NAME not in server_args.QUANTIZATION_CHOICES:
        server_args.add_quantization_method_choices([machine.NAME])

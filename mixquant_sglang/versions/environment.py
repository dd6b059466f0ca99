"""What the environment asks of SGLang."""

from __future__ import annotations

import pkgutil


def dumps_modules() -> bool:
    """Whether SGLang's dumper (``DUMPER_ENABLE``) looks at what modules return."""
    try:
        dumper = pkgutil.resolve_name("sglang.srt.debug_utils.dumper.dumper")
    except (ImportError, AttributeError):
        return False
    return bool(getattr(dumper, "may_enable", False))


def serves_by_rust() -> bool:
    """Whether the environment asks for SGLang's server in Rust: HTTP and tokenizer are threads of the scheduler then,
    and ``http_server._setup_and_run_http_server`` never runs."""
    from sglang.srt.environ import envs

    asked = getattr(envs, "SGLANG_RUST_SERVER", None)
    return asked is not None and bool(asked.get())


def interleaves_experts() -> bool:
    """Whether the environment asks for experts whose gate and up rows take turns (0.5.23)."""
    from sglang.srt.environ import envs

    asked = getattr(envs, "SGLANG_OPT_FUSE_SWIGLU_INTERLEAVED", None)
    return asked is not None and bool(asked.get())


def has_own_http_app() -> bool:
    """Whether the environment gives tokenizer workers another app than SGLang's (0.5.23)."""
    from sglang.srt.environ import envs

    asked = getattr(envs, "SGLANG_HTTP_SERVER_APP_PATH", None)
    return asked is not None and asked.get() != "sglang.srt.entrypoints.http_server:app"

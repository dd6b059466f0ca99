"""What a request may ask of us, and the name under which its KV is kept.

``custom_params.mixquant`` of a request is a policy.  There is one, ``{"prefill": "bf16"}``: this prompt is prefilled in
BF16.  Anything else there is an error, and so is a BF16 prefill where some layer has no BF16 path because it decodes in
low precision.

A cached prefix is named by what made it: ``mixquant:FINGERPRINT`` (``recipe/fingerprint.py``) for the server's own
prefill, ``mixquant:bf16`` for BF16, and behind it, after a ``|``, whatever key the client or SGLang gave the request.
None of these names is the beginning of another up to that ``|``, so no client text makes KV of one prefill pass for
another's.

No torch, no sglang: the HTTP side, the scheduler and tests ask the same functions.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

from mixquant_sglang.recipe.schema import PRECISIONS, Recipe

KEY = "mixquant"
BF16 = "bf16"  # the fingerprint of KV that BF16 made, whatever the recipe
ALLOWED: Mapping[str, str] = {"prefill": "bf16"}
SHOWN = 80  # characters of a client's value in a message


class PolicyError(ValueError):
    """Of one line, with at most ``SHOWN`` characters of the client's; SGLang answers a ``ValueError`` with 400."""


# -- the policy --------------------------------------------------------------------------------------------------------


def asks_bf16(custom_params: Any, recipe: Recipe | None) -> bool:
    """Whether ``custom_params`` ask for BF16 prefill; raises ``PolicyError`` for what ``recipe`` or nobody can do."""
    if custom_params is None:
        return False
    if not isinstance(custom_params, Mapping):
        raise PolicyError(f"custom_params is {show(custom_params)}; allowed: an object, {_EXAMPLE} for one")
    for key in custom_params:
        if key != KEY and _is_ours(key, custom_params[key]):
            raise PolicyError(f"custom_params.{_shown(key)} is not looked at; give custom_params {_EXAMPLE}")
    if KEY not in custom_params:
        return False
    policy = custom_params[KEY]
    if policy != ALLOWED:
        raise PolicyError(
            f"custom_params.{KEY} is {show(policy)}; allowed: {dict(ALLOWED)}, which prefills this request in BF16"
        )
    if recipe is not None:
        low = decodes_low(recipe)
        if low:
            raise PolicyError(
                f"custom_params.{KEY}: this server's recipe {recipe.name} has decode {low}, "
                "so it has no BF16 path for a request's prefill"
            )
    return True


_EXAMPLE = json.dumps({KEY: dict(ALLOWED)})


def _is_ours(key: Any, value: Any) -> bool:
    """Whether an entry of ``custom_params`` is meant for us: ``mixquant``, however it is spelt, or the ``prefill`` in
    it, left alone, where its value is a precision (others' logit processors may have a ``prefill`` too)."""
    return _plain(key) == KEY or (_plain(key) == "prefill" and _plain(value) in PRECISIONS)


def _plain(name: Any) -> str:
    """Letters and digits alone, lower-case."""
    return re.sub(r"[^a-z0-9]", "", name.lower()) if isinstance(name, str) and len(name) <= SHOWN else ""


def _shown(name: str) -> str:
    return name if name.isidentifier() and name.isascii() and len(name) <= SHOWN // 2 else show(name)


def decodes_low(recipe: Recipe) -> str:
    """The low precision that some layer decodes in, by default or by rule, with where it says so; empty if none."""
    if recipe.decode != "bf16":
        return recipe.decode
    for rule in recipe.layers:
        if rule.decode not in (None, "bf16"):
            return f"{rule.decode} for some layers ({rule.where})"
    return ""


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxdict, self.maxlist, self.maxtuple, self.maxset = 3, 4, 4, 4, 4
        self.maxstring = self.maxother = self.maxlong = SHOWN


_short = _Short()


def show(value: Any) -> str:
    """A client's value in one line of at most ``SHOWN`` characters, however large it is."""
    text = _short.repr(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


# -- the name of its KV ------------------------------------------------------------------------------------------------

_NAME = re.compile(r"mixquant:(?:bf16|[0-9a-f]{16})(?=\||\Z)")


def kv_name(fingerprint: str, client_key: str | None) -> str:
    """The radix cache's ``extra_key`` of a request whose KV ``fingerprint`` makes; injective in both arguments.

    ``client_key`` is what the request would have been kept under without us: text of the client, a LoRA's id or both.
    """
    name = f"{KEY}:{fingerprint}"
    return name if client_key is None else f"{name}|{client_key}"


def client_key(name: str | None) -> str | None:
    """The ``client_key`` of a ``kv_name``, for a server that will put its own name before it."""
    found = _NAME.match(name) if name is not None else None
    if name is None or found is None:
        return name
    return name[found.end() + 1 :] if found.end() < len(name) else None


# -- a policy in the body of an HTTP request ---------------------------------------------------------------------------

# What a body that concerns us holds, in lower case: a word of the keys as they may be misspelt, or escapes and
# encodings in which they could be written.  Each behind a byte that prompts of token ids lack: C looks for one byte
# 25 to 50 times as fast as Python for several, and the body of 8192 ids takes 6 us of the event loop.  Other bodies
# are copied in lower case (10 MB of an image: 10 to 20 ms on a busy CPU), and parsed a second time if they speak of
# customers or quantities: that costs less than a regular expression for whole keys (155 kB of text: 0.1 ms and 0.2).
_CONCERNS = ((b"qQ", b"quant"), (b"cC", b"custom"), (b"\\", b"\\u00"), (b"\x00", b"\x00"))
# The media types that FastAPI does not read as JSON; application/vnd.platform+json is JSON.
_FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")
_FORM = re.compile(rb'name="?custom_?param|(?:^|&)custom_?param', re.IGNORECASE)
# Bodies in which SGLang reads one entry of sampling_params per prompt.
_TAKES_LISTS = ("/generate", "/encode", "/classify")


def concerns(body: bytes) -> bool:
    """Whether ``body_asks_bf16`` can be anything but False."""
    found = [part for first, part in _CONCERNS if any(byte in body for byte in first)]
    if not found:
        return False
    lower = body.lower()
    return any(part in lower for part in found)


def body_asks_bf16(body: bytes, content_type: str, path: str, recipe: Recipe | None) -> bool:
    """Whether the body of a POST to ``path``, a route of SGLang's, asks for BF16 prefill of all its prompts, whatever
    SGLang's model of it drops; raises ``PolicyError`` for a policy that is wrong or where nobody looks for it."""
    if not concerns(body):
        return False
    if content_type.partition(";")[0].strip().lower() in _FORMS:
        if _FORM.search(body) and b"mixquant" in body.lower():
            raise PolicyError(f"a form has no custom_params.{KEY}; send JSON to an endpoint that takes a prompt")
        return False
    parsed = _parse(body)
    return isinstance(parsed, dict) and _asks(parsed, path, recipe)


def _parse(body: bytes) -> Any:
    """``body`` as SGLang's routes read it (``http_server.ORJSONRequest``: 1024 levels, where ``json`` ends at Python's
    recursion limit), or else as Starlette's would (UTF-16, NaN); None for what neither reads, and SGLang refuses."""
    import orjson  # SGLang's own

    try:
        return orjson.loads(body)
    except ValueError:
        pass
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _asks(body: dict[str, Any], path: str, recipe: Recipe | None) -> bool:
    asked = asks_bf16(body.get("custom_params"), recipe)
    for key in ("sampling_params", "options"):  # of /generate and of Ollama
        value = body.get(key)
        if isinstance(value, dict):
            asked |= asks_bf16(value.get("custom_params"), recipe)
        elif isinstance(value, list) and key == "sampling_params":
            each = [asks_bf16(entry.get("custom_params"), recipe) for entry in value if isinstance(entry, dict)]
            if any(each) and path not in _TAKES_LISTS:
                raise PolicyError(f"a list of sampling_params with a custom_params.{KEY} belongs to /generate")
    parameters = body.get("parameters")  # of Vertex AI, where SGLang takes them for those of /generate
    if isinstance(parameters, dict):
        asked |= _asks(parameters, "/generate", recipe)
    for where in _misplaced(body):
        raise PolicyError(f"{where} is not looked at; give custom_params.{KEY} at the top of the body")
    return asked


def _misplaced(body: dict[str, Any]) -> Iterator[str]:
    """Where a policy stands that nobody looks for: beside ``custom_params``, under a name like it, or within another
    object of the body.  What a client calls its own (a tool's field, metadata named like us) is none of that."""
    for name, value in body.items():
        where = _shown(name)
        if name == "custom_params":
            continue
        if _plain(name) == KEY or (_like_custom_params(name) and _has_ours(value)):
            yield where
        elif isinstance(value, dict):
            yield from (f"{where}.{_shown(key)}" for key in value if _is_lost(name, key, value[key]))
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for item in filter(_is_object, value):
                yield from (f"{where}[].{_shown(key)}" for key in item if _is_lost(name, key, item[key]))


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_lost(holder: str, key: str, value: Any) -> bool:
    """Whether an entry of the object ``holder`` of a body is a policy that is not looked at there."""
    if key == "custom_params" and holder in ("sampling_params", "options", "parameters"):
        return False
    if _plain(key) == KEY:
        return holder in _MERGED or _is_policy(value)
    return _like_custom_params(key) and _has_ours(value)


# What SGLang reads or clients merge into the body: nothing of others' in there is named like us.
_MERGED = ("sampling_params", "options", "extra_body")


def _is_policy(value: Any) -> bool:
    return isinstance(value, dict) and any(_plain(key) == "prefill" for key in value)


def _like_custom_params(name: str) -> bool:
    return _plain(name) in ("customparam", "customparams", "customparameter", "customparameters")


def _has_ours(custom: Any) -> bool:
    return isinstance(custom, dict) and any(_is_ours(key, value) for key, value in custom.items())

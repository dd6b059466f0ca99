"""Bodies that no server may take, each with what its 4xx must say.

Left out are those that SGLang itself answers with 500 (sampling parameters of another name or type), and a token id
outside of the vocabulary, which ends a scheduler of SGLang 0.5.17 (``docs/soak.md``).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Malformed:
    path: str
    body: str
    says: str = ""  # in the answer


_MESSAGE = '"model": "m", "messages": [{"role": "user", "content": "hi"}]'
_ALLOWED = "allowed: {'prefill': 'bf16'}"
MALFORMED = (
    Malformed("/generate", '{"text": "a"'),
    Malformed("/generate", "[1, 2]"),
    Malformed("/generate", '{"text": 5}'),
    Malformed("/generate", "{}"),
    Malformed("/generate", '{"input_ids": "abc"}'),
    Malformed("/generate", '{"input_ids": [1, "x"]}'),
    Malformed("/generate", '{"text": "a", "sampling_params": {"max_new_tokens": -3}}', "max_new_tokens"),
    Malformed("/generate", '{"text": "a", "sampling_params": {"temperature": -1}}', "temperature"),
    Malformed("/v1/chat/completions", "nonsense"),
    Malformed("/v1/chat/completions", '{"model": "m"}'),
    Malformed("/v1/chat/completions", '{"model": "m", "messages": "hi"}'),
    Malformed("/v1/chat/completions", '{"model": "m", "messages": []}'),
    Malformed("/v1/chat/completions", f'{{{_MESSAGE}, "max_tokens": -1}}', "max_new_tokens"),
    # mixquant's own
    Malformed("/generate", '{"text": "a", "custom_params": {"mixquant": {"prefill": "fp4"}}}', _ALLOWED),
    Malformed("/generate", '{"text": "a", "custom_params": {"mixquant": null}}', _ALLOWED),
    Malformed("/generate", '{"text": "a", "custom_params": 7}', "custom_params is 7"),
    Malformed(
        "/generate",
        '{"text": "a", "stream": true, "sampling_params": {"custom_params": {"mixquant": {"prefill": "fp4"}}}}',
        _ALLOWED,
    ),
    Malformed("/v1/chat/completions", f'{{{_MESSAGE}, "custom_params": {{"mixquant": {{"prefil": 1}}}}}}', _ALLOWED),
    Malformed("/v1/chat/completions", f'{{{_MESSAGE}, "custom_params": {{"mixquant": []}}}}', _ALLOWED),
)


def verdict(sent: Malformed, status: int, text: str, *, router: bool) -> str:
    """What does not hold; "" where all does.  A router answers bad JSON itself, and hands on a stream that was refused
    with 200 and the error as its body."""
    streamed = '"stream": true' in sent.body
    refused = 400 <= status < 500 or (router and streamed and status == 200 and '"error"' in text)
    if router and not sent.says and status == 500:
        refused = True  # mini_lb's own: it reads fields of bodies before a server has seen them
    if not refused:
        return f"{sent.path} {sent.body[:80]} -> {status} {text[:200]!r}, where 4xx is right"
    if sent.says and sent.says not in text.replace('\\"', '"'):
        return f"{sent.path} {sent.body[:80]} -> {status} without {sent.says!r}: {text[:200]!r}"
    return ""

"""One request whose prompt is prefilled in BF16, beside others that are not: ``one_request_bf16.py URL``.

The same prompt is asked twice.  The BF16 one has cache entries of its own, so it never reads what the other wrote.
"""

from __future__ import annotations

import sys
from typing import Any

import requests

BF16 = {"custom_params": {"mixquant": {"prefill": "bf16"}}}


def rows(url: str) -> dict[str, int]:
    """Prefilled rows by precision since the server started."""
    state = requests.get(f"{url}/server_info", timeout=60).json()["internal_states"][0]["mixquant"]
    return dict(state["tokens"]["prefill"])


def ask(url: str, **more: Any) -> str:
    """With an OpenAI client: ``client.chat.completions.create(..., extra_body=BF16)``."""
    messages = [{"role": "user", "content": "Summarise: " + "the quick brown fox jumps over the lazy dog. " * 10}]
    body = {"model": "default", "messages": messages, "max_tokens": 16, "temperature": 0, **more}
    answer = requests.post(f"{url}/v1/chat/completions", json=body, timeout=300)
    answer.raise_for_status()
    return str(answer.json()["choices"][0]["message"]["content"])


def main() -> None:
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:30000"
    for name, more in (("as usual", {}), ("in BF16", BF16)):
        before = rows(url)
        said = ask(url, **more)
        new = {precision: n - before.get(precision, 0) for precision, n in rows(url).items()}
        print(f"{name}: {said!r}; prefilled rows: {new}")


if __name__ == "__main__":
    main()

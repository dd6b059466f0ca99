"""What must not be in a bug report, taken out of its lines wherever it appears.

Known: all that the user typed and that is not shown, what of the environment names a person or a machine or is a key,
and the words of files that the user wrote.  Unknown: what has the form of a path, an address or a key.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import re
import socket
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

from mixquant_sglang import recipe

MASK = "(not shown)"
_SECRET = re.compile(
    r"(^|_)(\w*TOKEN|\w*KEY|\w*SECRETS?|\w*PASS|\w*PASSWORD|\w*PASSWD|\w*CREDENTIALS?|AUTH\w*|COOKIE)(_|$)"
)
_IDENTITY = ("USER", "LOGNAME", "USERNAME", "SUDO_USER", "HOME", "HOSTNAME", "HOST", "PWD", "OLDPWD", "VIRTUAL_ENV")
_WORD = re.compile(r"[\w.+~@%-]+")
_FORMS = (
    re.compile(r"\b\w[\w+.-]*://[^\s'\")]+"),  # an address, with who logs in
    re.compile(r"[\w.+-]+@[\w.-]+"),
    re.compile(r"(?<!\w)[\w.~@+-]*/[^\s,;:'\")]+"),  # a path, a model's name on the hub
    re.compile(r"(?<!\w)[A-Za-z]:\\[^\s'\")]+"),
    re.compile(r"(?<![\w.])\d+(\.\d+){3}(?![\w.])"),
    re.compile(
        r"(?<![\w:])(?=[0-9a-fA-F:]*(?:::|(?::[0-9a-fA-F]+){3}))(?:[0-9a-fA-F]{0,4}:){2,7}[0-9a-fA-F]{1,4}(?![\w:])"
    ),
    re.compile(r"\b(?:hf_|sk-|gh[a-z]_|glpat-|xox[a-z]-|AKIA|ASIA|eyJ|nvapi-|Bearer\s+)[\w./+=-]+"),
    re.compile(r"(?<![\w-])(?=[\w+=]*\d)(?=[\w+=]*[a-z])(?=[\w+=]*[A-Z])[\w+=]{20,}"),  # a key of no known kind
    re.compile(r"(?<![\w-])[0-9a-f]{24,}(?!\w)"),
)

_FLAGS = re.compile(r"--[a-z][a-z\d-]*(/--?[a-z][a-z\d-]*)+")  # names of one flag, as argparse writes them: no path


def is_secret(name: str) -> bool:
    """Whether an environment variable of this name holds a key."""
    return _SECRET.search(name.upper()) is not None


@cache
def public() -> frozenset[str]:
    """The words of this package's own source, lower-case: they tell nothing."""
    root = Path(__file__).resolve().parents[1]
    return frozenset(word for file in root.rglob("*.py") for word in re.findall(r"[a-z0-9]+", file.read_text().lower()))


class Hidden:
    """Collects what must not be shown (``add``, ``add_words``), then takes it out of lines (``out_of``)."""

    def __init__(self) -> None:
        self._whole: set[str] = set()
        self._hosts: set[str] = set()  # with any domain behind them
        self._words: set[str] = set()

    def add(self, value: str) -> None:
        """``value`` as it is, as messages quote it, and its parts that are not words of ours."""
        value = value.strip()
        if not value:
            return
        self._whole |= {value, value.rstrip("/"), repr(value)[1:-1], json.dumps(value)[1:-1], recipe.show(value)[1:-1]}
        self.add_words(value)

    def add_words(self, text: str) -> None:
        """The words of ``text``; not those of our own source."""
        for word in _WORD.findall(text):
            for part in (word, word.rpartition(".")[0], *re.split(r"[=@]", word)):
                known = all(piece.lower() in public() for piece in re.findall(r"[A-Za-z0-9]+", part))
                if len(part) > 2 and not known:
                    self._words.add(part.lower())

    def add_environment(self, environment: Mapping[str, str]) -> None:
        """Who and where: people, machines, folders and keys."""
        hosts = {socket.gethostname(), environment.get("HOSTNAME", ""), environment.get("HOST", "")}
        self._hosts |= {host.partition(".")[0] for host in hosts} - {"", "localhost"}
        names = {*hosts, str(Path.home()), str(Path.cwd())}
        with contextlib.suppress(KeyError, OSError):  # in containers a user may have no name
            names.add(getpass.getuser())
        names |= {environment.get(name, "") for name in _IDENTITY}
        names |= {value for name, value in environment.items() if is_secret(name)}
        for name in names:
            if len(name) > 1:
                self._whole |= {name} - {"localhost"}
                if os.sep in name:
                    self.add_words(name)

    def add_all(self, values: Iterable[str]) -> None:
        for value in values:
            self.add(value)

    def out_of(self, line: str) -> str:
        """``line`` with all of it, and what has the form of a path, an address or a key, replaced."""
        for value in sorted(self._whole - {""}, key=len, reverse=True):
            before, after = (r"(?<!\w)" if value[0].isalnum() else "", r"(?!\w)" if value[-1].isalnum() else "")
            anywhere = len(value) >= 8
            found = re.escape(value) if anywhere else before + re.escape(value) + after
            line = re.sub(found, MASK, line, flags=re.IGNORECASE)
        for host in self._hosts:
            line = re.sub(rf"(?<!\w){re.escape(host)}(?:\.[\w-]+)*(?!\w)", MASK, line, flags=re.IGNORECASE)
        for form in _FORMS:
            line = form.sub(lambda found: found.group() if _FLAGS.fullmatch(found.group()) else MASK, line)
        line = _WORD.sub(lambda word: MASK if self._is_hidden(word.group()) else word.group(), line)
        return re.sub(rf"{re.escape(MASK)}(?:[\s/,:=@.-]*{re.escape(MASK)})+", MASK, line)

    def _is_hidden(self, word: str) -> bool:
        word = word.lower()
        bare = word.strip(".-")
        if word in self._words or bare in self._words:
            return True
        # a message may end a value early, "..."
        return len(bare) >= 6 and any(known.startswith(bare) and bare not in public() for known in self._words)

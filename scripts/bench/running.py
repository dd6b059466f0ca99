"""Servers that are up already, as arms of a benchmark: a router with whatever is behind it, or several servers."""

from __future__ import annotations

import argparse
import time
import urllib.error
import urllib.request
from dataclasses import dataclass

import orjson


@dataclass(frozen=True)
class Running:
    """``url``: one, or several by commas, to which conversations go in turn, as a router with affinity has it.
    ``gpus``: of all that serves it; ``servers``: those whose caches are emptied one by one."""

    name: str
    url: str
    gpus: int
    servers: tuple[str, ...]

    def failed(self, what: str) -> SystemExit:
        return SystemExit(f"{self.name} ({self.url}) {what}")

    def flush(self) -> None:
        """Empties the caches; SGLang answers 400 while its last pass is still under way."""
        for server in self.servers:
            deadline = time.monotonic() + 30
            while True:
                try:
                    post(f"{server}/flush_cache")
                    break
                except OSError as error:
                    if getattr(error, "code", None) != 400 or time.monotonic() > deadline:
                        raise self.failed(f"did not flush the cache of {server} ({error})") from None
                time.sleep(0.1)


def post(url: str) -> None:
    request = urllib.request.Request(url, orjson.dumps({}), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as response:
        response.read()


def add_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--url",
        action="append",
        nargs="+",
        default=[],
        metavar="ARG",
        help="NAME URL[,URL...] GPUS [SERVER ...]: an arm that is up already; of several URLs a conversation goes to "
        "one; SERVER: those behind a router, whose caches are emptied (default: the URLs). May be given several times; "
        "with --arms none there are no others",
    )


def read(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Fills in ``args.running``, the arms that ``--url`` names, and takes the "none" out of ``args.arms``."""
    args.arms = [] if args.arms == ["none"] else args.arms
    args.running = arms = []
    for words in args.url:
        if len(words) < 3 or not words[2].isdigit() or int(words[2]) < 1:
            parser.error(f"argument --url: {' '.join(words)}: give a name, a URL and a number of GPUs")
        name, url, gpus, *servers = words
        urls, servers = ([one.rstrip("/") for one in some] for some in (url.split(","), servers))
        for address in (*urls, *servers):
            if not address.startswith(("http://", "https://")):
                parser.error(f"argument --url: {address} is no URL")
        arms.append(Running(name, ",".join(urls), int(gpus), tuple(servers or urls)))
    names = [*args.arms, *(arm.name for arm in arms)]
    if not names:
        parser.error("argument --arms: none, and no --url")
    if len({*names}) < len(names):
        parser.error(f"arguments --arms, --url: {' '.join(names)}: name each once")

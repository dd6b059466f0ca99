"""Looks up what mixquant uses of SGLang in SGLang's wheels, by source and without importing them: targets of hooks,
names that are imported or written as strings, and attributes (mixquant_sglang/versions/lookup.py, surface.py).

    scripts/drift [VERSION ...]      default: the versions that have pins, and the newest that the registry offers

A hook needs one of its targets.  Exit status 1 if a version that has pins lacks anything; for others it is only said.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import mixquant_sglang
from mixquant_sglang.host.hooks.hook import Hook
from mixquant_sglang.host.hooks.table import HOOKS
from mixquant_sglang.versions.lookup import Package, Source, gone

ROOT = Path(__file__).resolve().parents[2]
PINS = sorted(p.stem.removeprefix("sglang-") for p in (ROOT / "scripts" / "pins").glob("sglang-*.txt"))
NEWEST = "newest"


def fetch(version: str, folder: Path) -> str:
    """Unpacks the wheel of ``version`` without what it depends on; returns the version that came."""
    uv = shutil.which("uv") or str(ROOT / ".cache" / "uv" / "bin" / "uv")
    asked = "sglang" if version == NEWEST else f"sglang=={version}"
    subprocess.run([uv, "pip", "install", "-q", "--no-deps", "--target", folder, asked], check=True)
    return next(folder.glob("sglang-*.dist-info")).name.split("-")[1].removesuffix(".dist")


def wanted(source: Source, hook: Hook) -> bool:
    return not hook.only_with or source.exists(hook.only_with)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", default=[*PINS, NEWEST], metavar="VERSION")
    status, seen = 0, set()
    for version in parser.parse_args().versions:
        with tempfile.TemporaryDirectory() as folder:
            got = fetch(version, Path(folder))
            if got in seen:
                print(f"SGLang {got} is the {version}")
                continue
            seen.add(got)
            source, package = Source(Path(folder)), Package(Path(mixquant_sglang.__file__).parent)
            unhooked = [h for h in HOOKS if wanted(source, h) and not any(map(source.exists, h.targets))]
            lost = gone(source, package, got)
        asked = len([*package.names(got), *package.rows(got)])
        print(f"SGLang {got}: {len(HOOKS) - len(unhooked)} of {len(HOOKS)} hooks have a target", end="; ")
        print(f"{asked - len(lost)} of {asked} names and attributes are there")
        for hook in unhooked:
            print(f"  {hook.handler}: no {' nor '.join(hook.targets)}; it {hook.why}")
        for name in lost:
            print(f"  no {name}")
        status |= bool(unhooked or lost) and got in PINS
    return status


def command() -> None:
    sys.exit(main())

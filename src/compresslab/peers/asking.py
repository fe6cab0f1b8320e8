"""Asking a peer: its script in its environment, a job as JSON in, its answer as JSON out, and proof that both sides did the same.

Job -> `python run_NAME.py JOB.json ANSWER.json` -> Answer. The script says which bytes it read (their hashes) and what the
network was worth before it touched it; an answer about other bytes is an error, not a row. What is in the files is up to the
lab that hands them over (course/beside.py) and to the scripts, which share scripts/peer_job.py.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compresslab.errors import CompressLabError
from compresslab.peers import environments
from compresslab.peers.registry import Peer
from compresslab.wheels import file_sha256

TIME_LIMIT = 3600.0


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a peer is to do.

    Attributes:
        networks: folders that transformers opens, by what they are to the job; "model" is the one to compress.
        data: safetensors files, by what they are to the job, such as "calibration", "train" or "test".
        out: an empty or absent folder for what it writes.
        settings: bits and such, as its script knows them.
    """

    networks: dict[str, Path]
    data: dict[str, Path]
    out: Path
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    threads: int = 1


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a peer says.

    Attributes:
        sha256: name of a file of data -> hash of what it read.
        before: metric -> what it measured on the network as it was handed over.
        after: metric -> what it measured on what it made of it; "bytes" are those of the files of weights that it wrote.
        versions: of the packages that mattered.
        seconds: for each of its parts, by name; "total" is its whole process.
        peak_rss_bytes: the largest resident memory of its process.
        notes: what it did differently from what it was asked, in its own words.
    """

    sha256: dict[str, str]
    before: dict[str, float]
    after: dict[str, float]
    versions: dict[str, str]
    seconds: dict[str, float]
    peak_rss_bytes: int
    notes: tuple[str, ...] = ()


def ask(peer: Peer, job: Job, *, time_limit: float = TIME_LIMIT) -> Answer:
    """Have a peer do a job.

    Raises:
        CompressLabError: if it is not installed, fails, takes too long, or answers about other data than it was given.
    """
    python = environments.python(peer)
    with tempfile.TemporaryDirectory() as scratch:
        spec, answer = Path(scratch) / "job.json", Path(scratch) / "answer.json"
        spec.write_text(json.dumps(dataclasses.asdict(job), default=str), encoding="utf-8")
        command = [str(python), str(peer.script), str(spec), str(answer)]
        started = time.perf_counter()
        try:
            done = subprocess.run(
                command, env=_surroundings(job, Path(scratch)), cwd=scratch, capture_output=True, text=True, errors="replace",
                timeout=time_limit, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise CompressLabError(f"peer '{peer.name}' was stopped after {time_limit:g} s") from None
        seconds = time.perf_counter() - started
        if done.returncode or not answer.is_file():
            said = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
            raise CompressLabError(f"peer '{peer.name}' failed: {said[-1].strip()}")
        raw = json.loads(answer.read_text(encoding="utf-8"))
    try:
        found = Answer(**raw | {"notes": tuple(raw.get("notes", ())), "seconds": raw["seconds"] | {"total": seconds}})
    except (TypeError, KeyError) as error:
        raise CompressLabError(f"peer '{peer.name}' answered in another form than asked for: {error}") from None
    _hold_against(peer, job, found)
    return found


def _surroundings(job: Job, scratch: Path) -> dict[str, str]:
    """Its process sees nothing of ours, and no hub: networks and data are handed to it. Code of networks is copied to scratch."""
    own = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    alone = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(job.threads)}
    return own | offline | alone | {"HF_MODULES_CACHE": str(scratch / "modules")}


def _hold_against(peer: Peer, job: Job, found: Answer) -> None:
    for what, path in job.data.items():
        wanted, read = file_sha256(path), found.sha256.get(what)
        if read != wanted:
            raise CompressLabError(
                f"peer '{peer.name}' read another {what} file than it was given (sha256 {read}, not {wanted}): "
                "its row would compare nothing"
            )

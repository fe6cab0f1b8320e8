"""Runtimes timed in turn: each in a process of its own, which holds its model and runs one round when it is told to.

    entrants (runtime, folder) x threads -> one process each -> A B C A B C ... -> times of all rounds -> Measurements

All processes of one thread count are open at once and take turns, so that what else the machine does hits them alike; each is
bound to the first cores this process may use. A process opens its model, runs one round that is not counted, and says so;
then it answers every line on its standard input with the times of a round, and the end of input with its peak memory.
Oracle: a runtime that waits a known time (tests/test_runtimes.py), and a stopwatch around a real one.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from compresslab.errors import CompressLabError
from compresslab.measure import runtimes, sessions
from compresslab.measure.environment import cpu_name, peak_memory_bytes
from compresslab.report.schema import Frozen, Measurement

FORWARDS = 5  # in a turn, after one that is not counted
DECODE_AFTER = 32  # tokens read before those that are timed, as measure/speed.py does


class Entrant(Frozen):
    """One runtime on one folder with a number of threads: what a process is told."""

    runtime: str
    folder: Path
    threads: int
    prompt: int = 128
    tokens: int = 32
    batch: int = 1


class Timed(Frozen):
    """What an entrant reached; Measurements named as in a report, and their 95th and 99th percentiles."""

    entrant: Entrant
    measurements: tuple[Measurement, ...]


def entrants(
    folders: Sequence[Path], names: Sequence[str] | None, threads: Sequence[int], **sizes: int
) -> list[Entrant]:
    """Every runtime that can open one of the folders, on that folder, for every number of threads.

    Args:
        names: runtimes; None for all that are installed and find something to open.

    Raises:
        CompressLabError: for a runtime that is asked for and absent, or finds nothing to open; for too many threads.
    """
    allowed = len(_cores())
    for count in threads:
        if not 1 <= count <= allowed:
            raise CompressLabError(f"--threads {count}: this process may use 1 to {allowed} cores")
    chosen: list[tuple[str, Path]] = []
    for name in names or runtimes.RUNTIMES:
        runtime = runtimes.runtime(name)
        found = [folder for folder in folders if runtime.file(folder) is not None]
        if names is None:
            try:
                runtime.require()
            except CompressLabError:
                continue
        elif not found:
            raise CompressLabError(
                f"runtime {name} reads {runtime.reads}, and there is none in {', '.join(map(str, folders))}: "
                "name the folder of an export too (compresslab export)"
            )
        else:
            runtime.require()
        chosen += [(name, folder) for folder in found]
    if not chosen:
        raise CompressLabError(f"no installed runtime opens anything in {', '.join(map(str, folders))}")
    return [Entrant(runtime=r, folder=f, threads=n, **sizes) for n in dict.fromkeys(threads) for r, f in chosen]


def run(given: Sequence[Entrant], rounds: int, on_turn: Callable[[Entrant], None] = lambda _: None) -> list[Timed]:
    """Time all entrants: those of one thread count in turn, A B C A B C.

    Raises:
        CompressLabError: if a process fails, with the last line it said.
    """
    if rounds < 1:
        raise CompressLabError(f"--rounds {rounds}: at least one round is needed")
    done: list[Timed] = []
    for threads in dict.fromkeys(one.threads for one in given):
        group = [one for one in given if one.threads == threads]
        workers: list[_Worker] = []
        try:
            for one in group:
                workers.append(_Worker(one))
                workers[-1].wait()
            for _ in range(rounds):
                for worker in workers:
                    on_turn(worker.entrant)
                    worker.round()
            done += [worker.finish() for worker in workers]
        finally:
            for worker in workers:
                worker.stop()
    return done


class _Worker:
    """The process of an entrant, seen from outside."""

    def __init__(self, entrant: Entrant) -> None:
        self.entrant = entrant
        self.times: dict[str, list[float]] = {}
        self.said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed in stop()
        count = str(entrant.threads)
        environment = os.environ | {"OMP_NUM_THREADS": count, "TRANSFORMERS_VERBOSITY": "error"}
        command = [sys.executable, "-m", "compresslab.measure.rounds", entrant.model_dump_json()]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said, env=environment, text=True
        )

    def wait(self) -> None:
        self.runtime = self._answer()["runtime"]

    def round(self) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write("round\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it died: the missing answer tells why
        for name, values in self._answer().items():
            self.times.setdefault(name, []).extend(values)

    def finish(self) -> Timed:
        assert self.process.stdin is not None
        self.process.stdin.close()
        peak = self._answer()["peak_memory_bytes"]
        return Timed(
            entrant=self.entrant, measurements=tuple(_measurements(self.entrant, self.runtime, self.times, peak))
        )

    def stop(self) -> None:
        if self.process.poll() is None and self.process.stdin is not None and not self.process.stdin.closed:
            self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.said):
            if pipe is not None:
                pipe.close()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            found: dict[str, Any] = json.loads(line)
            return found
        code = self.process.wait()
        self.said.seek(0)
        lines = [x for x in self.said.read().decode(errors="replace").splitlines() if x.strip()] or [
            f"exit code {code}"
        ]
        last = lines[-1].removeprefix("compresslab.errors.CompressLabError: ")
        raise CompressLabError(f"runtime {self.entrant.runtime} failed on {self.entrant.folder}: {last}")


def _measurements(entrant: Entrant, runtime: str, times: dict[str, list[float]], peak: int) -> list[Measurement]:
    device = f"{cpu_name()}, {entrant.threads} threads"
    words = {
        "prefill_ms": f"{entrant.prompt} tokens, batch 1",
        "decode_ms_per_token": f"after {DECODE_AFTER} tokens, batch 1",
        "forward_ms": f"batch {entrant.batch}, {entrant.prompt} tokens (pictures: their own size)",
    }

    def one(name: str, value: float, unit: str, n: int, said: str, spread: float | None = None) -> Measurement:
        return Measurement(name=name, value=value, unit=unit, n=n, spread=spread, device=device,
                           conditions=f"{said}, {runtime}, in turn with the others")  # fmt: skip

    found = []
    for name, values in times.items():
        deciles = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else None
        spread = (deciles[-1] - deciles[0]) / 2 if deciles else None
        found.append(one(name, statistics.median(values), "ms", len(values), words[name], spread))
        for percent in (95, 99):
            value = float(np.percentile(values, percent))
            found.append(one(f"{name}_p{percent}", value, "ms", len(values), words[name]))
        if name == "decode_ms_per_token":
            rate = 1000 / statistics.median(values)
            found.append(one("decode_tokens_per_s", rate, "tokens/s", len(values), words[name]))
    return [*found, one("peak_memory_bytes", peak, "bytes", 1, "resident memory of the process")]


def _cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


# --- within the process -----------------------------------------------------------------------------------------------


@dataclass
class _Rounds:
    """What is run in every round, each call timed."""

    session: sessions.Session
    entrant: Entrant

    def __post_init__(self) -> None:
        one, session = self.entrant, self.session
        if session.decodes:
            self.ids = sessions.random_ids(max(one.prompt, DECODE_AFTER), session.vocabulary)
        else:
            self.given = session.inputs(one.batch, one.prompt)

    def __call__(self) -> dict[str, list[float]]:
        if not self.session.decodes:
            self.session.forward(self.given)  # the others have had the caches since the last turn
            return {"forward_ms": [_timed(lambda: self.session.forward(self.given)) for _ in range(FORWARDS)]}
        prefill = _timed(lambda: self.session.prefill(self.ids[: self.entrant.prompt]))
        self.session.prefill(self.ids[:DECODE_AFTER])
        self.session.step()
        steps = [_timed(self.session.step) for _ in range(self.entrant.tokens)]
        return {"prefill_ms": [prefill], "decode_ms_per_token": steps}


def _timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1000


def _serve(entrant: Entrant) -> None:
    """Answer on what was standard output; whatever libraries print goes to standard error instead."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, _cores()[: entrant.threads])

    def answer(found: dict[str, Any]) -> None:
        answers.write(json.dumps(found) + "\n")
        answers.flush()

    runtime = runtimes.runtime(entrant.runtime)
    rounds = _Rounds(runtime.open(entrant.folder, entrant.threads), entrant)
    rounds()
    answer({"runtime": f"{entrant.runtime} ({runtime.said()})"})
    for _ in sys.stdin:
        answer(rounds())
    answer({"peak_memory_bytes": peak_memory_bytes()})


if __name__ == "__main__":
    _serve(Entrant.model_validate_json(sys.argv[1]))

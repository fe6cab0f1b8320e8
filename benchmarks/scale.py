"""A model of 7 thousand million parameters on a small machine, costs over four sizes, and runs that are killed.

    python benchmarks/scale.py --work FOLDER [--parts rounding hqq gptq layers tokens kills ceiling ranks exports]

Checkpoints are random weights in a real model's exact shapes (`compresslab random-model`), made in FOLDER once; the largest
takes 13.5 GB and its artifact 4 GB. Every compression is a process of its own, whose peak of resident memory the system
tells at its end (wait4: the process and those it started, whichever was largest). What the preflight foretold stands beside it,
and beside the most that the output and its partial folder had on disk.

    rounding  all of it by w4a16-rtn, and the checkpoint copied and synced to disk, in turn, three times: no two copies take
              equally long here; the run whose ratio to its copy is the median is told whole. `times_copy` is all of the process,
              which knows the checkpoint by its hash first, and compares every weight at its end; `solved_times_copy` reading,
              rounding and writing alone
    hqq, gptq by w4a16-hqq and -gptq, the last one with 16 x 512 tokens; like rounding and copy, they find no page of the
              checkpoint in memory
    exports   the rounded 7B artifact to other formats: seconds, and the peak of memory beside the model's bytes
    layers, tokens        seconds of solving at four depths, and at four lengths of calibration
    kills     20 runs, each killed by SIGKILL at random moments, twice each, and run again: are the artifact's bytes the same?
    ceiling   much calibration text in as much memory as the run likes, and under a ceiling: peaks, seconds, and the same bytes?
    ranks     one process of one thread, and two gloo ranks of one thread each: seconds, and the same bytes?

Parts are measured one after the other and kept as they finish, so that some can be done again. Keep the machine quiet.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from compresslab.measure import environment
from compresslab.weights import partial_of

SMALL = "qwen2.5-0.5b"  # its shapes for what needs many runs
DEPTHS = (2, 4, 8, 16)
LENGTHS = (16, 32, 64, 128)  # samples of 128 tokens
KILLS, PAIRS = 20, 3
CEILING = "1.8GB"
EXPORTS = ("safetensors-bf16", "awq", "gguf")
UNTOUCHED = ("model.safetensors", "config.json", "tokenizer.json")  # reports have times of day in them

WORKER = """
import json, sys
from compresslab import pipeline
from compresslab.errors import CompressLabError

def say(name, value):
    print(json.dumps({name: value}), flush=True)

model, out, recipe, data, settings, foretell, memory = json.loads(sys.argv[1])
if foretell:
    _, estimate, _ = pipeline.plan_only(model, recipe, settings=settings, memory=memory, measure=False)
    fields = ("seconds", "memory_bytes", "disk_bytes", "parts")
    say("foretold", {field: getattr(estimate, field) for field in fields})
_, report = pipeline.compress(model, recipe, data, out=out, settings=settings, measure=False, memory=memory)
say("seconds", report.seconds)
say("layers", sum(layer.seconds for layer in report.layers))
"""


def process(
    command: list[str], *, kill_after: float | None = None, threads: int | None = None
) -> tuple[list[str], float, int, int]:
    """Run it to its end, or for a while.

    Returns:
        its lines, its seconds, the peak of its resident memory in bytes, and its exit code (-9 if killed).
    """
    started = time.perf_counter()
    few = {} if threads is None else {"OMP_NUM_THREADS": str(threads), "NUMBA_NUM_THREADS": str(threads)}
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True, env=os.environ | few)
    if kill_after is not None:
        try:
            child.wait(kill_after)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, 9)
    assert child.stdout is not None
    lines = child.stdout.read().splitlines()
    if child.returncode is not None:
        return lines, time.perf_counter() - started, 0, child.returncode
    _, status, usage = os.wait4(child.pid, 0)
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return lines, time.perf_counter() - started, peak, os.waitstatus_to_exitcode(status)


class Disk:
    """What a folder and its .partial hold while this is entered: bytes at the most, looked at ten times a second."""

    def __init__(self, out: Path) -> None:
        self.folders, self.most_bytes = (out, partial_of(out)), 0
        self._ended = threading.Event()
        self._looking = threading.Thread(target=self._look)

    def __enter__(self) -> Disk:
        self._looking.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._looking.join()

    def _look(self) -> None:
        while not self._ended.wait(0.1):
            sizes: dict[int, int] = {}  # by file, for a linked one takes its place once
            for path in (path for folder in self.folders for path in folder.rglob("*")):
                with contextlib.suppress(OSError):  # it is gone by now
                    found = path.lstat()
                    sizes[found.st_ino] = found.st_blocks * 512
            self.most_bytes = max(self.most_bytes, sum(sizes.values()))


def job(
    model: Path,
    out: Path,
    recipe: str,
    data: str | None,
    settings: dict[str, Any],
    *,
    foretell: bool,
    memory: str | None = None,
) -> list[str]:
    asked = json.dumps([str(model), str(out), recipe, data, settings, foretell, memory])
    return [sys.executable, "-c", WORKER, asked]


def forget(folder: Path) -> None:
    """Have the system read a folder's files from disk again."""
    os.sync()
    for path in folder.iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def fresh(out: Path) -> Path:
    for folder in (out, partial_of(out)):
        shutil.rmtree(folder, ignore_errors=True)
    return out


def compressed(
    model: Path,
    out: Path,
    recipe: str,
    data: str | None = None,
    settings: dict[str, Any] | None = None,
    memory: str | None = None,
    go_on: bool = False,
) -> dict[str, Any]:
    """One whole compression, with what was foretold of it.

    Args:
        go_on: with what a run that was killed has left, if there is any; the stages' seconds are then those of the rest, while
            the layers' own seconds are all there.
    """
    command = job(model, out, recipe, data, settings or {}, foretell=True, memory=memory)
    went_on = go_on and partial_of(out).exists()
    if not went_on:
        forget(model)
        fresh(out)
    with Disk(out) as disk:
        lines, seconds, peak, code = process(command)
    if code:
        raise SystemExit(f"{recipe} on {model} ended with {code}")
    said: dict[str, Any] = {}
    for line in lines:
        said |= json.loads(line)
    solved = said["seconds"]["calibrate and solve"]
    return {
        "seconds": seconds,
        "peak_bytes": peak,
        "disk_bytes": disk.most_bytes,
        "by_stage": said["seconds"],
        "solved": solved,
        "solved_by_layers": said["layers"],
        "went_on": went_on,
        "foretold": said["foretold"],
    }


class Bench:
    def __init__(self, work: Path, shape: str, data: str) -> None:
        self.work, self.shape, self.data = work, shape, data
        self.out = work / "out"
        work.mkdir(parents=True, exist_ok=True)

    def model(self, shape: str, blocks: int | None = None) -> Path:
        folder = self.work / (shape if blocks is None else f"{shape}-{blocks}")
        if not (folder / "tokenizer.json").exists():  # written last
            shutil.rmtree(folder, ignore_errors=True)
            more = [] if blocks is None else ["--blocks", str(blocks)]
            command = [sys.executable, "-m", "compresslab.cli", "random-model", shape, "--out", str(folder), *more]
            subprocess.run(command, check=True)
        return folder

    def copy(self) -> float:
        """Seconds until the checkpoint lies on disk a second time."""
        source, target = self.model(self.shape), self.work / "copy"
        forget(source)
        started = time.perf_counter()
        shutil.copytree(source, target, dirs_exist_ok=True)
        os.sync()
        seconds = time.perf_counter() - started
        shutil.rmtree(target)
        return seconds

    def rounding(self) -> dict[str, Any]:
        runs: list[dict[str, Any]] = []
        for _ in range(PAIRS):
            copied = self.copy()
            run = compressed(self.model(self.shape), self.out, "w4a16-rtn")
            times = {"times_copy": run["seconds"] / copied, "solved_times_copy": run["solved"] / copied}
            runs.append({"copy_seconds": copied} | times | run)
        runs.sort(key=lambda run: run["times_copy"])
        pairs = [[run["copy_seconds"], run["seconds"], run["foretold"]["seconds"]] for run in runs]
        size = sum(path.stat().st_size for path in self.model(self.shape).iterdir())
        return runs[PAIRS // 2] | {"copy_run_foretold_seconds": pairs, "checkpoint_bytes": size}

    def hqq(self) -> dict[str, Any]:
        return compressed(self.model(self.shape), self.out, "w4a16-hqq", go_on=True)

    def gptq(self) -> dict[str, Any]:
        settings = {"calibration.samples": 16, "calibration.sequence_length": 512}
        return compressed(self.model(self.shape), self.out, "w4a16-gptq", self.data, settings)

    def exports(self) -> dict[str, Any]:
        compressed(self.model(self.shape), self.out, "w4a16-rtn")
        found, target = {}, self.work / "exported"
        for name in EXPORTS:
            shutil.rmtree(target, ignore_errors=True)
            forget(self.out)
            command = ["-m", "compresslab.cli", "export", str(self.out), "--to", name, "--out", str(target)]
            lines, seconds, peak, code = process([sys.executable, *command])
            if code:
                raise SystemExit(f"export to {name} ended with {code}: {lines}")
            size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
            found[name] = {"seconds": seconds, "peak_bytes": peak, "bytes": size}
        shutil.rmtree(target)
        return found

    def layers(self) -> dict[str, Any]:
        settings = {"calibration.samples": 32, "calibration.sequence_length": 128}
        sizes = [self.model(SMALL, blocks) for blocks in DEPTHS]
        return _line(DEPTHS, [compressed(m, self.out, "w4a16-gptq", self.data, settings)["solved"] for m in sizes])

    def tokens(self) -> dict[str, Any]:
        model = self.model(SMALL, DEPTHS[1])
        found = []
        for samples in LENGTHS:
            settings = {"calibration.samples": samples, "calibration.sequence_length": 128}
            found.append(compressed(model, self.out, "w4a16-gptq", self.data, settings)["solved"])
        return _line([128 * samples for samples in LENGTHS], found)

    def kills(self) -> dict[str, Any]:
        """Moments are uniform over the time that an undisturbed run takes, from its first import to its end."""
        model, settings = self.model(SMALL, DEPTHS[1]), {"calibration.samples": 16, "calibration.sequence_length": 128}
        command = job(model, fresh(self.out), "w4a16-gptq", self.data, settings, foretell=False)
        _, whole, _, code = process(command)
        assert code == 0
        expected, draw, alike, killed = _digests(self.out), random.Random(0), 0, 0
        for number in range(KILLS):
            fresh(self.out)
            for _ in range(2):
                killed += process(command, kill_after=draw.uniform(0, whole))[3] == -9
            if not (self.out / "compresslab.json").exists() and process(command)[3] != 0:
                raise SystemExit(f"run {number} did not go on after its kills")
            alike += _digests(self.out) == expected
        return {"runs": KILLS, "kills": killed, "byte_identical": alike, "undisturbed_seconds": whole}

    def ceiling(self) -> dict[str, Any]:
        model, settings = self.model(SMALL, DEPTHS[1]), {"calibration.samples": 128, "calibration.sequence_length": 512}
        free = compressed(model, self.out, "w4a16-gptq", self.data, settings)
        expected = _digests(self.out)
        under = compressed(model, self.out, "w4a16-gptq", self.data, settings, CEILING)
        return {"free": free, "under": under, "ceiling": CEILING, "same_bytes": _digests(self.out) == expected}

    def ranks(self) -> dict[str, Any]:
        model, settings = self.model(SMALL, DEPTHS[1]), {"calibration.samples": 64, "calibration.sequence_length": 512}
        alone = job(model, self.out, "w4a16-gptq", self.data, settings, foretell=False)
        script = self.work / "worker.py"
        script.write_text(WORKER, encoding="utf-8")
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        seconds, digests = [], []
        for command in (alone, [*launcher, str(script), alone[-1]]):
            fresh(self.out)
            _, took, _, code = process(command, threads=1)
            assert code == 0
            seconds.append(took)
            digests.append(_digests(self.out))
        return {
            "seconds": dict(zip(("one process", "two ranks"), seconds, strict=True)),
            "same_bytes": digests[0] == digests[1],
        }


def _digests(out: Path) -> dict[str, str]:
    return {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in UNTOUCHED}


def _line(sizes: Any, seconds: list[float]) -> dict[str, Any]:
    """Seconds over sizes, with the line through them: what is fixed, what each unit costs, and how far any point lies off."""
    fit = statistics.linear_regression(sizes, seconds)
    off = max(abs(s - fit.intercept - fit.slope * n) / s for n, s in zip(sizes, seconds, strict=True))
    return {
        "sizes": list(sizes),
        "seconds": seconds,
        "slope": fit.slope,
        "intercept": fit.intercept,
        "furthest_off": off,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parts = ("rounding", "hqq", "gptq", "layers", "tokens", "kills", "ceiling", "ranks", "exports")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--shape", default="llama-2-7b")
    parser.add_argument("--data", default="wiki")
    parser.add_argument("--out", type=Path, default=Path("results/scale.json"))
    chosen = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a killed child leaves no dump of its memory
    bench = Bench(chosen.work.resolve(), chosen.shape, chosen.data)
    kept = json.loads(chosen.out.read_text(encoding="utf-8")) if chosen.out.exists() else {"parts": {}}
    for part in chosen.parts:
        measure: Callable[[], dict[str, Any]] = getattr(bench, part)
        of = bench.shape if part in ("rounding", "hqq", "gptq", "exports") else SMALL
        kept["parts"][part] = measure() | {"shape": of}
        kept["environment"] = environment.describe(torch.device("cpu"))
        chosen.out.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        print(part, json.dumps(kept["parts"][part]), flush=True)
    fresh(bench.out)


if __name__ == "__main__":
    main()

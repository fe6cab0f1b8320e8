"""Recipes x budgets x seeds: every combination a run of its own, on Ray where it is there, or one beside another here.

    trials -> `compresslab compress`, each in its own process and its own folder -> OUT/<trial>/ -> compare

What all trials share (model, data, settings, threads) and each recipe as it was is kept in OUT/sweep.json, and a sweep with
something else is refused. Files and folders are known by their contents, other models and data by their names.
A trial is finished when its folder is there, for an artifact appears in one rename, whole: it is never run again. One that was
killed goes on where it stopped, at once and again when the sweep is called again. One that says what is wrong with it (exit
code 2) would say it again, so it waits for the next call.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compresslab import recipe as recipes
from compresslab.artifact import MANIFEST, atomic_write
from compresslab.budget import parse_budget
from compresslab.errors import CompressLabError
from compresslab.weights import partial_of
from compresslab.wheels import file_sha256

SHARED = "sweep.json"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run of a sweep.

    Attributes:
        recipe: a shipped recipe's name, or a YAML file.
        budget: as `compresslab compress --budget` takes it; None for none.
    """

    recipe: str
    budget: str | None
    seed: int

    @property
    def name(self) -> str:
        """Its folder: the recipe, the budget if there is one, the seed."""
        return "-".join(filter(None, (Path(self.recipe).stem, self.budget, f"seed{self.seed}")))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a trial.

    Attributes:
        state: "finished" now, "kept" from an earlier sweep, or "failed".
        attempts: how often it was started now.
        why: the last line that a failed one said.
    """

    trial: Trial
    folder: Path
    state: str
    attempts: int = 0
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What all trials share.

    Attributes:
        arguments: further ones of `compresslab compress`, such as ("--set", "bits=3").
        threads: of each trial. Codes depend on them, so a sweep keeps those that it began with.
        attempts: how often a trial is started that ends without saying why.
    """

    model: str
    data: str
    out: Path
    arguments: tuple[str, ...] = ()
    threads: int = 1
    attempts: int = 3

    def command(self, trial: Trial) -> list[str]:
        budget = [] if trial.budget is None else ["--budget", trial.budget]
        return [
            sys.executable, "-m", "compresslab.cli", "compress", self.model, "--out", str(self.out / trial.name), "--recipe",
            trial.recipe, "--data", self.data, "--seed", str(trial.seed), *budget, *self.arguments, "--quiet",
        ]  # fmt: skip


def trials(chosen: Sequence[str], budgets: Sequence[str | None] = (None,), seeds: Sequence[int] = (0,)) -> list[Trial]:
    """All combinations, recipe by recipe.

    Raises:
        CompressLabError: if a recipe or a budget cannot be read, or two trials would have one folder.
    """
    for name in chosen:
        recipes.read(name)
    for budget in budgets:
        if budget is not None:
            parse_budget(budget)
    found = [Trial(recipe=r, budget=b, seed=s) for r, b, s in itertools.product(chosen, budgets, seeds)]
    names = [trial.name for trial in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise CompressLabError(
            f"two trials would be called {twice[0]}: give files, budgets and seeds other names, each once"
        )
    return found


def run(
    sweep: Sweep, wanted: Sequence[Trial], *, workers: int = 1, on_ray: bool | None = None,
    on_end: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:  # fmt: skip
    """Run what is not finished, and say what became of everything, in the order given.

    Args:
        workers: trials at the same time, here; Ray starts as many as its processors allow.
        on_ray: None for Ray if it is installed and RAY_ADDRESS names a cluster; it must see the same folders.
        on_end: told of each trial as it ends.

    Raises:
        CompressLabError: if OUT holds a sweep of something else.
    """
    sweep = _begun(sweep, wanted)
    if on_ray is None:
        on_ray = importlib.util.find_spec("ray") is not None and "RAY_ADDRESS" in os.environ
    ends = _on_ray(sweep, wanted) if on_ray else _here(sweep, wanted, workers)
    found = {}
    for outcome in ends:
        found[outcome.trial] = outcome
        on_end(outcome)
    return [found[trial] for trial in wanted]


def attempt(sweep: Sweep, trial: Trial) -> Outcome:
    """Run one trial to its end, if that has not happened yet."""
    folder = sweep.out / trial.name
    if (folder / MANIFEST).exists() and not partial_of(folder).exists():  # or it has yet to tidy up
        return Outcome(trial=trial, folder=folder, state="kept")
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), str(sweep.threads))
    why = ""
    for count in range(1, sweep.attempts + 1):
        ended = subprocess.run(
            sweep.command(trial),
            env=os.environ | threads,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if ended.returncode == 0:
            return Outcome(trial=trial, folder=folder, state="finished", attempts=count)
        said = [line for line in ended.stderr.splitlines() if line.strip()]
        why = said[-1].removeprefix("error: ") if said else f"ended with exit code {ended.returncode}"
        if ended.returncode == 2:
            break
    return Outcome(trial=trial, folder=folder, state="failed", attempts=count, why=why)


def _here(sweep: Sweep, wanted: Sequence[Trial], workers: int) -> Iterator[Outcome]:
    with ThreadPoolExecutor(max_workers=workers) as pool:
        for done in as_completed([pool.submit(attempt, sweep, trial) for trial in wanted]):
            yield done.result()


def _on_ray(sweep: Sweep, wanted: Sequence[Trial]) -> Iterator[Outcome]:
    """As tasks of as many processors as a trial has threads. A task whose process or machine dies is started again, elsewhere if
    need be; one that dies each time fails alone.
    """
    import ray

    ray.init(ignore_reinit_error=True, log_to_driver=False)
    task = ray.remote(num_cpus=sweep.threads, max_retries=sweep.attempts)(attempt)
    trials = {task.remote(sweep, trial): trial for trial in wanted}
    waiting = list(trials)
    while waiting:
        (done,), waiting = ray.wait(waiting, num_returns=1)
        try:
            yield ray.get(done)
        except ray.exceptions.RayTaskError:  # a fault of this program, not of the cluster
            raise
        except ray.exceptions.RayError as error:
            trial = trials[done]
            why = f"Ray gave it up: {str(error).splitlines()[0]}"
            yield Outcome(
                trial=trial, folder=sweep.out / trial.name, state="failed", attempts=sweep.attempts + 1, why=why
            )


def _sha256(path: Path) -> str | None:
    """Of a file, or of all files of a folder; None where there is nothing of that name."""
    if path.is_file():
        return file_sha256(path)
    if not path.is_dir():
        return None
    digest = hashlib.sha256()
    for inner in sorted(found for found in path.rglob("*") if found.is_file()):
        digest.update(f"{inner.relative_to(path).as_posix()} {file_sha256(inner)}\n".encode())
    return digest.hexdigest()


def _begun(sweep: Sweep, wanted: Sequence[Trial]) -> Sweep:
    """The sweep as it was begun, with the threads of that time; or as it begins now.

    Raises:
        CompressLabError: naming what changed.
    """
    path = sweep.out / SHARED
    asked: dict[str, Any] = {"model": sweep.model, "data": sweep.data, "arguments": list(sweep.arguments)}
    contents = {f"contents of {name}": _sha256(Path(name)) for name in (sweep.model, sweep.data)}
    asked |= {what: digest for what, digest in contents.items() if digest is not None}
    chosen = {Path(trial.recipe).stem: recipes.read(trial.recipe).model_dump(mode="json") for trial in wanted}
    kept = (
        json.loads(path.read_text(encoding="utf-8"))
        if path.exists()
        else asked | {"threads": sweep.threads, "recipes": {}}
    )
    for key, value in asked.items():
        if kept.setdefault(key, value) != value:
            raise CompressLabError(f"{sweep.out} holds a sweep with other {key} ({kept[key]}): choose another --out")
    for name, recipe in chosen.items():
        if kept["recipes"].get(name, recipe) != recipe:
            raise CompressLabError(
                f"{sweep.out} holds trials of another recipe called {name}: rename it, or choose another --out"
            )
    kept["recipes"] |= chosen
    try:
        sweep.out.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps(kept, indent=1).encode())
    except OSError as error:
        raise CompressLabError(f"cannot write to {sweep.out} ({error.strerror}): choose another --out") from None
    return dataclasses.replace(sweep, threads=int(kept["threads"]), out=sweep.out.resolve())

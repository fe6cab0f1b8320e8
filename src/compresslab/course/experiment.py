"""Running a lab: the same measurement for every seed, and verdicts on the directions it should show.

lab, scale, seeds -> rows of measured values per seed -> for each expectation "A is better than B" the mean paired difference
over the seeds, which must exceed two of its standard deviations -> a Result, saved as JSON; every table and figure is made of it.

With a single seed there is no spread: the verdict is then the direction alone, and says so.

A lab whose settings name `parts` can be measured a part at a time; `joined` puts the rows of two runs side by side, each with
the conditions that it was measured under.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from compresslab.course import beside
from compresslab.course.beside import Beside
from compresslab.course.catalogue import Lab, lab
from compresslab.errors import CompressLabError, unknown
from compresslab.measure import environment

SCALES = ("micro", "real", "paper")
DEVIATIONS = 2.0
VERDICTS = ("does not hold", "direction only", "holds")  # from the least to the most

Rows = dict[str, dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of an expectation.

    Attributes:
        key: of the words that state it.
        better, worse: the rows compared, by `metric`.
        difference: mean over the seeds of how much better; positive where the expectation points.
        deviation: standard deviation of that over the seeds; None for a single seed.
        verdict: one of VERDICTS.
    """

    key: str
    better: str
    worse: str
    metric: str
    difference: float
    deviation: float | None
    verdict: str


@dataclass(frozen=True, kw_only=True)
class Run:
    """What some of a result's rows were measured under."""

    rows: list[str]
    settings: dict[str, Any]
    environment: dict[str, Any]
    seconds: float
    created: str


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a lab measured.

    Attributes:
        rows: row -> metric -> one value per seed.
        peers: what other frameworks said of the same job, by row; empty unless they were asked.
        runs: which of the rows were measured when, if it was in several runs; what else is said here is then of the last one,
            and `seconds` are those of all.
    """

    lab: str
    scale: str
    model: str
    seeds: list[int]
    settings: dict[str, Any]
    rows: dict[str, dict[str, list[float]]]
    verdicts: list[Verdict]
    environment: dict[str, Any]
    seconds: float
    created: str
    peers: dict[str, Beside] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)

    def mean(self, row: str, metric: str) -> float:
        return statistics.fmean(self.rows[row][metric])

    def spread(self, row: str, metric: str) -> float | None:
        values = self.rows[row][metric]
        return statistics.stdev(values) if len(values) > 1 else None

    @property
    def holds(self) -> bool:
        return all(verdict.verdict == "holds" for verdict in self.verdicts)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> Result:
    raw = json.loads(path.read_text(encoding="utf-8"))
    peers = {row: Beside(**found) for row, found in raw.get("peers", {}).items()}
    runs = [Run(**one) for one in raw.get("runs", [])]
    verdicts = [Verdict(**verdict) for verdict in raw["verdicts"]]
    return Result(**raw | {"verdicts": verdicts, "peers": peers, "runs": runs})


def joined(old: Result, new: Result) -> Result:
    """Both results in one: what was measured again is the new one's, and verdicts are taken of all rows.

    Raises:
        CompressLabError: results that are not of one lab, scale, model and seeds.
    """
    _check_joins(old, lab=new.lab, scale=new.scale, model=new.model, seeds=new.seeds)
    runs = [dataclasses.replace(one, rows=[row for row in one.rows if row not in new.rows]) for one in _runs(old)]
    rows = {row: new.rows.get(row, metrics) for row, metrics in (old.rows | new.rows).items()}
    return dataclasses.replace(
        new, rows=rows, verdicts=judge(lab(new.lab), rows), seconds=old.seconds + new.seconds, peers=old.peers | new.peers,
        runs=[one for one in (*runs, *_runs(new)) if one.rows],
    )  # fmt: skip


def _check_joins(old: Result, **new: Any) -> None:
    for name, mine in new.items():
        if mine != (theirs := getattr(old, name)):
            raise CompressLabError(
                f"a result of {name} {mine} cannot be joined with one of {name} {theirs}: name another"
            )


def _runs(result: Result) -> list[Run]:
    return result.runs or [
        Run(
            rows=list(result.rows), settings=result.settings, environment=result.environment, seconds=result.seconds,
            created=result.created,
        )
    ]  # fmt: skip


def run(
    number: str, *, scale: str = "micro", seeds: int | None = None, model: str | None = None, pictures: str | None = None,
    small_pictures: str | None = None, parts: Sequence[str] | None = None, into: Result | None = None,
    peers: bool = False, say: Callable[[str], None] = lambda what: None,
) -> Result:  # fmt: skip
    """Measure a lab.

    Args:
        seeds: how many; None for the lab's own number at this scale.
        model: another model than the lab's own at this scale.
        pictures: a folder or .parquet of labelled pictures, for a lab that has a use for them.
        small_pictures: the same of small ones in ten classes, for a lab that learns such ones beside the others.
        parts: of the lab, to be measured alone; None for all.
        into: an earlier result, which this one is joined with.
        peers: also ask the frameworks that the lab names, those of them that are installed.
        say: told what is being done.
    """
    chosen = lab(number)
    experiment = chosen.module("experiment")
    if scale not in SCALES:
        raise unknown("scale", scale, SCALES)
    if scale not in experiment.SETTINGS:
        raise CompressLabError(f"lab {number} has no scale '{scale}' yet: it has {', '.join(experiment.SETTINGS)}")
    asked_for = {"model": model, "seeds": seeds, "pictures": pictures, "small_pictures": small_pictures, "parts": parts}
    settings = _with(experiment.SETTINGS[scale], asked_for, f"lab {number}", scale)
    if settings.seeds < 1:
        raise CompressLabError(f"--seeds {settings.seeds}: at least one is needed")
    if into is not None:
        _check_joins(into, lab=number, scale=scale, model=settings.model, seeds=list(range(settings.seeds)))
    asked = beside.asked_by(experiment, number, settings, say) if peers else []
    started = time.perf_counter()
    measured: list[Rows] = []
    answers: dict[str, Beside] = {}
    for seed in range(settings.seeds):
        measured.append(experiment.measure(settings, seed, say))
        if asked:
            beside.measure_(answers, asked, settings, seed, measured[-1], say)
    rows = {
        row: {metric: [once[row][metric] for once in measured] for metric in metrics}
        for row, metrics in measured[0].items()
    }
    result = Result(
        lab=number, scale=scale, model=settings.model, seeds=list(range(settings.seeds)),
        settings=dataclasses.asdict(settings), rows=rows, verdicts=judge(chosen, rows),
        environment=environment.describe(torch.device("cpu")), seconds=time.perf_counter() - started,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), peers=answers,
    )  # fmt: skip
    return result if into is None else joined(into, result)


def _with(settings: Any, asked_for: Mapping[str, Any], lab: str, scale: str) -> Any:
    """The settings with what was asked for in the place of theirs."""
    for name, value in asked_for.items():
        if value is None:
            continue
        if not hasattr(settings, name):
            words, option = name.replace("_", " "), name.replace("_", "-")
            raise CompressLabError(f"{lab} has no use for {words} at scale {scale}: leave --{option} out")
        if name == "parts" and (wrong := [part for part in value if part not in settings.parts]):
            raise unknown("part", wrong[0], settings.parts)
        settings = dataclasses.replace(settings, **{name: value})
    return settings


def judge(chosen: Lab, rows: dict[str, dict[str, list[float]]]) -> list[Verdict]:
    """Verdicts on the expectations whose rows were measured."""
    return [
        _judge(expected, rows)
        for expected in chosen.expectations
        if expected["better"] in rows and expected["worse"] in rows
    ]


def _judge(expected: dict[str, Any], rows: dict[str, dict[str, list[float]]]) -> Verdict:
    metric = expected["metric"]
    sign = 1 if expected.get("higher_is_better") else -1
    pairs = zip(rows[expected["better"]][metric], rows[expected["worse"]][metric], strict=True)
    differences = [sign * (better - worse) for better, worse in pairs]
    mean = statistics.fmean(differences)
    finite = all(math.isfinite(difference) for difference in differences)
    deviation = statistics.stdev(differences) if finite and len(differences) > 1 else None
    if not (finite and mean > 0):
        verdict = "does not hold"
    elif deviation is None or mean <= DEVIATIONS * deviation:
        verdict = "direction only"
    else:
        verdict = "holds"
    return Verdict(
        key=expected["key"], better=expected["better"], worse=expected["worse"], metric=metric, difference=mean,
        deviation=deviation, verdict=verdict,
    )  # fmt: skip

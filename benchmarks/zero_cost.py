"""Whether zero-cost proxies know which networks learn well: their rank correlation with what was learned, beside the controls.

    python benchmarks/zero_cost.py            # a few minutes on one thread; a run that was killed goes on

Networks of one space of inverted residuals, on scikit-learn's digits, moved and noised:

- "any": drawn from the whole space, so that large and small ones are compared;
- "half": drawn, and then fitted to half of the largest one's multiply-accumulates. Under a limit, which is where a search
  compares them, all take nearly the same, and what a proxy knows beside their size is all that is of use.

Each is scored before training by every proxy (zero_cost.py) on one batch, trained by itself, and taken out of a supernet that
was trained once. The figure is Spearman's rank correlation of the score with the accuracy on pictures of other digits, with an
interval by bootstrap over networks. Then the evolution of `compresslab specialise` under the same half, with each proxy and
without one, at the same number of evaluations: the loss of the best shape found.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compresslab import supernet, zero_cost
from compresslab.architectures.inverted_residuals import InvertedResidualsForImageClassification
from compresslab.course import digits
from compresslab.measure import environment, intervals
from compresslab.recipe import Training
from compresslab.search.evolution import Journal, evolved
from compresslab.search.widths import Limit, fitted
from compresslab.specialising import ShapeCosts, ShapeGuess, ShapeJudge, without_silent
from compresslab.supernet import Shape, ShapeSpace, Supernet

ROOT = Path(__file__).resolve().parent.parent
SPACE = ShapeSpace(
    widths=(8, 16), strides=(2, 2), depths=(1, 2, 3), expansions=(1, 2, 4), kernels=(3, 5), stem_channels=8, head_channels=32,
    num_channels=1, image_size=digits.SIDE, num_labels=digits.CLASSES,
)  # fmt: skip
HALF = Limit(frac=0.5, of="macs")
ALONE = digits.Training(pictures=1400, epochs=4, learning_rate=1e-2)
PHASES = {"largest": 160, "kernels": 60, "depths": 60, "expansions": 60}
BATCH, TESTED, JUDGED, RENEWED = 64, 2000, 400, 192
KINDS = ("any", "half")
SEARCH = {"size": 6, "generations": 2}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--networks", type=int, default=20, help="of each of the two kinds")
    arguments.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    arguments.add_argument("--searches", type=int, default=3, help="seeds of the evolution; 0 for none")
    arguments.add_argument(
        "--work", type=Path, default=Path("zero-cost-work"), help="of the supernet, and of what is known"
    )
    arguments.add_argument("--out", type=Path, default=ROOT / "results" / "zero-cost.json")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    started, costs = time.perf_counter(), ShapeCosts(SPACE)
    shown = digits.pictures("train", ALONE.pictures).examples()
    tested, judged = digits.pictures("test", TESTED), digits.pictures("transfer", JUDGED).examples()
    batch = shown[:BATCH]

    net = trained_supernet(shown, options.work / "supernet")
    said(started, "the supernet is trained")
    kinds: dict[str, Any] = {}
    for kind in options.kinds:
        shapes = drawn(costs, kind, options.networks)
        scores = {name: [ShapeGuess(SPACE, name, batch)(shape) for shape in shapes] for name in zero_cost.PROXIES}
        said(started, f"{kind}: {len(shapes)} networks are scored")
        rows = [trained(shape, net, shown, tested, options.work / "accuracies.jsonl") for shape in shapes]
        said(started, f"{kind}: and trained")
        accuracies = {how: [row[how] for row in rows] for how in rows[0]}
        kinds[kind] = {
            "networks": len(shapes),
            "macs_frac": spread([costs.macs_frac(shape) for shape in shapes]),
            "accuracy": {how: spread(values) for how, values in accuracies.items()},
            "rank_correlation": {
                name: {how: correlation(mine, values) for how, values in accuracies.items()} for name, mine in scores.items()
            },
            "rank_correlation_of_alone_and_in_the_supernet": correlation(*accuracies.values()),
        }  # fmt: skip
    judge = Journal(options.work / "judged.jsonl", "half", ShapeJudge(net, shown[:RENEWED], judged))
    found = {}
    for proxy in (None, *zero_cost.PROXIES) if options.searches else ():
        guess = None if proxy is None else ShapeGuess(SPACE, proxy, batch)
        found[str(proxy)] = searched(costs, judge, guess, options.searches)
        said(started, f"searched with {proxy}")
    result = {
        "benchmark": "zero-cost",
        "task": "digits of 8 x 8 pixels, moved and noised",
        "settings": {
            "space": {name: getattr(SPACE, name) for name in ("widths", "depths", "expansions", "kernels")},
            "alone": {"pictures": ALONE.pictures, "epochs": ALONE.epochs}, "supernet_steps": PHASES, "batch": BATCH,
            "tested": TESTED, "search": SEARCH | {"limit": "0.5macs", "proposals": 4, "seeds": options.searches},
        },
        "kinds": kinds,
        "loss_of_the_best_shape_found": found,
        "environment": environment.describe(torch.device("cpu")),
    }  # fmt: skip
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for kind, one in kinds.items():
        for name, row in one["rank_correlation"].items():
            print(f"{kind:<5} {name:<11}" + "".join(f"  {how} {c['value']:+.2f}" for how, c in row.items()))
    print(json.dumps(found, indent=1))
    said(started, str(options.out))


def said(started: float, what: str) -> None:
    print(f"{time.perf_counter() - started:6.0f} s  {what}", flush=True)


def drawn(costs: ShapeCosts, kind: str, count: int) -> list[Shape]:
    """Distinct networks."""
    generator, found = random.Random(0), dict[Shape, None]()
    while len(found) < count:
        shape = SPACE.drawn(generator)
        if kind == "half":
            shape = fitted(shape, SPACE.genes, lambda one: HALF.fits(costs, one), generator)
        found[without_silent(SPACE, shape)] = None
    return list(found)


def trained_supernet(shown: Sequence[dict[str, Any]], folder: Path) -> Supernet:
    torch.manual_seed(0)
    net = Supernet(SPACE)
    settings = {
        phase: Training(steps=steps, batch=64, learning_rate=4e-3, checks=2, held_back=0.02) for phase, steps in PHASES.items()
    }  # fmt: skip
    supernet.trained_(net, shown, settings, folder, seed=0)
    return net.eval().requires_grad_(False)


def trained(
    shape: Shape, net: Supernet, shown: Sequence[dict[str, Any]], tested: digits.Pictures, notes: Path
) -> dict[str, float]:
    """Accuracies of a shape, from the notes if it is there."""
    lines = notes.read_text(encoding="utf-8").splitlines() if notes.exists() else []
    known = {tuple(told): row for told, row in map(json.loads, lines)}
    if shape not in known:
        torch.manual_seed(0)
        network = InvertedResidualsForImageClassification(SPACE.config(shape))
        digits.train_(network, 0, ALONE)
        taken = net.taken(shape, shown[:RENEWED])
        known[shape] = {
            "alone": digits.accuracy(network, tested), "in the supernet": digits.accuracy(taken, tested)
        }  # fmt: skip
        with notes.open("a", encoding="utf-8") as file:
            file.write(json.dumps([shape, known[shape]]) + "\n")
    return known[shape]


def correlation(scores: Sequence[float], accuracies: Sequence[float]) -> dict[str, float]:
    """Spearman's, with the ends of its 95 % interval."""
    parts = np.stack([np.asarray(scores), np.asarray(accuracies)], axis=1)  # ranks count: a score may be minus infinity
    ends = intervals.bootstrap(partial(intervals.spearman, parts), len(parts))
    assert ends is not None
    value = float(intervals.spearman(parts, np.ones((1, len(parts))))[0])
    return {"value": value, "low": ends[0], "high": ends[1]}


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"least": min(values), "median": statistics.median(values), "most": max(values)}


def searched(costs: ShapeCosts, judge: Journal, guess: ShapeGuess | None, seeds: int) -> dict[str, Any]:
    found = [evolved(SPACE.genes, costs, HALF, judge, seed=seed, guess=guess, **SEARCH) for seed in range(seeds)]
    losses = [one.best.damage for one in found]
    return {"mean": statistics.mean(losses), "each": losses, "evaluations": [len(one.judged) for one in found]}


if __name__ == "__main__":
    main()

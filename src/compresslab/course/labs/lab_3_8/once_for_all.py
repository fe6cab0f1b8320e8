"""Lab 3.8's supernet: one training, and from it a network for each of several limits of time on this machine.

small pictures -> a supernet of inverted residuals, trained by progressive shrinking (supernet.py) -> for each limit of measured
time, its own table of latencies in hand:

    chosen         the shape that evolution finds (specialising.py), with the supernet's weights
    random         one shape that is drawn and made to fit, with the supernet's weights
    drawn          the best of as many drawn ones as the evolution judges (the control of the search)
    scratch        the chosen shape from fresh weights, for as many steps as the supernet's last phase
    scratch-long   the same for as many steps as all of its phases

Shapes are judged on pictures that neither train nor test, and every network's batch norms are counted anew on the same ones.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import nn

from compresslab import specialising, supernet
from compresslab.architectures.inverted_residuals import InvertedResidualsForImageClassification
from compresslab.batch_norms import renew_batch_norms_
from compresslab.course import in_memory, own_pictures
from compresslab.course.timing import in_turn
from compresslab.data.labelled import Example
from compresslab.recipe import Training
from compresslab.search.evolution import drawn_best
from compresslab.search.widths import Limit
from compresslab.specialising import ShapeCosts, ShapeJudge
from compresslab.supernet import Shape, ShapeSpace, Supernet
from compresslab.training import collate

FRESH, DRAWN = 10_000, 1000  # added to the seed of fresh weights, and of the draws
Rows = dict[str, dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class OnceForAll:
    """The supernet, how it is trained, and what is taken from it.

    Attributes:
        limits: of measured time at `timed` pictures, by the prefix of the rows' names.
        steps: of each phase.
        size, generations: of the evolution.
        renewed, judged, tested: pictures for the batch norms, for judging a shape, and for accuracy.
        rounds: how often each network is timed.
    """

    space: ShapeSpace = field(
        default_factory=lambda: ShapeSpace(
            widths=(16, 32, 64), strides=(1, 2, 2), depths=(1, 2), expansions=(1, 2, 4), kernels=(3, 5), image_size=16
        )
    )
    limits: Mapping[str, Limit] = field(
        default_factory=lambda: {
            f"supernet-{percent}-": Limit(frac=percent / 100, of="latency", batch=32) for percent in (70, 45)
        }
    )
    steps: Mapping[str, int] = field(
        default_factory=lambda: {"largest": 180, "kernels": 60, "depths": 60, "expansions": 60}
    )
    batch: int = 64
    learning_rate: float = 4e-3
    timed: int = 32
    size: int = 12
    generations: int = 5
    renewed: int = 256
    judged: int = 500
    tested: int = 2000
    rounds: int = 25

    def training(self, steps: int) -> Training:
        return Training(steps=steps, batch=self.batch, learning_rate=self.learning_rate, checks=1, held_back=0.005)


def measure(settings: OnceForAll, source: str, seed: int, say: Callable[[str], None]) -> Rows:
    """Rows of one seed.

    Args:
        source: a folder or .parquet of small pictures in ten classes.
    """
    space = settings.space
    test, judged, shown = own_pictures.parts(
        source, tested=settings.tested, held_back=settings.judged, side=space.image_size
    )
    say(f"seed {seed}: the supernet")
    net = trained(settings, shown, seed)
    renew = shown[: settings.renewed]
    costs = ShapeCosts(space, {settings.timed: specialising.measured_predictor(space, settings.timed)})
    judge = ShapeJudge(net, renew, judged)
    rows: Rows = {}
    networks: dict[str, nn.Module] = {}

    def row(name: str, shape: Shape, network: nn.Module) -> None:
        networks[name] = network
        rows[name] = {
            "accuracy": own_pictures.accuracy(network, test),
            "macs_share": 100 * costs.macs_frac(shape),
            "predicted_ms": costs.latency_ms(shape, settings.timed),
            "bytes": float(in_memory.float_bytes(network)),
        }

    row("supernet-whole", space.largest, net.taken(space.largest, renew))
    for prefix, limit in settings.limits.items():
        say(f"seed {seed}: {prefix}chosen")
        shapes = chosen(settings, costs, limit, judge, seed)
        for name, shape in shapes.items():
            row(prefix + name, shape, net.taken(shape, renew))
        for name, steps in scratch(settings).items():
            say(f"seed {seed}: {prefix}{name}")
            row(prefix + name, shapes["chosen"], alone(settings, shapes["chosen"], steps, shown, renew, seed))
    pixels = collate(test[: settings.timed])["pixel_values"]
    calls = {name: partial(network, pixel_values=pixels) for name, network in networks.items()}
    for name, taken in in_turn(calls, settings.rounds).items():
        rows[name]["measured_ms"] = taken
    return rows


def trained(settings: OnceForAll, shown: Sequence[Example], seed: int) -> Supernet:
    with torch.random.fork_rng(), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(seed)
        net = Supernet(settings.space)
        phases = {phase: settings.training(steps) for phase, steps in settings.steps.items()}
        supernet.trained_(net, shown, phases, Path(folder), seed=seed)
    return net.eval().requires_grad_(False)


def chosen(
    settings: OnceForAll, costs: ShapeCosts, limit: Limit, judge: Callable[[Shape], float], seed: int
) -> dict[str, Shape]:
    """The shapes within a limit that take the supernet's weights, by row."""
    space = settings.space
    best, found = specialising.specialised(
        space, costs, limit, judge, seed=seed, size=settings.size, generations=settings.generations
    )
    draws = drawn_best(space.genes, costs, limit, judge, seed=seed + DRAWN, evaluations=len(found.judged))
    return {"chosen": best, "random": draws.judged[0].widths, "drawn": draws.best.widths}


def scratch(settings: OnceForAll) -> dict[str, int]:
    """Steps of the controls from fresh weights, by row."""
    steps = settings.steps
    return {"scratch": steps[supernet.PHASES[-1]], "scratch-long": sum(steps.values())}


def alone(
    settings: OnceForAll, shape: Shape, steps: int, shown: Sequence[Example], renew: Sequence[Example], seed: int
) -> nn.Module:
    """A shape's network that never was part of a supernet."""
    with torch.random.fork_rng():
        torch.manual_seed(FRESH + seed)
        fresh = InvertedResidualsForImageClassification(settings.space.config(shape))
    network = in_memory.trained_on(fresh, shown, settings.training(steps), seed=seed)
    renew_batch_norms_(network, [collate(renew)])
    return network

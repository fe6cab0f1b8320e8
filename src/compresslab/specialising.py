"""Specialising: the part of a supernet that a device takes, found by evolution under a table of that device's latencies.

Paper. Cai et al., "Once for All: Train One Network and Specialize it for Efficient Deployment", arXiv 1908.09791, section 3.4.

    space -> every block that a shape may run, timed on this machine -> a predictor of any shape's time (search/latency.py)
      -> ShapeCosts: multiply-accumulates and bytes by arithmetic, time by the predictor
    supernet -> ShapeJudge: a shape taken out as a plain network, and its loss on examples
      -> search/evolution.py (or another search), whose widths are the genes here -> specialised
    ShapeGuess: a zero-cost proxy of a shape's network before any training; may choose which shapes are judged (zero_cost.py)

The line through two whole networks that corrects a table (search/latency.py) stands for the stem and the head too: all shapes
have the same. A gene of a block that is not run says nothing; a shape is judged with those at their smallest, and once.

Cost. A few timings for each expansion and kernel at two places of a stage; for each shape that is judged a forward over the
examples, and one over those that batch norms are counted on.

Differences from the paper. There a small network learns to foretell a shape's accuracy, and the search asks it; here every shape
that the search asks for is measured.

Oracle. tests/test_specialising.py: counted products, and tables added up by hand; every shape of a small space.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from compresslab import zero_cost
from compresslab.architectures.inverted_residuals import InvertedResidual, InvertedResidualsForImageClassification
from compresslab.budget import FILE_BYTES, entry_bytes, rounded_up
from compresslab.data.labelled import Example
from compresslab.errors import CompressLabError
from compresslab.measure import layers as timing
from compresslab.search import latency
from compresslab.search.evolution import Found
from compresslab.search.latency import LatencyTable, Predictor
from compresslab.search.searchers import searched
from compresslab.search.widths import Costs, CountedCosts, Limit
from compresslab.supernet import PAPERS as SUPERNET
from compresslab.supernet import Shape, ShapeSpace, Supernet
from compresslab.training import collate

PAPERS = {"specialising": SUPERNET["once for all"]}


@dataclass(frozen=True, kw_only=True)
class Block:
    """One inverted residual as a shape runs it; see InvertedResidual. `side` is that of what it reads."""

    width: int
    inside: int
    out: int
    kernel: int
    stride: int
    side: int

    @property
    def name(self) -> str:
        """In a table of latencies: all that its time depends on."""
        channels = f"{self.width}-{self.inside}-{self.out}"
        return f"block {channels} kernel {self.kernel} stride {self.stride} reads {self.side}x{self.side}"

    @property
    def side_out(self) -> int:
        return -(-self.side // self.stride)

    @property
    def macs(self) -> int:
        before, after = self.side**2 * self.width, self.side_out**2 * (self.kernel**2 + self.out)
        return self.inside * (before + after)


def blocks_of(space: ShapeSpace, shape: Shape) -> list[Block]:
    """Every block that a shape runs, in order."""
    found = []
    width, side = space.stem_channels, space.image_size
    for blocks, out, first in zip(space.stages(shape), space.widths, space.strides, strict=True):
        for place, (expansion, kernel) in enumerate(blocks):
            inside, stride = expansion * width, 1 if place else first
            block = Block(width=width, inside=inside, out=out, kernel=kernel, stride=stride, side=side)
            found.append(block)
            width, side = out, block.side_out
    return found


def without_silent(space: ShapeSpace, shape: Shape) -> Shape:
    """The shape with the genes of blocks that are not run at their smallest: one for each network."""
    found, length = list(shape), 1 + 2 * space.depths[-1]
    smallest = space.smallest()
    for start in range(0, len(shape), length):
        run = start + 1 + 2 * shape[start]
        found[run : start + length] = smallest[run : start + length]
    return tuple(found)


class ShapeCosts(CountedCosts):
    """Of a supernet's shapes."""

    def __init__(self, space: ShapeSpace, predictors: Mapping[int, Predictor] | None = None) -> None:
        self.predictors: dict[int, Predictor] = dict(predictors or {})
        self.space, self.dense = space, space.largest

    def macs(self, shape: Shape) -> int:
        """Multiply-accumulates for one picture."""
        space, blocks = self.space, blocks_of(self.space, shape)
        stem = space.image_size**2 * space.stem_channels * space.num_channels * 9
        head = blocks[-1].side_out ** 2 * blocks[-1].out * space.head_channels
        return stem + sum(block.macs for block in blocks) + head + space.head_channels * space.num_labels

    def bytes(self, shape: Shape) -> int:
        """Of the weight file, at most: float32, and a header as long as the largest network's."""
        space, blocks = self.space, blocks_of(self.space, shape)
        weights = 9 * space.num_channels * space.stem_channels + blocks[-1].out * space.head_channels
        weights += (space.head_channels + 1) * space.num_labels
        weights += sum(block.inside * (block.width + block.kernel**2 + block.out) for block in blocks)
        norms = [space.stem_channels, space.head_channels]
        norms += [channels for block in blocks for channels in (block.inside, block.inside, block.out)]
        return 4 * weights + sum(4 * 4 * channels + 8 for channels in norms) + self._header_bytes

    @cached_property
    def _header_bytes(self) -> int:
        with torch.device("meta"):
            tensors = InvertedResidualsForImageClassification(self.space.config(self.space.largest)).state_dict()
        return FILE_BYTES + sum(entry_bytes(name, tensor.shape) for name, tensor in tensors.items())


def measured_predictor(space: ShapeSpace, batch: int, table: LatencyTable | None = None) -> Predictor:
    """The latency of every shape at a batch; what the table lacks is measured now, on this machine, and put into it.

    Args:
        table: of this machine and batch; None for an empty one.

    Raises:
        CompressLabError: a table of other conditions, or a smallest shape that is no faster than the largest.
    """
    wanted = timing.conditions(batch)
    table = LatencyTable(conditions=wanted) if table is None else table
    if table.conditions != wanted:
        raise CompressLabError(
            f"the latency table is of {table.conditions}, and not of {wanted}: measure another for this machine and batch"
        )

    def layers(shape: Shape) -> list[str]:
        return [block.name for block in blocks_of(space, shape)]

    for expansion, kernel in itertools.product(space.expansions, space.kernels):
        told = {"expansions": expansion, "kernels": kernel, "depths": space.depths[-1]}
        for block in blocks_of(space, tuple(told[name] for name in space.names)):
            if block.name not in table.ms:
                made = InvertedResidual(block.width, block.inside, block.out, block.kernel, block.stride).eval()
                x = torch.randn(batch, block.width, block.side, block.side)
                table.ms[block.name] = timing.time_network_ms(made, {"x": x})
    anchors = []
    for shape in (space.largest, space.smallest()):
        name = "network " + hashlib.sha256("\n".join(layers(shape)).encode()).hexdigest()[:16]
        if name not in table.ms:
            whole = InvertedResidualsForImageClassification(space.config(shape)).eval()
            pixels = torch.randn(batch, space.num_channels, space.image_size, space.image_size)
            table.ms[name] = timing.time_network_ms(whole, {"pixel_values": pixels}, repeats=2 * timing.REPEATS)
        anchors.append((shape, table.ms[name]))
    return latency.corrected(table, layers, *anchors)


class ShapeJudge:
    """The damage of a shape: the cross-entropy of the network that is taken out, on examples that it was not trained on."""

    def __init__(
        self, supernet: Supernet, renew: Sequence[Example], judged: Sequence[Example], batch: int = 256
    ) -> None:
        """Args: renew: what batch norms are counted on; judged: with "pixel_values" and "labels"."""
        self.supernet, self.renew = supernet, renew
        self.batches = [collate(judged[i : i + batch]) for i in range(0, len(judged), batch)]
        self.known: dict[Shape, float] = {}

    def __call__(self, shape: Shape) -> float:
        shape = without_silent(self.supernet.space, shape)
        if shape not in self.known:
            self.known[shape] = self._measured(self.supernet.taken(shape, self.renew))
        return self.known[shape]

    @torch.no_grad()
    def _measured(self, network: nn.Module) -> float:
        losses = [
            nn.functional.cross_entropy(network(batch["pixel_values"]).logits, batch["labels"], reduction="sum")
            for batch in self.batches
        ]
        return float(torch.stack(losses).sum()) / sum(len(batch["labels"]) for batch in self.batches)


class ShapeGuess:
    """A zero-cost proxy of a shape: the score of its network as it is drawn by the seed, on one batch."""

    def __init__(self, space: ShapeSpace, proxy: str, examples: Sequence[Example], seed: int = 0) -> None:
        """Args: proxy: a row of zero_cost.PROXIES; examples: the batch, with "pixel_values" and "labels"."""
        self.space, self.proxy, self.seed, self.batch = space, proxy, seed, collate(examples)
        self.known: dict[Shape, float] = {}

    def __call__(self, shape: Shape) -> float:
        """CompressLabError if the proxy cannot score such networks."""
        shape = without_silent(self.space, shape)
        if shape not in self.known:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                network = InvertedResidualsForImageClassification(self.space.config(shape))
            try:
                self.known[shape] = zero_cost.score(
                    self.proxy, network, self.batch["pixel_values"], self.batch["labels"]
                )
            except ValueError as error:
                raise CompressLabError(f"proxy {self.proxy}: {error}") from None
        return self.known[shape]


def specialised(
    space: ShapeSpace, costs: Costs, limit: Limit, judge: Callable[[Shape], float], *, seed: int = 0, size: int = 16,
    generations: int = 6, search_by: str = "evolution", guess: Callable[[Shape], float] | None = None, proposals: int = 4,
) -> tuple[Shape, Found]:  # fmt: skip
    """The shape for one device, and what the search came to.

    Args:
        costs, limit: of the device: a share of the largest network's multiply-accumulates or measured time.
        judge: the damage of a shape, such as a ShapeJudge.
        size, generations: of the evolution, or what as many evaluations come to.
        search_by: one of searchers.SEARCHERS.
        guess: such as a ShapeGuess; chooses each shape that is judged among `proposals` of them.

    Raises:
        CompressLabError: if no shape is within the limit, naming what the smallest takes.
    """
    if not limit.fits(costs, space.smallest()):
        least = limit.taken(costs, space.smallest())
        raise CompressLabError(
            f"{limit.frac:.3g} of the largest network's {limit.of} cannot be reached: the smallest shape takes "
            f"{rounded_up(least)} of it"
        )
    found = searched(
        search_by, space.genes, costs, limit, judge, seed=seed, size=size, generations=generations, guess=guess,
        proposals=proposals,
    )  # fmt: skip
    return without_silent(space, found.best.widths), found

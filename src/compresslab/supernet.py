"""Once for all: one network whose parts are networks, trained together, so that each device takes the part that fits it.

Paper. Cai et al., "Once for All: Train One Network and Specialize it for Efficient Deployment", arXiv 1908.09791, sections
3.1 to 3.3.

Symbols. A shape is a tuple of integers, the genes: for every stage how many of its blocks are run, and for every block its
expansion e (inside = e times the channels that come in) and its kernel k. z the logits of a shape's network, y labels.

Method. A shape's network has no weights of its own. It takes the first blocks of a stage, the first channels inside a block,
and of a depthwise kernel the middle, sent through a matrix that belongs to the block (25 x 25 from 7 to 5, 9 x 9 from 5 to 3),
since the middle of a good large kernel need not be a good small one. Progressive shrinking (section 3.3): the largest network is
trained alone; then kernels, then depths, then expansions become elastic, each on top of those before. In these phases a step
draws `SHAPES` shapes, and each learns the labels and the largest network's answers as they were after the first phase:

    loss = mean over the shapes drawn of  cross-entropy(z, y) + KL(softmax(z_largest) || softmax(z))

Before the expansions become elastic the channels inside each block are sorted by the size of what they write, the L1 norm of the
projection's column, which changes nothing in the largest network but leaves the first ones the most important.

A batch norm's running statistics are true for one shape only. The supernet has none: it uses the batch's, and a network that is
taken out (`taken`) has its own counted on calibration examples.

    space -> Supernet -> trained_ -> specialising.py: a search under macs or a table of latencies -> taken -> a plain network

Cost. The phases' steps, each with SHAPES forwards and backwards and a forward of the teacher. Memory: the largest network twice.

Differences from the paper. No elastic resolution; options of a dimension come in at once and not the larger ones first; ReLU6 and
no squeeze-and-excitation, as EfficientNet-Lite, so that what is found can be rounded to 8 bits.

Oracle. tests/test_supernet.py: shapes taken out as plain networks against the supernet's answers; kernels cut by hand.
"""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from compresslab.architectures.inverted_residuals import (
    InvertedResidual,
    InvertedResidualsConfig,
    InvertedResidualsForImageClassification,
)
from compresslab.batch_norms import renew_batch_norms_
from compresslab.contract import Paper
from compresslab.data.labelled import Example
from compresslab.errors import CompressLabError
from compresslab.recipe import Training
from compresslab.training import Record, collate, split, train_

PAPERS = {
    "once for all": Paper(
        title="Once for All: Train One Network and Specialize it for Efficient Deployment",
        authors="Cai et al.",
        year=2019,
        arxiv="1908.09791",
        claim="ImageNet 80.0 % top-1 under 600M multiply-accumulates; MobileNetV3's accuracy 1.5 times faster [abstract]",
    ),
}

PHASES = ("largest", "kernels", "depths", "expansions")
SHAPES = 2  # drawn in a step

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ShapeSpace:
    """The shapes that a supernet has.

    Attributes:
        widths, strides: of the stages, as the architecture has them.
        depths, expansions, kernels: what may be chosen, ascending; kernels are odd and each two apart.
        stem_channels, head_channels, num_channels, image_size, num_labels: as the architecture has them.
    """

    widths: tuple[int, ...]
    strides: tuple[int, ...]
    depths: tuple[int, ...] = (2, 3, 4)
    expansions: tuple[int, ...] = (3, 4, 6)
    kernels: tuple[int, ...] = (3, 5, 7)
    stem_channels: int = 16
    head_channels: int = 128
    num_channels: int = 3
    image_size: int = 32
    num_labels: int = 10

    def __post_init__(self) -> None:
        if len(self.widths) != len(self.strides):
            raise CompressLabError(
                f"{len(self.widths)} widths and {len(self.strides)} strides: a stage has one of each"
            )
        for name in ("depths", "expansions", "kernels"):
            options = getattr(self, name)
            if not options or options[0] < 1 or list(options) != sorted(set(options)):
                raise CompressLabError(f"{name} are whole numbers from 1, ascending, not {options}")
        if any(kernel % 2 == 0 for kernel in self.kernels) or any(
            b - a != 2 for a, b in itertools.pairwise(self.kernels)
        ):
            raise CompressLabError(f"kernels are odd and two apart, such as (3, 5, 7), not {self.kernels}")

    @property
    def names(self) -> tuple[str, ...]:
        """Of every gene: for each stage its depth, then expansion and kernel of each of its blocks."""
        return ("depths", *(("expansions", "kernels") * self.depths[-1])) * len(self.widths)

    @property
    def genes(self) -> tuple[tuple[int, ...], ...]:
        """The options of every gene."""
        return tuple(getattr(self, name) for name in self.names)

    @property
    def largest(self) -> Shape:
        return tuple(options[-1] for options in self.genes)

    def smallest(self, elastic: Sequence[str] = PHASES) -> Shape:
        """The shape whose elastic dimensions are at their smallest, and the others at their largest."""
        return tuple(getattr(self, name)[0 if name in elastic else -1] for name in self.names)

    def drawn(self, generator: random.Random, elastic: Sequence[str] = PHASES) -> Shape:
        """A shape whose elastic dimensions are drawn; the others are at their largest."""
        return tuple(
            generator.choice(options) if name in elastic else options[-1]
            for name, options in zip(self.names, self.genes, strict=True)
        )

    def stages(self, shape: Shape) -> list[list[tuple[int, int]]]:
        """(expansion, kernel) of every block that is run, by stage. CompressLabError if a gene is none of its options."""
        genes = self.genes
        if len(shape) != len(genes) or any(gene not in options for gene, options in zip(shape, genes, strict=True)):
            raise CompressLabError(f"{shape} is no shape of this space: it has {len(genes)} genes, {genes}")
        length, found = 1 + 2 * self.depths[-1], []
        for start in range(0, len(shape), length):
            depth, *blocks = shape[start : start + length]
            found.append([(blocks[2 * i], blocks[2 * i + 1]) for i in range(depth)])
        return found

    def config(self, shape: Shape) -> InvertedResidualsConfig:
        """Of the plain network of a shape."""
        width, stages = self.stem_channels, []
        for blocks, out in zip(self.stages(shape), self.widths, strict=True):
            made = []
            for expansion, kernel in blocks:
                made.append((expansion * width, kernel))
                width = out
            stages.append(made)
        return InvertedResidualsConfig(
            stages=stages, widths=self.widths, strides=self.strides, stem_channels=self.stem_channels,
            head_channels=self.head_channels, num_channels=self.num_channels, image_size=self.image_size,
            num_labels=self.num_labels,
        )  # fmt: skip


class Supernet(nn.Module):
    """The largest network, and what makes smaller kernels of its own.

    Attributes:
        largest: a plain network; its batch norms' running statistics are not used.
        smaller: for every block, the matrices from each kernel to the next smaller one, [k^2, k^2].
        steps: how many steps of the phases have been made, so that a training that goes on draws what it would have drawn.
    """

    steps: Tensor

    def __init__(self, space: ShapeSpace) -> None:
        super().__init__()
        self.space = space
        self.largest = InvertedResidualsForImageClassification(space.config(space.largest))
        sizes = space.kernels[:-1][::-1]
        self.smaller = nn.ModuleList(
            nn.ModuleList(
                nn.ParameterDict({str(k): torch.eye(k * k) for k in sizes}) for _ in cast(nn.ModuleList, stage)
            )
            for stage in self.largest.stages
        )
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def kernel(self, stage: int, place: int, inside: int, size: int) -> Tensor:
        """The depthwise weight [inside, 1, size, size] of a block."""
        weight = self._block(stage, place).depthwise.weight[:inside]
        for smaller in [k for k in self.space.kernels[::-1] if size <= k < weight.shape[-1]]:
            middle = weight[..., 1:-1, 1:-1].flatten(1)
            matrix = cast(nn.ParameterDict, cast(nn.ModuleList, self.smaller[stage])[place])[str(smaller)]
            weight = (middle @ matrix.T).view(inside, 1, smaller, smaller)
        return weight

    def forward(self, pixel_values: Tensor, shape: Shape | None = None) -> Tensor:
        """Logits [n, labels] of a shape; the largest by default. Batch norms use the batch's statistics."""
        net = self.largest
        x = net.relu(_norm(net.bn, net.stem(pixel_values)))
        for stage, blocks in enumerate(self.space.stages(self.space.largest if shape is None else shape)):
            for place, (expansion, size) in enumerate(blocks):
                x = self._run(stage, place, expansion * x.shape[1], size, x)
        x = net.relu(_norm(net.head_bn, net.head(x)))
        found: Tensor = net.classifier(x.mean(dim=(2, 3)))
        return found

    def _block(self, stage: int, place: int) -> InvertedResidual:
        return cast(InvertedResidual, cast(nn.ModuleList, self.largest.stages[stage])[place])

    def _run(self, stage: int, place: int, inside: int, size: int, x: Tensor) -> Tensor:
        block = self._block(stage, place)
        y = block.relu(_norm(block.bn1, nn.functional.conv2d(x, block.expand.weight[:inside])))
        kernel = self.kernel(stage, place, inside, size)
        y = nn.functional.conv2d(y, kernel, None, block.depthwise.stride, size // 2, groups=inside)
        y = block.relu(_norm(block.bn2, y))
        y = _norm(block.bn3, nn.functional.conv2d(y, block.project.weight[:, :inside]))
        return x + y if block.adds_input else y

    @torch.no_grad()
    def sort_channels_(self) -> None:
        """The channels inside each block by the L1 norm of what they write, the largest first; nothing else changes."""
        for stage in range(len(self.space.widths)):
            for place in range(self.space.depths[-1]):
                block = self._block(stage, place)
                order = block.project.weight.abs().sum(dim=(0, 2, 3)).argsort(descending=True, stable=True)
                for module in (block.expand, block.bn1, block.depthwise, block.bn2):
                    for tensor in (module.weight, module.bias):
                        if tensor is not None:
                            tensor.copy_(tensor[order])
                block.project.weight.copy_(block.project.weight[:, order])

    @torch.no_grad()
    def taken(
        self, shape: Shape, examples: Sequence[Example], batch: int = 64
    ) -> InvertedResidualsForImageClassification:
        """The plain network of a shape, in eval mode, its batch norms counted anew.

        Args:
            examples: with "pixel_values"; some hundreds will do.

        Raises:
            CompressLabError: no examples, or a shape of another space.
        """
        if not examples:
            raise CompressLabError("a network that is taken out counts its batch norms anew: give it examples")
        made = InvertedResidualsForImageClassification(self.space.config(shape))
        wanted = made.state_dict()
        found: dict[str, Tensor] = {}
        for stage, blocks in enumerate(self.space.stages(shape)):
            for place, (_, size) in enumerate(blocks):
                name = f"stages.{stage}.{place}.depthwise.weight"
                found[name] = self.kernel(stage, place, wanted[name].shape[0], size)
        for name, tensor in self.largest.state_dict().items():
            if name in wanted and name not in found:
                found[name] = tensor[tuple(slice(n) for n in wanted[name].shape)]
        made.load_state_dict({name: tensor.detach().clone() for name, tensor in found.items()})
        made.eval()
        renew_batch_norms_(made, (collate(examples[i : i + batch]) for i in range(0, len(examples), batch)))
        return made


def _norm(norm: nn.Module, x: Tensor) -> Tensor:
    """A batch norm of the first channels, with the batch's own statistics."""
    norm = cast(nn.BatchNorm2d, norm)
    channels = x.shape[1]
    return nn.functional.batch_norm(
        x, None, None, norm.weight[:channels], norm.bias[:channels], training=True, eps=norm.eps
    )


def trained_(
    supernet: Supernet, examples: Sequence[Example], settings: Mapping[str, Training] | Training, folder: Path, *, seed: int = 0,
    device: torch.device | None = None,
) -> dict[str, Record]:  # fmt: skip
    """Progressive shrinking, in place; what each phase did.

    Called again with the same folder after a kill, it goes on from the last checkpoint; phases that are over are not done again.

    Args:
        examples: with "pixel_values" and "labels".
        settings: of every phase, or one for all.
        folder: of checkpoints.

    Raises:
        CompressLabError: a phase without settings, or what training.train_ says.
    """
    if isinstance(settings, Training):
        settings = dict.fromkeys(PHASES, settings)
    missing = [phase for phase in PHASES if phase not in settings]
    if missing:
        raise CompressLabError(f"phase {missing[0]} has no settings: give those of {', '.join(PHASES)}")
    where = device or torch.device("cpu")
    supernet.to(where).requires_grad_(True)
    records: dict[str, Record] = {}
    teacher: Supernet | None = None
    for number, phase in enumerate(PHASES):
        if phase == "expansions":
            supernet.sort_channels_()  # before what a checkpoint of this phase says, if there is one
        training, held_back = split(examples, settings[phase].held_back, seed)
        records[phase] = train_(
            supernet, training, settings[phase], folder / phase, seed=seed + number, held_back=held_back,
            loss=_Lesson(supernet.space, teacher, PHASES[1 : number + 1], seed), device=where,
        )  # fmt: skip
        if phase == "largest":
            teacher = copy.deepcopy(supernet).requires_grad_(False)
    return records


@dataclass(frozen=True)
class _Lesson:
    """The loss of a step: of the largest network alone, or of shapes that are drawn, beside a teacher."""

    space: ShapeSpace
    teacher: Supernet | None
    elastic: Sequence[str]
    seed: int

    def __call__(self, supernet: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        net = cast(Supernet, supernet)
        pixels, labels = batch["pixel_values"], batch["labels"]
        if self.teacher is None:
            return nn.functional.cross_entropy(net(pixels), labels)
        with torch.no_grad():
            wanted = self.teacher(pixels).log_softmax(dim=-1)
        losses = []
        for shape in self._shapes(net):
            logits = net(pixels, shape)
            taught = nn.functional.kl_div(logits.log_softmax(-1), wanted, reduction="batchmean", log_target=True)
            losses.append(nn.functional.cross_entropy(logits, labels) + taught)
        return torch.stack(losses).mean()

    def _shapes(self, net: Supernet) -> list[Shape]:
        """Drawn ones in training; when judged, always the largest and the smallest that there are in this phase."""
        if not net.training:
            return [self.space.largest, self.space.smallest(self.elastic)]
        generator = random.Random(self.seed * 1_000_003 + int(net.steps))
        net.steps += 1
        return [self.space.drawn(generator, self.elastic) for _ in range(SHAPES)]

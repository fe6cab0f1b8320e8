"""DeepInversion: pictures to teach on, where there are none, drawn out of the teacher's own batch norms.

Paper. Yin et al., "Dreaming to Distill: Data-free Knowledge Transfer via DeepInversion", arXiv 1912.08795, section 3.2,
equations 1 to 4.

Symbols. x [pictures, channels, height, width]; y a class for each; T the teacher, held still, its batch norms as in use, which
keep the mean m_l and the variance v_l [channels] of what they saw in training; mu_l(x), sigma2_l(x) the mean and the variance
over the batch, and over all places, of what reaches batch norm l now.

Method. From noise x is changed step by step (Adam) to lower

    cross-entropy(T(x), y) + statistics * sum over l of (|mu_l(x) - m_l| + |sigma2_l(x) - v_l|) + variation * TV(x) + small * |x|

with Euclidean norms. The first term makes every picture one of its class; the second makes the batch one that the teacher could
have been trained on, at every depth, which is what plain noise and pictures of a class alone lack. TV, the sum over the four
directions of |x - x shifted by a pixel|, makes it smooth. In every step the batch is shifted round by up to `shift` pixels,
another way each time, so that no picture hangs on the place of a grid. Classes take turns, so all are there as often.

    steps:
      - {method: deep-inversion, pictures: 512}
      - {method: soft-labels, temperature: 4.0}

No data is asked for; `--data` names pictures to measure on, where there are some. A run that was killed makes the same pictures
again before it goes on, for they hang on teacher, settings and seed alone.

Cost. pictures / batch * steps forwards and backwards of the teacher.

Differences from the paper. No competition with the student (its adaptive form, equations 6 to 8), so the pictures are less
diverse; no flips, which a digit or a letter does not survive; a cosine of the rate; no bounds on pixels. The authors' code takes
2,000 steps on CIFAR-10 with statistics at 10; in the 200 of ours the classes would not be found so, hence 1. Rate, variation and
shift are theirs. Where a picture has but one place, as in 8 x 8 pixels, shift 0 is better.

Oracle. tests/oracles/inversion.py: the terms in loops over pictures, places and channels in float64, from what plain hooks see.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from compresslab.contract import Paper


@dataclass(frozen=True, kw_only=True)
class DeepInversion:
    """Pictures from a teacher.

    Args:
        pictures: how many to make.
        batch: how many at a time, whose statistics are compared.
        steps: of every batch.
        rate: Adam's, at first.
        statistics: what those of the batch norms count for; 0 leaves them out, and then it is no more than pictures of a class.
        variation: what total variation counts for.
        small: what the size of the pictures counts for.
        shift: pixels.
    """

    paper: ClassVar[Paper] = Paper(
        title="Dreaming to Distill: Data-free Knowledge Transfer via DeepInversion",
        authors="Yin et al.",
        year=2019,
        arxiv="1912.08795",
        claim="CIFAR-10 without its pictures: ResNet-18 93.26 % in the adaptive form, its teacher ResNet-34 95.42 %",
    )
    needs_data: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False

    pictures: int = 512
    batch: int = 128
    steps: int = 200
    rate: float = 0.1
    statistics: float = 1.0
    variation: float = 0.001
    small: float = 0.0
    shift: int = 2

    def __post_init__(self) -> None:
        if self.pictures < 2 or self.batch < 2 or self.steps < 1:
            raise ValueError(
                f"pictures and batch are 2 or more and steps 1 or more, not {self.pictures}, {self.batch}, {self.steps}"
            )
        if not self.rate > 0 or min(self.statistics, self.variation, self.small, self.shift) < 0:
            raise ValueError(
                f"rate is above 0, statistics, variation, small and shift 0 or above, not {self.rate}, {self.statistics}, "
                f"{self.variation}, {self.small}, {self.shift}"
            )

    def made(
        self, teacher: nn.Module, shape: tuple[int, int, int], classes: int, seed: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Pictures [n, channels, height, width] on the CPU with their classes int64 [n], a batch at a time.

        Args:
            teacher: in eval mode; its parameters and statistics are not changed.

        Raises:
            ValueError: a teacher without batch norms that keep statistics, where they count for something.
        """
        device = next(teacher.parameters()).device
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(self.pictures) % classes
        for wanted in labels.tensor_split(self.batches):
            pixels = torch.randn(len(wanted), *shape, generator=generator).to(device)
            yield self._drawn_out(teacher, pixels, wanted.to(device), generator).cpu(), wanted

    @property
    def batches(self) -> int:
        """How many batches there are, of equal size but for one picture."""
        return math.ceil(self.pictures / self.batch)

    def _drawn_out(self, teacher: nn.Module, pixels: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        pixels = pixels.requires_grad_(True)
        optimiser = torch.optim.Adam([pixels], lr=self.rate)
        for step in range(self.steps):
            optimiser.param_groups[0]["lr"] = self.rate * (1 + math.cos(math.pi * step / self.steps)) / 2
            down, right = torch.randint(-self.shift, self.shift + 1, (2,), generator=generator).tolist()
            loss = self.loss(teacher, pixels.roll((down, right), (2, 3)), labels)
            (pixels.grad,) = torch.autograd.grad(loss, [pixels])
            optimiser.step()
        return pixels.detach()

    def loss(self, teacher: nn.Module, pixels: Tensor, labels: Tensor) -> Tensor:
        """What a batch of pictures is judged by."""
        with _watched(teacher) as apart:
            logits = teacher(pixel_values=pixels).logits
        found = [nn.functional.cross_entropy(logits, labels)]
        if self.statistics:
            if not apart:
                raise ValueError("there is no batch norm with statistics in the teacher to draw pictures out of")
            found.append(self.statistics * torch.stack(apart).sum())
        if self.variation:
            found.append(self.variation * total_variation(pixels))
        if self.small:
            found.append(self.small * torch.linalg.vector_norm(pixels))
        return torch.stack(found).sum()


def total_variation(pixels: Tensor) -> Tensor:
    """The sum of |x - x shifted by one pixel| down, right and along both diagonals."""
    pairs = (
        (pixels[:, :, 1:], pixels[:, :, :-1]),
        (pixels[:, :, :, 1:], pixels[:, :, :, :-1]),
        (pixels[:, :, 1:, 1:], pixels[:, :, :-1, :-1]),
        (pixels[:, :, 1:, :-1], pixels[:, :, :-1, 1:]),
    )
    return torch.stack([torch.linalg.vector_norm(a - b) for a, b in pairs]).sum()


@contextmanager
def _watched(teacher: nn.Module) -> Iterator[list[Tensor]]:
    """How far what reaches each batch norm is from what it knows, filled by a forward."""
    apart: list[Tensor] = []

    def see(norm: Any, arguments: tuple[Tensor, ...]) -> None:
        x = arguments[0]
        mean, variance = x.mean((0, *range(2, x.dim()))), x.var((0, *range(2, x.dim())), unbiased=False)
        apart.append(
            torch.linalg.vector_norm(mean - norm.running_mean) + torch.linalg.vector_norm(variance - norm.running_var)
        )

    norms = [module for module in teacher.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    handles = [norm.register_forward_pre_hook(see) for norm in norms]
    try:
        yield apart
    finally:
        for handle in handles:
            handle.remove()

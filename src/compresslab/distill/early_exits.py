"""Be your own teacher: a network's earlier blocks learn from its last one, and the last one from having better ones before it.

Paper. Zhang et al., "Be Your Own Teacher: Improve the Performance of Convolutional Neural Networks via Self Distillation", arXiv
1905.08094, section 3.1, equations 2 to 4.

Symbols. F_i [examples, c_i] what exit i sees, the mean of its block's output over what counts, and F the same of the last
block, of d channels; B_i [d, c_i] and C_i [classes, d] the exit's bottleneck and classifier; p the network's own softened
logits.

Method. While it is trained, some blocks before the last get an exit of their own. Each learns three things,

    loss_i = (1 - soft) cross-entropy(C_i B_i F_i, labels) + soft T^2 KL(p || softmax(C_i B_i F_i / T))
             + hint mean of (B_i F_i - F)^2

from the labels, from the deepest classifier, and from the deepest feature; added up. The last two teach nothing back: p and F are
taken as they stand. The network's own loss on labels is a step beside this one:

    steps:
      - {method: hard-labels}
      - {method: early-exits}

Exits are thrown away after the training: what leaves is the plain network, which learnt with gradients that reach its early
blocks by a short way. No other teacher is asked; name the same model as teacher and student.

Cost. Two small products an exit.

Differences from the paper. Exits are linear, behind a mean over positions, where the paper has convolutions; blocks of any
architecture. Exits are not kept for faster answers.

Oracle. tests/oracles/features.py: the three terms in loops over examples and classes in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from compresslab.contract import Feature, Paper
from compresslab.distill.divergence import check_temperature, check_weight
from compresslab.distill.pairs import pooled


@dataclass(frozen=True, kw_only=True)
class EarlyExits:
    """Exits at earlier blocks, taught by the last.

    Args:
        weight: of this term in the sum of the recipe's losses.
        exits: how many, evenly among the blocks before the last.
        soft: what the deepest classifier counts for beside the labels, from 0 to 1.
        temperature: T of its softened distribution.
        hint: what the deepest feature counts for.
    """

    paper: ClassVar[Paper] = Paper(
        title="Be Your Own Teacher: Improve the Performance of Convolutional Neural Networks via Self Distillation",
        authors="Zhang et al.",
        year=2019,
        arxiv="1905.08094",
        claim="2.65 % more accuracy on average, from 0.61 % (ResNeXt) to 4.07 % (VGG-19) [abstract]",
    )
    needs_data: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = True

    weight: float = 1.0
    exits: int = 3
    soft: float = 0.3
    temperature: float = 3.0
    hint: float = 0.03

    def __post_init__(self) -> None:
        check_weight(self.weight)
        check_temperature(self.temperature)
        if self.exits < 1:
            raise ValueError(f"exits is a positive number, not {self.exits}")
        if not 0 <= self.soft <= 1 or self.hint < 0:
            raise ValueError(f"soft is from 0 to 1 and hint 0 or above, not {self.soft} and {self.hint}")

    def places(self, student: Sequence[str], teacher: Sequence[str]) -> tuple[list[str], list[str]]:
        before = len(student) - 1
        if before < 1:
            raise ValueError("a network needs at least two blocks for an exit before the last")
        count = min(self.exits, before)
        chosen = [(i + 1) * before // count - 1 for i in range(count)]
        return [*(student[i] for i in chosen), student[-1], "@logits"], []

    def judge(self, student: Sequence[Any], teacher: Sequence[Any], examples: int) -> nn.Module:
        *early, last, logits = student
        if logits.values.shape[1] != 1:
            raise ValueError(
                "exits are for classifiers: a language model has a class for every token at every position"
            )
        sizes = [int(feature.values.shape[2]) for feature in (*early, last)]
        return Judge(self, sizes, classes=int(logits.values.shape[2]))


class Judge(nn.Module):
    def __init__(self, settings: EarlyExits, sizes: Sequence[int], classes: int) -> None:
        super().__init__()
        self.settings = settings
        self.bottlenecks = nn.ModuleList(nn.Linear(size, sizes[-1]) for size in sizes[:-1])
        self.classifiers = nn.ModuleList(nn.Linear(sizes[-1], classes) for _ in sizes[:-1])

    def forward(self, student: Sequence[Feature], teacher: Sequence[Any], labels: Tensor | None) -> Tensor:
        if labels is None:
            raise ValueError("exits learn from labels: take data that has them")
        *early, last, logits = student
        t, deepest = self.settings.temperature, pooled(last).detach()
        q = (logits.values[:, 0].detach() / t).log_softmax(1)
        found = []
        for feature, bottleneck, classifier in zip(early, self.bottlenecks, self.classifiers, strict=True):
            seen = bottleneck(pooled(feature))
            said = classifier(seen)
            hard = functional.cross_entropy(said, labels)
            soft = t**2 * (q.exp() * (q - (said / t).log_softmax(1))).sum(1).mean()
            apart = (seen - deepest).square().mean()
            found.append((1 - self.settings.soft) * hard + self.settings.soft * soft + self.settings.hint * apart)
        return torch.stack(found).sum()

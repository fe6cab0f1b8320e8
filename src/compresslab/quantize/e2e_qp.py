"""E2E-QP: with all codes fixed, train the scales of the whole network, and its norms, towards what it said before.

Papers. Chen et al., "EfficientQAT: Efficient Quantization-Aware Training for Large Language Models", arXiv 2407.11062, the
second of its two phases (section 3.3): end-to-end training of quantisation parameters. The norms: Li et al., "Norm Tweaking",
arXiv 2309.02784, where each norm is trained alone.

Symbols. C [out, in] the codes of a layer, Z [R, G] its zero points, s [R, G] its scales; p [R, G] the learned relative change
of a scale, and likewise of each entry of a norm's weight; t, u [tokens, vocabulary] the logits of the uncompressed and of the
compressed network.

Method. A solver works on one layer, a refiner on one block; neither sees what becomes of their errors at the end of the
network. Here every number that is not a code is trained against that end: minimise over the calibration tokens

    mean of KL(softmax t || softmax u),    W = s (1 + p) (C - Z)

by gradients through the whole network. Scales are rounded to the dtype that they are stored in as they are used, with the
gradient straight through, so what was trained is what is written. There is one p for each `group_size` weights: too few to
learn the calibration text by heart, and enough to shift what every layer hands on.

Kept only if the loss on windows held back is smaller than before.

Cost. Per token one forward of the uncompressed network, two of the compressed one (each block is computed again on the way back,
so that only its input is kept) and one backward: about five forwards. Memory: the network and its codes in the compute dtype,
four times p (its gradient and two moments), the inputs of all blocks for one batch, and the logits of a few hundred tokens.

Differences from the paper. It trains on 4096 windows of 2048 tokens of the text itself, towards the next token; this one on the
calibration windows, towards the uncompressed network's whole distribution, which says more per token. Its first phase, which
trains codes block by block, is the solver's and refiner's part here. Relative changes take the place of absolute ones, so that
one learning rate fits all layers.

Oracle. tests/oracles/e2e_qp.py: the gradient of a layer's changes by hand, from the gradient of its weight, in float64.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compresslab.contract import Paper
from compresslab.numerics.grid import QuantWeight


@dataclass(frozen=True, kw_only=True)
class E2EQP:
    """The scales of a solved network, trained end to end. How long is said in the recipe's `training`.

    Args:
        norms: train the weights of norms too.
    """

    paper: ClassVar[Paper] = Paper(
        title="EfficientQAT: Efficient Quantization-Aware Training for Large Language Models",
        authors="Chen et al.",
        year=2024,
        arxiv="2407.11062",
        claim="Llama-2-70B in 2 bits on one A100-80GB in 41 hours, at less than 3 points of accuracy lost [abstract]",
    )
    needs_data: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False

    norms: bool = True

    def distance(self, logits: Tensor, wanted: Tensor) -> Tensor:
        """The sum over tokens of KL(softmax wanted || softmax logits); both [tokens, vocabulary], any float dtype."""
        ours, theirs = logits.float().log_softmax(dim=-1), wanted.float().log_softmax(dim=-1)
        return torch.nn.functional.kl_div(ours, theirs, reduction="sum", log_target=True)

    def scale(self, solved: QuantWeight, change: Tensor) -> Tensor:
        """s (1 + p), float32 [R, G], on the numbers that its dtype holds; differentiable in p [R, G]."""
        wanted = solved.scale.float() * (1 + change)
        held = wanted.detach().to(solved.scale.dtype).float()
        return wanted + (held - wanted.detach())

    def after(self, solved: QuantWeight, change: Tensor) -> QuantWeight:
        """The solved weight with the scales that were trained."""
        return dataclasses.replace(solved, scale=self.scale(solved, change.detach()).to(solved.scale.dtype))

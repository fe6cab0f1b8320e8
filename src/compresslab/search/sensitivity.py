"""Sensitivity: what rounding one layer does to the model, in a number that may be added up over layers.

To share bits out (allocation.py) the damage of every layer at every width must be known, and on one scale.

`output_noise`. Rounding W to Q adds the error (W - Q) x to the output y = W x. Over the calibration tokens, with
H = X^T X, the error's energy is tr((W - Q) H (W - Q)^T) and the output's is tr(W H W^T); the measure is their ratio,

    r = tr((W - Q) H (W - Q)^T) / tr(W H W^T)

which is the relative error of each output channel, averaged with the channels' energies as weights; 1 / r is the signal to
quantisation-noise ratio of the report. What makes it comparable across layers: r has no unit, the number of tokens cancels,
and it stays the same when the layer's input or output is rescaled and the next layer scales back, which leaves the network
as it was; the error's energy by itself would not. To first order the noises of different layers are independent, so that
relative energies add along a chain of layers. What it does not know: how much the rest of the network cares.

`kl_divergence`. That is measured by leaving one layer out: KL(p || q) per token, in nats, between the next-token distribution
p of the float model and q of the model in which this layer alone is rounded. KL is of second order in a small error, and the
cross terms of layers vanish on average where their errors are independent, so these add up too ("HIGGS", Malinovskii et al.,
arXiv 2411.17525, shows the same of relative weight errors, with one measured coefficient per layer).

Cost. output_noise: two products out * in^2 beside the solve. kl_divergence: one forward of the model per layer and width.

Oracle. tests/search/test_sensitivity.py: outputs on the tokens themselves, and distributions written out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compresslab.numerics.gram import Gram, GroupedGram
from compresslab.numerics.linalg import quadratic_error


def output_noise(weight: Tensor, rounded: Tensor, gram: Gram | GroupedGram | None) -> float:
    """The energy of the output's error relative to the output's.

    Args:
        weight: float32 [out, in].
        rounded: float32 [out, in], what the runtime will multiply by.
        gram: H of the layer's input; None (no data, or no token reached the layer) counts every input channel alike.
    """
    difference = weight - rounded
    if gram is None or not any(bool(part.diagonal.any()) for part in gram.parts):
        noise, signal = difference.square().sum(dtype=torch.float64), weight.square().sum(dtype=torch.float64)
    else:
        noise, signal = (_energy(matrix, gram) for matrix in (difference, weight))
    if float(signal) <= 0:  # a layer that returns nothing, which any grid holds exactly
        return 0.0
    return max(float(noise / signal), 0.0)


def _energy(matrix: Tensor, gram: Gram | GroupedGram) -> Tensor:
    """tr(D H D^T), group by group."""
    rows = matrix.chunk(len(gram.parts))
    return torch.stack([quadratic_error(d, part.matrix) for d, part in zip(rows, gram.parts, strict=True)]).sum()


def kl_divergence(reference: Tensor, logits: Tensor) -> float:
    """KL(softmax(reference) || softmax(logits)) in nats, the mean over tokens; logits [..., vocabulary]."""
    p, q = (x.float().log_softmax(dim=-1) for x in (reference, logits))
    return max(float((p.exp() * (p - q)).sum(dim=-1, dtype=torch.float64).mean()), 0.0)

"""Sensitivity: what rounding one layer does to the model, in a number that may be added up over layers.

To share bits out (allocation.py) the damage of every layer at every width must be known, and on one scale. Symbols: W and Q
[out, in] the weight and its rounded twin, E = W - Q, H = X^T X [in, in] over T calibration tokens, g [out] the gradient of the
loss of one token's window with respect to the layer's output y = W x.

`output_noise`. The energy of the error that rounding adds to y, relative to the energy of y:

    r = tr(E H E^T) / tr(W H W^T)

1 / r is the signal to quantisation-noise ratio of the report. It has no unit, the number of tokens cancels, and it stays the
same when the layer's input or output is rescaled and the next layer scales back. What it does not know is how much the rest of
the network cares; sharing out by it alone was worse than the same bits everywhere (docs/log.md).

`fisher_noise`. To second order the divergence of the next-token distributions is KL(p || q) = 1/2 dy^T F dy with the Fisher
information F = E[g g^T], where the loss is -log p of tokens drawn from the model's own distribution (Martens, "New insights
and perspectives on the natural gradient method", arXiv 1412.1193, section 5). With its diagonal, and errors that are
independent from token to token,

    KL per token = 1/2 sum over o of E[g_o^2] (E H E^T)[o, o] / T

so one backward pass through the uncompressed network tells the damage of every layer, at every width and for any rounding.

`trace_noise`. HAWQ-V2 (arXiv 1911.03852, eq. 6) takes the Hessian of the loss with respect to W and the error of W itself:
mean of the Hessian's diagonal times |E|^2. It knows the loss, and nothing of which inputs are loud.

`kl_divergence`. KL(p || q) per token in nats, measured: p of the float model and q of the model in which this layer alone is
rounded. Measured once per layer it gives a coefficient, and the damage at other widths follows from their noise: KL is
proportional to it where errors are small ("HIGGS", Malinovskii et al., arXiv 2411.17525, theorem 1, for relative weight errors).

Cost. Products of out * in^2 beside the solve; for fisher_noise one backward pass over some windows, for trace_noise a double
one per probe; for kl_divergence one forward per layer, or per layer and width where each is left out in turn.

Oracle. tests/search/test_sensitivity.py: outputs on the tokens themselves, and distributions written out;
tests/test_damage.py: gradients token by token, and a whole Hessian.
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
    noise, signal = _energy(weight - rounded, gram), _energy(weight, gram)
    if signal <= 0:  # a layer that returns nothing, which any grid holds exactly
        return 0.0
    return max(noise / signal, 0.0)


def fisher_noise(weight: Tensor, rounded: Tensor, gram: Gram | GroupedGram | None, importance: Tensor) -> float:
    """The divergence per token, in nats, that the output's error causes.

    Args:
        importance: E[g_o^2], float32 [out].
    """
    tokens = gram.tokens if gram is not None and _was_excited(gram) else 1
    return max(0.5 * _energy((weight - rounded) * importance.sqrt()[:, None], gram) / tokens, 0.0)


def trace_noise(weight: Tensor, rounded: Tensor, trace: float) -> float:
    """`trace`, that of the Hessian with respect to W, over the number of weights, times |W - Q|^2; 0 where it is negative."""
    squared = (weight - rounded).square().sum(dtype=torch.float64)
    return max(float(trace / weight.numel() * squared), 0.0)


def _was_excited(gram: Gram | GroupedGram) -> bool:
    return any(bool(part.diagonal.any()) for part in gram.parts)


def _energy(matrix: Tensor, gram: Gram | GroupedGram | None) -> float:
    """tr(D H D^T), group by group, with H = I where nothing is known of the input."""
    if gram is None or not _was_excited(gram):
        return float(matrix.square().sum(dtype=torch.float64))
    rows = matrix.chunk(len(gram.parts))
    return sum(float(quadratic_error(d, part.matrix)) for d, part in zip(rows, gram.parts, strict=True))


def kl_divergence(reference: Tensor, logits: Tensor) -> float:
    """KL(softmax(reference) || softmax(logits)) in nats, the mean over tokens; logits [..., vocabulary]."""
    p, q = (x.float().log_softmax(dim=-1) for x in (reference, logits))
    return max(float((p.exp() * (p - q)).sum(dim=-1, dtype=torch.float64).mean()), 0.0)

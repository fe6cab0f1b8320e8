"""QuaRot: rotate the hidden spaces of a network until no channel is louder than the others, then round.

Paper. Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", arXiv 2404.00456, sections 3 and 4, stages 1a
and 1b; the invariance under rotations is that of SliceGPT (Ashkboos et al., arXiv 2401.15024).

Symbols. x [n] one token's residual stream; Q [n, n] orthogonal, Q Q^T = I; H [n, n] a Hadamard matrix, entries +1 and -1,
H H^T = n I; s [n] random signs; g [n] the weight of a norm; W [out, in] a weight; d the size of an attention head.

Method. Some channels of x are a hundred times as loud as the rest, and a grid that must hold them has few points left for
the others. Nothing in a pre-norm transformer depends on the axes of x, though: every block reads x through a norm and adds
to it. So let the network work on x Q:

    what writes x     embedding E, and W of the last layer of attention and MLP     E Q,  Q^T W,  and biases b Q
    the norm          x / |x| commutes with Q once its weight g is moved out of it   g -> 1
    what reads x      W diag(g) of the projections behind the norm, and the head    W diag(g) Q

and the logits are what they were. With Q = diag(s) H / sqrt(n) every channel of x Q is a sum of all channels of x with equal
weights and random signs: an outlier is spread over n channels, and the kurtosis of x falls to nearly that of a normal
distribution. Weights profit alike, on both sides. The values of each head get a Hadamard rotation of their own, of size d:
attention only ever adds up whole value vectors, so W_v -> Q^T W_v and W_o -> W_o Q, head by head.

Where n is a power of two times a known kernel H is built (numerics/hadamard.py: 576 = 36 * 16, 4096, 5120 = 20 * 256);
elsewhere Q is a random orthogonal matrix, which is nearly as flat.

Cost. One product with Q for every weight that is read, O(out * in * n): less than a calibration batch. No memory but Q. An
output head that shared its tensor with the embedding cannot do so any longer, because the last norm's weight g went into the
head and not into the embedding: vocabulary * n more numbers are stored (SmolLM2-135M: 56.6 MB in bfloat16). Giving up that
weight would be another network. The head is then an ordinary layer that can be rounded: leave '@outside-blocks' out of
`ignore`.

Differences from the paper.
- What can be folded is folded, and nothing else: the paper's online Hadamards, of the input of down_proj (stage 1c) and of
  queries and keys after their rotary embedding (stage 1d), need a runtime that multiplies by H in each forward. The artifact
  is opened by plain transformers, which has no such thing. Rounding the input of down_proj to 4 bits therefore stays
  as hard as it was: SpinQuant (arXiv 2405.16406) has such a variant too ("no had").
- Networks with LayerNorm keep it. The paper turns it into an RMSNorm and moves the subtraction of the mean into the weights
  before it, which makes another architecture; here Q = H^T diag(s) H / n with s_1 = 1 is taken, which is as flat and maps the
  vector of ones to itself, so that the mean of x Q is that of x. The norm's bias b becomes (b / g) Q.
- What writes and reads is found by watching the network run (rotating.py), so the method knows no architecture; one that
  does with x what is not understood is refused.

Oracle. tests/oracles/quarot.py: a transformer written out in explicit float64 matrices, with Q as a dense matrix product on
the activations in place of a change of weights; Hadamard matrices are checked against their definition.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compresslab.contract import Paper
from compresslab.numerics.hadamard import hadamard, orthogonal


@dataclass(frozen=True, kw_only=True)
class QuaRot:
    """Random Hadamard rotations of the residual stream and of the values of each attention head.

    Args:
        heads: also rotate the values of each head, where a layer of their own makes them.
        seed: of the random signs.
    """

    paper: ClassVar[Paper] = Paper(
        title="QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs",
        authors="Ashkboos et al.",
        year=2024,
        arxiv="2404.00456",
        claim="Llama-2-7B / 13B, W4A4KV4 with online Hadamards: WikiText-2 perplexity 6.10 / 5.40 (FP16 5.47 / 4.88) [table 1]",
    )
    needs_data: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False

    heads: bool = True
    seed: int = 0

    def residual(self, size: int, *, keeps_mean: bool) -> Tensor:
        flat = self._flat(size)
        generator = torch.Generator().manual_seed(self.seed)
        signs = torch.randint(0, 2, (size,), generator=generator, dtype=torch.float64) * 2 - 1
        if not keeps_mean:
            return signs[:, None] * flat
        signs[0] = 1
        return flat.t() @ (signs[:, None] * flat)

    def head(self, size: int) -> Tensor | None:
        return self._flat(size) if self.heads else None

    def _flat(self, size: int) -> Tensor:
        """An orthogonal matrix without large entries, whose first row is constant."""
        found = hadamard(size)
        return orthogonal(size, self.seed) if found is None else found / math.sqrt(size)

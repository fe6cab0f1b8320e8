"""The Gram matrix of a layer's input, H = X^T X: the one statistic that layer-wise methods share.

For a linear layer y = W x, replacing W by Q costs, summed over the calibration tokens,

    |X W^T - X Q^T|^2 = tr((W - Q) H (W - Q)^T)

so H [in, in] is all that any second-order rounding or pruning needs of the data, however many tokens there were.

Precision. A product of bfloat16 matrices that is rounded to bfloat16 on output can lose positive definiteness, and a
float32 product is slow. So on a CPU with 8-bit dot products X is rounded to int8 with one scale per column and multiplied
in exact int32: H is then the Gram matrix of a slightly different X, hence positive semi-definite by construction, and
the rounding noise acts like a small damping. Four times the speed of float32.

Symbols: X [tokens, in] the layer's input; H [in, in].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

Precision = Literal["int8", "float32"]

# 127^2 * tokens must stay below 2^31, or the int32 accumulator of one product could overflow.
MAX_TOKENS_PER_PRODUCT = 2**31 // 127**2 - 1
# Width of the column stripes of the int8 product; only stripes on and below the diagonal are computed.
STRIPE = 512


class Gram:
    """H = X^T X, accumulated one batch of tokens at a time.

    Attributes:
        features: in, the width of X.
        tokens: how many rows of X have been added.
    """

    def __init__(self, features: int, *, precision: Precision = "float32", device: torch.device | str = "cpu") -> None:
        self.features = features
        self.tokens = 0
        self.precision: Precision = precision
        self._sum = torch.zeros(features, features, dtype=torch.float32, device=device)
        self._cache: dict[Any, Any] = {}
        self._lower_only = precision == "int8"

    def add_(self, x: Tensor) -> None:
        """Add the tokens x [..., in], of any float dtype.

        Raises:
            ValueError: if x holds a NaN or an infinity.
        """
        x = x.reshape(-1, self.features)
        for part in x.split(MAX_TOKENS_PER_PRODUCT):
            largest = part.abs().amax(dim=0).float()  # one pass; NaN and infinity both survive it
            if not torch.isfinite(largest).all():
                bad = int((~torch.isfinite(largest)).nonzero()[0])
                raise ValueError(f"NaN or infinity in input channel {bad} of the calibration activations")
            if self.precision == "int8":
                self._add_int8_(part, largest)
            else:
                part = part.float()
                self._sum.addmm_(part.t(), part)
        self.tokens += x.shape[0]
        self._cache.clear()

    def _add_int8_(self, x: Tensor, largest: Tensor) -> None:
        """Lower triangle, by stripes, of diag(s) (round(X / s)^T round(X / s)) diag(s), with s = max|X| / 127."""
        scale = (largest / 127).clamp_(min=1e-30)
        codes = (x * (1 / scale).to(x.dtype)).round_().clamp_(-127, 127).to(torch.int8)
        for start in range(0, self.features, STRIPE):
            stop = min(start + STRIPE, self.features)
            product = torch._int_mm(codes[:, start:stop].t(), codes[:, :stop]).float()
            product.mul_(scale[start:stop, None]).mul_(scale[:stop])
            self._sum[start:stop, :stop] += product

    @property
    def matrix(self) -> Tensor:
        """H, float32 [in, in], symmetric."""
        return self.cached("matrix", self._symmetric)

    def _symmetric(self) -> Tensor:
        if not self._lower_only:
            return self._sum
        return self._sum.tril() + self._sum.tril(-1).t()

    @property
    def diagonal(self) -> Tensor:
        """diag(H), float32 [in]: the squared norm of every input channel."""
        return self._sum.diagonal()

    def cached(self, key: Any, compute: Callable[[], Any]) -> Any:
        """`compute()`, once per key for all the layers that read this input; dropped when tokens are added."""
        if key not in self._cache:
            self._cache[key] = compute()
        return self._cache[key]


def best_precision(device: torch.device | str = "cpu") -> Precision:
    """int8 where the CPU has 8-bit dot products (VNNI), float32 elsewhere."""
    if torch.device(device).type == "cpu" and torch.cpu._is_vnni_supported():
        return "int8"
    return "float32"

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

import numpy as np
import torch
from torch import Tensor

from compresslab.numerics import kernels

Precision = Literal["int8", "float32"]

NARROWEST_INT8 = (
    16  # torch's int8 product misreads matrices of a single column; below this width it gains nothing anyway
)
TOP = 126  # the code of a column's largest value; one below what int8 holds, so that rounding up is safe
# 127^2 * tokens must stay below 2^31, or the int32 accumulator of one product could overflow.
MAX_TOKENS_PER_PRODUCT = 2**31 // 127**2 - 1
# Width of the column stripes of the int8 product; only stripes on and below the diagonal are computed.
STRIPE = 256


class Gram:
    """H = X^T X, accumulated one batch of tokens at a time.

    Attributes:
        features: in, the width of X.
        tokens: how many rows of X have been added.
        largest: max |X| of every channel, float32 [in].
        observers: what else watches X, by whoever asked for it (activations/); fed with the same tokens.
        drift: (X* - X)^T X, float32 [in, in], where X* is what the uncompressed network has in the place of X; or None.
    """

    def __init__(self, features: int, *, precision: Precision = "float32", device: torch.device | str = "cpu") -> None:
        self.features = features
        self.tokens = 0
        self.precision: Precision = precision
        self._sum = torch.zeros(features, features, dtype=torch.float32, device=device)
        self.largest = torch.zeros(features, dtype=torch.float32, device=device)
        self.drift: Tensor | None = None
        self.observers: dict[Any, Any] = {}
        self._cache: dict[Any, Any] = {}

    def add_(self, x: Tensor) -> None:
        """Add the tokens x [..., in], of any float dtype.

        Raises:
            ValueError: if x holds a NaN or an infinity.
        """
        x = x.reshape(-1, self.features)
        for part in x.split(MAX_TOKENS_PER_PRODUCT):
            if part.shape[0] == 0:  # a batch that is all padding, an expert that got no token
                continue
            if self.precision == "int8" and self.features >= NARROWEST_INT8:
                self._add_int8_(part)
            else:
                self._add_float_(part)
        for observer in self.observers.values():
            observer.add_(x)
        self.tokens += x.shape[0]
        self._cache.clear()

    def add_drift_(self, reference: Tensor, x: Tensor) -> None:
        """Compare x [..., in], whose tokens were added already, with what the uncompressed network has in its place."""
        if self.drift is None:
            self.drift = torch.zeros_like(self._sum)
        x, reference = x.reshape(-1, self.features), reference.reshape(-1, self.features)
        for here, there in zip(x.split(MAX_TOKENS_PER_PRODUCT), reference.split(MAX_TOKENS_PER_PRODUCT), strict=True):
            difference = there - here
            if self.precision == "int8" and self.features >= NARROWEST_INT8:
                left, left_scale = _to_int8(difference)
                right, right_scale = _to_int8(here)
                product = torch._int_mm(left.t(), right)
                kernels.add_scaled(product.numpy(), left_scale.numpy(), right_scale.numpy(), self.drift.numpy())
            else:
                self.drift.addmm_(difference.float().t(), here.float())
        self._cache.clear()

    def _add_float_(self, x: Tensor) -> None:
        x = x.float()
        largest = x.abs().amax(dim=0)
        _check_finite(largest)
        self.largest = torch.maximum(self.largest, largest)
        self._sum.addmm_(x.t(), x)

    def _add_int8_(self, x: Tensor) -> None:
        """Lower triangle, by stripes, of diag(s) (round(X / s)^T round(X / s)) diag(s), with s = max|X| / 126."""
        codes, scale = _to_int8(x)
        largest = scale * TOP
        _check_finite(largest)
        self.largest = torch.maximum(self.largest, largest)
        for start in range(0, self.features, STRIPE):
            stop = min(start + STRIPE, self.features)
            product = torch._int_mm(codes[:, start:stop].t(), codes[:, :stop])
            kernels.add_scaled(
                product.numpy(), scale[start:stop].numpy(), scale[:stop].numpy(), self._sum[start:stop, :stop].numpy()
            )

    @property
    def matrix(self) -> Tensor:
        """H, float32 [in, in], symmetric."""
        return self.cached("matrix", self._mirror)

    def _mirror(self) -> Tensor:
        """Fill the upper triangle, which the int8 product leaves out, from the lower one, in place."""
        if self.precision == "int8" and self.features >= NARROWEST_INT8:
            self._sum.tril_()
            self._sum += self._sum.tril(-1).t()
        return self._sum

    @property
    def diagonal(self) -> Tensor:
        """diag(H), float32 [in]: the squared norm of every input channel."""
        return self._sum.diagonal()

    def cached(self, key: Any, compute: Callable[[], Any]) -> Any:
        """`compute()`, once per key for all the layers that read this input; dropped when tokens are added."""
        if key not in self._cache:
            self._cache[key] = compute()
        return self._cache[key]


def _to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 [tokens, in] and scales float32 [in] of x: one scale per column, its largest magnitude / TOP."""
    x = x.to(torch.bfloat16).contiguous()
    largest = torch.empty(x.shape[1])
    codes = torch.empty(x.shape, dtype=torch.int8)
    bits = x.view(torch.int16).numpy()
    kernels.quantize_columns_bf16(bits, largest.numpy(), codes.numpy(), np.float32(TOP), torch.get_num_threads())
    return codes, largest / TOP


def _check_finite(largest: Tensor) -> None:
    if not torch.isfinite(largest).all():
        bad = int((~torch.isfinite(largest)).nonzero()[0])
        raise ValueError(f"NaN or infinity in input channel {bad} of the calibration activations")


def best_precision(device: torch.device | str = "cpu") -> Precision:
    """int8 where the CPU has 8-bit dot products (VNNI), float32 elsewhere."""
    if torch.device(device).type == "cpu" and torch.cpu._is_vnni_supported():
        return "int8"
    return "float32"

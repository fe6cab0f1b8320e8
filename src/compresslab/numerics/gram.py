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

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
# Width of the stripes in which a product is computed; only what lies on and below the diagonal is.
STRIPE = 256


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Tokens as they are multiplied: float32, or int8 with the scale of every column; [tokens, in], and [in] each."""

    values: Tensor
    scale: Tensor | None
    largest: Tensor
    total: Tensor


class Gram:
    """H = X^T X, accumulated one batch of tokens at a time.

    Attributes:
        features: in, the width of X.
        tokens: how many rows of X have been added.
        largest: max |X| of every channel, float32 [in].
        total: the sum of every channel over the tokens, float32 [in].
        observers: what else watches X, by whoever asked for it (activations/); fed with the same tokens.
        drift: (X* - X)^T X, float32 [in, in], where X* is what the uncompressed network has in the place of X; or None.
    """

    def __init__(self, features: int, *, precision: Precision = "float32", device: torch.device | str = "cpu") -> None:
        self.features = features
        self.tokens = 0
        self.precision: Precision = precision
        self._sum = torch.zeros(features, features, dtype=torch.float32, device=device)
        self.largest = torch.zeros(features, dtype=torch.float32, device=device)
        self.total = torch.zeros(features, dtype=torch.float32, device=device)
        self.drift: Tensor | None = None
        self.observers: dict[Any, Any] = {}
        self._cache: dict[Any, Any] = {}

    def add_(self, x: Tensor, watched: Tensor | None = None) -> None:
        """Add the tokens x [..., in], of any float dtype.

        Args:
            watched: what the observers shall see in place of x, of which these tokens were made.

        Raises:
            ValueError: if x holds a NaN or an infinity.
        """
        for rows in self.rows_of(x):
            self.count_(rows)
            for stripe in self.stripes:
                self.add_stripe_(rows, *stripe)
        self.observe_(x if watched is None else watched)

    # The parts of add_, for what adds in another order of stripes (ranks.py): to each stripe, rows in the same order.

    def rows_of(self, x: Tensor) -> Iterator[Rows]:
        """The tokens x [..., in] as they are multiplied, at most MAX_TOKENS_PER_PRODUCT at a time.

        Raises:
            ValueError: if x holds a NaN or an infinity.
        """
        for part in x.reshape(-1, self.features).split(MAX_TOKENS_PER_PRODUCT):
            if part.shape[0] == 0:  # a batch that is all padding, an expert that got no token
                continue
            if self._in_int8:
                values, scale = _to_int8(part)
                largest = scale * TOP
            else:
                values, scale = part.float(), None
                largest = values.abs().amax(dim=0)
            _check_finite(largest)
            yield Rows(values=values, scale=scale, largest=largest, total=part.sum(dim=0, dtype=torch.float32))

    def count_(self, rows: Rows) -> None:
        """Add all of these rows but their products."""
        self.tokens += rows.values.shape[0]
        self.total += rows.total
        self.largest = torch.maximum(self.largest, rows.largest)
        self._cache.clear()

    def observe_(self, x: Tensor) -> None:
        for observer in self.observers.values():
            observer.add_(x)

    @property
    def stripes(self) -> list[tuple[int, int]]:
        """The rows of H in stripes; of each, only what lies on and below the diagonal is computed."""
        return [(start, min(start + STRIPE, self.features)) for start in range(0, self.features, STRIPE)]

    def stripe(self, start: int, stop: int) -> Tensor:
        """H[start:stop, :stop] as far as it is added up; a view."""
        return self._sum[start:stop, :stop]

    def add_stripe_(self, rows: Rows, start: int, stop: int) -> None:
        """H[start:stop, :stop] += X^T X of these rows; in int8 diag(s) (round(X / s)^T round(X / s)) diag(s), s = max|X|/126."""
        left, right, target = rows.values[:, start:stop], rows.values[:, :stop], self.stripe(start, stop)
        if rows.scale is None:
            target.addmm_(left.t(), right)
        else:
            product = torch._int_mm(left.t(), right)
            kernels.add_scaled(
                product.numpy(), rows.scale[start:stop].numpy(), rows.scale[:stop].numpy(), target.numpy()
            )

    @property
    def _in_int8(self) -> bool:
        return self.precision == "int8" and self.features >= NARROWEST_INT8

    def add_drift_(self, reference: Tensor, x: Tensor) -> None:
        """Compare x [..., in], whose tokens were added already, with what the uncompressed network has in its place."""
        if self.drift is None:
            self.drift = torch.zeros_like(self._sum)
        x, reference = x.reshape(-1, self.features), reference.reshape(-1, self.features)
        for here, there in zip(x.split(MAX_TOKENS_PER_PRODUCT), reference.split(MAX_TOKENS_PER_PRODUCT), strict=True):
            difference = there - here
            if self._in_int8:
                left, left_scale = _to_int8(difference)
                right, right_scale = _to_int8(here)
                product = torch._int_mm(left.t(), right)
                kernels.add_scaled(product.numpy(), left_scale.numpy(), right_scale.numpy(), self.drift.numpy())
            else:
                self.drift.addmm_(difference.float().t(), here.float())
        self._cache.clear()

    @property
    def matrix(self) -> Tensor:
        """H, float32 [in, in], symmetric."""
        return self.cached("matrix", self._mirror)

    def _mirror(self) -> Tensor:
        """Fill the upper triangle, which the stripes leave out, from the lower one, in place."""
        with torch.inference_mode():  # in which it may have been added up
            self._sum.tril_()
            self._sum += self._sum.tril(-1).t()
        return self._sum

    @property
    def diagonal(self) -> Tensor:
        """diag(H), float32 [in]: the squared norm of every input channel."""
        return self._sum.diagonal()

    @property
    def mean(self) -> Tensor:
        """The mean of every input channel, float32 [in]."""
        return self.total / max(self.tokens, 1)

    @property
    def parts(self) -> tuple[Gram, ...]:
        """Itself: all of its channels meet in every output (see GroupedGram)."""
        return (self,)

    def cached(self, key: Any, compute: Callable[[], Any]) -> Any:
        """`compute()`, once per key for all the layers that read this input; dropped when tokens are added."""
        if key not in self._cache:
            self._cache[key] = compute()
        return self._cache[key]


class GroupedGram:
    """The Gram matrices of an input whose channels fall into groups that never meet: a grouped convolution's.

    Output channels of group g see the channels of group g only, so each group is a layer of its own with H_g = X_g^T X_g.

    Attributes:
        features: in, the width of one group.
        parts: one Gram for each group, in order.
        observers: as of a Gram.
    """

    def __init__(self, features: int, groups: int, *, device: torch.device | str = "cpu") -> None:
        self.features = features
        self._sum = torch.zeros(groups, features, features, dtype=torch.float32, device=device)
        self._largest = torch.zeros(groups, features, dtype=torch.float32, device=device)
        self._total = torch.zeros(groups, features, dtype=torch.float32, device=device)
        self.observers: dict[Any, Any] = {}
        self.parts = tuple(Gram(features, device=device) for _ in range(groups))
        for part, own, largest, total in zip(self.parts, self._sum, self._largest, self._total, strict=True):
            part._sum, part.largest, part.total = own, largest, total  # views: all groups are added to in one product

    @property
    def tokens(self) -> int:
        return self.parts[0].tokens

    def add_(self, x: Tensor, watched: Tensor | None = None) -> None:
        """`Gram.add_` of the tokens x [..., groups * in]. ValueError if it holds a NaN or an infinity."""
        grouped = x.reshape(-1, len(self.parts), self.features).float()
        if len(grouped) == 0:
            return
        largest = grouped.abs().amax(dim=0)
        _check_finite(largest.flatten())
        torch.maximum(self._largest, largest, out=self._largest)
        self._total += grouped.sum(dim=0)
        by_group = grouped.transpose(0, 1)
        self._sum.baddbmm_(by_group.transpose(1, 2), by_group)
        for observer in self.observers.values():
            observer.add_(x if watched is None else watched)
        for part in self.parts:
            part.tokens += len(grouped)
            part._cache.clear()

    def add_drift_(self, reference: Tensor, x: Tensor) -> None:
        """`Gram.add_drift_` of every group; both [..., groups * in]."""
        for part, there, here in zip(
            self.parts, *(t.split(self.features, dim=-1) for t in (reference, x)), strict=True
        ):
            part.add_drift_(there, here)


Statistic = Gram | GroupedGram


def _to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 [tokens, in] and scales float32 [in] of x: one scale per column, its largest magnitude / TOP."""
    x = x.to(torch.bfloat16).contiguous()
    largest = torch.empty(x.shape[1])
    codes = torch.empty(x.shape, dtype=torch.int8)
    # Not by numpy(), after which torch no longer gives the memory of a walk's tensor back (spilling.py).
    words = (ctypes.c_int16 * x.numel()).from_address(x.data_ptr())
    bits = np.ctypeslib.as_array(words).reshape(x.shape)
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

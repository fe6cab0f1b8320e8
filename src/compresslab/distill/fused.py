"""A language model's head and its losses in one, some rows at a time: logits of a whole batch are never in memory.

Symbols. h [n, d] what the head reads, one row a token that counts; W [V, d] and b [V] the head; z = h W^T + b [n, V] the
logits; t [n, V'] the teacher's; L a loss that is a sum over rows (contract.LogitLoss).

Method. Logits are by far the largest tensor of a training step: 1,024 tokens at V = 151,936 are 0.62 GB in float32, and the
plain way holds six of them: z, t, both softmaxes, and the gradients of two. But the head is the last layer. Once dL/dz of
some rows is known, and every loss here knows it in closed form, their part of the gradients is at hand, and the logits can be
dropped:

    dL/dh = dL/dz W        dL/dW = sum over chunks of (dL/dz)^T h        dL/db = sum of dL/dz

So the forward computes both, chunk by chunk, and the backward only multiplies by what comes from above. Rows that no loss
counts (padding, prompts) are dropped before the head, and not after the loss. The teacher's logits come chunk by chunk too,
from what its head reads; or there is no teacher, but its k most likely tokens from a cache.

Vocabularies of different size (two of one family, padded to other multiples). The smaller is filled up with minus infinity,
never with 0, which would be a likely token. Where the teacher has more tokens than the student that would make each loss
infinite, for no student can say what it lacks; so there the teacher is cut to what both have, and its softmax is over that.

What some networks do to each logit behind the head, y = c tanh(s z / c) with a scale s and a cap c (Gemma 2, arXiv 2408.00118,
section 2; Granite and Cohere scale alone), is done to the rows of a chunk, and dL/dz = dL/dy s (1 - (y / c)^2).

Cost. Per row 2 V d multiplications forward and 4 V d for the gradients, as the plain way, and 2 V d' for a live teacher.
Memory: the gradient of W, which the plain way has too, and some buffers of CHUNK_BYTES.

Source of the idea. Liger Kernel, arXiv 2410.10989, does the same for the cross-entropy and some divergences on GPUs.

Oracle. tests/oracles/distillation.py and torch's autograd through dense logits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compresslab.contract import LogitLoss, TopK

CHUNK_BYTES = 64_000_000  # of logits for one product: smaller ones read and write the gradient of W more often
BLOCK_BYTES = 4_000_000  # of logits for the passes of a softmax and its gradient on a CPU: they stay in its caches


@dataclass(frozen=True, kw_only=True)
class After:
    """What is done to each logit behind a head.

    Attributes:
        scale: by which it is multiplied.
        cap: below which it then stays, c tanh(z / c); None for no cap.
    """

    scale: float = 1.0
    cap: float | None = None

    def of_(self, logits: Tensor) -> Tensor:
        """Logits as they leave the network, in place."""
        if self.scale != 1:
            logits.mul_(self.scale)
        return logits if self.cap is None else logits.div_(self.cap).tanh_().mul_(self.cap)

    def through_(self, slope: Tensor, logits: Tensor) -> Tensor:
        """The gradient in what the head makes, in place, from the one in `logits` as they left the network."""
        if self.cap is not None:
            slope.mul_(1 - (logits / self.cap).square_())
        return slope if self.scale == 1 else slope.mul_(self.scale)


PLAIN = After()


@dataclass(frozen=True, kw_only=True, eq=False)
class TeacherHead:
    """A teacher's logits before they are computed.

    Attributes:
        hidden: what its head reads, [rows, width].
        weight: [classes, width].
        bias: [classes] or None.
        after: what is done behind it.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    after: After = PLAIN

    def logits(self) -> Tensor:
        """[rows, classes]."""
        return self.after.of_(nn.functional.linear(self.hidden, self.weight, self.bias))


Teacher = Tensor | TopK | TeacherHead | None


def head_loss(
    hidden: Tensor, head: nn.Linear, teacher: Teacher, labels: Tensor | None, losses: Sequence[LogitLoss],
    *, after: After = PLAIN, chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:  # fmt: skip
    """The weighted sum of losses on the logits of a head, as the mean over rows; differentiable in hidden and the head.

    Args:
        hidden: [rows, width], only rows that count.
        teacher: of the same rows.
        labels: int64 [rows].
        after: what is done to the student's logits behind the head.

    Raises:
        ValueError: a loss that judges all rows of a batch together, or that cannot be had from such a teacher.
    """
    together = [type(loss).__name__ for loss in losses if not loss.in_rows]
    if together:
        raise ValueError(
            f"{together[0]} judges all rows of a batch together, and a head is computed some rows at a time"
        )
    if not len(hidden):
        return (hidden.sum() + head.weight.sum()) * 0
    rows = max(1, chunk_bytes // (4 * head.weight.shape[0]))
    found: Tensor = _HeadLoss.apply(
        hidden, head.weight, head.bias, teacher, labels, losses, after, rows, torch.is_grad_enabled()
    )
    return found / len(hidden)


def logit_loss(logits: Tensor, teacher: Teacher, labels: Tensor | None, losses: Sequence[LogitLoss]) -> Tensor:
    """The weighted sum of losses on logits that are there, [rows, classes], as the mean over rows; differentiable."""
    found: Tensor = _LogitLoss.apply(logits, teacher, labels, losses)
    return found / len(logits)


class _LogitLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, teacher: Teacher, labels: Tensor | None, losses: Sequence[LogitLoss]
    ) -> Tensor:
        value, gradient = _rows(_wide(logits), teacher, labels, losses)
        ctx.gradient = gradient.to(logits.dtype)
        return value

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> Any:
        return ctx.gradient * above[0], None, None, None


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher: Teacher, labels: Tensor | None,
        losses: Sequence[LogitLoss], after: After, rows: int, learns: bool,
    ) -> Tensor:  # fmt: skip
        of_hidden, of_weight, of_bias = (
            torch.zeros_like(x) if x is not None and learns and needed else None
            for x, needed in zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)
        )
        total = _wide(hidden.new_zeros(()))
        buffers = _Buffers()
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logits = buffers.logits("student", hidden[part], weight, bias)
            of_teacher = part_of(teacher, part)
            if isinstance(of_teacher, TeacherHead):
                head = of_teacher
                of_teacher = head.after.of_(buffers.logits("teacher", head.hidden, head.weight, head.bias))
            total += _to_gradient_(logits, of_teacher, None if labels is None else labels[part], losses, after)
            if of_hidden is not None:
                torch.mm(logits, weight, out=of_hidden[part])
            if of_weight is not None:
                of_weight.addmm_(logits.t(), hidden[part])
            if of_bias is not None:
                of_bias += logits.sum(0)
        ctx.gradients = (of_hidden, of_weight, of_bias)
        return total

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> Any:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of a fused head were used up: they are multiplied in place, once")
        gradients = [None if g is None else g.mul_(above[0]) for g in ctx.gradients]
        ctx.gradients = None
        return (*gradients, None, None, None, None, None, None)


class _Buffers:
    """Memory for the logits of one chunk, taken once: fresh pages cost a CPU as much as what is written into them."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    def logits(self, whose: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if whose not in self.found:
            self.found[whose] = hidden.new_empty(len(hidden), len(weight))
        out = self.found[whose][: len(hidden)]
        torch.mm(hidden, weight.t(), out=out)
        return out if bias is None else out.add_(bias)


def _to_gradient_(
    logits: Tensor, teacher: Tensor | TopK | None, labels: Tensor | None, losses: Sequence[LogitLoss], after: After
) -> Tensor:
    """The summed losses of some rows, whose logits as the head makes them are replaced by the gradient."""
    rows = len(logits) if logits.is_cuda else max(1, BLOCK_BYTES // (4 * logits.shape[1]))
    total = _wide(logits.new_zeros(()))
    for start in range(0, len(logits), rows):
        part = slice(start, start + rows)
        wide = after.of_(_wide(logits[part]))
        value, slope = _rows(wide, part_of(teacher, part), None if labels is None else labels[part], losses)
        total += value
        logits[part] = after.through_(slope, wide)
    return total


def _rows(
    logits: Tensor, teacher: Teacher, labels: Tensor | None, losses: Sequence[LogitLoss]
) -> tuple[Tensor, Tensor]:
    """The weighted losses of some rows in one sum, and its gradient in the logits."""
    wanted = teacher if any(loss.needs_teacher for loss in losses) else None
    fitted, classes = _fitted(wanted, logits), logits.shape[1]
    if isinstance(fitted, TopK) and int(fitted.ids.max()) >= classes:
        logits = nn.functional.pad(logits, (0, int(fitted.ids.max()) + 1 - classes), value=-torch.inf)
    value, slope = logits.new_zeros(()), None
    for loss in losses:
        of_rows, gradient = loss.rows(logits, fitted, labels)
        value = value + loss.weight * of_rows.sum()
        gradient = gradient if loss.weight == 1 else gradient.mul_(loss.weight)
        slope = gradient if slope is None else slope.add_(gradient)
    assert slope is not None
    return value, slope[:, :classes]


def _fitted(teacher: Teacher, logits: Tensor) -> Tensor | TopK | None:
    """The teacher's logits with as many classes as the student has; see the head of this file."""
    classes = logits.shape[1]
    if isinstance(teacher, TeacherHead):
        teacher = teacher.logits()
    if isinstance(teacher, Tensor):
        teacher = teacher[:, :classes].to(logits.dtype)
        missing = classes - teacher.shape[1]
        return nn.functional.pad(teacher, (0, missing), value=-torch.inf) if missing else teacher
    if isinstance(teacher, TopK) and int(teacher.ids.max()) >= classes:
        lacking = teacher.ids >= classes
        lost = teacher.log_probs.exp().masked_fill(~lacking, 0).sum(1, keepdim=True)
        rest = teacher.log_probs - torch.log1p(-lost.clamp(max=1 - 1e-6))
        return dataclasses.replace(teacher, log_probs=rest.masked_fill(lacking, -torch.inf))
    return teacher


def part_of(teacher: Teacher, part: slice) -> Teacher:
    """Some of its rows."""
    if isinstance(teacher, TeacherHead):
        return dataclasses.replace(teacher, hidden=teacher.hidden[part])
    if isinstance(teacher, TopK):
        return dataclasses.replace(teacher, ids=teacher.ids[part], log_probs=teacher.log_probs[part])
    return None if teacher is None else teacher[part]


def _wide(x: Tensor) -> Tensor:
    """In float32, or as it is in float64."""
    return x if x.dtype == torch.float64 else x.float()

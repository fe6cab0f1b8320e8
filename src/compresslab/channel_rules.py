"""What operations of torch do to channels: the rules of coupling.py, one for each kind of operation.

A rule runs in the place of an operation that has at least one tensor which depends on a weight. It joins numbers, or asks an axis
to keep its length, and returns shells with the numbers of the result. To teach the tracer an operation, add it to a row of RULES
whose rule holds for it, or write one. What is not in RULES is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from compresslab.errors import CompressLabError

if TYPE_CHECKING:
    from compresslab.coupling import Trace

aten = torch.ops.aten


def varies(numbers: Tensor, axis: int) -> bool:
    """Whether the elements along an axis belong to different channels."""
    if numbers.shape[axis] == 1 or numbers.stride(axis) == 0 or not numbers.numel():
        return False
    return not bool((numbers == numbers.narrow(axis, 0, 1)).all())


def varying(numbers: Tensor) -> list[int]:
    return [axis for axis in range(numbers.dim()) if varies(numbers, axis)]


def first(numbers: Tensor, axes: Sequence[int]) -> Tensor:
    """The numbers at the beginning of these axes, which keep length 1."""
    for axis in axes:
        numbers = numbers.narrow(axis, 0, 1)
    return numbers


def along(ids: Tensor, axis: int, shape: Sequence[int]) -> Tensor:
    """Numbers of this shape, those of one axis being `ids`; it takes no memory."""
    return ids.view([-1 if i == axis else 1 for i in range(len(shape))]).expand(shape)


Rule = Callable[["Trace", Any, Any, Any], Any]


def _own(trace: Trace, func: Any, value: Tensor) -> Tensor:
    """The numbers of what an operation works on, where it is not enough that some other argument has any."""
    numbers = trace.numbers_of(value)
    if numbers is None:
        raise trace.not_understood(f"{func.overloadpacket} is steered by what depends on weights")
    return numbers


def _elementwise(trace: Trace, func: Any, args: Any, kwargs: Any) -> Any:
    """One element of each tensor makes one of the result."""
    if trace.weight_of(args[0]) is not None and len([a for a in args if isinstance(a, Tensor)]) == 1:
        weight = trace.weight_of(args[0])
        if weight is not None and len(weight.order) > 1 and func.overloadpacket in _COPIES:
            return trace.views(func, args[0], args, weight, range(len(weight.order)))
    tensors = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)]
    shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
    own = [numbers for tensor in tensors if (numbers := trace.numbers_of(tensor)) is not None]
    own.sort(key=lambda numbers: -numbers.numel())
    axes = [axis - len(shape) for axis in varying(own[0].expand(shape))]
    known = [own[0].expand(shape)]
    for other in own[1:]:
        if axes and all(-axis > other.dim() or other.shape[axis] == 1 for axis in axes):
            trace.stay(other)  # it serves all of these channels, such as one norm for all heads
        else:
            known.append(other.expand(shape))
            trace.join(known[0], known[-1])
    for tensor in tensors:
        if trace.numbers_of(tensor) is None:
            lead = len(shape) - tensor.dim()
            for axis in range(tensor.dim()):
                if tensor.shape[axis] > 1:
                    trace.keep_length(known[0], lead + axis)
    plainest = min(known, key=lambda numbers: len(varying(numbers))) if len(known) > 1 else known[0]
    if func._schema.is_mutable:
        if trace.numbers_of(args[0]) is None:
            raise trace.not_understood(f"{func.overloadpacket} writes into something that is not made of weights")
        return args[0]
    return trace.result(func, args, kwargs, plainest)


def _move(trace: Trace, func: Any, args: Any, kwargs: Any) -> Any:
    """Values change their places only."""
    packet, value = func.overloadpacket, args[0]
    weight = trace.weight_of(value)
    if weight is not None and len(weight.order) > 1:
        order = list(range(len(weight.order)))
        if packet is aten.t:
            return trace.views(func, value, args, weight, order[::-1])
        if packet is aten.transpose:
            order[args[1]], order[args[2]] = order[args[2]], order[args[1]]
            return trace.views(func, value, args, weight, order)
        if packet is aten.permute:
            return trace.views(func, value, args, weight, [axis % len(order) for axis in args[1]])
    numbers = _own(trace, func, value)
    if packet in (aten.view, aten._unsafe_view, aten.reshape):
        moved = numbers.reshape(args[1])
        before, after = varying(numbers), varying(moved)
        if len(after) > max(len(before), 1):  # an axis was split: it will be cut by the first of its parts
            trace.keep_length(moved, after[-1])
            moved = first(moved, [after[-1]]).expand(moved.shape)
        twin = torch.empty(moved.shape, dtype=value.dtype, device="meta")  # a shell can be viewed in any way
        return trace.track(twin, moved)
    else:
        moved = func(numbers, *args[1:], **kwargs)
    return trace.result(func, args, kwargs, list(moved) if isinstance(moved, list | tuple) else moved)


def _concatenate(trace: Trace, func: Any, args: Any, kwargs: Any) -> Any:
    pieces = [piece for piece in args[0] if piece.numel()]
    shape = pieces[0].shape
    axis = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % len(shape)
    found = [trace.numbers_of(piece) for piece in pieces]
    known = [numbers for numbers in found if numbers is not None]
    heads = [first(numbers, [axis]) for numbers in known]
    across = any(varying(head) for head in heads)
    if across:  # the other axes are as long in all pieces
        for head in heads[1:]:
            trace.join(heads[0], head)
        if len(known) < len(found):
            trace.stay(heads[0])
    if across and not any(varies(numbers, axis) for numbers in known):
        return trace.result(func, args, kwargs, heads[0])
    zeros = [
        torch.zeros(1, dtype=torch.int64).expand(p.shape) if n is None else n
        for p, n in zip(pieces, found, strict=True)
    ]
    return trace.result(func, args, kwargs, torch.cat(zeros, dim=axis))


def _stack(trace: Trace, func: Any, args: Any, kwargs: Any) -> Any:
    axis = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % (args[0][0].dim() + 1)
    found = [trace.numbers_of(piece) for piece in args[0]]
    known = [numbers for numbers in found if numbers is not None]
    if len(known) < len(found):
        trace.stay(known[0])
    for other in known[1:]:
        if varying(known[0]) or varying(other):
            trace.join(known[0], other)
    return trace.result(func, args, kwargs, known[0].unsqueeze(axis))


def _pad(trace: Trace, func: Any, args: Any, kwargs: Any) -> Any:
    numbers, sizes = _own(trace, func, args[0]), list(args[1])
    for axis, (before, after) in zip(
        range(numbers.dim() - 1, -1, -1), zip(sizes[::2], sizes[1::2], strict=True), strict=False
    ):
        if not before and not after:
            continue
        if min(before, after) < 0:
            numbers = numbers.narrow(axis, max(-before, 0), numbers.shape[axis] + min(before, 0) + min(after, 0))
        elif varies(numbers, axis):  # channels of zeros, as many as the code says
            made = list(numbers.shape)
            wings = [torch.zeros([*made[:axis], n, *made[axis + 1 :]], dtype=torch.int64) for n in (before, after)]
            numbers = torch.cat([wings[0], numbers, wings[1]], dim=axis)
        else:
            made = list(numbers.shape)
            made[axis] += before + after
            numbers = numbers.narrow(axis, 0, 1).expand(made)
    return trace.result(func, args, kwargs, numbers)


def _multiplied(trace: Trace, func: Any, args: Any, kwargs: Any, x: Tensor, matrix: Tensor, bias: Any) -> Any:
    """x [m, k] times a matrix [k, n]."""
    weight = trace.weight_of(matrix)
    if weight is None:
        if trace.numbers_of(matrix) is None:  # of numbers that will not be cut
            own = _own(trace, func, x)
            trace.keep_length(own, 1)
            rows = first(own, [1])
            return trace.result(func, args, kwargs, rows if varying(rows) else None)
        return _contracted(trace, func, args, kwargs, x.unsqueeze(0), matrix.unsqueeze(0))
    made, read = trace.axis(weight.name, weight.order[1], "makes"), trace.axis(weight.name, weight.order[0], "reads")
    numbers = trace.numbers_of(x)
    if numbers is None:
        trace.stay(read)
    else:
        trace.join(numbers, read)
    trace.counts(weight, x.shape[0])
    return _made(trace, func, args, kwargs, made, bias, 1)


def _made(trace: Trace, func: Any, args: Any, kwargs: Any, made: Tensor, bias: Any, axis: int) -> Any:
    """The result of a layer, whose output channels lie along an axis."""
    if (own := trace.numbers_of(bias)) is not None:
        trace.join(made, own.reshape(-1))
    if len(made) == 1:  # a layer of one output has none to spare
        trace.stay(made)
        return trace.result(func, args, kwargs, None)
    shape = list(trace.shapes_of(func, args, kwargs).shape)
    return trace.result(func, args, kwargs, along(made, axis, shape))


def _mm(trace: Trace, func: Any, args: Any, kwargs: Any) -> Any:
    return _multiplied(trace, func, args, kwargs, args[0], args[1], None)


def _addmm(trace: Trace, func: Any, args: Any, kwargs: Any) -> Any:
    return _multiplied(trace, func, args, kwargs, args[1], args[2], args[0])


def _bmm(trace: Trace, func: Any, args: Any, kwargs: Any) -> Any:
    return _contracted(trace, func, args, kwargs, args[0], args[1])


def _baddbmm(trace: Trace, func: Any, args: Any, kwargs: Any) -> Any:
    return _contracted(trace, func, args, kwargs, args[1], args[2])


def _contracted(trace: Trace, func: Any, args: Any, kwargs: Any, a: Tensor, b: Tensor) -> Any:
    """a [heads, m, k] b [heads, k, n], both made by the network: a head leaves as a whole."""
    found = [numbers for value in (a, b) if (numbers := _of(trace, value)) is not None]
    for numbers in found:
        trace.join(numbers, first(found[0], [1, 2]))
    owner = first(found[0], [1, 2])
    if len(found) == 2:
        trace.attends(owner)
    for number in owner.reshape(-1).tolist():
        trace.attended(number, a.shape[1] * a.shape[2] * b.shape[2])
    return trace.result(func, args, kwargs, owner if func.overloadpacket is not aten.mm else owner[0])


def _of(trace: Trace, value: Tensor) -> Tensor | None:
    numbers = trace.numbers_of(value)
    if numbers is None and value.dim() == 3 and value.shape[0] == 1:  # one that _multiplied has given a first axis
        numbers = trace.numbers_of(value[0])
        return None if numbers is None else numbers.unsqueeze(0)
    return numbers


def _attention(trace: Trace, func: Any, args: Any, kwargs: Any) -> Any:
    """softmax(q k^T) v of [batch, heads, tokens, width]; neighbouring query heads share those of keys and values."""
    query, found = args[0], [trace.numbers_of(value) for value in args[:3]]
    heads = query.shape[1]
    owners = []
    for own in found:
        if own is not None:
            numbers = own.repeat_interleave(heads // own.shape[1], dim=1)
            owners.append(first(numbers, [0, 2, 3]))
            trace.join(numbers, owners[-1])
            trace.join(owners[-1], owners[0])
    trace.attends(owners[0])
    for number in owners[0].reshape(-1).tolist():
        tokens = query.shape[0] * query.shape[2] * args[1].shape[2]
        trace.attended(number, tokens * (query.shape[3] + args[2].shape[3]))
    made = trace.shapes_of(func, args, kwargs)
    leaves = [leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)]
    shells = [trace.track(leaves[0], owners[0]), *(trace.shell(leaf) for leaf in leaves[1:])]
    return tuple(shells)


def _convolution(trace: Trace, func: Any, args: Any, kwargs: Any) -> Any:
    x, matrix, bias, transposed, groups = args[0], args[1], args[2], args[6], args[8]
    weight = trace.weight_of(matrix)
    if weight is None or weight.order != tuple(range(len(weight.order))):
        raise CompressLabError(
            f"the convolution in {trace.place} has a weight that is computed: that is not understood"
        )
    into, out = (0, 1) if transposed else (1, 0)
    numbers = trace.numbers_of(x)
    if groups == 1:
        made, read = trace.axis(weight.name, out, "makes"), trace.axis(weight.name, into, "reads")
        if numbers is None:
            trace.stay(read)
        else:
            trace.join(numbers, along(read, 1, x.shape))
    else:  # the channels of one group leave together, with what they read
        own = trace.axis(weight.name, 0, "makes").view(groups, -1)
        trace.keep_length(own, 1)
        made = own.reshape(-1) if not transposed else own[:, 0].repeat_interleave(matrix.shape[1])
        if numbers is None:
            trace.stay(made)
        else:
            trace.join(numbers, along(own[:, 0].repeat_interleave(x.shape[1] // groups), 1, x.shape))
    shape = trace.shapes_of(func, args, kwargs).shape
    trace.counts(weight, math.prod(x.shape if transposed else shape) // (x.shape[1] if transposed else shape[1]))
    return _made(trace, func, args, kwargs, made, bias, 1)


def _embedding(trace: Trace, func: Any, args: Any, kwargs: Any) -> Any:
    weight = trace.weight_of(args[0])
    if weight is None:
        raise trace.not_understood("an embedding has a table that is computed")
    return _made(trace, func, args, kwargs, trace.axis(weight.name, weight.order[1], "makes"), None, args[1].dim())


def _batch_norm(trace: Trace, func: Any, args: Any, kwargs: Any) -> Any:
    numbers = trace.numbers_of(args[0])
    if numbers is None:  # of what was never multiplied, such as the network's input
        for value in args[1:5]:
            if (own := trace.vector(value)) is not None:
                trace.stay(own)
        return trace.result(func, args, kwargs, None)
    for value in args[1:5]:
        if (own := trace.vector(value)) is not None:
            trace.join(numbers, along(own, 1, numbers.shape))
    made = trace.shapes_of(func, args, kwargs)
    return (trace.track(made[0], numbers), *(trace.shell(leaf) for leaf in made[1:]))


def _layer_norm(trace: Trace, func: Any, args: Any, kwargs: Any) -> Any:
    numbers, axes = trace.numbers_of(args[0]), len(args[1])
    if numbers is None:
        for value in args[2:4]:
            if (own := trace.numbers_of(value)) is not None:
                trace.stay(own)
        return trace.result(func, args, kwargs, None)
    if axes > 1:
        trace.stay(numbers)
    trace.mixes(numbers, numbers.dim() - 1)
    for value in args[2:4]:
        if (own := trace.numbers_of(value)) is not None:
            trace.join(numbers, own)
    made = trace.shapes_of(func, args, kwargs)
    return (trace.track(made[0], numbers), *(trace.shell(leaf) for leaf in made[1:]))


def _group_norm(trace: Trace, func: Any, args: Any, kwargs: Any) -> Any:
    """The channels of a group leave together; one group of all channels is a layer norm."""
    numbers, groups = trace.numbers_of(args[0]), args[6]
    for value in args[1:3]:
        if (own := trace.numbers_of(value)) is not None:
            trace.stay(own) if numbers is None else trace.join(numbers, along(own, 1, numbers.shape))
    if numbers is None:
        return trace.result(func, args, kwargs, None)
    if groups == 1:
        trace.mixes(numbers, 1)
    else:
        trace.keep_length(numbers.unflatten(1, (groups, -1)), 2)
    made = trace.shapes_of(func, args, kwargs)
    return (trace.track(made[0], numbers), *(trace.shell(leaf) for leaf in made[1:]))


def _softmax(trace: Trace, func: Any, args: Any, kwargs: Any) -> Any:
    numbers = _own(trace, func, args[0])
    trace.keep_length(numbers, args[1] % numbers.dim())
    return trace.result(func, args, kwargs, numbers)


def _reduced(trace: Trace, func: Any, args: Any, kwargs: Any) -> Any:
    """A mean or a sum over axes. Over channels it has none itself; what is divided by it is still theirs."""
    numbers = _own(trace, func, args[0])
    names = [argument.name for argument in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    axes = given.get("dim")
    axes = range(numbers.dim()) if axes is None or axes == [] else [axes] if isinstance(axes, int) else axes
    axes = [axis % numbers.dim() for axis in axes]
    for axis in axes:
        if func.overloadpacket is not aten.sum:
            trace.mixes(numbers, axis)
    over = [axis for axis in axes if varies(numbers, axis)]
    rest = first(numbers, over)
    if over and varying(rest):
        for axis in over:
            trace.keep_length(numbers, axis)
    rest = first(numbers, axes)
    if over and not varying(rest):
        return trace.result(func, args, kwargs, None)
    if not given.get("keepdim"):
        for axis in sorted(axes, reverse=True):
            rest = rest.squeeze(axis)
    return trace.result(func, args, kwargs, rest)


def _pooled(trace: Trace, func: Any, args: Any, kwargs: Any) -> Any:
    """Pixels of one channel make pixels of the same."""
    numbers = _own(trace, func, args[0])
    space = list(range(2, numbers.dim()))
    for axis in space:
        trace.keep_length(numbers, axis)
    return trace.result(func, args, kwargs, first(numbers, space))


def _constant(trace: Trace, func: Any, args: Any, kwargs: Any) -> Any:
    """A new tensor of the same shape, with nothing of the old one in it."""
    return func(*args, **kwargs)


_COPIES = (aten._to_copy, aten.clone, aten.detach, aten.alias, aten.lift_fresh)
_MOVES = (
    aten.view, aten._unsafe_view, aten.reshape, aten.transpose, aten.permute, aten.t, aten.unsqueeze, aten.squeeze, aten.expand,
    aten.slice, aten.select, aten.split, aten.split_with_sizes, aten.unbind, aten.repeat, aten.roll, aten.flip, aten.index,
    aten.index_select, aten.gather, aten.narrow,
    aten.pixel_shuffle, aten.pixel_unshuffle, aten.channel_shuffle, aten.native_channel_shuffle,
    aten.unfold, aten._reshape_alias,
)  # fmt: skip
_ELEMENTWISE = (
    *_COPIES, aten.add, aten.sub, aten.rsub, aten.mul, aten.div, aten.pow, aten.maximum, aten.minimum, aten.where,
    aten.masked_fill, aten.addcmul, aten.addcdiv, aten.lerp, aten.relu, aten.gelu, aten.silu, aten.mish, aten.sigmoid,
    aten.tanh, aten.hardtanh, aten.hardswish, aten.hardsigmoid, aten.leaky_relu, aten.elu, aten.softplus, aten.clamp,
    aten.clamp_min, aten.clamp_max, aten.exp, aten.log, aten.neg, aten.abs, aten.sqrt, aten.rsqrt, aten.reciprocal,
    aten.square, aten.erf, aten.sin, aten.cos,
    aten.relu_, aten.add_, aten.sub_, aten.mul_, aten.div_, aten.hardtanh_, aten.silu_, aten.hardswish_, aten.hardsigmoid_,
    aten.sigmoid_, aten.tanh_, aten.leaky_relu_, aten.elu_, aten.clamp_, aten.clamp_min_, aten.masked_fill_, aten.gelu_,
    aten.mish_, aten._prelu_kernel,
)  # fmt: skip
_POOLS = (
    aten.max_pool2d_with_indices, aten.avg_pool2d, aten._adaptive_avg_pool2d, aten.adaptive_avg_pool2d, aten.adaptive_max_pool2d,
    aten.avg_pool1d, aten.avg_pool3d, aten.adaptive_avg_pool1d, aten.max_pool3d_with_indices, aten._adaptive_avg_pool3d,
    aten.upsample_nearest2d, aten.upsample_bilinear2d, aten.upsample_bicubic2d, aten.upsample_nearest1d,
    aten._upsample_bilinear2d_aa, aten._upsample_bicubic2d_aa, aten.reflection_pad2d, aten.replication_pad2d,
)  # fmt: skip
_ATTENTIONS = (
    aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_efficient_attention, aten._scaled_dot_product_cudnn_attention,
)  # fmt: skip
RULES: dict[Any, Rule] = {
    **dict.fromkeys(_MOVES, _move),
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(_POOLS, _pooled),
    **dict.fromkeys(_ATTENTIONS, _attention),
    **dict.fromkeys((aten.native_batch_norm, aten._native_batch_norm_legit_no_training, aten.cudnn_batch_norm), _batch_norm),
    **dict.fromkeys((aten.mean, aten.sum, aten.var, aten.std, aten.linalg_vector_norm, aten.norm), _reduced),
    **dict.fromkeys((aten._softmax, aten._log_softmax, aten._safe_softmax), _softmax),
    **dict.fromkeys((aten.native_layer_norm, aten._fused_rms_norm), _layer_norm),
    **dict.fromkeys((aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like, aten.new_zeros, aten.new_ones,
                     aten.new_empty, aten.new_full, aten.new_empty_strided), _constant),
    aten.native_group_norm: _group_norm,
    aten.cat: _concatenate,
    aten.stack: _stack,
    aten.constant_pad_nd: _pad,
    aten.convolution: _convolution,
    aten.embedding: _embedding,
    aten.mm: _mm,
    aten.addmm: _addmm,
    aten.bmm: _bmm,
    aten.baddbmm: _baddbmm,
}  # fmt: skip

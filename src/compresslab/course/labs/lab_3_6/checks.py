"""The grader's checks of Lab 3.6: each raises Wrong with the symptom that the learner can see.

Attentions so small that what stays can be counted on the fingers come first, as tables of 1 (stays) and 0 (goes); the last check
runs the smaller attention beside the whole one whose other heads are silent.
Oracle: compresslab.groups.kept_entries, itself held against masked networks in tests/test_removing.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compresslab import groups as library
from compresslab.course.findings import Check, Wrong

Shapes = Mapping[str, Sequence[int]]
Entries = dict[str, tuple[int, Tensor]]
MAKERS, READER = ("q_proj", "k_proj", "v_proj"), "o_proj"


def _shapes(heads: int, key_heads: int, width: int, features: int, *, biased: bool) -> dict[str, list[int]]:
    """Of an attention's tensors, weights first."""
    rows = {"q_proj": heads * width, "k_proj": key_heads * width, "v_proj": key_heads * width}
    shapes = {f"{layer}.weight": [n, features] for layer, n in rows.items()} | {
        f"{READER}.weight": [features, heads * width]
    }
    if biased:
        shapes |= {f"{layer}.bias": [n] for layer, n in rows.items()} | {f"{READER}.bias": [features]}
    return shapes


def _asked(function: Any, shapes: Shapes, count: int, kept: Tensor) -> Entries:
    """What the learner's function says, if it is a place and numbers of entries for tensors that there are."""
    found = function({tensor: list(shape) for tensor, shape in shapes.items()}, READER, count, kept.clone())
    if not isinstance(found, dict):
        raise Wrong("no-entries", kind=type(found).__name__)
    for tensor, pair in found.items():
        if tensor not in shapes:
            raise Wrong("unknown", tensor=tensor)
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], Tensor) and pair[1].dim() == 1):
            raise Wrong("no-pair", tensor=tensor)
        axis, entries = pair
        if axis not in range(len(shapes[tensor])):
            raise Wrong("no-axis", tensor=tensor, axis=axis, shape=list(shapes[tensor]))
        length = shapes[tensor][axis]
        if entries.dtype.is_floating_point or not all(0 <= entry < length for entry in entries.tolist()):
            raise Wrong("range", tensor=tensor, length=length, entries=entries.tolist())
    return found


def _stays(entries: Entries, shapes: Shapes, tensors: Sequence[str]) -> Tensor:
    """A line for each tensor: 1 for what stays along the axis of the heads, 0 for what goes."""
    lines = []
    for tensor in tensors:
        along = 1 if tensor == f"{READER}.weight" else 0
        axis, kept = entries.get(tensor, (along, torch.arange(shapes[tensor][along])))
        line = torch.zeros(shapes[tensor][along], dtype=torch.int64)
        line[kept if axis == along else slice(None)] = 1
        lines.append(line)
    return torch.stack(lines)


def _wrong(symptom: str, found: Entries, wanted: Entries, shapes: Shapes, tensors: Sequence[str], **more: Any) -> Wrong:
    return Wrong(
        symptom, expected=_stays(wanted, shapes, tensors), yours=_stays(found, shapes, tensors),
        tensors=", ".join(tensors), **more,
    )  # fmt: skip


def _same(found: Entries, wanted: Entries, tensor: str) -> bool:
    return found[tensor][0] == wanted[tensor][0] and torch.equal(found[tensor][1].long(), wanted[tensor][1])


def places(function: Any) -> None:
    """Three heads of two channels, of which the first and the last stay: rows of those that make them, columns of the reader."""
    shapes, kept = _shapes(3, 3, 2, 5, biased=False), torch.tensor([0, 2])
    found, wanted = (_asked(f, shapes, 3, kept) for f in (function, library.kept_entries))
    tensors = list(shapes)
    for tensor in tensors:
        reads = tensor == f"{READER}.weight"
        if tensor not in found:
            raise _wrong("reader-whole" if reads else "keys-whole", found, wanted, shapes, tensors, tensor=tensor)
        if found[tensor][0] != wanted[tensor][0]:
            raise _wrong("reader-rows" if reads else "columns", found, wanted, shapes, tensors, tensor=tensor)
        if not _same(found, wanted, tensor):
            mine = found[tensor][1].tolist()
            symptoms = {(0, 2): "width", (2, 3): "complement", (0, 1, 2, 3): "others"}
            raise _wrong(symptoms.get(tuple(mine), "entries"), found, wanted, shapes, tensors, tensor=tensor)


def biases(function: Any) -> None:
    """Every row has its number in the bias, and the reader's bias belongs to no head."""
    shapes, kept = _shapes(3, 3, 2, 6, biased=True), torch.tensor([0, 2])
    found, wanted = (_asked(f, shapes, 3, kept) for f in (function, library.kept_entries))
    tensors = [tensor for tensor in shapes if tensor.endswith(".bias")]
    if f"{READER}.bias" in found:
        raise _wrong("reader-bias", found, wanted, shapes, tensors)
    for tensor in [f"{layer}.bias" for layer in MAKERS]:
        if tensor not in found or not _same(found, wanted, tensor):
            raise _wrong("bias-whole", found, wanted, shapes, tensors, tensor=tensor)


def grouped(function: Any) -> None:
    """Four query heads of two channels read two keys: with the first key its two queries go, neighbours both."""
    shapes, kept = _shapes(4, 2, 2, 5, biased=False), torch.tensor([1])
    found, wanted = (_asked(f, shapes, 2, kept) for f in (function, library.kept_entries))
    for tensor in ("q_proj.weight", "o_proj.weight"):
        if not (tensor in found and _same(found, wanted, tensor)):
            mixed = tensor in found and found[tensor][1].tolist() == [2, 3, 6, 7]
            raise _wrong(
                "interleaved" if mixed else "group", found, wanted, shapes, ("q_proj.weight", "o_proj.weight"), tensor=tensor
            )  # fmt: skip
    for tensor in ("k_proj.weight", "v_proj.weight"):
        if not (tensor in found and _same(found, wanted, tensor)):
            raise _wrong("entries", found, wanted, shapes, ("k_proj.weight", "v_proj.weight"), tensor=tensor)


def says(tensors: Mapping[str, Tensor], x: Tensor, width: int, silent: Sequence[int] = ()) -> Tensor:
    """What an attention of grouped queries says of x [tokens, in]: [tokens, out]; groups of heads that are silent give zeros."""

    def made(layer: str, given: Tensor) -> Tensor:
        return torch.nn.functional.linear(given, tensors[f"{layer}.weight"], tensors.get(f"{layer}.bias"))

    query, key, value = (made(layer, x).unflatten(1, (-1, width)).transpose(0, 1) for layer in MAKERS)
    share = len(query) // len(key)
    heads = torch.nn.functional.scaled_dot_product_attention(
        query, key.repeat_interleave(share, dim=0), value.repeat_interleave(share, dim=0)
    )
    for group in silent:
        heads[group * share : (group + 1) * share] = 0
    return made(READER, heads.transpose(0, 1).flatten(1))


def whole(function: Any) -> None:
    """Six query heads, three keys, biases: the smaller attention and the whole one with a silent group say the same."""
    generator = torch.Generator().manual_seed(6)
    shapes, width = _shapes(6, 3, 4, 10, biased=True), 4
    tensors = {tensor: torch.randn(shape, generator=generator) for tensor, shape in shapes.items()}
    x = torch.randn(5, 10, generator=generator)
    for gone in range(3):
        kept = torch.tensor([unit for unit in range(3) if unit != gone])
        entries = _asked(function, shapes, 3, kept)
        cut = {
            name: tensor.index_select(*entries[name]) if name in entries else tensor for name, tensor in tensors.items()
        }
        wanted, found = says(tensors, x, width, silent=[gone]), says(cut, x, width)
        if not torch.allclose(found, wanted, atol=1e-4):
            off = f"{float((found - wanted).abs().max()):.3g}"
            raise Wrong("whole", expected=wanted[:3, :6], yours=found[:3, :6], gone=gone, difference=off)


CHECKS: dict[str, Check] = {"places": places, "biases": biases, "grouped": grouped, "whole": whole}

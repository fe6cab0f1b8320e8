"""Net2Net: a network made wider or deeper that computes what it did, so that training goes on from what it knows.

Paper. Chen, Goodfellow, Shlens, "Net2Net: Accelerating Learning via Knowledge Transfer", arXiv 1511.05641, sections 2.1 to 2.4.

Symbols. Units of one block, neurons or heads, n before and q after; g(j) the unit that unit j is a copy of; c(u) how many
copies of u there are; W the weight that reads them.

Method. Wider (section 2.3): the first q units are themselves and the others copies of some drawn at random, g(j) = j for j < n;
what makes them is copied, and what reads them is divided among the copies,

    W'[:, j] = W[:, g(j)] / c(g(j))

so that the sum over copies is what the one unit said. With `noise` every copy's share is off by a little, as the paper advises,
or copies would go on being alike: shares of a unit still add up to 1, so that nothing changes in the network yet.

Deeper (section 2.4): new blocks are the identity. A block of a transformer with its norm before each sublayer is x + f(x); a copy
of its neighbour whose writing layers are zero adds nothing, and learns through those layers first.

Cost. None to speak of: tensors are copied.

Differences from the paper. Heads and groups of heads that share keys, beside neurons; blocks with residual streams in the place
of identity matrices. A block that ends in a norm, as BERT's, cannot be the identity and is refused. That the network has not
changed is checked on an example before anything is handed on.

Oracle. tests/test_growing.py: outputs before and after to float tolerance, for all architectures; copies traced one by one.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor

from compresslab.contract import Paper, Removal
from compresslab.errors import CompressLabError
from compresslab.groups import FEED_FORWARDS, Group, groups_of, with_units
from compresslab.models import Source, linear_layers, materialise
from compresslab.removing import cut_out, plain_stack, told_by
from compresslab.solving import read_weight
from compresslab.weights import OverlaidWeights, RenamedWeights

PAPERS = {
    "growing": Paper(
        title="Net2Net: Accelerating Learning via Knowledge Transfer",
        authors="Chen, Goodfellow, Shlens",
        year=2015,
        arxiv="1511.05641",
        claim="larger Inception networks begin where a smaller one stopped; a new best on ImageNet of its time [abstract]",
    ),
}

# What writes to the residual stream.
WRITERS = tuple(
    {reader for _, reader in FEED_FORWARDS} | {"o_proj", "out_proj", "attention.output.dense", "attention.dense"}
)
CLOSE = 1e-4  # of the largest output, in float32


def wider(source: Source, kind: str, factor: float, *, noise: float = 0.0, seed: int = 0) -> tuple[Source, str]:
    """The network with `factor` times as many "neurons" or "heads" in every block, and what to tell of it.

    Args:
        noise: how far the shares of a unit's copies may be from equal, from 0 to below 1.

    Raises:
        CompressLabError: a factor below 1; an architecture whose units are not understood, or tied to something else.
    """
    if factor < 1 or not 0 <= noise < 1:
        raise CompressLabError(
            f"growing takes a factor of 1 or more and noise from 0 to below 1, not {factor:g} and {noise:g}"
        )
    groups = groups_of(source, kind)
    before = groups[0].count
    after = round(factor * before)
    if after == before:
        return source, ""
    config = with_units(copy.deepcopy(source.config), kind, before, after)
    if "edits" in told_by(source, config, groups, {kind: after}):
        raise CompressLabError(
            f"{source.architecture} cannot be built with {after} {kind}: its config ties them to something else"
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = {group.reader: _copied(source, group, after, noise, generator) for group in groups}
    grown = dataclasses.replace(cut_out(source, groups, chosen), config=config)
    _check_same(source, grown)
    return grown, f"{after} {kind} in every block instead of {before}"


def with_copies(
    reader: Tensor, units: int, after: int, *, noise: float = 0.0, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """More units that are copies of some, and the weight that reads them all as the old one read the few.

    Args:
        reader: [out, units * width], floating; the columns of a unit lie beside each other.
        after: how many units there shall be, `units` or more.
        noise: how far the shares of a unit's copies may be from equal, from 0 to below 1.

    Returns:
        g [after], the unit that each is a copy of, j itself for j < units; the grown reader [out, after * width].
    """
    drawn = torch.randint(units, (after - units,), generator=generator)
    kept = torch.cat([torch.arange(units), drawn])
    raw = 1 + noise * (2 * torch.rand(after, generator=generator, dtype=torch.float64) - 1)
    shares = raw / torch.zeros(units, dtype=torch.float64).index_add_(0, kept, raw)[kept]
    by_unit = reader.unflatten(1, (units, -1))
    return kept, (by_unit[:, kept] * shares[:, None].to(reader.dtype)).flatten(1)


def _copied(source: Source, group: Group, after: int, noise: float, generator: torch.Generator) -> Removal:
    """Units with copies, and what reads them."""
    weight = read_weight(source, group.reader, source.skeleton().get_submodule(group.reader)).double()
    kept, reader = with_copies(weight, group.count, after, noise=noise, generator=generator)
    return Removal(kept=kept, weight=reader.float())


def deeper(source: Source, blocks: int) -> tuple[Source, str]:
    """The network with so many blocks, the new ones evenly between the old, and what to tell of it.

    Raises:
        CompressLabError: fewer blocks than there are; blocks that cannot be the identity.
    """
    names = plain_stack(source)
    count = len(names)
    if blocks < count:
        raise CompressLabError(f"{source.name} has {count} blocks: growing to {blocks} is shrinking")
    if blocks == count:
        return source, ""
    new = blocks - count
    after = [(i + 1) * count // new - 1 if new <= count else i * count // new for i in range(new)]
    order = [(i, is_new) for i in range(count) for is_new in (False, *[True] * after.count(i))]
    prefix = names[0].rpartition(".")[0]
    skeleton = source.skeleton()
    stored = {t: t for t in source.weights.names() if not t.startswith(tuple(name + "." for name in names))}
    zeros: dict[str, Tensor] = {}
    for number, (old, is_new) in enumerate(order):
        for tensor in source.weights.names():
            if tensor.startswith(names[old] + "."):
                stored[f"{prefix}.{number}{tensor.removeprefix(names[old])}"] = tensor
        if is_new:
            for layer in linear_layers(skeleton.get_submodule(names[old])):
                for part in ("weight", "bias") if layer.endswith(WRITERS) else ():
                    if (name := f"{prefix}.{number}.{layer}.{part}") in stored:
                        zeros[name] = torch.zeros_like(source.weights.get(stored[name]))
    config = copy.deepcopy(source.config)
    for key, value in list(config.to_dict().items()):  # such as layer_types: one entry for each block
        if isinstance(value, list) and len(value) == count:
            setattr(config, key, [value[old] for old, _ in order])
    config.num_hidden_layers = blocks
    weights = OverlaidWeights(RenamedWeights(source.weights, stored), zeros)
    grown = dataclasses.replace(source, config=config, weights=weights)
    _check_same(source, grown)
    added = [str(number) for number, (_, is_new) in enumerate(order) if is_new]
    return grown, f"{new} new blocks that do nothing yet ({', '.join(added)})"


def _check_same(before: Source, after: Source) -> None:
    """CompressLabError if the grown network does not compute what it did."""
    example = before.example()
    if "input_ids" in example:
        vocabulary = int(before.config.vocab_size)
        example = {"input_ids": torch.arange(1, 9)[None] * 7919 % vocabulary}
    with torch.no_grad():
        outputs: list[Any] = [materialise(source)(**example)[0] for source in (before, after)]
    apart = float((outputs[0] - outputs[1]).abs().max() / outputs[0].abs().max())
    if not apart <= CLOSE:
        raise CompressLabError(
            f"{before.name} ({before.architecture}) would change by {apart:.1%} when it grows so: its blocks end in a norm, or "
            "are not understood. Start a student of that size fresh instead"
        )

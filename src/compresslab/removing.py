"""Removing: neurons, heads and blocks taken out of a network for good, so that what is left is a smaller plain model.

config and weights -> groups that must leave together (groups.py) -> a pass over the calibration text through the uncompressed
network, in which the method chooses what stays as soon as a layer's Gram matrix is complete -> another Source: the same
architecture with smaller numbers in its config, rows and columns cut out as the weights are read. Whatever comes afterwards in
the recipe (smoothing, zeros, rounding) works on that as on any other model, and plain transformers opens it. Where a config
ties its numbers to something else (BERT's heads to its width), edits of the architecture tell it, and our own layout opens it.

What is left computes what the whole network would with the lost units set to zero and the readers' new weights: no mask
remains. The weights of readers, which the method may have refitted, are held in memory; all others are cut when they are read.

A run that was killed looks again, finds the same, and goes on from there. Oracle: tests/oracles/removal.py.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compresslab import layerwise, models
from compresslab.channels import without_channels
from compresslab.contract import BlockRemover, ChannelRemover, Removal, UnitRemover
from compresslab.cutting import NOT_PLAIN, check_runs, head_counts, resized
from compresslab.errors import CompressLabError
from compresslab.groups import Group, groups_of, inputs_of, kept_entries, outputs_of, with_units
from compresslab.models import Source, blocks, is_transposed
from compresslab.numerics.gram import Gram, Statistic
from compresslab.plan import OUTSIDE, make_plan
from compresslab.solving import Pass, read_finite, read_weight
from compresslab.weights import OverlaidWeights, RenamedWeights, Select, TransformedWeights

KINDS = ("heads", "neurons")


def removed(calibration: Pass, methods: Sequence[UnitRemover | ChannelRemover | BlockRemover]) -> tuple[Source, str]:
    """The network without what these methods take out, one after the other; and what to tell of it.

    Raises:
        CompressLabError: naming the block, where a method gives up or the architecture cannot be cut so.
    """
    told: list[str] = []
    for method in methods:
        if isinstance(method, BlockRemover):
            source, said = without_blocks(calibration, method)
        elif isinstance(method, ChannelRemover):
            source, said = without_channels(calibration, method)
        else:
            source, said = without_units(calibration, method)
        calibration = dataclasses.replace(calibration, source=source)
        told += said
    return calibration.source, "; ".join(told)


# ---------------------------------------------------------------------------------------------------------------------
# Neurons and heads
# ---------------------------------------------------------------------------------------------------------------------


def without_units(calibration: Pass, method: UnitRemover) -> tuple[Source, list[str]]:
    source, told = calibration.source, []
    shares = {"heads": method.head_frac, "neurons": method.neuron_frac}
    wanted = {kind: groups_of(source, kind) for kind in KINDS if shares[kind] > 0}
    keep: dict[str, int] = {}
    config = copy.deepcopy(source.config)
    for kind, found in wanted.items():
        try:
            keep[kind] = method.kept_of(kind, found[0].count)
        except ValueError as error:
            raise CompressLabError(str(error)) from None
        config = with_units(config, kind, found[0].count, keep[kind])
        told.append(f"{found[0].count - keep[kind]} of {found[0].count} {kind} of every block taken out")
    everything = [group for found in wanted.values() for group in found]
    fields = told_by(source, config, everything, keep)
    told += [NOT_PLAIN] if "edits" in fields else []
    chosen = _choose(calibration, method, everything, keep)
    return dataclasses.replace(cut_out(source, everything, chosen), **fields), told


def _choose(
    calibration: Pass, method: UnitRemover, groups: Sequence[Group], keep: dict[str, int]
) -> dict[str, Removal]:
    """What stays of every group, by its reader."""
    source, skeleton = calibration.source, calibration.source.skeleton()
    by_reader, found, stored = {group.reader: group for group in groups}, {}, set(source.weights.names())

    def visit(reader: str, gram: Statistic | None) -> None:
        group = by_reader.get(reader)
        if group is None or not (gram is None or isinstance(gram, Gram)):
            return
        weight = read_weight(source, reader, skeleton.get_submodule(reader)).to(calibration.device, torch.float32)
        producers = [
            read_weight(source, name, skeleton.get_submodule(name))
            .to(calibration.device, torch.float32)
            .unflatten(0, (group.count, rows))
            for name, rows in group.rows.items()
        ]
        try:
            found[reader] = method.remove(
                weight.contiguous(), producers, gram, keep=keep[group.kind], has_bias=f"{reader}.bias" in stored
            )
        except ValueError as error:
            raise CompressLabError(f"taking out the {group.kind} that {reader} reads: {error}") from error

    if method.needs_data:
        layerwise.survey(dataclasses.replace(calibration, plan=make_plan(source, (OUTSIDE,))), visit)
    for reader in by_reader:
        if reader not in found:
            visit(reader, None)
    return found


def cut_out(source: Source, groups: Sequence[Group], chosen: dict[str, Removal]) -> Source:
    """The weights without what was not chosen; the config stays as it is."""
    skeleton, stored = source.skeleton(), set(source.weights.names())
    replaced: dict[str, Tensor] = {}
    changes: dict[str, Select] = {}
    for group in groups:
        removal = chosen[group.reader]
        made = _shapes_of(skeleton, group.rows, stored)
        for tensor, (axis, kept) in kept_entries(made, group.reader, group.count, removal.kept.cpu()).items():
            transposed = tensor.endswith(".weight") and is_transposed(skeleton.get_submodule(tensor[: -len(".weight")]))
            changes[tensor] = Select(kept=kept, axis=1 - axis if transposed else axis)
        weight = removal.weight.cpu()
        weight = weight.t() if is_transposed(skeleton.get_submodule(group.reader)) else weight
        replaced[f"{group.reader}.weight"] = _stored(source, f"{group.reader}.weight", weight)
        if removal.bias_change is not None:
            bias = read_finite(source, f"{group.reader}.bias").float() + removal.bias_change.cpu()
            replaced[f"{group.reader}.bias"] = _stored(source, f"{group.reader}.bias", bias)
    weights = OverlaidWeights(TransformedWeights(source.weights, changes), replaced)
    return dataclasses.replace(source, weights=weights)


def _shapes_of(skeleton: nn.Module, layers: Iterable[str], stored: Collection[str]) -> dict[str, tuple[int, ...]]:
    """[out, in] of the weights and [out] of the biases that these layers have, by the tensor's name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name in layers:
        module = skeleton.get_submodule(name)
        shapes[f"{name}.weight"] = outputs_of(module), inputs_of(module)
        if f"{name}.bias" in stored:
            shapes[f"{name}.bias"] = (outputs_of(module),)
    return shapes


def _stored(source: Source, name: str, value: Tensor) -> Tensor:
    """In the dtype of the tensor that it replaces. CompressLabError if that cannot hold it."""
    cast = value.to(source.weights.get(name).dtype).contiguous()
    if not torch.isfinite(cast).all():
        raise CompressLabError(f"the refitted {name} is not finite in {cast.dtype}: raise damp_frac, or take out less")
    return cast


def told_by(source: Source, config: Any, groups: Sequence[Group], keep: dict[str, int]) -> dict[str, Any]:
    """What tells the smaller network: its config, or edits of what the whole one's builds, by the Source's field.

    Raises:
        CompressLabError: if neither does.
    """
    skeleton, sizes, settings = source.skeleton(), dict[str, dict[str, list[int]]](), dict[str, dict[str, int]]()
    for group in groups:
        left = keep[group.kind]
        lengths = {name: (0, left * rows) for name, rows in group.rows.items()} | {
            group.reader: (1, left * group.width)
        }
        for name, (axis, length) in lengths.items():
            module = skeleton.get_submodule(name)
            shape = sizes.setdefault(name, {"weight": list(module.weight.shape)})["weight"]  # type: ignore[arg-type]
            shape[1 - axis if is_transposed(module) else axis] = length
            if axis == 0 and module.bias is not None:
                sizes[name]["bias"] = [length]
        for owner in {name.rpartition(".")[0] for name in group.rows} if group.kind == "heads" else ():
            settings[owner] = head_counts(skeleton.get_submodule(owner), group.count, left)
    trouble = _differs(dataclasses.replace(source, config=config), sizes)
    if not trouble:
        return {"config": config}
    edits = [resized(skeleton, name, sizes.get(name, {}), settings.get(name, {})) for name in {**sizes, **settings}]
    everything = (*source.edits, *edits)
    try:
        check_runs(dataclasses.replace(source, edits=everything))
    except CompressLabError as error:
        kinds = " and ".join(keep)
        raise CompressLabError(
            f"{source.architecture} cannot be built with fewer {kinds} ({trouble}): its config ties them to something else, and "
            f"its code does not run without them ({error}). Take out neurons or blocks only"
        ) from None
    return {"edits": everything}


def _differs(source: Source, sizes: Mapping[str, Mapping[str, list[int]]]) -> str:
    """Where what a config builds has other shapes than these, in words; nothing if it has them."""
    try:
        models.reread(source.config)
        built = source.skeleton()
    except (CompressLabError, ValueError, TypeError, AssertionError) as error:
        return " ".join(str(error).split())
    for name, tensors in sizes.items():
        shape = list(built.get_submodule(name).weight.shape)  # type: ignore[arg-type]
        if shape != tensors["weight"]:
            return f"{name} would be {shape}"
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# Blocks
# ---------------------------------------------------------------------------------------------------------------------


def without_blocks(calibration: Pass, method: BlockRemover) -> tuple[Source, list[str]]:
    source = calibration.source
    names = plain_stack(source)
    influence = block_influence(calibration, names)
    try:
        kept = method.keep_blocks(influence)
    except ValueError as error:
        raise CompressLabError(str(error)) from None
    gone = [names[i] for i in range(len(names)) if i not in kept]
    return stacked(source, names, kept), [f"{len(gone)} of {len(names)} blocks taken out: {', '.join(gone)}"]


def plain_stack(source: Source) -> list[str]:
    """The blocks of a network that is one stack of them. CompressLabError if it is not."""
    names = list(blocks(source.skeleton()))
    lists = {name.rpartition(".")[0] for name in names}
    if len(lists) != 1 or getattr(source.config, "num_hidden_layers", None) != len(names):
        raise CompressLabError(
            f"{source.name} ({source.architecture}) is no plain stack of blocks that its config counts: leave its blocks in"
        )
    return names


def block_influence(calibration: Pass, names: Sequence[str]) -> list[float]:
    """1 - mean over the calibration tokens of cos(what goes into a block, what comes out of it), by block."""
    sums, counts = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)

    def see(block: str, before: Tensor, after: Tensor, mask: Tensor | None) -> None:
        x, y = (layerwise.real_tokens(t, mask).flatten(0, -2).float() for t in (before, after))
        sums[block] += float(torch.nn.functional.cosine_similarity(x, y, dim=-1).sum(dtype=torch.float64))
        counts[block] += len(x)

    layerwise.watch_blocks(calibration, see)
    return [1 - sums[name] / max(counts[name], 1) for name in names]


def stacked(source: Source, names: Sequence[str], kept: Sequence[int]) -> Source:
    """The network of these blocks alone, numbered anew."""
    prefix = names[0].rpartition(".")[0]
    new_name = {names[old]: f"{prefix}.{new}" for new, old in enumerate(kept)}
    stored: dict[str, str] = {}
    for tensor in source.weights.names():
        block = next((name for name in names if tensor.startswith(name + ".")), None)
        if block is None:
            stored[tensor] = tensor
        elif block in new_name:
            stored[new_name[block] + tensor.removeprefix(block)] = tensor
    config = copy.deepcopy(source.config)
    for key, value in list(config.to_dict().items()):  # such as layer_types: one entry for each block
        if isinstance(value, list) and len(value) == len(names):
            setattr(config, key, [value[i] for i in kept])
    config.num_hidden_layers = len(kept)
    return dataclasses.replace(source, config=config, weights=RenamedWeights(source.weights, stored))

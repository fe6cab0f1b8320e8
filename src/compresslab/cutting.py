"""Cutting: coupled channels taken out of a network for good, whatever its architecture.

    coupling.py's groups, and the units of each that stay -> rows, columns and entries to select from every tensor
      -> a config with smaller numbers if the architecture has one for just these shapes: a plain model, which transformers opens
      -> else edits (edits.py) of what the config builds: our own layout, which `compresslab.models.load` opens in any process

What is cut is then run beside the whole network with the same units set to zero: both must say the same. So a shape that stands
in the network's code, where no trace can see it, is an error and not a broken artifact. Where a layer norm averages over the
channels that are cut, zeros are not the same as nothing, and it is only checked that it runs.

A plain nn.Module is cut by `cut_`, saved by `save`, and read back by `reopen` into a new instance of its class.
Oracle: the same network with zeros (tests/test_cutting.py), on every architecture there.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from compresslab import models
from compresslab.coupling import Coupled, Coupling, couplings
from compresslab.edits import Edit, apply_
from compresslab.errors import CompressLabError
from compresslab.groups import with_units
from compresslab.models import Source, is_transposed
from compresslab.weights import Chain, Select, TransformedWeights

Keep = Mapping[str, Tensor]  # group -> int64, its units that stay, ascending; groups that are not named stay whole
Entries = dict[str, dict[int, Tensor]]  # tensor -> axis -> int64, the entries that stay, ascending

# Attributes of an attention that count its heads, or the channels of all of them; as transformers and its relatives call them.
HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "num_key_value_heads", "n_kv_heads",
               "num_kv_heads", "split_size", "all_head_size", "inner_dim")  # fmt: skip
WIDTH_KEYS = ("hidden_size", "n_embd", "d_model", "dim", "embed_dim")
CUTS, WEIGHTS = "cuts.json", "model.safetensors"
NOT_PLAIN = "no config says these shapes, so compresslab.models.load opens it and plain transformers does not"
TOLERANCE = 1e-3  # of the largest output; float32 sums in another order


def entries_left(coupling: Coupling, keep: Keep) -> Entries:
    """What stays of every tensor that loses something.

    Raises:
        CompressLabError: if a group would lose all its units.
    """
    gone: dict[tuple[str, int], list[Tensor]] = {}
    for group in coupling.groups:
        kept = keep.get(group.name)
        if kept is None or len(kept) == group.count:
            continue
        if not len(kept):
            raise CompressLabError(
                f"nothing would be left of the {group.count} {group.kind} that {group.name} makes: take out less"
            )
        lost = torch.ones(group.count, dtype=torch.bool)
        lost[kept] = False
        for piece in group.slices:
            gone.setdefault((piece.tensor, piece.axis), []).append(piece.index[lost].flatten())
    entries: Entries = {}
    for (tensor, axis), lists in gone.items():
        left = torch.ones(coupling.shapes[tensor][axis], dtype=torch.bool)
        left[torch.cat(lists)] = False
        entries.setdefault(tensor, {})[axis] = left.nonzero().flatten()
    return entries


def shape_left(coupling: Coupling, entries: Entries, tensor: str) -> list[int]:
    return [len(entries.get(tensor, {}).get(axis, range(n))) for axis, n in enumerate(coupling.shapes[tensor])]


def macs(coupling: Coupling, keep: Keep) -> int:
    """Multiply-accumulates of the traced forward with what is left."""
    entries = entries_left(coupling, keep)
    total = 0
    for work in coupling.work:
        if work.owner is not None:
            tensor, axis, index = work.owner
            total += work.times * bool(
                (entries[tensor][axis] == index).any() if axis in entries.get(tensor, {}) else True
            )
        else:
            total += work.times * (torch.Size(shape_left(coupling, entries, work.tensor)).numel() if work.tensor else 1)
    return total


# ---------------------------------------------------------------------------------------------------------------------
# A source
# ---------------------------------------------------------------------------------------------------------------------


def tied_skeleton(source: Source) -> nn.Module:
    """The architecture, with one parameter where two names share a tensor."""
    skeleton = source.skeleton()
    models.tie_weights(skeleton)
    return skeleton


def couplings_of(source: Source) -> Coupling:
    """The groups of a source, from the smallest input that it reads."""
    return couplings(tied_skeleton(source), source.example())


def cut_source(source: Source, coupling: Coupling, keep: Keep) -> Source:
    """The network without the units that do not stay: with a smaller config if there is one that says it, else with edits.

    Raises:
        CompressLabError: if what is left does not run, or says something else than the masked network.
    """
    entries, skeleton = entries_left(coupling, keep), tied_skeleton(source)
    if not entries:
        return source
    changes = {}
    for tensor, axes in entries.items():
        selects = tuple(Select(kept=kept, axis=axis) for axis, kept in axes.items())
        changes[tensor] = selects[0] if len(selects) == 1 else Chain(changes=selects)
    cut = dataclasses.replace(source, weights=TransformedWeights(source.weights, changes))
    config = _plain_config(source, coupling, keep, entries)
    if config is not None:
        cut = dataclasses.replace(cut, config=config)
    else:
        cut = dataclasses.replace(cut, edits=(*source.edits, *edits_of(skeleton, coupling, keep, entries)))
    if any(group.mixed for group in coupling.groups if _loses(group, keep)):
        check_runs(cut)
    else:
        masked = models.materialise(source)
        mask_(masked, coupling, keep)
        _check_same(masked, models.materialise(cut), source.example(), source.name)
    return cut


def _loses(group: Coupled, keep: Keep) -> bool:
    return group.name in keep and len(keep[group.name]) < group.count


def check_runs(source: Source) -> None:
    """CompressLabError unless a forward of shapes goes through."""
    try:
        couplings_of(source)
    except (RuntimeError, ValueError, TypeError) as error:
        raise _in_the_code(source.name, " ".join(str(error).split())) from error


def _in_the_code(name: str, reason: str) -> CompressLabError:
    return CompressLabError(
        f"{name} cannot be cut so: its code has numbers of its own that the smaller network does not follow ({reason[:200]}). "
        "Leave out the kind of unit (channel_frac, head_frac, width_frac) that these belong to"
    )


def _plain_config(source: Source, coupling: Coupling, keep: Keep, entries: Entries) -> Any:
    """A config of the same architecture that builds just what is left; None if there is none."""
    config = copy.deepcopy(source.config)
    left: dict[str, set[tuple[int, int]]] = {}
    for group in coupling.groups:
        left.setdefault(group.kind, set()).add((group.count, len(keep.get(group.name, range(group.count)))))
    if any(len(counts) > 1 for counts in left.values()):
        return None
    try:
        for kind, counts in left.items():
            before, after = next(iter(counts))
            if before != after:
                config = with_width(config, before, after) if kind == "width" else with_units(
                    config, "neurons" if kind == "channels" else kind, before, after)  # fmt: skip
        models.reread(config)
        built = tied_skeleton(dataclasses.replace(source, config=config))
    except (CompressLabError, ValueError, TypeError, AttributeError, AssertionError, RuntimeError):
        return None
    tensors = dict(built.named_parameters()) | dict(built.named_buffers())
    same = all(
        list(tensors[name].shape) == shape_left(coupling, entries, name) for name in coupling.shapes if name in tensors
    )
    return config if same and set(coupling.shapes) <= set(tensors) else None


def with_width(config: Any, before: int, after: int) -> Any:
    """A config whose embedding is `after` wide; it is changed. CompressLabError if the architecture has no number for that."""
    heads = getattr(config, "num_attention_heads", None)
    if heads:
        config.head_dim = getattr(config, "head_dim", None) or before // heads
    if getattr(config, "n_inner", 0) is None:  # GPT-2: None stands for four times the width
        config.n_inner = 4 * before
    for key in WIDTH_KEYS:
        if getattr(config, key, None) == before:
            setattr(config, key, after)
            return config
    raise CompressLabError(f"no number in {type(config).__name__} says how wide its embedding is")


# ---------------------------------------------------------------------------------------------------------------------
# Edits
# ---------------------------------------------------------------------------------------------------------------------


def edits_of(model: nn.Module, coupling: Coupling, keep: Keep, entries: Entries) -> list[Edit]:
    """What becomes of each module that owns a tensor which is cut, and of attentions whose heads are counted."""
    known = {id(tensor): name for name, tensor in model.named_parameters()}
    settings = _head_settings(model, coupling, keep)
    sizes: dict[str, dict[str, list[int]]] = {name: {} for name in settings}
    everything = (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
    for name, tensor in everything:  # one that is shared is resized wherever it stands
        owner, _, leaf = name.rpartition(".")
        if (stored := known.get(id(tensor), name)) in entries:
            sizes.setdefault(owner, {})[leaf] = shape_left(coupling, entries, stored)
    return [resized(model, name, shapes, settings.get(name, {})) for name, shapes in sizes.items()]


def resized(model: nn.Module, name: str, shapes: Mapping[str, list[int]], settings: Mapping[str, int]) -> Edit:
    """The edit that gives a module's tensors these shapes, with the attributes that repeat them and other `settings`."""
    told = dict(settings) | _settings_of(model.get_submodule(name), shapes)
    return Edit(module=name, becomes="resized", sizes=shapes, settings=told)


def _convolution(module: Any, rows: int, columns: int) -> dict[str, Any]:
    groups = module.groups if module.groups == 1 else module.groups * rows // module.weight.shape[0]
    into, out = (rows, columns * groups) if module.transposed else (columns * groups, rows)
    return {"in_channels": into, "out_channels": out, "groups": groups}


def _group_norm(module: Any, rows: int, columns: int) -> dict[str, Any]:
    groups = module.num_groups if module.num_groups == 1 else module.num_groups * rows // module.num_channels
    return {"num_channels": rows, "num_groups": groups}


# Attributes of torch's modules that repeat what the shape of their weight says: rows, and the axis after these.
ATTRIBUTES: tuple[tuple[Any, Callable[[Any, int, int], dict[str, Any]]], ...] = (
    (_ConvNd, _convolution),
    (nn.GroupNorm, _group_norm),
    (nn.Linear, lambda module, rows, columns: {"in_features": columns, "out_features": rows}),
    (nn.Embedding, lambda module, rows, columns: {"embedding_dim": columns}),
    (nn.LayerNorm | nn.RMSNorm, lambda module, rows, columns: {"normalized_shape": [rows]}),
    (_NormBase, lambda module, rows, columns: {"num_features": rows}),
    (nn.PReLU, lambda module, rows, columns: {"num_parameters": rows}),
)


def _settings_of(module: nn.Module, shapes: Mapping[str, list[int]]) -> dict[str, Any]:
    rows, columns = (*shapes.get("weight", ()), 0, 0)[:2]
    if rows and is_transposed(module):
        return {"nx": rows, "nf": columns}
    for kind, attributes in ATTRIBUTES if rows else ():
        if isinstance(module, kind):
            return attributes(module, rows, columns)
    return {}


def _head_settings(model: nn.Module, coupling: Coupling, keep: Keep) -> dict[str, dict[str, int]]:
    """Module around the layers that make heads -> its attributes of HEAD_COUNTS, in proportion to the heads left."""
    found: dict[str, dict[str, int]] = {}
    for group in coupling.groups:
        if group.kind != "heads" or not _loses(group, keep):
            continue
        left = len(keep[group.name])
        layers = {piece.tensor.rpartition(".")[0] for piece in group.slices if piece.role == "makes"}
        for owner in {layer.rpartition(".")[0] for layer in layers}:
            if counted := head_counts(model.get_submodule(owner), group.count, left):
                found[owner] = counted
    return found


def head_counts(module: nn.Module, count: int, left: int) -> dict[str, int]:
    """An attention's attributes of HEAD_COUNTS when `left` of `count` heads, or groups of these, are left."""
    values = {key: module.__dict__.get(key) for key in HEAD_COUNTS}
    return {key: n // count * left for key, n in values.items() if isinstance(n, int) and n and n % count == 0}


# ---------------------------------------------------------------------------------------------------------------------
# A module in memory
# ---------------------------------------------------------------------------------------------------------------------


def mask_(model: nn.Module, coupling: Coupling, keep: Keep) -> None:
    """Set all that would be cut to zero instead."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for tensor, axes in entries_left(coupling, keep).items():
            for axis, kept in axes.items():
                gone = torch.ones(coupling.shapes[tensor][axis], dtype=torch.bool)
                gone[kept] = False
                tensors[tensor].index_fill_(axis, gone.nonzero().flatten().to(tensors[tensor].device), 0)


def cut_(
    model: nn.Module, coupling: Coupling, keep: Keep, example: Mapping[str, Tensor] | Sequence[Tensor] | None = None
) -> list[Edit]:
    """Take units out of a module for good.

    Args:
        example: inputs; with it what is left is compared with the masked network.

    Returns:
        What was changed, which `save` writes beside the weights.

    Raises:
        CompressLabError: if what is left does not run, or says something else than the masked network; the model is as it was.
    """
    entries = entries_left(coupling, keep)
    edits = edits_of(model, coupling, keep, entries)
    smaller = copy.deepcopy(model)
    _apply_(smaller, edits, entries)
    if example is not None:
        masked = copy.deepcopy(model)
        mask_(masked, coupling, keep)
        mixed = any(group.mixed for group in coupling.groups if _loses(group, keep))
        _check_same(masked, smaller, example, type(model).__name__, values=not mixed)
    _apply_(model, edits, entries)
    return edits


def _apply_(model: nn.Module, edits: Sequence[Edit], entries: Entries) -> None:
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    everything = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    aliases: dict[str, list[str]] = {
        name: [other for other, tensor in everything if tensor is tensors[name]] for name in entries
    }
    with torch.no_grad():
        left = {}
        for name, axes in entries.items():
            left[name] = tensors[name].detach()
            for axis, kept in axes.items():
                left[name] = left[name].index_select(axis, kept.to(left[name].device))
    apply_(model, edits)
    for name, value in left.items():
        shared: Tensor | None = None
        for alias in aliases[name]:
            owner, _, leaf = alias.rpartition(".")
            module = model.get_submodule(owner)
            if shared is None:
                like = getattr(module, leaf)
                shared = (
                    nn.Parameter(value, requires_grad=like.requires_grad) if isinstance(like, nn.Parameter) else value
                )
            setattr(module, leaf, shared)


def save(model: nn.Module, edits: Sequence[Edit], folder: Path) -> None:
    """Write a module that was cut: its weights, and in what it differs from a new instance of its class."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = model.state_dict()
    once = {
        name for name, _ in (*model.named_parameters(), *model.named_buffers())
    }  # a shared tensor has one name here
    save_file({name: tensor.contiguous() for name, tensor in stored.items() if name in once}, folder / WEIGHTS)
    (folder / CUTS).write_text(json.dumps([dataclasses.asdict(edit) for edit in edits], indent=1), encoding="utf-8")


def reopen(model: nn.Module, folder: Path) -> nn.Module:
    """A new instance of the class that was cut, made into what `save` wrote. It is changed.

    Raises:
        CompressLabError: if the folder holds no such module, or one of another class.
    """
    try:
        edits = [Edit(**edit) for edit in json.loads((folder / CUTS).read_text(encoding="utf-8"))]
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, TypeError) as error:
        raise CompressLabError(
            f"{folder} holds no module that was cut ({error}): name the folder that save() wrote"
        ) from None
    shared: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shared.setdefault(id(parameter), []).append(name)
    try:
        apply_(model, edits)
    except AttributeError as error:
        raise CompressLabError(
            f"{folder} holds a module of another class ({error}): make a new one of the class that was cut"
        ) from None
    for names in shared.values():
        for alias in names[1:]:
            owner, _, leaf = alias.rpartition(".")
            first, _, own = names[0].rpartition(".")
            setattr(model.get_submodule(owner), leaf, getattr(model.get_submodule(first), own))
    aliases = {alias for names in shared.values() for alias in names[1:]}
    try:
        missing, unknown = model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise CompressLabError(
            f"{folder} holds a module of another class ({' '.join(str(error).split())[:200]})"
        ) from None
    if set(missing) - aliases or unknown:
        raise CompressLabError(
            f"{folder} holds a module of another class: {[*missing, *unknown][0]} is on one side only"
        )
    return model


def _check_same(
    masked: nn.Module,
    cut: nn.Module,
    example: Mapping[str, Tensor] | Sequence[Tensor],
    name: str,
    *,
    values: bool = True,
) -> None:
    """CompressLabError unless both say the same of the example, or with `values` False, unless the cut one runs."""
    with torch.no_grad():
        wanted = said(masked, _filled(example))
        try:
            found = said(cut, _filled(example))
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise _in_the_code(name, " ".join(str(error).split())) from error
    if found.shape != wanted.shape:
        raise _in_the_code(name, f"it returns {list(found.shape)}, not {list(wanted.shape)}")
    off = float((found - wanted).abs().max()) / max(float(wanted.abs().max()), 1e-6)
    if values and not off < TOLERANCE:
        raise _in_the_code(name, f"it differs from the network with zeros by {off:.2g} of its largest output")


def said(model: nn.Module, inputs: Mapping[str, Tensor] | Sequence[Tensor]) -> Tensor:
    """The first tensor that a network returns, in float32 and in eval mode."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    if isinstance(inputs, Mapping):
        returned = model(**{key: value.to(device) for key, value in inputs.items()})
    else:
        returned = model(*(value.to(device) for value in inputs))
    model.train(was_training)
    values = list(returned.values()) if isinstance(returned, Mapping) else returned
    found = values if isinstance(values, Tensor) else next(value for value in values if isinstance(value, Tensor))
    return found.float()


def _filled(example: Mapping[str, Tensor] | Sequence[Tensor]) -> Any:
    """The example with random numbers in place of floats: zeros would hide a wrong column."""
    generator = torch.Generator().manual_seed(0)

    def fill(value: Tensor) -> Tensor:
        return torch.randn(value.shape, generator=generator).to(value.dtype) if value.is_floating_point() else value

    return (
        {key: fill(value) for key, value in example.items()}
        if isinstance(example, Mapping)
        else [fill(v) for v in example]
    )

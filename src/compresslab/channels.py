"""Channels: what a method wants to know of coupled channels, gathered; and the channels taken out.

    source -> coupling.py: its groups -> one pass over the calibration samples with the whole network in memory, if the method
    wants gradients or inputs -> Members of every group -> the method's importances -> its choice, scaled to a target of
    multiply-accumulates if there is one -> cutting.py

The loss of a sample is the cross-entropy of its labels where the batch has them, of the next token for a language model, and for
all others that of a label drawn from the network's own distribution; a network that returns numbers is taken as the mean of a
normal distribution from which one is drawn. So squares of the gradients are those of Fisher's information matrix.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compresslab import models
from compresslab.contract import ChannelRemover, Member, Ranked
from compresslab.coupling import Coupled, Coupling, Slice, couplings
from compresslab.cutting import NOT_PLAIN, couplings_of, cut_, cut_source, macs
from compresslab.edits import Edit
from compresslab.errors import CompressLabError
from compresslab.models import Source, is_linear, is_transposed
from compresslab.solving import Pass

HALVINGS = 20


def without_channels(calibration: Pass, method: ChannelRemover) -> tuple[Source, list[str]]:
    """The network without the channels that the method takes out, and what to tell of it.

    Raises:
        CompressLabError: nothing to take out, a layer that would be emptied, a target that cannot be met, or what coupling.py
            and cutting.py say.
    """
    source = calibration.source
    coupling = couplings_of(source)
    groups = groups_taken_from(coupling, method, f"{source.name} ({source.architecture})")
    model = models.materialise(source).to(calibration.device)
    ranked = importances(model, coupling, groups, method, calibration.batches)
    del model
    keep, left = choose(method, ranked, coupling)
    cut = cut_source(source, coupling, keep)
    told = _told(groups, keep, left)
    if cut.edits != source.edits:
        told.append(NOT_PLAIN)
    return cut, told


def take_out_(
    model: nn.Module,
    example: Mapping[str, Tensor],
    method: ChannelRemover,
    batches: Sequence[Mapping[str, Tensor]] | None = None,
) -> tuple[list[Edit], list[str]]:
    """The same of a module in memory, of any class; it is changed.

    Args:
        example: a small input, by the names of the forward's arguments.
        batches: calibration samples by the same names, and their "labels" where there are any.

    Returns:
        What was changed, for `cutting.save`, and what to tell of it.

    Raises:
        CompressLabError: as without_channels; the module is as it was.
    """
    coupling = couplings(model, example)
    groups = groups_taken_from(coupling, method, type(model).__name__)
    copied = copy.deepcopy(model).float().eval()
    keep, left = choose(method, importances(copied, coupling, groups, method, batches), coupling)
    return cut_(model, coupling, keep, example), _told(groups, keep, left)


def groups_taken_from(coupling: Coupling, method: ChannelRemover, name: str) -> list[Coupled]:
    """Those that the method shall take from. CompressLabError if there are none of a kind that it names."""
    kinds = [kind for kind in ("channels", "heads", "width") if getattr(method, f"{kind.removesuffix('s')}_frac")]
    for kind in kinds:
        if not any(group.kind == kind for group in coupling.groups):
            raise CompressLabError(
                f"{name} has no {kind} that could be taken out: what it returns would lose them, or they are all of one piece; "
                f"leave {kind.removesuffix('s')}_frac at 0"
            )
    return [group for group in coupling.groups if group.kind in kinds]


def importances(
    model: nn.Module,
    coupling: Coupling,
    groups: Sequence[Coupled],
    method: ChannelRemover,
    batches: Sequence[Mapping[str, Tensor]] | None,
) -> list[Ranked]:
    """The importance of every unit of these groups. CompressLabError naming the group that the method cannot judge."""
    ranked = []
    for group, members in members_of(model, coupling, groups, method.sees, batches):
        try:
            scores = _checked(method.score(members))
        except ValueError as error:
            raise CompressLabError(f"the {group.kind} that {group.name} makes: {error}") from error
        ranked.append(Ranked(name=group.name, kind=group.kind, shape=group.shape, scores=scores))
    return ranked


def _checked(scores: Tensor) -> Tensor:
    if not torch.isfinite(scores).all():
        raise ValueError("their importances are not finite")
    return scores.float().cpu()


def choose(method: ChannelRemover, ranked: Sequence[Ranked], coupling: Coupling) -> tuple[dict[str, Tensor], float]:
    """The units that stay, by group, and the share of the multiply-accumulates that this leaves.

    Raises:
        CompressLabError: if a layer would be emptied, or the method's macs_frac cannot be met.
    """
    whole = macs(coupling, {})

    def tried(scale: float) -> tuple[dict[str, Tensor], float]:
        keep = method.choose(ranked, scale)
        return keep, macs(coupling, keep) / max(whole, 1)

    if method.macs_frac is None:
        try:
            keep, left = tried(1.0)
        except ValueError as error:
            raise CompressLabError(str(error)) from None
        if not keep:
            raise CompressLabError("so few of so many channels, left in multiples, would take out none: take out more")
        return keep, left
    low, high, best = 0.0, _largest_scale(method), None
    least, emptied = 1.0, ""
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        try:
            keep, left = tried(middle)
        except ValueError as error:
            high, emptied = middle, f"; {error}"
            continue
        least = min(least, left)
        if left <= method.macs_frac:
            high, best = middle, (keep, left)
        else:
            low = middle
    if best is None:
        raise CompressLabError(
            f"{method.macs_frac:g} of the multiply-accumulates cannot be reached: the closest is {least:.3f}{emptied}"
        )
    return best


def _largest_scale(method: ChannelRemover) -> float:
    return 1 / min(share for kind in ("channel", "head", "width") if (share := getattr(method, f"{kind}_frac")))


def _told(groups: Sequence[Coupled], keep: Mapping[str, Tensor], left: float) -> list[str]:
    said = []
    for kind in dict.fromkeys(group.kind for group in groups):
        mine = [group for group in groups if group.kind == kind]
        gone = sum(group.count - len(keep[group.name]) for group in mine if group.name in keep)
        what = "channels of the embedding" if kind == "width" else kind
        places = "" if len(mine) == 1 else f" in {len(mine)} coupled groups"
        said.append(f"{gone} of {sum(group.count for group in mine)} {what}{places} taken out")
    return [*said, f"{left:.1%} of the multiply-accumulates left"]


# ---------------------------------------------------------------------------------------------------------------------
# What methods want to know
# ---------------------------------------------------------------------------------------------------------------------


def members_of(
    model: nn.Module,
    coupling: Coupling,
    groups: Sequence[Coupled],
    sees: str,
    batches: Sequence[Mapping[str, Tensor]] | None,
) -> Iterator[tuple[Coupled, list[Member]]]:
    """Every group with its members: weights alone, or with what is seen of them on the samples of all batches.

    Args:
        model: the whole network in float32.
    """
    parameters = dict(model.named_parameters())
    times = {work.tensor: 0 for work in coupling.work}
    for work in coupling.work:
        times[work.tensor] += work.times
    slices = {
        (piece.tensor, piece.axis): piece for group in groups for piece in group.slices if piece.tensor in parameters
    }
    products: dict[tuple[str, int], Tensor] = {}
    inputs: dict[tuple[str, int], Tensor] = {}
    if sees == "gradients":
        products = _products(model, slices, batches)
    elif sees == "inputs":
        inputs = _inputs(model, slices, batches)
    for group in groups:
        members = []
        for piece in group.slices:
            if piece.tensor not in parameters:
                continue  # statistics of a batch norm
            key, index = (piece.tensor, piece.axis), piece.index.to(parameters[piece.tensor].device)
            weight = parameters[piece.tensor].detach().float().movedim(piece.axis, 0)[index].flatten(1)
            members.append(Member(role=piece.role, weight=weight, work=weight.shape[1] * times.get(piece.tensor, 0),
                                  products=_of_units(products.get(key), index),
                                  inputs=_of_units(inputs.get(key), index)))  # fmt: skip
        yield group, members


def _of_units(found: Tensor | None, index: Tensor) -> Tensor | None:
    """[samples, n] by entries -> [samples, units], summed over what each unit owns."""
    return None if found is None else found[:, index].sum(dim=-1)


def _samples(model: nn.Module, batches: Sequence[Mapping[str, Tensor]] | None) -> Iterator[dict[str, Tensor]]:
    device = next(model.parameters()).device
    if not batches:
        raise CompressLabError("this method of taking out channels needs calibration data: name it with --data")
    for batch in batches:
        for row in range(len(next(iter(batch.values())))):
            yield {key: value[row : row + 1].to(device) for key, value in batch.items()}


def _without_labels(sample: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in sample.items() if key != "labels"}


def _products(
    model: nn.Module, slices: Mapping[tuple[str, int], Slice], batches: Sequence[Mapping[str, Tensor]] | None
) -> dict[tuple[str, int], Tensor]:
    """weight times gradient, summed over all but one axis: float32 [samples, n] by parameter and axis."""
    parameters = {
        name: parameter for name, parameter in model.named_parameters() if any(name == own for own, _ in slices)
    }
    found: dict[tuple[str, int], list[Tensor]] = {key: [] for key in slices}
    generator = torch.Generator().manual_seed(0)
    model.requires_grad_(False)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    for sample in _samples(model, batches):
        with torch.enable_grad():
            loss = loss_of(model, sample, generator)
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
            product = parameter.detach() * gradient
            for axis in [axis for own, axis in slices if own == name]:
                found[name, axis].append(
                    product.sum(dim=[i for i in range(product.dim()) if i != axis]) if product.dim() > 1 else product
                )
    model.requires_grad_(False)
    return {key: torch.stack(rows) for key, rows in found.items()}


def _inputs(
    model: nn.Module, slices: Mapping[tuple[str, int], Slice], batches: Sequence[Mapping[str, Tensor]] | None
) -> dict[tuple[str, int], Tensor]:
    """The mean over positions of |x|, of what layers read: float32 [samples, in] by weight and axis."""
    found: dict[tuple[str, int], list[Tensor]] = {}
    handles = []
    once = {id(parameter): name for name, parameter in model.named_parameters()}

    def watch(key: tuple[str, int], channels_first: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            x = args[0].detach().float().abs()
            x = x.movedim(1, -1) if channels_first else x
            found.setdefault(key, []).append(x.flatten(0, -2).mean(dim=0))

        return hook

    for module in model.modules():
        weight = getattr(module, "weight", None)
        if is_linear(module) and id(weight) in once:
            axis = 0 if is_transposed(module) else 1
            piece = slices.get((once[id(weight)], axis))
            if piece is not None and piece.role == "reads":
                handles.append(
                    module.register_forward_pre_hook(watch((once[id(weight)], axis), isinstance(module, nn.Conv2d)))
                )
    count = 0
    try:
        with torch.no_grad():
            for sample in _samples(model, batches):
                model(**_without_labels(sample))
                count += 1
    finally:
        for handle in handles:
            handle.remove()
    return {
        key: torch.stack(rows).unflatten(0, (count, -1)).mean(dim=1)
        for key, rows in found.items()
        if len(rows) % count == 0
    }


def loss_of(model: nn.Module, sample: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
    """The loss of one sample; see the top of this file."""
    labels = sample.get("labels")
    returned = model(**_without_labels(sample))
    logits = returned.logits if hasattr(returned, "logits") else returned if isinstance(returned, Tensor) else None
    if logits is not None and models.is_language_model(model):
        return nn.functional.cross_entropy(logits[0, :-1].float(), sample["input_ids"][0, 1:])
    if logits is not None and labels is not None:
        return nn.functional.cross_entropy(logits.float(), labels)
    if logits is not None:
        drawn = torch.multinomial(logits.detach().float().softmax(dim=-1).flatten(0, -2).cpu(), 1, generator=generator)[
            :, 0
        ]
        return nn.functional.cross_entropy(logits.float().flatten(0, -2), drawn.to(logits.device))
    values = next(value for value in returned.values() if isinstance(value, Tensor)).float()
    noise = torch.randn(values.shape, generator=generator).to(values.device)
    if (mask := sample.get("attention_mask")) is not None:
        noise = noise * mask[..., None]
    return (values * noise).sum() / values[..., 0].numel()

"""Damage: what each choice for a layer does to the model, measured on the uncompressed network.

Five ways to know (the mathematics is in search/sensitivity.py), from the one that runs no model to the one that runs it most:

    gram             the noise of the layer's output relative to the output; needs no loss
    fisher           that noise weighted by what the next-token distribution makes of it: one backward pass. The default.
    hessian          HAWQ-V2: the trace of the loss's Hessian, by Hutchinson's probes, times the squared error of the weight
    kl               the divergence when a layer is rounded at its least width, and from there in proportion to the noise
    leave-one-out    the divergence of every layer at every width, outright

All but gram have the whole model in memory, once, and read a few windows of the calibration text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from compresslab import models
from compresslab.errors import CompressLabError, unknown
from compresslab.models import Source, is_transposed, weight_of
from compresslab.numerics.curvature import hessian_product, random_signs
from compresslab.numerics.gram import Statistic
from compresslab.search.sensitivity import fisher_noise, kl_divergence, output_noise, trace_noise
from compresslab.solving import Pass

# Tokens that the measures with a model read: windows, and the beginnings of those.
FISHER_WINDOWS, FISHER_TOKENS = 8, 512
KL_WINDOWS, KL_TOKENS = 4, 128
PROBES = 8


class Damage(Protocol):
    def __call__(self, name: str, weight: Tensor, rounded: Tensor, gram: Statistic | None) -> float:
        """What replacing `weight` by `rounded`, both float32 [out, in], does; called from the narrowest choice to the widest."""
        ...


def damage_of(sensitivity: str | None, calibration: Pass, recipe_name: str) -> tuple[str, Damage]:
    """The measure of that name, or the best that this model and recipe have.

    Returns:
        Its name, and the measure.

    Raises:
        CompressLabError: unknown, or one that needs calibration text or a language model where there is none.
    """
    name = sensitivity or best_sensitivity(calibration.source, calibration.batches is not None)
    if name not in SENSITIVITIES:
        raise unknown("sensitivity", name, SENSITIVITIES)
    if name != "gram" and calibration.batches is None:
        raise CompressLabError(
            f"sensitivity '{name}' runs the model on calibration text, which recipe '{recipe_name}' does not use: "
            "take a recipe such as w4a16-gptq, or sensitivity 'gram'"
        )
    if name != "gram" and not models.is_language_model(calibration.source.skeleton()):
        raise CompressLabError(
            f"sensitivity '{name}' compares next-token distributions, and {calibration.source.architecture} has none: "
            "take sensitivity 'gram'"
        )
    return name, SENSITIVITIES[name](calibration)


def best_sensitivity(source: Source, has_text: bool) -> str:
    """fisher for a language model with calibration text, gram for all else."""
    return "fisher" if has_text and models.is_language_model(source.skeleton()) else "gram"


class OutputNoise:
    def __init__(self, calibration: Pass) -> None:
        pass

    def __call__(self, name: str, weight: Tensor, rounded: Tensor, gram: Statistic | None) -> float:
        return output_noise(weight, rounded, gram)


class Fisher:
    """The loss's curvature at every layer's output, from gradients; in the compute dtype."""

    def __init__(self, calibration: Pass) -> None:
        model = whole_model(calibration.source, calibration.device, calibration.compute_dtype)
        self.importance = output_importance(
            model, calibration.plan.layers, first_windows(calibration, FISHER_WINDOWS, FISHER_TOKENS)
        )
        reached = [found.mean() for found in self.importance.values()]
        self.usual = torch.stack(reached).mean() if reached else torch.ones(())

    def __call__(self, name: str, weight: Tensor, rounded: Tensor, gram: Statistic | None) -> float:
        # An expert that these few windows did not reach is taken to matter as much as the others.
        importance = self.importance.get(name, self.usual.expand(len(weight)))
        return fisher_noise(weight, rounded, gram, importance)


def output_importance(model: nn.Module, layers: Any, batch: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """E[g^2], float32 [out], of every layer that a token reached: squared gradients of -log p with respect to its output.

    Args:
        batch: windows; the labels are drawn from the model's own distribution.
    """
    sums: dict[str, Tensor] = {}
    tokens = 0
    handles = []

    def watch(name: str) -> Callable[..., None]:
        def add(gradient: Tensor) -> None:
            squared = gradient.float().square().flatten(0, -2).sum(dim=0)
            sums[name] = sums[name] + squared if name in sums else squared

        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(add)

        return hook

    for name in layers:
        handles.append(model.get_submodule(name).register_forward_hook(watch(name)))
    generator = torch.Generator().manual_seed(seed)
    try:
        with torch.enable_grad(), _gradients_from_the_first_layer(model):
            for row in range(len(batch["input_ids"])):
                window = {key: value[row : row + 1] for key, value in batch.items()}
                logits = _real_logits(model, window)
                drawn = torch.multinomial(logits.detach().softmax(dim=-1).cpu(), 1, generator=generator).to(
                    logits.device
                )
                (-logits.log_softmax(dim=-1).gather(1, drawn).sum()).backward()
                tokens += len(logits)
    finally:
        for handle in handles:
            handle.remove()
    return {name: found / max(tokens, 1) for name, found in sums.items()}


@contextmanager
def _gradients_from_the_first_layer(model: nn.Module) -> Iterator[None]:
    """Have gradients flow through all layers without one being kept for any weight: from the embedding's output on."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    handle = embedding.register_forward_hook(lambda module, args, output: output.detach().requires_grad_(True))
    try:
        yield
    finally:
        handle.remove()


class Hessian:
    """The trace of the Hessian of the loss per token with respect to each layer's weight; in float32."""

    def __init__(self, calibration: Pass) -> None:
        # The fused attention kernels have no second derivative.
        model = whole_model(calibration.source, calibration.device, torch.float32, attention="eager")
        batch = first_windows(calibration, KL_WINDOWS, KL_TOKENS)
        self.traces = hessian_traces(model, calibration.plan.layers, batch, PROBES)

    def __call__(self, name: str, weight: Tensor, rounded: Tensor, gram: Statistic | None) -> float:
        return trace_noise(weight, rounded, self.traces[name])


def hessian_traces(
    model: nn.Module, layers: Any, batch: dict[str, Tensor], probes: int, seed: int = 0
) -> dict[str, float]:
    """tr of the Hessian of the mean next-token loss, by layer: the mean of v^T (Hess v) over random signs v (Hutchinson)."""
    weights = {name: weight_of(model.get_submodule(name)) for name in layers}
    generator = torch.Generator().manual_seed(seed)
    sums = dict.fromkeys(weights, 0.0)
    for weight in weights.values():
        weight.requires_grad_(True)
    try:
        with torch.enable_grad():
            for probe in range(probes):
                row = probe % len(batch["input_ids"])
                window = {key: value[row : row + 1] for key, value in batch.items()}
                logits = model(**window, use_cache=False).logits[0, :-1].float()
                loss = nn.functional.cross_entropy(logits, window["input_ids"][0, 1:])
                signs = random_signs(list(weights.values()), generator)
                products = hessian_product(loss, list(weights.values()), signs)
                for name, product, v in zip(weights, products, signs, strict=True):
                    sums[name] += float((product * v).sum()) / probes
    finally:
        for weight in weights.values():
            weight.requires_grad_(False)
    return sums


class LeaveOneOut:
    """What rounding one layer alone does to the next-token distributions; in float32."""

    def __init__(self, calibration: Pass) -> None:
        self.model = whole_model(calibration.source, calibration.device, torch.float32)
        self.batch = first_windows(calibration, KL_WINDOWS, KL_TOKENS)
        self.reference = self._logits()

    def __call__(self, name: str, weight: Tensor, rounded: Tensor, gram: Statistic | None) -> float:
        module = self.model.get_submodule(name)
        kept = module._parameters["weight"]
        swapped = rounded.t() if is_transposed(module) else rounded
        module._parameters["weight"] = nn.Parameter(swapped, requires_grad=False)
        try:
            return kl_divergence(self.reference, self._logits())
        finally:
            module._parameters["weight"] = kept

    def _logits(self) -> Tensor:
        with torch.inference_mode():
            return _real_logits(self.model, self.batch)


class Divergence(LeaveOneOut):
    """One such measurement per layer, at the width that is asked for first; the others follow from their noise."""

    def __init__(self, calibration: Pass) -> None:
        super().__init__(calibration)
        self.coefficients: dict[str, float] = {}

    def __call__(self, name: str, weight: Tensor, rounded: Tensor, gram: Statistic | None) -> float:
        noise = output_noise(weight, rounded, gram)
        if name not in self.coefficients:
            self.coefficients[name] = super().__call__(name, weight, rounded, gram) / noise if noise else 0.0
        return self.coefficients[name] * noise


SENSITIVITIES: dict[str, Callable[[Pass], Damage]] = {
    "gram": OutputNoise,
    "fisher": Fisher,
    "hessian": Hessian,
    "kl": Divergence,
    "leave-one-out": LeaveOneOut,
}


def tokens_read(sensitivity: str, layers: int, widths: int) -> int:
    """How many tokens pass through the whole model, a backward counted as two passes and a second derivative as six.

    Args:
        widths: how many choices there are for each layer, halves among them.
    """
    batch = KL_WINDOWS * KL_TOKENS
    return {
        "gram": 0,
        "fisher": 3 * FISHER_WINDOWS * FISHER_TOKENS,
        "hessian": 9 * PROBES * KL_TOKENS,
        "kl": batch * (layers + 1),
        "leave-one-out": batch * (layers * widths + 1),
    }[sensitivity]


def first_windows(calibration: Pass, windows: int, tokens: int) -> dict[str, Tensor]:
    """The first calibration windows, cut to `tokens`, on the device."""
    assert calibration.batches is not None
    keys = calibration.batches[0].keys()
    found = {key: torch.cat([batch[key] for batch in calibration.batches[:windows]]) for key in keys}
    return {key: value[:windows, :tokens].to(calibration.device) for key, value in found.items()}


def _real_logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Of every token that is no padding, float32 [tokens, vocabulary]."""
    logits = model(**batch, use_cache=False).logits.float()
    mask = batch.get("attention_mask")
    return logits.flatten(0, 1) if mask is None else logits[mask.bool()]


def whole_model(source: Source, device: torch.device, dtype: torch.dtype, attention: str | None = None) -> nn.Module:
    """The model with all its weights, from the source itself: that may be an object, or smoothed, and lie in no folder."""
    model = source.skeleton(attention)
    names = set(model.state_dict()) & set(source.weights.names())
    stored = {name: source.weights.get(name).to(device) for name in names}
    floats = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in stored.items()}
    model.load_state_dict(floats, strict=False, assign=True)
    for module in model.modules():  # tables that no checkpoint has
        module._buffers.update({k: v.to(device) for k, v in module._buffers.items() if v is not None and not v.is_meta})
    models.tie_weights(model)
    return model.requires_grad_(False)

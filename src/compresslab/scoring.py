"""Pruning by what weights mean to the whole network: scores, one threshold, masks; in rounds.

recipe -> the whole network in memory (damage.py opens it) as a function of the planned layers' weights -> scores of what is left
in every round (prune/rounds.py) -> a mask for every layer, which the driver applies like any pruner's (pruning.py, masks.py).

A method (contract.NetworkPruner) sees losses and flows as functions of weights [out, in], and knows nothing of models. A run that
was killed scores again, finds the same masks, and goes on from there.

Sources: the methods' papers (prune/). Oracle: tests/oracles/saliency.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from compresslab.contract import Loss, NetworkPruner, Pruner, Scores, Weights
from compresslab.damage import whole_model
from compresslab.data.labelled import Example
from compresslab.errors import CompressLabError
from compresslab.models import PROPORTIONAL_ATTENTION, Source, is_language_model, is_transposed
from compresslab.positive import make_positive_, ones_for
from compresslab.prune.rounds import Found, asking, prune_in_rounds
from compresslab.pruning import Marked
from compresslab.solving import Pass, read_weight
from compresslab.training import IGNORED_LABEL, collate

TOKENS, EXAMPLES = 1024, 64  # in a batch whose size is ours to choose: logits of text are wide, pictures small


@dataclass(frozen=True, kw_only=True)
class WholeNetwork:
    """contract.Network of a source, without anything of it being changed.

    Attributes:
        weights: of the layers that may be pruned, float32 [out, in], asking for gradients.
        examples: what the network takes, each with "labels": a class, or the tokens of the text itself.
        dtype: of the forward.
        attention: transformers' name of it; None for its own choice.
        in_training: have batch norms use the statistics of the batch, as a network that was never trained needs.
        opened: what is in memory already; networks that differ in their weights alone share it.
    """

    source: Source
    weights: Weights
    examples: Sequence[Example] = ()
    seed: int = 0
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    attention: str | None = None
    in_training: bool = False
    opened: dict[str, Any] = dataclasses.field(default_factory=dict)

    def losses(self, size: int | None = None, *, temperature: float = 1.0) -> Iterator[tuple[float, Loss]]:
        for share, batch in self._batches(size):

            def loss(weights: Weights, batch: dict[str, Tensor] = batch) -> Tensor:
                logits, labels = self._predictions(weights, batch)
                return nn.functional.cross_entropy(logits / temperature, labels)

            yield share, loss

    def drawn_losses(self, draw: int) -> Iterator[tuple[float, Loss]]:
        generator = torch.Generator().manual_seed(self.seed * 7919 + draw)
        for share, batch in self._batches(None):

            def loss(weights: Weights, batch: dict[str, Tensor] = batch) -> Tensor:
                logits, _ = self._predictions(weights, batch)
                drawn = torch.multinomial(logits.detach().softmax(dim=-1).cpu(), 1, generator=generator)[:, 0]
                drawn = drawn.to(logits.device)
                return nn.functional.cross_entropy(logits, drawn, reduction="sum") / len(logits) ** 0.5

            yield share, loss

    def flow(self, weights: Weights) -> Tensor:
        model, ones = self._positive
        output = torch.func.functional_call(model, self._as_kept(weights, model, torch.float64), kwargs=ones)
        values = [x for x in output.values() if isinstance(x, Tensor) and x.is_floating_point()]
        return values[0].sum()

    def _batches(self, size: int | None) -> Iterator[tuple[float, dict[str, Tensor]]]:
        """Batches on the device, each with its share of all labels."""
        if not self.examples:
            raise ValueError("it is scored on examples, and there are none: name data")
        if size is None:
            longest = max(len(example.get("input_ids", ())) for example in self.examples)
            size = max(TOKENS // longest, 1) if longest else EXAMPLES
        batches = [collate(self.examples[i : i + size]) for i in range(0, len(self.examples), size)]
        counts = [int((_targets(batch["labels"], self._reads_itself) != IGNORED_LABEL).sum()) for batch in batches]
        for batch, count in zip(batches, counts, strict=True):
            if count:
                yield count / sum(counts), {key: value.to(self.device) for key, value in batch.items()}

    @cached_property
    def _reads_itself(self) -> bool:
        return is_language_model(self.source.skeleton())

    @property
    def _model(self) -> nn.Module:
        if "model" not in self.opened:
            model = whole_model(self.source, self.device, self.dtype, attention=self.attention)
            if self.in_training:
                for module in model.modules():
                    if isinstance(module, nn.modules.batchnorm._BatchNorm):
                        module.train().momentum = 0.0  # the statistics of the batch are used, and not remembered
            self.opened["model"] = model
        found: nn.Module = self.opened["model"]
        return found

    @property
    def _positive(self) -> tuple[nn.Module, dict[str, Tensor]]:
        if "positive" not in self.opened:
            model = whole_model(self.source, self.device, torch.float64, attention=PROPORTIONAL_ATTENTION)
            make_positive_(model)
            self.opened["positive"] = model, ones_for(self.source, model, torch.float64, self.device)
        found: tuple[nn.Module, dict[str, Tensor]] = self.opened["positive"]
        return found

    def _as_kept(self, weights: Weights, model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        """Weights [out, in] as the modules keep them."""
        kept = {}
        for layer, weight in weights.items():
            module: Any = model.get_submodule(layer)
            kept[f"{layer}.weight"] = (weight.t() if is_transposed(module) else weight.view(module.weight.shape)).to(
                dtype
            )
        return kept

    def _predictions(self, weights: Weights, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits [n, classes] in float32, or better, of everything that has a label, and these labels [n]."""
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        more: dict[str, Any] = {"use_cache": False} if self._reads_itself else {}
        output = torch.func.functional_call(
            self._model, self._as_kept(weights, self._model, self.dtype), kwargs=_in_dtype(inputs, self.dtype) | more
        )
        labels = _targets(batch["labels"], self._reads_itself)
        logits = output.logits[:, :-1] if self._reads_itself else output.logits
        told = labels != IGNORED_LABEL
        return logits[told].to(torch.promote_types(logits.dtype, torch.float32)), labels[told]


def _targets(labels: Tensor, reads_itself: bool) -> Tensor:
    return labels[:, 1:] if reads_itself else labels


def _in_dtype(inputs: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {key: x.to(dtype) if x.is_floating_point() else x for key, x in inputs.items()}


def network_of(calibration: Pass, layers: Sequence[str], method: NetworkPruner, examples: Sequence[Example],
               seed: int = 0, *, in_training: bool = False) -> WholeNetwork:  # fmt: skip
    """The network of a source, with the weights of these layers to be pruned.

    Raises:
        CompressLabError: examples without labels, or with labels that are no classes.
    """
    source, skeleton = calibration.source, calibration.source.skeleton()
    dimensions = 1 if is_language_model(skeleton) else 0
    for example in examples:
        labels = example.get("labels")
        if labels is None or labels.is_floating_point() or labels.dim() != dimensions:
            raise CompressLabError(
                f"to score the weights of {source.name} every example needs 'labels' that are classes: give such examples, or "
                "take a method without data, such as synflow"
            )
    weights = {
        layer: read_weight(source, layer, skeleton.get_submodule(layer))
        .to(calibration.device, torch.float32)
        .contiguous()
        for layer in layers
    }
    return WholeNetwork(
        source=source,
        weights=asking(weights),
        examples=_some(examples, method.examples, seed),
        seed=seed,
        device=calibration.device,
        dtype=torch.float32 if method.second_order else calibration.compute_dtype,
        attention="eager" if method.second_order else None,  # the fused kernels have no second derivative
        in_training=in_training,
    )


def _some(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """`count` of them at most, picked by the seed."""
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    return [examples[i] for i in sorted(order[:count])]


def find_masks(method: NetworkPruner, network: Any, on_round: Callable[[], None] = lambda: None) -> Found:
    """Masks in which the method's share of the weights is zero, to the last one.

    Args:
        network: a contract.Network that is a dataclass, whose `weights` can be replaced.

    Raises:
        ValueError: scores that are no numbers.
    """
    original = {layer: weight.detach() for layer, weight in network.weights.items()}

    def score(weights: Weights) -> Scores:
        return method.score(dataclasses.replace(network, weights=weights))

    found = prune_in_rounds(
        score, original, sparsity=method.sparsity, rounds=method.rounds, scope=method.scope, on_round=on_round
    )
    if not method.shuffled:
        return found
    kept = _shuffled(found.kept, network.seed)
    return Found(kept=kept, weights={layer: original[layer] * kept[layer] for layer in kept})


def _shuffled(kept: Weights, seed: int) -> dict[str, Tensor]:
    """As many ones in every mask, in other places."""
    generator = torch.Generator().manual_seed(seed)
    return {
        x: mask.flatten()[torch.randperm(mask.numel(), generator=generator)].view_as(mask) for x, mask in kept.items()
    }


def scored(
    calibration: Pass, pruners: Mapping[str, Pruner], method: NetworkPruner, examples: Sequence[Example], seed: int,
    on_round: Callable[[], None] = lambda: None,
) -> dict[str, Pruner]:  # fmt: skip
    """Pruners that have the masks which the method finds for their layers.

    Raises:
        CompressLabError: if the network cannot be scored, or a layer would be emptied.
    """
    network = network_of(calibration, list(pruners), method, examples, seed)
    try:
        found = find_masks(method, network, on_round)
    except ValueError as error:
        raise CompressLabError(f"{calibration.source.name} cannot be pruned so: {error}") from None
    for layer, kept in found.kept.items():
        if not kept.any():
            raise CompressLabError(
                f"layer {layer} would be emptied: all of its weights are below the threshold for a sparsity of "
                f"{method.sparsity:g}. Lower it, set scope=layer, raise rounds, or leave the layer alone with --ignore '{layer}'"
            )
    return {
        layer: Marked(sparsity=1 - int(kept.sum()) / kept.numel(), weight=found.weights[layer].cpu())
        for layer, kept in found.kept.items()
    }

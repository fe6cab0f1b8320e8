"""Classification: how often a classifier is right, class by class, and where it changed its mind.

predicted and true classes [n] -> counts per example -> accuracy, precision, recall and F1, macro and micro.
Oracle: scikit-learn.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from compresslab.errors import CompressLabError
from compresslab.measure.environment import device_label
from compresslab.measure.intervals import Array, Scored, mean


def classify(model: nn.Module, batches: Iterable[Tensor]) -> Tensor:
    """The class that an image classifier gives to each picture, int64 [n].

    Args:
        model: returns logits [batch, classes].
        batches: pixel_values [b, channels, height, width].
    """
    first = next(model.parameters())
    with torch.inference_mode():
        parts = [model(pixel_values=b.to(first.device, first.dtype)).logits.argmax(dim=1).cpu() for b in batches]
    return torch.cat(parts)


def classify_texts(model: nn.Module, batch: dict[str, Tensor], *, batch_size: int = 32) -> Tensor:
    """The class that a classifier gives to each example of one batch, which may hold "labels"; int64 [n]."""
    device = next(model.parameters()).device
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    count = len(next(iter(inputs.values())))
    with torch.inference_mode():
        found = [
            model(**{k: v[start : start + batch_size].to(device) for k, v in inputs.items()}).logits.argmax(-1).cpu()
            for start in range(0, count, batch_size)
        ]
    return torch.cat(found)


def scores(
    predicted: Tensor, labels: Tensor, *, name: str = "accuracy", units: str = "examples",
    device: torch.device | str = "cpu", conditions: str = "",
) -> list[Scored]:  # fmt: skip
    """Accuracy, then precision, recall and F1 as means over the classes (macro), and F1 over all decisions (micro).

    Classes are those seen among labels or predictions. Where a class was never predicted its precision counts as 0, as
    scikit-learn has it with zero_division=0; so does the F1 of a class in neither. With one class for each example micro F1,
    precision and recall are the accuracy.

    Args:
        predicted, labels: int64 [n].
        name: what to call the accuracy.
    """
    if predicted.shape != labels.shape or not len(labels):
        raise CompressLabError(
            f"{len(predicted)} predictions for {len(labels)} labels: there must be as many, and some"
        )
    seen, flat = np.unique(torch.stack([predicted, labels]).numpy(), return_inverse=True)
    given, true = np.eye(len(seen))[flat.reshape(2, -1)]
    parts = np.concatenate([given * true, given, true], axis=1)  # hits, predictions and labels of each class
    made = partial(Scored, units=units, device=device_label(device), conditions=conditions)
    right = (predicted == labels).double().numpy()[:, None]
    return [
        made(name=name, parts=right, of=mean),
        *(made(name=kind, parts=parts, of=of) for kind, of in _BY_CLASS.items()),
    ]


def agreement(
    reference: Tensor, predicted: Tensor, labels: Tensor | None = None, *, units: str = "examples",
    device: torch.device | str = "cpu", conditions: str = "",
) -> list[Scored]:  # fmt: skip
    """Share of examples put into the class that the uncompressed model gives, right or wrong; and with labels the flips.

    A flip is an answer that was right and is wrong now, or the other way round.
    """
    said = "against the uncompressed model's class" + (f", {conditions}" if conditions else "")
    made = partial(Scored, of=mean, units=units, device=device_label(device), conditions=said)
    found = [made(name="top1_agreement", parts=(reference == predicted).double().numpy()[:, None])]
    if labels is not None:
        flipped = (reference == labels) != (predicted == labels)
        found.append(made(name="flips", parts=flipped.double().numpy()[:, None]))
    return found


def _totals(parts: Array, counts: Array) -> tuple[Array, Array, Array, Array]:
    """Hits, predictions, labels [resamples, classes] and which classes are among the latter two."""
    hits, given, true = np.split(counts @ parts, 3, axis=1)
    return hits, given, true, ((given + true) > 0).astype(np.float64)


def _share(of: Array, all_: Array) -> Array:
    return np.divide(of, all_, out=np.zeros_like(of), where=all_ > 0)


def _over_classes(values: Array, present: Array) -> Array:
    return (values * present).sum(axis=1) / present.sum(axis=1)


def _precision(parts: Array, counts: Array) -> Array:
    hits, given, _, present = _totals(parts, counts)
    return _over_classes(_share(hits, given), present)


def _recall(parts: Array, counts: Array) -> Array:
    hits, _, true, present = _totals(parts, counts)
    return _over_classes(_share(hits, true), present)


def _f1_macro(parts: Array, counts: Array) -> Array:
    hits, given, true, present = _totals(parts, counts)
    return _over_classes(_share(2 * hits, given + true), present)


def _f1_micro(parts: Array, counts: Array) -> Array:
    hits, given, true, _ = _totals(parts, counts)
    return 2 * hits.sum(axis=1) / (given + true).sum(axis=1)


_BY_CLASS = {"precision_macro": _precision, "recall_macro": _recall, "f1_macro": _f1_macro, "f1_micro": _f1_micro}

"""How far a compressed language model is from the uncompressed one, token by token, in the pass that gives its perplexity.

    uncompressed model, window by window -> what its head reads -> one safetensors file per window, and the head once
    compressed model, window by window -> its logits, beside those the stored head makes -> KL, top-1 agreement, flips

The reference keeps the input of the head, [L, hidden], and not its logits, [L, vocabulary]: for SmolLM2-135M 1.2 MB a window
of 512 tokens in place of 101 MB, and exact, for the head is run again. Both models are never in memory together: besides the
model there is the one head and, for CHUNK tokens at a time, log-probabilities of both. A model whose logits are more than its
head's output (Gemma 2 caps them) has its log-probabilities stored in float32 instead, and the conditions say so.

Flips are after Dutta et al., "Accuracy is Not All You Need" (2024): answers that were right and are wrong now, or the other way.
Oracle: KL by brute force in float64 from the logits of both models held at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compresslab.errors import CompressLabError
from compresslab.measure import perplexity
from compresslab.measure.environment import device_label
from compresslab.measure.intervals import Scored, ratio

CHUNK = 64  # tokens whose log-probabilities are held at once
HEAD = "head.safetensors"


def read(
    model: nn.Module, windows: Tensor, *, record: Path | None = None, against: Path | None = None, conditions: str = "",
    batch_size: int = 1,
) -> list[Scored]:  # fmt: skip
    """Perplexity of a causal language model, and its agreement with a recorded one.

    Args:
        windows: int64 [n, L], of which batch_size pass through the model at a time.
        record: a folder to make, with what `against` of another model needs.
        against: such a folder, of the same windows.

    Returns:
        perplexity; with `against` also kl_divergence (nats per token, from the recorded model to this one), top1_agreement
        and flips.

    Raises:
        CompressLabError: if `against` was recorded of other windows or of another vocabulary.
    """
    device = next(model.parameters()).device
    recorder = _Recorder(model, record) if record is not None else None
    reference = _Reference(against, device) if against is not None else None
    losses, compared = [], []
    with torch.inference_mode():
        for first, batch in zip(itertools.count(0, batch_size), windows.to(device).split(batch_size), strict=False):
            for place, logits in enumerate(model(input_ids=batch, use_cache=False).logits):
                i, window = first + place, batch[place]
                losses.append(perplexity.window_loss(logits, window))
                if recorder is not None:
                    recorder.write(i, place, window, logits)
                if reference is not None:
                    compared.append(compare(reference.logits_of(i, window), logits[:-1], window[1:]))
    if recorder is not None:
        recorder.close()
    found = [perplexity.of_losses(losses, windows, model, conditions)]
    if reference is None:
        return found
    parts = np.concatenate([np.array(compared), np.full((len(windows), 1), windows.shape[1] - 1.0)], axis=1)
    names = {"kl_divergence": "nats/token", "top1_agreement": "1", "flips": "1"}
    said = f"{windows.shape[1]} tokens each, against the uncompressed model{reference.said}"
    more = [
        Scored(
            name=name, parts=parts[:, [k, 3]], of=ratio, units="windows", unit=unit, n=int(parts[:, 3].sum()),
            device=device_label(device), conditions=said + (f", {conditions}" if conditions else ""),
        )
        for k, (name, unit) in enumerate(names.items())
    ]  # fmt: skip
    return found + more


def compare(reference: Callable[[slice], Tensor], logits: Tensor, labels: Tensor) -> tuple[float, float, float]:
    """Sums over tokens of KL(reference || model), of equal first choices, and of choices right in one of both alone.

    Args:
        reference: some tokens -> logits [t, vocabulary] of the uncompressed model.
        logits: [tokens, vocabulary].
        labels: int64 [tokens].
    """
    total = torch.zeros(3, dtype=torch.float64)
    for start in range(0, len(labels), CHUNK):
        rows = slice(start, min(start + CHUNK, len(labels)))
        ours = logits[rows].float().log_softmax(dim=1)
        theirs = reference(rows).float().log_softmax(dim=1)
        if ours.shape != theirs.shape:
            raise CompressLabError(
                f"a vocabulary of {ours.shape[1]} tokens against one of {theirs.shape[1]}: their logits cannot be compared"
            )
        kl = nn.functional.kl_div(ours, theirs, log_target=True, reduction="none").sum(dim=1)
        mine, its, right = ours.argmax(dim=1), theirs.argmax(dim=1), labels[rows]
        flipped = (mine == right) != (its == right)
        total += torch.stack([kl.double().sum(), (mine == its).sum().double(), flipped.sum().double()]).cpu()
    return float(total[0]), float(total[1]), float(total[2])


class _Recorder:
    """Writes what the head of a model reads, window by window."""

    def __init__(self, model: nn.Module, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        head = getattr(model, "get_output_embeddings", lambda: None)()
        self._head = head if isinstance(head, nn.Linear) else None
        self._hidden: Tensor | None = None
        self._handle = None if self._head is None else self._head.register_forward_pre_hook(self._keep)
        if self._head is not None:
            tensors = {"weight": self._head.weight, "bias": self._head.bias}
            save_file({k: v.detach().cpu().clone() for k, v in tensors.items() if v is not None}, folder / HEAD)

    def _keep(self, head: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._hidden = inputs[0]

    def write(self, number: int, place: int, window: Tensor, logits: Tensor) -> None:
        """What the head read of a window, which was at this place of the last batch."""
        found = {"tokens": window.cpu()}
        hidden = None if self._hidden is None else self._hidden[place]
        if hidden is not None and self._head_is_all(hidden, logits):
            found["hidden"] = hidden[:-1].cpu().clone()
        else:
            found["log_probabilities"] = logits[:-1].float().log_softmax(dim=1).cpu()
        save_file(found, self._folder / f"{number}.safetensors")

    def _head_is_all(self, hidden: Tensor, logits: Tensor) -> bool:
        assert self._head is not None
        again = nn.functional.linear(hidden[:8], self._head.weight, self._head.bias)
        return torch.allclose(again.float(), logits[:8].float(), rtol=1e-3, atol=1e-3)

    def close(self) -> None:
        if self._handle is not None:
            self._handle.remove()


class _Reference:
    """Reads what a _Recorder wrote."""

    said = ""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._folder, self._device = folder, device
        self._head = load_file(folder / HEAD, device=str(device)) if (folder / HEAD).exists() else {}

    def logits_of(self, number: int, window: Tensor) -> Callable[[slice], Tensor]:
        path = self._folder / f"{number}.safetensors"
        if not path.exists():
            raise CompressLabError(f"{self._folder} has no window {number}: record the reference on the same windows")
        stored = load_file(path, device=str(self._device))
        if not torch.equal(stored["tokens"], window):
            raise CompressLabError(f"{path} is of another window: record the reference on the same data")
        if "hidden" in stored:
            hidden, weight, bias = stored["hidden"], self._head["weight"], self._head.get("bias")
            return lambda rows: nn.functional.linear(hidden[rows], weight, bias)
        self.said = ", its log-probabilities stored in float32"
        return lambda rows: stored["log_probabilities"][rows]

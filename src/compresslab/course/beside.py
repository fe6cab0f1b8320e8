"""Other frameworks beside a lab's own rows: the same network, the same windows, the same test, in environments of their own.

lab, settings, seed -> the network as a folder, calibration and test windows as files -> every peer that the lab's
experiment lists in PEERS, asked by peers.asking -> perplexity and bytes of its answer. A peer whose float loss is not ours
has measured something else: an error. One that fails is written down as failed, and the lab goes on.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from compresslab import models
from compresslab.course import character_model
from compresslab.course.trials import TextSettings, material
from compresslab.errors import CompressLabError
from compresslab.peers import asking, environments, registry

SAME_FLOAT = 0.01  # of the perplexity: a peer may open the network in the 16 bits that it is stored in


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A row that a peer is asked for.

    Attributes:
        row: its name; the lab's words know it as "peer-ROW".
        peer: of peers.yaml.
        ours: the lab's row that did the same job.
        settings: what the peer's script is told.
    """

    row: str
    peer: str
    ours: str
    settings: dict[str, Any]


@dataclass(kw_only=True)
class Beside:
    """What a peer said, over the seeds.

    Attributes:
        metrics: "perplexity" and "bytes" (of the files of weights that it wrote) -> a value per seed.
        seconds: of its whole process, per seed; peak_rss_bytes: its resident memory at most.
        failed: why it gave no answer; empty if it did.
    """

    peer: str
    ours: str
    metrics: dict[str, list[float]] = field(default_factory=lambda: {"perplexity": [], "bytes": []})
    seconds: list[float] = field(default_factory=list)
    peak_rss_bytes: list[int] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    failed: str = ""


def asked_by(experiment: Any, number: str, settings: Any, say: Callable[[str], None]) -> list[Asked]:
    """The peers of a lab at a scale that are installed. CompressLabError if it has none there, or none is."""
    listed: Callable[[Any], Sequence[Asked]] | None = getattr(experiment, "peers", None)
    if listed is None or not isinstance(settings, TextSettings):
        raise CompressLabError(f"lab {number} asks no other framework at this scale: leave --peers out")
    asked = list(listed(settings))
    missing = sorted({one.peer for one in asked if not environments.is_installed(registry.peer(one.peer))})
    how = f"run `compresslab peers install {' '.join(missing)}`"
    there = [one for one in asked if one.peer not in missing]
    if not there:
        raise CompressLabError(f"lab {number} --peers needs {', '.join(missing)}: {how}")
    if missing:
        say(f"without {', '.join(missing)}: not installed, {how}")
    return there


def measure_(
    found: dict[str, Beside], asked: Sequence[Asked], settings: TextSettings, seed: int, float_perplexity: float,
    say: Callable[[str], None],
) -> None:  # fmt: skip
    """Add one seed's answers to `found`, by row.

    Args:
        float_perplexity: what we measured on the uncompressed network with this seed.
    """
    model, windows, test = material(settings, seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name, ids in (("calibration", windows), ("test", test)):
            save_file({"input_ids": ids.contiguous()}, folder / f"{name}.safetensors")
        opened = _folder(model, folder / "model")
        for one in asked:
            kept = found.setdefault(one.row, Beside(peer=one.peer, ours=one.ours))
            if kept.failed:
                continue
            say(f"seed {seed}: {one.peer}, beside {one.ours}")
            job = asking.Job(
                model=opened, calibration=folder / "calibration.safetensors", test=folder / "test.safetensors",
                out=folder / one.row, settings=one.settings, seed=seed, threads=torch.get_num_threads(),
            )  # fmt: skip
            try:
                answer = asking.ask(registry.peer(one.peer), job)
            except CompressLabError as error:
                kept.failed = str(error)
                say(kept.failed)
                continue
            _add_(kept, answer, float_perplexity)


def _folder(model: Any, target: Path) -> Path:
    """Where transformers opens the network; one that was trained on the spot is written there."""
    if isinstance(model, nn.Module):
        character_model.save(model, target)
        return target
    return models.locate(model)


def _add_(kept: Beside, answer: asking.Answer, float_perplexity: float) -> None:
    assert answer.loss is not None and answer.float_loss is not None
    theirs = math.exp(answer.float_loss / answer.tokens)
    if abs(theirs / float_perplexity - 1) > SAME_FLOAT:
        raise CompressLabError(
            f"peer '{kept.peer}' finds a perplexity of {theirs:.4f} before compression where we find "
            f"{float_perplexity:.4f}: it did not measure the same network and windows, so its row would compare nothing"
        )
    kept.metrics["perplexity"].append(math.exp(answer.loss / answer.tokens))
    kept.metrics["bytes"].append(float(answer.nbytes))
    kept.seconds.append(answer.seconds["total"])
    kept.peak_rss_bytes.append(answer.peak_rss_bytes)
    kept.versions, kept.notes = answer.versions, list(answer.notes)

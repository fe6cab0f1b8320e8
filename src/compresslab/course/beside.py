"""Other frameworks beside a lab's own rows: the same network, the same data, the same test, in environments of their own.

lab, settings, seed -> what its `peers` say is handed over: networks as folders, data as files -> every peer that `peers` lists,
asked by peers.asking -> its metrics, those that the lab's rows have and whatever else it says. A peer that does not find what we
found in the network before it touched it has measured something else: an error. One that fails is written down as failed, and
the lab goes on.
"""

from __future__ import annotations

import inspect
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from compresslab import models
from compresslab.course import character_model
from compresslab.course.trials import TextSettings, material
from compresslab.errors import CompressLabError
from compresslab.peers import asking, environments, registry
from compresslab.recipe import Training
from compresslab.training import split

# How far from ours a peer may be before it did anything, as a share of ours.
SAME = {
    "perplexity": 0.01,  # it may open the network in the 16 bits that it is stored in
    "accuracy": 0.002,  # of a thousand pictures two may lie on the border of two classes
}


@dataclass(frozen=True, kw_only=True)
class Handed:
    """What peers are given of one seed; the fields are those of asking.Job."""

    networks: dict[str, Path]
    data: dict[str, Path]


def text(settings: TextSettings, seed: int, folder: Path) -> Handed:
    """The language model of a lab, with the windows to calibrate on and those to test on."""
    model, windows, test = material(settings, seed)
    data = {"calibration": {"input_ids": windows}, "test": {"input_ids": test}}
    return Handed(networks={"model": text_network(model, folder / "model")}, data=files(data, folder))


def lesson(
    student: torch.nn.Module, teacher: Any, training: Training, windows: Tensor, test: Tensor, seed: int, folder: Path
) -> Handed:
    """A student of a language model as it begins, its teacher, and those windows that our training does not hold back."""
    shown, _ = split([{"input_ids": window} for window in windows], training.held_back, seed)
    student.save_pretrained(folder / "model")  # type: ignore[operator]
    data = {
        "calibration": {"input_ids": torch.stack([one["input_ids"] for one in shown])},
        "test": {"input_ids": test},
    }
    networks = {"model": folder / "model", "teacher": text_network(teacher, folder / "teacher")}
    return Handed(networks=networks, data=files(data, folder))


def told_to_train(training: Training) -> dict[str, Any]:
    """What a peer is told of a training, so that it trains as long and as fast."""
    names = ("steps", "batch", "learning_rate", "warmup", "weight_decay", "max_grad_norm")
    return {name: getattr(training, name) for name in names}


def text_network(model: Any, target: Path) -> Path:
    """Where transformers opens a language model; one that was trained on the spot is written there."""
    if isinstance(model, torch.nn.Module):
        character_model.save(model, target)
        return target
    return models.locate(model)


def network(model: torch.nn.Module, target: Path) -> Path:
    """A network of compresslab.architectures as a folder that transformers opens where CompressLab is not.

    Its code lies beside its weights, in transformers' own form for networks it does not have (`trust_remote_code`): one file,
    which imports torch and transformers alone.
    """
    model.save_pretrained(target)  # type: ignore[operator]
    code = Path(inspect.getfile(type(model)))
    shutil.copy(code, target / code.name)
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    names = {"AutoConfig": type(model.config), "AutoModelForImageClassification": type(model)}
    config["auto_map"] = {auto: f"{code.stem}.{cls.__name__}" for auto, cls in names.items()}
    (target / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return target


def files(data: Mapping[str, Mapping[str, Tensor]], folder: Path) -> dict[str, Path]:
    """Tensors by file and name -> the safetensors files that hold them."""
    found = {name: folder / f"{name}.safetensors" for name in data}
    for name, tensors in data.items():
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, found[name])
    return found


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A row that a peer is asked for.

    Attributes:
        row: its name; the lab's words know it as "peer-ROW".
        peer: of peers.yaml.
        ours: the lab's row that did the same job.
        settings: what the peer's script is told.
        hand: of the lab's settings, a seed and an empty folder: what the peer is given.
        whole: the lab's row of the network that it is given.
    """

    row: str
    peer: str
    ours: str
    settings: dict[str, Any]
    hand: Callable[[Any, int, Path], Handed] = text
    whole: str = "float"


@dataclass(kw_only=True)
class Beside:
    """What a peer said, over the seeds.

    Attributes:
        metrics: of what it made of the network, a value per seed; "bytes" are of the files of weights that it wrote.
        before: the same of the network that it was given.
        seconds: of its whole process, per seed; peak_rss_bytes: its resident memory at most.
        failed: why it gave no answer; empty if it did.
    """

    peer: str
    ours: str
    metrics: dict[str, list[float]] = field(default_factory=dict)
    before: dict[str, list[float]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    peak_rss_bytes: list[int] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    failed: str = ""


def asked_by(experiment: Any, number: str, settings: Any, say: Callable[[str], None]) -> list[Asked]:
    """The peers of a lab at a scale that are installed. CompressLabError if it has none there, or none is."""
    listed: Callable[[Any], Sequence[Asked]] = getattr(experiment, "peers", lambda settings: ())
    asked = list(listed(settings))
    if not asked:
        raise CompressLabError(f"lab {number} asks no other framework at this scale: leave --peers out")
    missing = sorted({one.peer for one in asked if not environments.is_installed(registry.peer(one.peer))})
    how = f"run `compresslab peers install {' '.join(missing)}`"
    there = [one for one in asked if one.peer not in missing]
    if not there:
        raise CompressLabError(f"lab {number} --peers needs {', '.join(missing)}: {how}")
    if missing:
        say(f"without {', '.join(missing)}: not installed, {how}")
    return there


def measure_(
    found: dict[str, Beside], asked: Sequence[Asked], settings: Any, seed: int, rows: Mapping[str, Mapping[str, float]],
    say: Callable[[str], None],
) -> None:  # fmt: skip
    """Add one seed's answers to `found`, by row.

    Args:
        rows: what the lab itself measured with this seed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        handed: dict[Any, Handed] = {}
        for one in asked:
            kept = found.setdefault(one.row, Beside(peer=one.peer, ours=one.ours))
            if kept.failed:
                continue
            say(f"seed {seed}: {one.peer}, beside {one.ours}")
            if one.hand not in handed:
                own = folder / f"handed-{len(handed)}"
                own.mkdir()
                handed[one.hand] = one.hand(settings, seed, own)
            job = asking.Job(
                **vars(handed[one.hand]),
                out=folder / one.row,
                settings=one.settings,
                seed=seed,
                threads=torch.get_num_threads(),
            )
            try:
                answer = asking.ask(registry.peer(one.peer), job)
            except CompressLabError as error:
                kept.failed = str(error)
                say(kept.failed)
                continue
            _hold_against(one, answer, rows[one.whole])
            _add_(kept, answer)


def _hold_against(one: Asked, answer: asking.Answer, whole: Mapping[str, float]) -> None:
    shared = [metric for metric in SAME if metric in answer.before and metric in whole]
    if not shared:
        raise CompressLabError(
            f"peer '{one.peer}' says nothing of the network before compression that row '{one.whole}' says too: "
            f"its script must measure one of {', '.join(SAME)}"
        )
    for metric in shared:
        theirs, ours = answer.before[metric], whole[metric]
        if not abs(theirs - ours) <= SAME[metric] * abs(ours):
            raise CompressLabError(
                f"peer '{one.peer}' finds {metric} {theirs:.4f} before compression where we find {ours:.4f}: it did not "
                "measure the same network and data, so its row would compare nothing"
            )


def _add_(kept: Beside, answer: asking.Answer) -> None:
    for values, said in ((kept.metrics, answer.after), (kept.before, answer.before)):
        for metric, value in said.items():
            values.setdefault(metric, []).append(value)
    kept.seconds.append(answer.seconds["total"])
    kept.peak_rss_bytes.append(answer.peak_rss_bytes)
    kept.versions, kept.notes = answer.versions, list(answer.notes)

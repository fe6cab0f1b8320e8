"""Lab 3.10 on a black box: a teacher of whom nothing is known but what it says, as GPT-3.5 is for its students.

language model -> behind `compresslab serve`'s server, on a free port of this machine -> asked how beginnings of passages go on
(endpoint.py) -> answers kept -> a student, the same model with some of its blocks, taught by the answers alone; beside it the
same student taught by how the passages really go on, and by the teacher's logits on these, which no black box gives

-> perplexity on text, and on what the teacher says of beginnings that nobody was taught on. Every student is taught on as many
examples for as many steps; only what goes on after the beginning counts. Requests, tokens and answers from the cache are what
the endpoint counted; the second asking, of which the student learns, finds the server gone and everything in the cache.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from compresslab import data, doubting, models
from compresslab.answers import answered
from compresslab.contract import LogitLoss
from compresslab.course import in_memory
from compresslab.course.encoders import Rows
from compresslab.data.labelled import Example
from compresslab.distill.hard_labels import HardLabels
from compresslab.distill.soft_labels import SoftLabels
from compresslab.distill.teacher_cache import TeacherCache
from compresslab.endpoint import Asking, Endpoint
from compresslab.losses import Losses
from compresslab.measure.perplexity import perplexity
from compresslab.models import Source
from compresslab.recipe import Training
from compresslab.serving.server import served
from compresslab.students import Shape, student_of
from compresslab.training import IGNORED_LABEL


@dataclass(frozen=True, kw_only=True)
class BlackBox:
    """Settings of the part on a black box.

    Attributes:
        layers: blocks of the student.
        questions, held_out: beginnings that are taught, and that are not.
        begins, goes_on: tokens of a beginning, and of an answer at most.
    """

    model: str
    layers: int
    questions: int
    held_out: int
    begins: int
    goes_on: int
    steps: int
    batch: int
    learning_rate: float
    test_windows: int
    test_length: int


def measure(settings: BlackBox, seed: int, say: Callable[[str], None]) -> Rows:
    """Rows of one seed."""
    source = models.find(settings.model)
    tokenizer = source.tokenizer()
    count, length = settings.questions + settings.held_out, settings.begins + settings.goes_on
    found = data.calibration("wiki", tokenizer, samples=count, sequence_length=length, seed=seed)
    passages = torch.cat([batch["input_ids"] for batch in found.batches])
    test = data.windows("wiki", tokenizer, length=settings.test_length, count=settings.test_windows)
    with tempfile.TemporaryDirectory() as folder:
        return taught(source, passages, test, settings, seed, Path(folder), say)


def taught(
    source: Source, passages: Tensor, test: Tensor, settings: BlackBox, seed: int, folder: Path, say: Callable[[str], None]
) -> Rows:  # fmt: skip
    """Rows of students of a model.

    Args:
        passages: int64 [questions + held_out, begins + goes_on].
        test: int64 [windows, length], for perplexity.
        folder: an empty one, for answers.
    """
    begins, told = settings.begins, settings.questions
    student, _ = student_of(source, Shape(layers=settings.layers))
    asked = [source.tokenizer().decode(ids) for ids in passages[:, :begins].tolist()]
    say(f"seed {seed}: the teacher's answers")
    assert source.folder is not None
    with served(source.folder, max_tokens=settings.goes_on) as (url, name):
        endpoint = Endpoint(url=url, model=name, kind="completions", max_tokens=settings.goes_on, at_once=1)
        first = Asking(endpoint, folder / "answers")
        first.all(asked)
    again = Asking(endpoint, folder / "answers")
    length = 2 * begins + settings.goes_on  # a beginning that is read back may have other tokens
    box, unheard = (
        answered(again, part, source, out=folder / out, longest=length)
        for part, out in ((asked[:told], "taught"), (asked[told:], "held-out"))
    )
    teacher = models.materialise(source).float().eval().requires_grad_(False)

    def row(network: nn.Module) -> dict[str, float]:
        losses, tokens = perplexity(network, test, batch_size=4).parts.sum(axis=0)
        said = doubting.cross_entropy(network, unheard.labelled.train, settings.batch)
        size = float(in_memory.float_bytes(network))
        return {"perplexity": math.exp(losses / tokens), "answers_perplexity": math.exp(said), "bytes": size}

    training = Training(
        steps=settings.steps,
        batch=settings.batch,
        learning_rate=settings.learning_rate,
        checks=1,
        held_back=0.05,
        warmup=0.1,
    )
    rows = {"lm-teacher": row(teacher), "lm-untaught": row(models.materialise(student).float().eval())}
    plain = [continued(ids, begins) for ids in passages[:told]]
    ways: dict[str, tuple[LogitLoss, nn.Module | TeacherCache | None, list[Example]]] = {
        "lm-text": (HardLabels(), None, plain),
        "lm-logits": (SoftLabels(temperature=1.0), teacher, plain),
        "lm-answers": (SoftLabels(temperature=1.0), box.cache, list(box.labelled.train)),
    }
    for name, (loss, by, shown) in ways.items():
        say(f"seed {seed}: {name}")
        start = models.materialise(student).float().requires_grad_(True)
        losses = Losses(on_logits=(loss,), on_features=())
        rows[name] = row(in_memory.taught_on(start, by, losses, shown, training, seed=seed))
    rows["lm-answers"] |= {
        "requests": float(first.bill.asked),
        "answer_tokens": float(first.bill.answer_tokens),
        "from_cache": float(again.bill.from_cache),
    }
    return rows


def continued(ids: Tensor, begins: int) -> Example:
    """A passage of which only what follows its beginning counts."""
    labels = ids.clone()
    labels[:begins] = IGNORED_LABEL
    return {"input_ids": ids, "labels": labels}

"""Pairs: a teacher, a student, and what one learns from the other on; found, and checked before any work is done."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from compresslab import data as datasets
from compresslab import learning, models
from compresslab.answers import Answered
from compresslab.contract import PictureMaking
from compresslab.damage import whole_model
from compresslab.data.labelled import Example, examples_sha256
from compresslab.errors import CompressLabError
from compresslab.learning import Material
from compresslab.losses import Losses
from compresslab.models import Source
from compresslab.plan import OUTSIDE, make_plan
from compresslab.recipe import Recipe
from compresslab.solving import Pass
from compresslab.students import Shape, student_of
from compresslab.teaching import EXAMPLES_SHOWN
from compresslab.training import collate

TEXTS_COMPARED = 8


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A teacher and a student, found and not in memory; and how the student was made, in words."""

    teacher: Source
    student: Source
    told: str
    others: tuple[Source, ...] = ()
    ensemble: str | tuple[float, ...] = "mean"

    @classmethod
    def of(
        cls, teacher: Any, student: Any, others: Sequence[Any] = (), ensemble: str | Sequence[float] = "mean",
        shown: Callable[[Source], Pass] | None = None,
    ) -> Pair:  # fmt: skip
        """Args: shown, a pass over what is learnt from, for a student of which something is chosen by measurement."""
        weights = ensemble if isinstance(ensemble, str) else tuple(float(weight) for weight in ensemble)
        pair = cls._of_two(teacher, student, shown)
        return dataclasses.replace(pair, others=tuple(models.find(other) for other in others), ensemble=weights)

    @classmethod
    def _of_two(cls, teacher: Any, student: Any, shown: Callable[[Source], Pass] | None) -> Pair:
        if isinstance(teacher, Answered) and isinstance(student, Shape):
            raise CompressLabError("a black box has no blocks to build a student from: name a student")
        found = models.find(student if isinstance(teacher, Answered) else teacher)
        if isinstance(student, Shape):
            looking = shown(found) if shown is not None and student.needs_text else None
            built, told = student_of(found, student, calibration=looking)
            return cls(teacher=found, student=dataclasses.replace(built, name=f"a student of {found.name}"), told=told)
        named = models.find(student)
        return cls(teacher=found, student=named, told=f"the student {named.name}")

    def check(self, losses: Losses, data: Any) -> None:
        """CompressLabError if what one says means something else to the other; tokenizers are compared on the data too."""
        kinds = [_kind(source) for source in (self.teacher, self.student)]
        if kinds[0] != kinds[1]:
            raise CompressLabError(
                f"'{self.teacher.name}' ({self.teacher.architecture}) and '{self.student.name}' ({self.student.architecture}) "
                "do not answer the same question: take two language models, two encoders or two classifiers"
            )
        if losses.writing is not None and kinds[0] != "language model":
            raise CompressLabError(
                f"'{self.student.name}' writes no text, so it has none of its own: leave on-policy out"
            )
        if losses.making is not None and not self.teacher.reads_images:
            raise CompressLabError(
                f"'{self.teacher.name}' reads no pictures, so none can be drawn out of it: name data in place of deep-inversion"
            )
        if kinds[0] == "encoder" and (losses.on_logits or losses.cohort is not None):
            raise CompressLabError(
                f"'{self.student.name}' is an encoder without a head, so it has no logits to teach: take a recipe of losses on "
                "features"
            )
        for other in self.others:
            dataclasses.replace(self, teacher=other, others=()).check(losses, data)
        if self.others and losses.on_features:
            raise CompressLabError("losses on features look inside one teacher: leave the others out, or those losses")
        if kinds[0] == "classifier":
            _check_classes(self.teacher.config, self.student.config)
        if losses.cross_tokenizers:
            return
        if self.teacher.folder != self.student.folder and not self.student.reads_images and isinstance(data, str):
            texts = datasets.texts(data).documents[:TEXTS_COMPARED]
            _check_tokenizers(self.teacher, self.student, [text[:2000] for text in texts])

    @property
    def has_other_tokens(self) -> bool:
        """Whether the teacher's tokenizer is another than the student's."""
        if self.teacher.folder == self.student.folder:
            return False
        vocabularies: list[dict[str, int]] = [source.tokenizer().get_vocab() for source in (self.teacher, self.student)]
        return vocabularies[0] != vocabularies[1]


def _kind(source: Source) -> str:
    if models.is_language_model(source.skeleton()):
        return "language model"
    return "encoder" if models.is_encoder(source.config) else "classifier"


def material_of(student: Source, recipe: Recipe, data: Any, seed: int) -> Material:
    """What a student learns from. CompressLabError if there is nothing, or nothing that it can read."""
    if data is None:
        raise CompressLabError("a student learns from data: name it with --data, e.g. wiki")
    if isinstance(data, datasets.Calibration):
        return Material(calibration=data, labelled=None)
    if isinstance(data, str) and _kind(student) != "classifier":
        return Material(calibration=learning.windows_of(student, recipe, data, seed), labelled=None)
    return Material(calibration=None, labelled=learning.labelled(student, data, seed, recipe.calibration.samples))


def drawn_out(
    teacher: Source, making: PictureMaking, seed: int, device: torch.device, on_batch: Callable[[], None]
) -> Material:
    """Pictures that a teacher was made to tell of. CompressLabError if none can be."""
    network = whole_model(teacher, device, torch.float32).eval()
    shape, (_, classes) = models.picture_shape(teacher.config, teacher.folder), models.classes(teacher.skeleton())
    train: list[Example] = []
    try:
        for pixels, labels in making.made(network, shape, classes, seed):
            train += [{"pixel_values": one, "labels": label} for one, label in zip(pixels, labels, strict=True)]
            on_batch()
    except ValueError as error:
        raise CompressLabError(f"'{teacher.name}': {error}") from None
    labelled = datasets.Labelled(
        source="pictures drawn out of the teacher", revision="", samples=len(train), test_split="", train=train, test=[],
        sha256=examples_sha256(train),
    )  # fmt: skip
    return Material(calibration=None, labelled=labelled)


def shown(teacher: Source, recipe: Recipe, data: Any, seed: int, device: torch.device) -> Pass:
    """A pass through the teacher over the first examples of what a student learns from."""
    examples = material_of(teacher, recipe, data, seed).examples[:EXAMPLES_SHOWN]
    inputs = [{key: value for key, value in example.items() if key != "labels"} for example in examples]
    batches = [collate(inputs[start : start + 4]) for start in range(0, len(inputs), 4)]
    return Pass(source=teacher, plan=make_plan(teacher, (OUTSIDE,)), batches=batches, device=device)


def _check_tokenizers(teacher: models.Source, student: models.Source, texts: Sequence[str]) -> None:
    """CompressLabError if the same text makes other tokens, so that the distributions are not over the same things."""
    ours, theirs = (source.tokenizer() for source in (student, teacher))
    names: list[dict[str, int]] = [tokenizer.get_vocab() for tokenizer in (ours, theirs)]
    other = next((word for word, number in names[0].items() if names[1].get(word, number) != number), None)
    what = f"the token {other!r} is {names[0][other]} in one and {names[1][other]} in the other" if other else ""
    for text in texts if not what else ():
        both = [tokenizer(text, add_special_tokens=False)["input_ids"] for tokenizer in (ours, theirs)]
        if both[0] != both[1]:
            what = f"the text {text[:30]!r} is {len(both[0])} tokens in one and {len(both[1])} in the other"
            break
    if what:
        raise CompressLabError(
            f"'{student.name}' and '{teacher.name}' have tokenizers that differ ({what}): take a student of the teacher's "
            "family, or build one from the teacher with --layers"
        )


def _check_classes(teacher: Any, student: Any) -> None:
    """CompressLabError if two classifiers sort into other classes."""
    names = [list(map(str, (config.id2label or {}).values())) for config in (teacher, student)]
    if names[0] != names[1]:
        both = " and ".join(f"{len(known)} ({', '.join(known[:4])} ...)" for known in names)
        raise CompressLabError(
            f"teacher and student sort into other classes, {both}: name them alike in both config.json, in the same order"
        )

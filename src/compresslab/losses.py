"""Losses that a student learns from its teacher by, as a recipe's steps name them.

steps that are all losses            -> losses_of     -> distilling.py: a student and a teacher are named
losses in a recipe that prunes       -> stages.py     -> pipeline.py: what is left learns from the network as it was
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from compresslab.contract import CohortLoss, FeatureLoss, LogitLoss, PictureMaking, TextWriting
from compresslab.errors import CompressLabError
from compresslab.models import Source
from compresslab.recipe import Recipe

DEFAULT = "distill-soft-labels"
KINDS = (LogitLoss, FeatureLoss, TextWriting, CohortLoss, PictureMaking)  # of steps that a recipe for teaching may have


@dataclass(frozen=True, kw_only=True)
class Losses:
    """The losses of a recipe, by what they look at."""

    on_logits: Sequence[LogitLoss]
    on_features: Sequence[FeatureLoss]
    writing: TextWriting | None = None
    cohort: CohortLoss | None = None
    making: PictureMaking | None = None

    @classmethod
    def of(cls, recipe: str, methods: Sequence[Any]) -> Losses:
        """CompressLabError if methods that teach cannot stand together.

        Args:
            recipe: its name.
        """
        writing = [method for method in methods if isinstance(method, TextWriting)]
        making = [method for method in methods if isinstance(method, PictureMaking)]
        cohort = [method for method in methods if isinstance(method, CohortLoss)]
        if cohort and len(methods) > 1:
            raise CompressLabError(f"recipe '{recipe}': mutual has its own loss on labels, so it stands alone")
        found = cls(
            on_logits=[method for method in methods if isinstance(method, LogitLoss)],
            on_features=[method for method in methods if isinstance(method, FeatureLoss)],
            writing=writing[0] if writing else None,
            cohort=cohort[0] if cohort else None,
            making=making[0] if making else None,
        )
        if max(len(writing), len(making)) > 1 or not (found.on_logits or found.on_features or found.cohort):
            raise CompressLabError(
                f"recipe '{recipe}' needs a step that is a loss, and on-policy and deep-inversion at most once"
            )
        if writing and any(not loss.needs_teacher for loss in found.on_logits):
            raise CompressLabError("what a student has written itself is no label: leave hard-labels out, or on-policy")
        return found

    @property
    def need_teacher(self) -> bool:
        """Whether any of them asks what a teacher makes of a batch, and not only what its labels are."""
        return bool(self.on_features) or any(loss.needs_teacher for loss in self.on_logits)

    @property
    def cross_tokenizers(self) -> bool:
        """Whether all that asks the teacher can do with one of other tokens. CompressLabError if only some of it can."""
        asking = [loss for loss in self.on_logits if loss.needs_teacher]
        can = [getattr(loss, "crosses_tokenizers", False) for loss in (*asking, *self.on_features)]
        if any(can) and not all(can):
            raise CompressLabError(
                "uld is for teachers with other tokens, and other losses on a teacher are not: keep one kind"
            )
        return any(can)

    @property
    def temperature(self) -> float:
        """That of a teacher's logits. CompressLabError where a cache of it could not be made."""
        if self.on_features:
            raise CompressLabError(
                f"{type(self.on_features[0]).__name__} looks inside the teacher, of which a cache has logits only: leave the "
                "cache out"
            )
        if self.cohort is not None:
            raise CompressLabError("in mutual learning the teacher learns too, so that no cache can hold what it says")
        if self.writing is not None:
            raise CompressLabError("what a student will write is in no cache: leave the cache out, or on-policy")
        found = sorted({float(getattr(loss, "temperature", 1.0)) for loss in self.on_logits if loss.needs_teacher})
        if len(found) != 1:
            said = " and ".join(f"{t:g}" for t in found) or "no"
            raise CompressLabError(f"the recipe has {said} temperatures of a teacher: a cache is made at one")
        return found[0]


def losses_of(recipe: Recipe) -> Losses:
    """CompressLabError unless all steps are losses."""
    built = [(step.method, step.build()) for step in recipe.steps]
    others = [name for name, method in built if not isinstance(method, KINDS)]
    if others:
        raise CompressLabError(
            f"recipe '{recipe.name}' has the step {others[0]}, which is no loss to teach by: run it with "
            f"'compresslab compress', or take a recipe of losses, such as {DEFAULT}"
        )
    return Losses.of(recipe.name, [method for _, method in built])


def said_of(recipe: Recipe) -> str:
    """What a network that was pruned learns by, in words."""
    taught = {step.method: method for step in recipe.steps if isinstance(method := step.build(), KINDS)}
    asks = Losses.of(recipe.name, list(taught.values())).need_teacher
    return ", ".join(taught) + (" from the network as it was" if asks else "")


def dtype_of(source: Source, asked: str) -> torch.dtype:
    """What a teacher is opened in by `training.teacher_dtype`. CompressLabError where it cannot be."""
    if asked == "float32":
        return torch.float32
    if source.reads_images:
        raise CompressLabError(
            f"teacher_dtype={asked} is for teachers that read tokens, and '{source.name}' reads pictures, which come in float32: "
            "leave it out"
        )
    return source.dtype

"""Features: what happens inside a student and its teacher, watched from outside, and the losses on it added up.

batch -> student and teacher, each with hooks at the places that a recipe's feature losses name -> a judge for each loss ->
sum of weight x loss. The networks stay as they are: hooks come off again, and an attention is only asked to tell of its heads.

    terms = FeatureTerms(student, teacher, losses, batch, examples=len(train), seed=0)
    with terms.at_work(student):
        ... student(**batch), teacher(**batch), terms.loss() ...

While they are at work, the judges are a module of the student (`JUDGES`): so the optimiser trains their projections, and a
checkpoint has their parameters and memories. They leave before the student is saved.

A loss whose `blocks` are "similar" is given its pairs here, as they are found on the first batch (distill/similar_blocks.py).

A position that the attention mask takes out is never counted, and neither are its heads. A student and a teacher that saw
different batches are an error: inputs that both take by one name are compared bit by bit, unless they are the same tensors, as
in teaching.py; where no name is common to both, only the number of examples is.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compresslab.contract import Feature, FeatureLoss, Heads
from compresslab.distill.pairs import SIMILAR
from compresslab.distill.similar_blocks import rising, similarities
from compresslab.errors import CompressLabError
from compresslab.heads import head_input
from compresslab.models import attention_watched, blocks, is_language_model
from compresslab.training import OURS

JUDGES = f"{OURS}judges"
INPUT, ATTENTION, LOGITS = "@input", "@attention", "@logits"


class Watched:
    """What one network made of its last batch at some places; of a teacher, without a way back for gradients."""

    def __init__(self, model: nn.Module, places: Sequence[str], *, is_teacher: bool = False) -> None:
        self._is_teacher = is_teacher
        self.places = list(dict.fromkeys(places))
        self.seen: dict[str, Any] = {}
        self.inputs: dict[str, Tensor] = {}
        known = dict(model.named_modules())
        for place in self.places:
            if place.partition("@")[0] not in known:
                raise CompressLabError(f"{type(model).__name__} has no module '{place.partition('@')[0]}' to watch")
        self._model = model

    @contextmanager
    def at_work(self) -> Iterator[None]:
        with ExitStack() as stack:
            handle = self._model.register_forward_pre_hook(self._start, with_kwargs=True)
            stack.callback(handle.remove)
            for place in self.places:
                path, _, kind = place.partition("@")
                module = self._model.get_submodule(path)
                if place == LOGITS:
                    stack.callback(self._model.register_forward_hook(self._logits).remove)
                elif not kind:
                    stack.callback(module.register_forward_hook(self._output(place)).remove)
                elif "@" + kind == INPUT:
                    stack.callback(module.register_forward_pre_hook(self._input(place), with_kwargs=True).remove)
            if any(place.endswith(ATTENTION) for place in self.places):
                stack.enter_context(attention_watched(self._model, self._attention))
            yield

    def take(self) -> dict[str, Any]:
        """What was seen, as Feature or Heads by place; it is forgotten.

        Raises:
            CompressLabError: a place that was not reached, or whose output is no feature.
        """
        seen, self.seen = self.seen, {}
        mask = self.inputs.get("attention_mask")
        missing = [place for place in self.places if place not in seen]
        if missing:
            raise CompressLabError(
                f"nothing passed through '{missing[0]}' of {type(self._model).__name__}: name a place that every batch reaches"
            )
        return {place: _described(place, self._own(seen[place]), mask) for place in self.places}

    def _own(self, seen: Any) -> Any:
        if not self._is_teacher:
            return seen
        if isinstance(seen, tuple):
            return tuple(map(self._own, seen))
        if not isinstance(seen, Tensor):
            return seen
        is_short = (
            seen.is_floating_point() and seen.itemsize < 4
        )  # a teacher as it is stored, beside a student in float32
        return seen.detach().float() if is_short else seen.detach()

    def _start(self, module: nn.Module, arguments: Any, named: Mapping[str, Any]) -> None:
        self.seen.clear()
        given = inspect.signature(module.forward).bind_partial(*arguments).arguments | dict(named)
        self.inputs = {name: value for name, value in given.items() if isinstance(value, Tensor)}

    def _output(self, place: str) -> Callable[..., None]:
        def see(module: nn.Module, arguments: Any, output: Any) -> None:
            self.seen[place] = output[0] if isinstance(output, tuple) else output

        return see

    def _logits(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self.seen[LOGITS] = getattr(output, "logits", None)

    def _input(self, place: str) -> Callable[..., None]:
        def see(module: nn.Module, arguments: Any, named: Mapping[str, Any]) -> None:
            self.seen[place] = arguments[0] if arguments else next(iter(named.values()))

        return see

    def _attention(self, name: str, query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> None:
        for place in self.places:
            if place.endswith(ATTENTION) and f"{name}.".startswith(place.removesuffix(ATTENTION) + "."):
                if place in self.seen:
                    raise CompressLabError(
                        f"'{place.removesuffix(ATTENTION)}' has more than one attention: name one of them"
                    )
                self.seen[place] = (query, key, value, is_causal)


def _described(place: str, seen: Any, mask: Tensor | None) -> Feature | Heads:
    """A network's own tensors, as losses read them."""
    if isinstance(seen, tuple):
        query, key, value, is_causal = seen
        shared = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(shared, 1) if shared > 1 else t for t in (key, value))
        counted = _counted(place, query[:, 0].shape, mask, query.device)
        return Heads(queries=query, keys=key, values=value, counted=counted, is_causal=is_causal)
    if not isinstance(seen, Tensor) or not 2 <= seen.dim() <= 4:
        raise CompressLabError(f"what passes at '{place}' is no feature: a tensor of examples, positions and channels")
    if seen.dim() == 4:
        pixels = (int(seen.shape[2]), int(seen.shape[3]))
        values = seen.flatten(2).transpose(1, 2)
        return Feature(values=values, counted=_counted(place, values.shape, None, values.device), pixels=pixels)
    values = seen[:, None] if seen.dim() == 2 else seen
    here = mask if values.shape[1] > 1 else None  # one vector for each example: nothing in it is padding
    return Feature(values=values, counted=_counted(place, values.shape, here, values.device))


def _counted(place: str, shape: Sequence[int], mask: Tensor | None, device: torch.device) -> Tensor:
    """Of values [examples, positions, channels]."""
    examples, positions = shape[:2]
    if mask is None:
        return torch.ones(examples, positions, dtype=torch.bool, device=device)
    if mask.shape != (examples, positions):
        raise CompressLabError(
            f"the attention mask {list(mask.shape)} says nothing of the {examples} x {positions} positions at '{place}'"
        )
    return mask.bool()


class FeatureTerms:
    """The feature losses of a recipe at work on a student and its teacher.

    Args:
        losses: their settings; each has a judge.
        batch: any batch. Its first two examples are for the shapes; similar blocks are found on all of it, best on some thousand
            positions.
        examples: how many the training has.
        seed: of what the judges start from.

    Raises:
        CompressLabError: naming the loss, where the two networks cannot be compared so.

    Attributes:
        found: the pairs of similar blocks, "student:teacher" with commas between; "" where no loss asked for them.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, losses: Sequence[FeatureLoss], batch: Mapping[str, Any],
        *, examples: int, seed: int = 0,
    ) -> None:  # fmt: skip
        mine, its = list(blocks(student)), list(blocks(teacher))
        asking = [getattr(loss, "blocks", None) == SIMILAR for loss in losses]
        self.found = _similar(student, teacher, mine, its, batch) if any(asking) else ""
        self.losses = [
            dataclasses.replace(loss, blocks=self.found) if asks else loss  # type: ignore[type-var]
            for loss, asks in zip(losses, asking, strict=True)
        ]
        self._places: list[tuple[list[str], list[str]]] = []
        for loss in self.losses:
            try:
                self._places.append(loss.places(mine, its))
            except ValueError as error:
                raise CompressLabError(f"{type(loss).__name__}: {error}") from None
        self.student = Watched(student, [place for places, _ in self._places for place in places])
        self.teacher = Watched(teacher, [place for _, places in self._places for place in places], is_teacher=True)
        self.judges = nn.ModuleList()
        few = {key: value[:2] for key, value in batch.items()}
        with self.student.at_work(), self.teacher.at_work():
            _run(student, few), _run(teacher, few)
            seen = self._seen()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for loss, (ours, theirs) in zip(self.losses, seen, strict=True):
                try:
                    self.judges.append(loss.judge(ours, theirs, examples))
                except ValueError as error:
                    raise CompressLabError(f"{type(loss).__name__}: {error}") from None
        self.judges.to(next(student.parameters()).device)

    @contextmanager
    def at_work(self, student: nn.Module) -> Iterator[None]:
        """Hooks on, and the judges a part of the student, for as long as it lasts."""
        student.add_module(JUDGES, self.judges)
        try:
            with self.student.at_work(), self.teacher.at_work():
                yield
        finally:
            delattr(student, JUDGES)

    def loss(self, labels: Tensor | None = None) -> Tensor:
        """Sum of weight x loss, of the batch that both networks have just been run on; with its labels, for losses that ask."""
        found = []
        for loss, judge, (ours, theirs) in zip(self.losses, self.judges, self._seen(), strict=True):
            try:
                found.append(loss.weight * (judge(ours, theirs, labels) if loss.needs_labels else judge(ours, theirs)))
            except ValueError as error:
                raise CompressLabError(f"{type(loss).__name__}: {error}") from None
        return torch.stack(found).sum()

    def _seen(self) -> list[tuple[list[Any], list[Any]]]:
        ours, theirs = self.student.take(), self.teacher.take()
        for one in ours.values():
            for other in theirs.values():
                if len(one.counted) != len(other.counted):
                    raise CompressLabError(
                        f"the student has seen {len(one.counted)} examples and the teacher {len(other.counted)}: give both "
                        "the same batch"
                    )
        for name, own in self.student.inputs.items():
            its = self.teacher.inputs.get(name)
            if its is not None and its is not own and not torch.equal(its, own):
                raise CompressLabError(
                    f"the teacher was not shown the student's {name}: give both the same examples in the same order"
                )
        return [([ours[p] for p in mine], [theirs[p] for p in others]) for mine, others in self._places]


@torch.no_grad()
def _run(network: nn.Module, batch: Mapping[str, Any], *, to_head: bool = False) -> None:
    """Args: to_head, whether logits, which of a language model take more than all else, are left out."""
    was_training = network.training
    network.eval()
    if to_head and is_language_model(network):
        head_input(network, dict(batch))
    else:
        network(**batch)
    network.train(was_training)


def _similar(
    student: nn.Module, teacher: nn.Module, mine: Sequence[str], its: Sequence[str], batch: Mapping[str, Any]
) -> str:
    """The pairs of blocks that are most alike on a batch, in the order of both."""
    if not mine or not its:
        raise CompressLabError(f"blocks {SIMILAR}: a network has no list of blocks, so pairs of paths have to be named")
    both = Watched(student, mine), Watched(teacher, its, is_teacher=True)
    with both[0].at_work(), both[1].at_work():
        _run(student, batch, to_head=True), _run(teacher, batch, to_head=True)
        ours, theirs = (list(watched.take().values()) for watched in both)
    try:
        return ", ".join(f"{m}:{n}" for m, n in enumerate(rising(similarities(ours, theirs))))
    except ValueError as error:
        raise CompressLabError(f"blocks {SIMILAR}: {error}") from None

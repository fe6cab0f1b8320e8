"""Students made of their teachers: the laws of students.py, on the common architectures."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import tiny
from compresslab import models
from compresslab.distill.layer_maps import MAPS, chosen
from compresslab.errors import CompressLabError
from compresslab.groups import groups_of
from compresslab.plan import make_plan
from compresslab.solving import Pass
from compresslab.students import Shape, student_of, write

KINDS = ("llama-tied", "qwen2", "gpt2", "bert", "vit")
DEEP: dict[str, dict[str, Any]] = {"gpt2": {"n_layer": 4}}


def deep(kind: str) -> Any:
    """Four blocks."""
    return tiny.make(kind, **DEEP.get(kind, {"num_hidden_layers": 4}))


def batch(kind: str) -> dict[str, Tensor]:
    if kind == "vit":
        return {"pixel_values": torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))}
    return tiny.token_batches(3)[0]


def said(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        out = model(**inputs)
    return out.logits if "logits" in out else out.last_hidden_state


def opened(folder: Path) -> Any:
    """By plain transformers."""
    name = transformers.AutoConfig.from_pretrained(folder).architectures[0]
    return getattr(transformers, name).from_pretrained(folder).eval()


def block_list(model: nn.Module) -> nn.ModuleList:
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 4)


@pytest.mark.parametrize("kind", KINDS)
def test_all_of_the_teacher_is_the_teacher_bit_for_bit(kind: str, tmp_path: Path) -> None:
    model = deep(kind)
    model.save_pretrained(tmp_path / "teacher")
    for number, shape in enumerate((Shape(), Shape(layers=4, take="last", width=1.0, hidden=1.0))):
        student, told = student_of(models.find(tmp_path / "teacher"), shape)
        folder = write(student, tmp_path / str(number))
        after, before = load_file(folder / "model.safetensors"), model.state_dict()
        assert set(before) - set(after) <= set(model.all_tied_weights_keys) and set(after) <= set(before)
        assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
        assert torch.equal(said(opened(folder), batch(kind)), said(model, batch(kind)))
        assert told == "all of the teacher"


@pytest.mark.parametrize("take", ["skip", (0, 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_student_computes_what_the_teacher_does_without_the_other_blocks(
    kind: str, take: Any, tmp_path: Path
) -> None:
    model = deep(kind)
    student, told = student_of(models.find(model), Shape(layers=2, take=take))
    found = said(opened(write(student, tmp_path / "student")), batch(kind))
    kept = chosen(take, 2, 4)
    blocks = block_list(model)
    left = [blocks[i] for i in kept]
    for _ in range(4):
        del blocks[0]
    blocks.extend(left)
    model.config.use_cache = False  # it goes by the blocks' own numbers, which are those of the whole network
    assert torch.equal(found, said(model, batch(kind)))
    assert told == f"blocks {', '.join(map(str, kept))} of 4"


@pytest.mark.parametrize("kind", KINDS)
def test_half_the_width_opens_and_has_half_the_neurons(kind: str, tmp_path: Path) -> None:
    teacher = models.find(deep(kind))
    student, told = student_of(teacher, Shape(layers=3, width=0.5))
    folder = write(student, tmp_path / "student")
    assert said(opened(folder), batch(kind)).isfinite().all()
    again = models.find(folder)
    assert groups_of(again, "neurons")[0].count * 2 == groups_of(teacher, "neurons")[0].count
    if kind in ("bert", "gpt2"):
        assert "all heads" in told
    else:
        assert groups_of(again, "heads")[0].count * 2 == groups_of(teacher, "heads")[0].count


def looking(teacher: Any, kind: str = "llama") -> Pass:
    return Pass(source=teacher, plan=make_plan(teacher, ("@outside-blocks",)), batches=[batch(kind)])


@pytest.mark.parametrize("by", ["ziplm", "activation-norm", "taylor"])
def test_a_calibrated_method_chooses_the_neurons(by: str) -> None:
    teacher, shape = models.find(deep("llama")), Shape(layers=2, width=0.5, by=by)
    by_text, _ = student_of(teacher, shape, calibration=looking(teacher))
    by_norm, _ = student_of(teacher, Shape(layers=2, width=0.5))
    name = "model.layers.0.mlp.down_proj.weight"
    assert by_text.weights.shape(name) == by_norm.weights.shape(name)
    assert not torch.equal(by_text.weights.get(name), by_norm.weights.get(name))
    assert shape.needs_text and not Shape(layers=2, width=0.5).needs_text
    with pytest.raises(CompressLabError, match="there is none here: give it some"):
        student_of(teacher, shape)


@pytest.mark.parametrize("kind", ["llama-tied", "qwen2", "gpt2", "vit"])
def test_a_narrower_residual_stream_has_the_loudest_channels(kind: str, tmp_path: Path) -> None:
    """Channels that are made a hundred times as loud are those that stay, and a fresh student of that shape has that config."""
    model = deep(kind)
    embedding = next(m for m in model.modules() if isinstance(m, nn.Embedding | nn.Conv2d)).weight
    loud = torch.tensor([1, 2, 3, 5, 8, 13, 14, 16, 17, 19, 21, 22, 25, 28, 29, 31])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "position" in name or "wpe" in name:  # they are as loud in all channels
                parameter.zero_()
        embedding.index_copy_(*((1, loud, 100 * embedding[:, loud]) if embedding.dim() == 2 else
                                (0, loud, 100 * embedding[loud])))  # fmt: skip
    teacher, shape = models.find(model), Shape(layers=3, hidden=0.5)
    with pytest.raises(CompressLabError, match="there is none here"):
        student_of(teacher, shape)
    student, told = student_of(teacher, shape, calibration=looking(teacher, kind))
    name = next(
        name
        for name, tensor in model.state_dict().items()
        if tensor is not None and tensor.data_ptr() == embedding.data_ptr()
    )
    kept = student.weights.get(name)
    assert torch.equal(kept, embedding[:, loud] if embedding.dim() == 2 else embedding[loud])
    assert "16 of 32 channels of the embedding" in told
    folder = write(student, tmp_path / "student")
    assert said(opened(folder), batch(kind)).isfinite().all()
    fresh, _ = student_of(teacher, Shape(layers=3, hidden=0.5, fresh=True))
    assert fresh.config.to_dict() == student.config.to_dict()
    heads = models.find(folder).config.num_attention_heads
    assert heads == (2 if kind == "gpt2" else 4)  # whose config has no number for heads apart from the stream's


@pytest.mark.parametrize("by", ["group-magnitude", "activation-norm"])
def test_neurons_heads_and_stream_become_narrower_together(by: str, tmp_path: Path) -> None:
    teacher = models.find(deep("llama"))
    student, _ = student_of(teacher, Shape(width=0.5, hidden=0.75, by=by), calibration=looking(teacher))
    again = models.find(write(student, tmp_path / "student"))
    assert again.config.hidden_size == 24 and groups_of(again, "neurons")[0].count == 32
    assert groups_of(again, "heads")[0].count * 2 == groups_of(teacher, "heads")[0].count
    fresh, _ = student_of(teacher, Shape(width=0.5, hidden=0.75, by=by, fresh=True))
    assert fresh.config.to_dict() == student.config.to_dict()


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_the_blocks_that_change_the_stream_most_are_taken(kind: str) -> None:
    """Beside all choices of two blocks: no other has more influence, by hidden states of plain transformers."""
    model = deep(kind)
    with torch.no_grad():
        for number, block in enumerate(models.blocks(model).values()):
            for parameter in block.parameters():
                parameter.mul_((4.0, 0.1, 2.0, 1.0)[number] if parameter.dim() > 1 else 1.0)
    inputs = batch(kind)
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    teacher = models.find(model)
    looking = Pass(source=teacher, plan=make_plan(teacher, ("@outside-blocks",)), batches=[inputs])
    _, told = student_of(teacher, Shape(layers=2, take="influence"), calibration=looking)
    kept = [int(part) for part in told.removeprefix("blocks ").removesuffix(" of 4").split(",")]
    # The last state of a decoder is normalised on top of what its last block says: that block's influence is had from a hook.
    found = []
    names = list(models.blocks(model))
    for place, name in enumerate(names):
        seen: list[Tensor] = []
        hook = model.get_submodule(name).register_forward_hook(lambda m, a, out: seen.append(out))  # noqa: B023
        with torch.no_grad():
            model(**inputs)
        hook.remove()
        after = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
        found.append(1 - float(torch.cosine_similarity(states[place], after, dim=-1).mean()))
    best = max(itertools.combinations(range(4), 2), key=lambda both: sum(found[i] for i in both))
    assert tuple(kept) == best
    with pytest.raises(CompressLabError, match="is measured on text"):
        student_of(teacher, Shape(layers=2, take="influence"))
    with pytest.raises(CompressLabError, match="5 of 4 layers"):
        student_of(teacher, Shape(layers=5, take="influence"), calibration=looking)


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_weights_are_those_of_their_seed(kind: str, tmp_path: Path) -> None:
    teacher, shape = models.find(deep(kind)), Shape(layers=2, hidden=0.5, fresh=True)
    folders = [write(student_of(teacher, shape)[0], tmp_path / name) for name in ("a", "b")]
    other = write(student_of(teacher, Shape(layers=2, hidden=0.5, fresh=True, seed=1))[0], tmp_path / "c")
    first, second, third = (((path / "model.safetensors").read_bytes()) for path in (*folders, other))
    assert first == second != third
    config = transformers.AutoConfig.from_pretrained(folders[0])
    assert config.hidden_size == tiny.HIDDEN // 2 and config.num_hidden_layers == 2
    assert config.num_attention_heads == (2 if kind in ("bert", "gpt2") else 4)
    assert config.head_dim == tiny.HIDDEN // 4
    assert said(opened(folders[0]), batch(kind)).isfinite().all()


@pytest.mark.parametrize("take", MAPS)
def test_maps_are_whole_and_rising(take: str) -> None:
    for of in range(1, 30):
        for count in range(1, of + 1):
            layers = chosen(take, count, of)
            assert len(set(layers)) == count and layers == sorted(layers) and 0 <= layers[0] <= layers[-1] < of
            gaps = {b - a for a, b in itertools.pairwise(layers)}
            assert max(gaps, default=1) - min(gaps, default=1) <= 1  # evenly spread, or neighbours
        assert chosen(take, of, of) == list(range(of))
    assert chosen("skip", 4, 12) == [2, 5, 8, 11]  # TinyBERT: g(m) = 3 m, counted from 1
    assert chosen("uniform", 4, 12)[0] == 0 and chosen("uniform", 4, 12)[-1] == 11


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"layers": 5}, "5 of 4 layers"),
        ({"layers": 0}, "0 of 4 layers"),
        ({"layers": 2, "take": "middle"}, "no layer map 'middle'"),
        ({"layers": 2, "take": (0, 4)}, "not 2 different ones from 0 to 3"),
        ({"layers": 2, "take": (3, 0)}, "in rising order"),
        ({"width": 0.0}, "width is a share"),
        ({"hidden": 0.5, "by": "ziplm"}, "takes neurons and heads, and no channels.* one of .*activation-norm"),
        ({"hidden": 0.01, "by": "group-magnitude"}, "leaves 0 of 32 channels, in whole 8s"),
        ({"hidden": 0.99, "by": "group-magnitude"}, "leaves 32 of 32 channels"),
        ({"width": 0.5, "by": "filter-nrom"}, "did you mean 'filter-norm'"),
        ({"width": 0.01, "multiple": 64}, "would leave none"),
    ],
)
def test_shapes_that_cannot_be_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(CompressLabError, match=words):
        student_of(models.find(deep("llama")), Shape(**fields))


def test_what_is_no_plain_stack_is_refused() -> None:
    with pytest.raises(CompressLabError, match="no plain stack of blocks"):
        student_of(models.find(tiny.make_convnet("resnet")), Shape(layers=1))


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(CompressLabError, match="is not empty"):
        write(models.find(tiny.make("bert")), tmp_path)

"""Teachers of other tokens and several teachers at once; and the loss that the first are for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn

import tiny
from compresslab import models
from compresslab.contract import TopK
from compresslab.distill.uld import ULD
from compresslab.distilling import distill
from compresslab.errors import CompressLabError
from compresslab.measure import fresh
from compresslab.recipe import Recipe
from compresslab.teachers import ADAPTIVE, Ensemble, Translated, mixed
from oracles import uld as oracle


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(fresh, "measure", tiny.fake_measure)
    with tiny.quick():
        yield


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- uld -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("theirs", [3, 5])
def test_uld_is_the_least_distance_over_all_pairings(theirs: int) -> None:
    logits, teacher = 2 * random(4, 5, seed=1), 2 * random(4, theirs, seed=2)
    filled = nn.functional.pad(teacher, (0, 5 - theirs), value=-torch.inf)
    value, slope = ULD().rows(logits, filled, None)
    for row in range(4):
        z, t = logits[row].tolist(), teacher[row].tolist()
        assert float(value[row]) == pytest.approx(oracle.least(z, t))
        assert slope[row].tolist() == pytest.approx(oracle.slopes(z, t), abs=1e-6)


def test_uld_knows_no_order_and_leaves_out_what_is_not_there() -> None:
    logits = random(3, 6, seed=1)
    value, _ = ULD().rows(logits, logits[:, [3, 1, 0, 5, 4, 2]], None)
    assert value.tolist() == pytest.approx([0, 0, 0])
    teacher = random(3, 6, seed=2)
    teacher[1] = torch.nan
    value, slope = ULD().rows(logits, teacher, None)
    assert value[1] == 0 and not slope[1].any() and slope.isfinite().all() and value[0] > 0
    with pytest.raises(ValueError, match="leave it out"):
        ULD().rows(
            logits, TopK(ids=torch.zeros(3, 1, dtype=torch.long), log_probs=torch.zeros(3, 1), temperature=1.0), None
        )


# -- teachers --------------------------------------------------------------------------------------------------------


def other_tokenizer(folder: Path) -> None:
    """The words of the tiny tokenizer in reversed order, and every second of them unknown but for its letters."""
    words = tiny.words()
    letters = sorted(set("".join(words)))
    pieces = [*tiny.SPECIAL, *letters, *(f"##{letter}" for letter in letters), *reversed(words[::2])]
    made = Tokenizer(tokenizer_models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]"
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teachers")
    tiny.write_text(folder / "text.txt")
    tiny.save("llama", folder / "student", seed=1)
    for number in range(2):
        tiny.save("llama", folder / f"teacher-{number}", seed=2 + number)
    tiny.save("llama", folder / "foreign", seed=4)
    other_tokenizer(folder / "foreign")
    return folder


def test_a_foreign_teacher_reads_the_same_text(place: Path) -> None:
    network = models.load(place / "foreign")
    student, teacher = (models.find(place / name).tokenizer() for name in ("student", "foreign"))
    text = " ".join(tiny.words()[:5])
    ids = student(text)["input_ids"]
    own = teacher(text)["input_ids"]
    assert len(own) > len(ids) == 5
    batch = {
        "input_ids": torch.tensor([ids, [*ids[:1], 0, 0, 0, 0]]),
        "attention_mask": torch.tensor([[1] * 5, [1, 0, 0, 0, 0]]),
    }
    found = Translated(network, student, teacher)(**batch).logits
    with torch.no_grad():
        wanted = network(input_ids=torch.tensor([own])).logits[0, :5].sort(1, descending=True).values
    assert torch.allclose(found[0], wanted, atol=1e-5)
    reached = len(teacher(tiny.words()[0])["input_ids"])
    assert found[1, :reached].isfinite().all() and found[1, reached:].isnan().all()


@pytest.mark.parametrize("weights", ["mean", "adaptive", (1.0, 3.0, 0.0)])
def test_an_ensemble_is_the_weighted_mean_of_probabilities(weights: Any) -> None:
    logits = 2 * random(3, 4, 5, seed=1)
    found = mixed(logits.log_softmax(-1), weights)
    for row in range(4):
        every = [oracle.softmax(logits[m, row].tolist()) for m in range(3)]
        if weights == ADAPTIVE:
            w = [math.exp(sum(p * math.log(p) for p in one)) for one in every]
        else:
            w = [1.0] * 3 if weights == "mean" else list(weights)
        expected = [sum(a * one[c] for a, one in zip(w, every, strict=True)) / sum(w) for c in range(5)]
        assert found[row].exp().tolist() == pytest.approx(expected)


def test_one_teacher_twice_is_that_teacher(place: Path) -> None:
    network, batch = models.load(place / "teacher-0"), tiny.token_batches(2)[0]
    with torch.no_grad():
        alone = network(**batch).logits.log_softmax(-1)
    for weights in ("mean", "adaptive", [0.2, 0.8]):
        assert torch.allclose(Ensemble([network, network], weights)(**batch).logits, alone, atol=1e-5)


def test_a_teacher_that_knows_speaks_louder() -> None:
    sure, unsure = torch.tensor([8.0, 0, 0, 0]).log_softmax(0), torch.tensor([0, 0.1, 0, 0]).log_softmax(0)
    both = torch.stack([sure, unsure])[:, None]
    assert mixed(both, "adaptive")[0, 0].exp() > mixed(both, "mean")[0, 0].exp() + 0.1


@pytest.mark.parametrize(
    ("weights", "words"), [("loud", "mean, adaptive or"), ([1.0], "not 2 numbers"), ([0, 0], "not all 0")]
)
def test_weights_that_cannot_be_are_refused(weights: Any, words: str) -> None:
    with pytest.raises(CompressLabError, match=words):
        Ensemble([nn.Identity(), nn.Identity()], weights)


# -- the whole way ---------------------------------------------------------------------------------------------------


def recipe(*steps: dict[str, Any]) -> Recipe:
    return tiny.teaching_recipe(*steps, samples=16, steps=16, learning_rate=3e-3)


def taught(place: Path, out: Path, teacher: str, chosen: Recipe, **more: Any) -> Any:
    _, report = distill(
        str(place / teacher), str(place / "student"), chosen, str(place / "text.txt"), out=out, measure=False, **more
    )
    return report


def test_a_student_learns_from_a_teacher_with_other_tokens(place: Path, tmp_path: Path) -> None:
    report = taught(place, tmp_path / "out", "foreign", recipe({"method": "uld"}))
    told = report.data["training"]
    assert min(map(float, told["losses"])) < 0.98 * float(told["loss_before"])
    with pytest.raises(CompressLabError, match="have tokenizers that differ"):
        taught(place, tmp_path / "no", "foreign", recipe({"method": "soft-labels"}))
    with pytest.raises(CompressLabError, match="keep one kind"):
        taught(place, tmp_path / "no", "foreign", recipe({"method": "uld"}, {"method": "soft-labels"}))


def test_a_student_learns_from_two_teachers(place: Path, tmp_path: Path) -> None:
    others = [str(place / "teacher-1")]
    soft = recipe({"method": "soft-labels"})
    report = taught(place, tmp_path / "out", "teacher-0", soft, others=others, ensemble="adaptive")
    told = report.data["training"]
    assert min(map(float, told["losses"])) < float(told["loss_before"])
    assert "teacher-1 (adaptive)" in report.model["changed"]
    with pytest.raises(CompressLabError, match="look inside one teacher"):
        taught(place, tmp_path / "no", "teacher-0", recipe({"method": "hints"}), others=others)
    with pytest.raises(CompressLabError, match="have tokenizers that differ"):
        taught(place, tmp_path / "no", "teacher-0", soft, others=[str(place / "foreign")])


def test_the_command_takes_more_teachers(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = tmp_path / "tiny.yaml"
    chosen.write_text(recipe({"method": "soft-labels"}).to_yaml())
    command = ("distill", place / "teacher-0", place / "student", "--recipe", chosen, "--data", place / "text.txt",
               "--also", place / "teacher-1")  # fmt: skip
    code, _, complaint = tiny.run_cli(
        monkeypatch, capsys, *command, "--ensemble", "1,3", "--out", tmp_path / "out", "--quiet"
    )
    assert code == 0, complaint
    code, _, complaint = tiny.run_cli(monkeypatch, capsys, *command, "--ensemble", "loud", "--out", tmp_path / "no")
    assert code == 2 and "mean, adaptive or a number for each" in " ".join(complaint.split())

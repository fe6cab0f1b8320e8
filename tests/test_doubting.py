"""What a user is told of a teacher before it teaches: however it teaches."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from compresslab import doubting, models
from compresslab.caching import teach_cache
from compresslab.data.labelled import Example
from compresslab.distilling import distill
from compresslab.recipe import Recipe
from compresslab.teachers import Translated

UNTRAINED, WORSE = "was its head ever trained?", "is worse than the student on the examples held back"


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    with tiny.unmeasured(), tiny.quick():
        yield


def recipe(*steps: dict[str, Any], samples: int = 24, **training: Any) -> Recipe:
    brief = {"steps": 2, "learning_rate": 1e-4, "held_back": 0.25, "checks": 1}
    return tiny.teaching_recipe(*steps, samples=samples, **brief | training)


SOFT = {"method": "soft-labels", "temperature": 1.0}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One network that has learned a text and two that have not, one of which reads other tokens."""
    folder = tmp_path_factory.mktemp("doubts")
    text = tiny.write_text(folder / "text.txt")
    tiny.save("llama", folder / "untaught", seed=1)
    with tiny.quick(), tiny.unmeasured():
        learning = recipe({"method": "hard-labels"}, samples=64, steps=80, learning_rate=3e-3)
        distill(folder / "untaught", folder / "untaught", learning, str(text), out=folder / "taught", measure=False)
    for name in ("untaught", "taught"):
        shutil.copytree(folder / name, folder / f"foreign-{name}")
        other_numbers(folder / f"foreign-{name}")
    return folder


def other_numbers(folder: Path) -> None:
    """The same network of the same words, which have other numbers now."""
    turned = list(range(len(tiny.SPECIAL), tiny.VOCABULARY))[::-1]
    order = torch.tensor([*range(len(tiny.SPECIAL)), *turned])
    path = folder / "tokenizer.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    raw["model"]["vocab"] = {word: int((order == number).nonzero()) for word, number in raw["model"]["vocab"].items()}
    path.write_text(json.dumps(raw), encoding="utf-8")

    def turn(tensors: dict[str, Tensor]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name][order].contiguous()

    tiny.change_tensors(folder, turn)


def told(place: Path, out: Path, teacher: str, student: str, given: Recipe, **more: Any) -> dict[str, Any]:
    _, report = distill(
        place / teacher, place / student, given, str(place / "text.txt"), out=out, measure=False, **more
    )
    found: dict[str, Any] = report.data["training"]
    return found


@pytest.mark.parametrize("way", ["live", "cache", "features", "other tokens", "one of two"])
def test_a_teacher_that_knows_less_than_its_student_is_said_however_it_teaches(
    way: str, place: Path, tmp_path: Path
) -> None:
    given, foreign, more = recipe(SOFT), "", {}
    if way == "features":
        given = recipe({"method": "hints"})
    if way == "other tokens":
        given, foreign = recipe({"method": "uld"}), "foreign-"
    found = []
    for teacher, student in (("untaught", "taught"), ("taught", "untaught")):
        if way == "cache":
            kept = teach_cache(place / teacher, given, str(place / "text.txt"), out=tmp_path / teacher, k=196)
            assert [UNTRAINED in doubt for doubt in doubting.of_cache(kept)] == [True] * (teacher == "untaught")
            more = {"cache": kept.folder}
        if way == "one of two":
            more = {"others": [place / "taught"]}
        found.append(told(place, tmp_path / f"by-{teacher}", foreign + teacher, student, given, **more))
    assert UNTRAINED in found[0]["notice"] and WORSE in found[0]["notice"]
    assert found[1]["notice"] == ""
    if way == "one of two":
        assert f"the teacher {place / 'untaught'} is worse" in found[0]["notice"]
        assert f"the teacher {place / 'taught'} is worse" not in found[0]["notice"]
    assert found[0]["nats_of_labels"].startswith("teacher ")


def test_a_cache_says_the_same_numbers_as_its_teacher(place: Path, tmp_path: Path) -> None:
    kept = teach_cache(place / "untaught", recipe(SOFT), str(place / "text.txt"), out=tmp_path / "cache", k=64)
    both = [
        told(place, tmp_path / name, "untaught", "taught", recipe(SOFT), **more)["nats_of_labels"]
        for name, more in (("live", {}), ("cached", {"cache": kept.folder}))
    ]
    numbers = [[float(part.split()[-1]) for part in said.split(", ")] for said in both]
    assert len(numbers[0]) == 3
    assert numbers[0] == pytest.approx(numbers[1], abs=2e-3)


def test_peers_are_doubted_where_the_student_knows_more(place: Path, tmp_path: Path) -> None:
    """Two that begin untaught are what the method is for."""
    given = recipe({"method": "mutual"})
    assert WORSE in told(place, tmp_path / "worse", "untaught", "taught", given)["notice"]
    assert told(place, tmp_path / "better", "taught", "untaught", given)["notice"] == ""
    assert told(place, tmp_path / "fresh", "untaught", "untaught", given)["notice"] == ""


def test_the_same_text_in_other_tokens_takes_the_same_nats_a_byte(place: Path) -> None:
    network, own = (models.load(place / name) for name in ("foreign-taught", "taught"))
    student, teacher = (models.find(place / name).tokenizer() for name in ("taught", "foreign-taught"))
    words = tiny.words()
    texts = [" ".join(words[i : i + 9]) for i in range(6)]
    rows = [doubting.whole(torch.tensor(student(text)["input_ids"])) for text in texts]
    found = doubting.judged(own, Translated(network, student, teacher), ["x"], rows[:3], rows[3:], 2)
    total, count = 0.0, 0
    for text in texts[3:]:
        ids = torch.tensor(teacher(text)["input_ids"])
        with torch.no_grad():
            logs = network(input_ids=ids[None]).logits[0].log_softmax(1)
        total -= sum(float(logs[i, ids[i + 1]]) for i in range(len(ids) - 1))
        count += len(text) - len(text.split()[0])
    assert found.told == f"teacher {total / count:.3f}, student {total / count:.3f} a byte of text"
    assert not [doubt for doubt in found.doubts if WORSE in doubt]


def test_labels_that_do_not_count_are_not_counted() -> None:
    network, rows = tiny.make("llama"), [row for row in tiny.token_batches(3, 6)[0]["input_ids"]]
    examples: list[Example] = [{"input_ids": row, "labels": row.clone()} for row in rows]
    examples[0]["labels"][:] = -100
    examples[1]["labels"][3] = -100
    with torch.no_grad():
        nats = [
            -float(network(input_ids=e["input_ids"][None]).logits[0, i - 1].log_softmax(0)[e["labels"][i]])
            for e in examples for i in range(1, 6) if e["labels"][i] >= 0
        ]  # fmt: skip
    assert len(nats) == 4 + 5
    for batch in (1, 3):
        assert doubting.cross_entropy(network, examples, batch) == pytest.approx(sum(nats) / 9, rel=1e-5)


def test_doubts_are_of_numbers() -> None:
    assert doubting.untrained("the teacher", 1.0, 3.0) == doubting.worse("the teacher", 1.0, 1.5) == []
    assert WORSE in doubting.worse("the teacher", 1.6, 1.5)[0]
    assert "(1.600 and 1.500 nats a byte)" in doubting.worse("the teacher", 1.6, 1.5, "nats a byte")[0]
    assert "leaves out 30 %" in doubting.left_out(0.3)[0] and doubting.left_out(0.2) == []
    assert UNTRAINED in doubting.untrained("the teacher", 3.0, 3.0)[0]
    rows: list[Example] = [{"labels": torch.tensor([9, 0, 0, 1, -100])}, {"labels": torch.tensor([9, 1])}]
    assert doubting.entropy_of_labels(rows, True) == pytest.approx(math.log(2))


def test_an_encoder_has_no_labels_to_be_judged_by() -> None:
    bert: nn.Module = tiny.make("bert")
    rows = [{"input_ids": row} for row in tiny.token_batches(3)[0]["input_ids"]]
    assert doubting.judged(bert, bert, ["x"], rows, rows, 2) == doubting.Judged()

"""Students that teach each other: the formula, who gets which gradient, and the training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import tiny
from compresslab import models
from compresslab.data.labelled import labelled_examples
from compresslab.distill.mutual import Mutual
from compresslab.distilling import distill
from compresslab.errors import CompressLabError
from compresslab.losses import losses_of
from compresslab.measure import fresh
from compresslab.mutual import mutual, mutual_loss
from compresslab.recipe import Training, parse
from compresslab.training import split
from oracles import mutual as oracle

SETTINGS = Training(steps=12, learning_rate=3e-3, batch=4, checks=3, held_back=0.2)


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    with tiny.quick():
        yield


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_loss_is_its_formula_and_no_gradient_goes_to_who_teaches(count: int) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = [torch.randn(4, 5, generator=generator).requires_grad_() for _ in range(count)]
    labels = torch.tensor([0, 3, 4, 3])
    rows = [z.detach().double().tolist() for z in logits]
    loss = mutual_loss(logits, labels)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(
        sum(oracle.loss(k, rows, rows, labels.tolist()) for k in range(count)), rel=1e-5
    )
    for k in range(count):
        for row in range(4):
            for column in range(5):
                ends = []
                for step in (1e-5, -1e-5):
                    moved = [[list(r) for r in z] for z in rows]
                    moved[k][row][column] += step
                    ends.append(oracle.loss(k, moved, rows, labels.tolist()))
                assert float(logits[k].grad[row, column]) == pytest.approx((ends[0] - ends[1]) / 2e-5, abs=1e-4)


def pictures(count: int = 24) -> list[dict[str, Tensor]]:
    """Bright or dark."""
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "pixel_values": torch.randn(3, 8, 8, generator=generator) + (2 if i % 2 else -2),
            "labels": torch.tensor(i % 2),
        }
        for i in range(count)
    ]


def test_classifiers_learn_together_and_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    students = [models.find(tiny.save("vit", tmp_path / f"s{i}", seed=i, num_hidden_layers=1 + i)) for i in range(2)]
    folders, record = mutual(students, pictures(), SETTINGS, tmp_path / "whole")
    assert record.losses[-1][1] < record.losses[0][1]
    found = [models.load(folder) for folder in folders]
    batch = torch.stack([example["pixel_values"] for example in pictures()])
    for model in found:
        right = model(pixel_values=batch).logits.argmax(1) == torch.tensor([i % 2 for i in range(24)])
        assert float(right.float().mean()) > 0.9
    assert [len(list(models.blocks(model))) for model in found] == [1, 2]

    steps = [0]
    from compresslab import mutual as module

    def dying(logits: Any, labels: Tensor, weights: str) -> Tensor:
        steps[0] += 1
        if steps[0] == 9:
            raise KeyboardInterrupt
        return mutual_loss(logits, labels)

    with monkeypatch.context() as patch:
        patch.setattr(module, "mutual_loss", dying)
        with pytest.raises(KeyboardInterrupt):
            mutual(students, pictures(), SETTINGS, tmp_path / "killed")
    again, _ = mutual(students, pictures(), SETTINGS, tmp_path / "killed")
    for one, other in zip(folders, again, strict=True):
        assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


@pytest.mark.parametrize("weights", ["mean", "adaptive"])
def test_peers_are_weighed_as_it_is_said(weights: str, tmp_path: Path) -> None:
    students = [models.find(tiny.save("vit", tmp_path / f"s{i}", seed=i, num_hidden_layers=1)) for i in range(3)]
    still = SETTINGS.model_copy(update={"steps": 1, "learning_rate": 1e-9, "checks": 1})
    _, record = mutual(students, pictures(), still, tmp_path / "out", weights=weights)
    _, held_back = split(pictures(), still.held_back, 0)
    pixels, labels = (torch.stack([one[key] for one in held_back]) for key in ("pixel_values", "labels"))
    with torch.no_grad():
        logits = [models.materialise(source)(pixel_values=pixels).logits for source in students]
        both = {name: float(mutual_loss(logits, labels, weights=name)) for name in ("mean", "adaptive")}
    assert both["mean"] != pytest.approx(both["adaptive"], rel=1e-4)
    assert record.losses[0][1] == pytest.approx(both[weights], rel=1e-5)


def test_language_models_count_next_tokens(tmp_path: Path) -> None:
    students = [models.find(tiny.save("llama", tmp_path / f"s{i}", seed=i, num_hidden_layers=1)) for i in range(2)]
    ids = tiny.token_batches(12, 8)[0]["input_ids"]
    examples = [{"input_ids": row, "labels": row} for row in ids]
    _, record = mutual(students, examples, SETTINGS, tmp_path / "out")
    networks = [models.load(tmp_path / f"s{i}") for i in range(2)]
    with torch.no_grad():
        alone = [
            nn.functional.cross_entropy(n(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            for n in networks
        ]
        both = mutual_loss([n(input_ids=ids).logits[:, :-1].flatten(0, 1) for n in networks], ids[:, 1:].flatten())
    assert float(both) > float(sum(alone)) and record.losses[0][1] < 2 * float(both)


def test_students_of_other_kinds_are_refused(tmp_path: Path) -> None:
    picture, text, other = tiny.make("vit"), tiny.make("llama"), tiny.make("llama", vocab_size=100)
    for several in ([picture, text], [text, other], [tiny.make("bert")]):
        with pytest.raises(CompressLabError, match="answer the same question"):
            mutual([models.find(model) for model in several], pictures(), SETTINGS, tmp_path / "no")
    (tmp_path / "there").mkdir()
    with pytest.raises(CompressLabError, match="is there already"):
        mutual([models.find(picture)], pictures(), SETTINGS, tmp_path / "there")
    with pytest.raises(CompressLabError, match="'loud': weights of peers are mean or adaptive"):
        mutual([models.find(picture)], pictures(), SETTINGS, tmp_path / "no", weights="loud")


def pair(tmp_path: Path) -> list[Path]:
    return [tiny.save("vit", tmp_path / f"s{i}", seed=i, num_hidden_layers=1 + i) for i in range(2)]


MUTUAL = {"name": "tiny", "version": 1, "steps": [{"method": "mutual"}], "training": SETTINGS.model_dump()}


def test_as_a_recipe_it_leaves_the_student_that_the_cohort_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The student is named second and stands first, so its cohort is the two the other way round; the same bytes."""
    monkeypatch.setattr(fresh, "measure", tiny.fake_measure)
    peer, student = pair(tmp_path)
    artifact, report = distill(peer, student, parse(MUTUAL, "tiny"), pictures(), out=tmp_path / "out", measure=False)
    assert len(list(models.blocks(models.load(artifact.folder)))) == 2
    told: Any = report.data
    assert float(told["training"]["losses"][-1]) < float(told["training"]["loss_before"])
    assert told["training"]["notice"] == ""
    assert " together with the model above" in report.model["changed"] and " together with " in report.title
    train = labelled_examples(pictures(), 0).train
    sources = [models.find(student), models.find(peer)]
    folders, _ = mutual(sources, train, SETTINGS, tmp_path / "cohort")
    whole = load_file(folders[0] / "model.safetensors")
    found = load_file(artifact.folder / "model.safetensors")
    assert all(torch.equal(whole[name], found[name]) for name in whole)


def test_what_peers_say_has_a_weight() -> None:
    generator = torch.Generator().manual_seed(1)
    logits, labels = [torch.randn(4, 5, generator=generator) for _ in range(3)], torch.tensor([0, 3, 4, 3])
    alone = sum(nn.functional.cross_entropy(z, labels) for z in logits)
    whole = mutual_loss(logits, labels)
    assert float(Mutual(weight=0.5).together(logits, labels)) == pytest.approx(float(alone + whole) / 2)
    adaptive = mutual_loss(logits, labels, weights="adaptive")
    assert float(Mutual(weights="adaptive").together(logits, labels)) == float(adaptive) != float(whole)


def test_a_recipe_of_peers_takes_nothing_that_a_teacher_says(tmp_path: Path) -> None:
    peer, student = pair(tmp_path)
    with pytest.raises(CompressLabError, match="stands alone"):
        both = MUTUAL | {"steps": [{"method": "mutual"}, {"method": "soft-labels"}]}
        distill(peer, student, parse(both, "tiny"), pictures(), out=tmp_path / "out")
    with pytest.raises(CompressLabError, match="no cache can hold"):
        assert losses_of(parse(MUTUAL, "tiny")).temperature
    with pytest.raises(CompressLabError, match="--set weights=adaptive"):
        distill(peer, student, parse(MUTUAL, "tiny"), pictures(), out=tmp_path / "out", ensemble="adaptive")
    with pytest.raises(CompressLabError, match="an encoder without a head"):
        bert = tiny.save("bert", tmp_path / "bert")
        distill(bert, bert, parse(MUTUAL, "tiny"), pictures(), out=tmp_path / "out")
    with pytest.raises(CompressLabError, match="'loud': weights of peers are mean or adaptive"):
        parse(MUTUAL | {"steps": [{"method": "mutual", "weights": "loud"}]}, "tiny")


def test_a_classifier_is_its_own_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Early exits, the whole way: they are there while it learns, and not in what is written."""
    monkeypatch.setattr(fresh, "measure", tiny.fake_measure)
    folder = tiny.save("vit", tmp_path / "model", num_hidden_layers=3)
    raw = {"name": "tiny", "version": 1, "steps": [{"method": "hard-labels"}, {"method": "early-exits", "exits": 2}],
           "training": SETTINGS.model_dump()}  # fmt: skip
    artifact, report = distill(
        str(folder), str(folder), parse(raw, "tiny"), pictures(), out=tmp_path / "out", measure=False
    )
    told: Any = report.data
    assert float(told["training"]["losses"][-1]) < 0.8 * float(told["training"]["loss_before"])
    before, after = (load_file(path / "model.safetensors") for path in (folder, artifact.folder))
    assert len(before) == len(after)
    assert models.load(artifact.folder)(pixel_values=torch.zeros(1, 3, 8, 8)).logits.isfinite().all()

"""distill() and teach_cache() on tiny networks: a student learns, goes on after a kill, and what cannot work is said."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

import tiny
from compresslab import caching, doubting, models, pairing, pipeline, teaching
from compresslab.caching import teach_cache
from compresslab.contract import TopK
from compresslab.data.labelled import Example
from compresslab.distill import teacher_cache
from compresslab.distill.fused import After
from compresslab.distill.hard_labels import HardLabels
from compresslab.distill.soft_labels import SoftLabels
from compresslab.distill.teacher_cache import TeacherCache
from compresslab.distilling import distill
from compresslab.errors import CompressLabError
from compresslab.losses import losses_of
from compresslab.measure import fresh
from compresslab.recipe import Recipe
from compresslab.students import Shape, student_of
from compresslab.teachers import network_of
from compresslab.teaching import Lesson
from compresslab.training import collate

SOFT = [{"method": "soft-labels", "temperature": 2.0, "weight": 0.9}, {"method": "hard-labels", "weight": 0.1}]
MEASURE = fresh.measure


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    with tiny.unmeasured(), tiny.quick():
        yield


def chosen(*steps: dict[str, Any], samples: int = 24, **training: Any) -> Recipe:
    longer = {"steps": None, "epochs": 6, "learning_rate": 3e-3, "checks": 3}
    return tiny.teaching_recipe(*steps or SOFT, samples=samples, **longer | training)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of four blocks that has learned its text, and the text."""
    folder = tmp_path_factory.mktemp("pair")
    text = tiny.write_text(folder / "text.txt")
    tiny.save("llama", folder / "untaught", num_hidden_layers=4)
    with tiny.quick(), tiny.unmeasured():
        control = chosen({"method": "hard-labels"}, samples=64, epochs=8)
        distill(folder / "untaught", folder / "untaught", control, str(text), out=folder / "teacher", measure=False)
    return folder


def taught(place: Path, out: Path, given: Recipe | None = None, **more: Any) -> tuple[Any, Any]:
    options: dict[str, Any] = {"data": str(place / "text.txt"), "measure": False} | more
    student = options.pop("student", Shape(layers=2))
    return distill(place / "teacher", student, given or chosen(), out=out, **options)


def divergence(teacher: Path, student: Path) -> float:
    """Of the next-token distributions, by plain transformers, on tokens that neither has seen in training."""
    ids = torch.randint(3, 60, (16, 16), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        both = [models.load(folder)(input_ids=ids).logits.flatten(0, 1).log_softmax(1) for folder in (student, teacher)]
    return float(torch.nn.functional.kl_div(*both, log_target=True, reduction="batchmean"))


# -- whole runs ------------------------------------------------------------------------------------------------------


def test_a_student_learns_and_is_a_plain_folder_that_says_where_it_comes_from(place: Path, tmp_path: Path) -> None:
    artifact, report = taught(place, tmp_path / "out")
    untaught, _ = taught(place, tmp_path / "raw", chosen(learning_rate=1e-9))
    assert divergence(place / "teacher", artifact.folder) < 0.7 * divergence(place / "teacher", untaught.folder)
    opened = transformers.AutoModelForCausalLM.from_pretrained(artifact.folder)
    assert opened.config.num_hidden_layers == 2
    assert transformers.AutoTokenizer.from_pretrained(artifact.folder).get_vocab()
    artifact.verify()
    training = report.data["training"]
    losses = [float(loss) for loss in training["losses"]]
    assert len(losses) == 3
    assert min(losses) < float(training["loss_before"])
    assert training["notice"] == ""
    assert "taught by the model above" in report.model["changed"]
    assert report.parity.tensors == 2 * 7 + 1
    assert {m.name for m in report.after} >= {"disk_bytes", "weight_bytes"}
    page = (artifact.folder / "report.html").read_text(encoding="utf-8")
    assert f"step {training['best_step']}: {min(losses):g} (held back)" in page
    assert len(training["training_losses"]) == 3
    assert f": {float(training['training_losses'][1]):g} (in training" in page
    text = (artifact.folder / "README.md").read_text(encoding="utf-8")
    assert "soft-labels" in text


def test_before_is_the_teacher_and_after_the_student_measured_from_disk(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fresh, "measure", MEASURE)
    artifact, report = taught(place, tmp_path / "out", chosen(epochs=1), measure=True, evaluation_windows=4)
    pairs = {before.name: (before.value, after.value) for before, after in report.pairs()}
    assert pairs["weight_bytes"][1] < pairs["weight_bytes"][0]
    ids = pipeline.Questions.of(models.find(place / "teacher"), str(place / "text.txt"), 4, False, None).texts
    assert ids is not None
    for folder, value in zip((place / "teacher", artifact.folder), pairs["perplexity"], strict=True):
        model = models.load(folder, dtype=torch.float32)
        with torch.no_grad():
            nats = [float(model(input_ids=row[None], labels=row[None]).loss) for row in ids["input_ids"]]
        assert value == pytest.approx(float(np.exp(np.mean(nats))), rel=1e-3)


def test_a_student_of_the_blocks_that_matter(place: Path, tmp_path: Path) -> None:
    """Measured on the recipe's own text; the same text names the same blocks."""
    told = [
        taught(place, tmp_path / f"out{i}", student=Shape(layers=2, take="influence"))[1].model["changed"]
        for i in (0, 1)
    ]
    assert told[0] == told[1] and told[0].startswith("blocks ") and " of 4, taught by" in told[0]


def test_a_narrower_student_is_measured_on_the_recipes_text(place: Path, tmp_path: Path) -> None:
    """The residual stream is cut, and taught on; plain transformers opens what is left."""
    artifact, report = taught(place, tmp_path / "out", student=Shape(layers=2, width=0.5, hidden=0.5))
    changed = report.model["changed"]
    assert changed.startswith("blocks ") and "16 of 32 channels of the embedding" in changed and "heads" in changed
    assert transformers.AutoModelForCausalLM.from_pretrained(artifact.folder).config.hidden_size == 16


def test_the_same_bytes_every_time_and_after_a_kill(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, report = taught(place, tmp_path / "whole")
    steps = []

    def kill(what: str) -> None:
        steps.append(what)
        if len(steps) > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        taught(place, tmp_path / "again", progress=pipeline.Progress(step=kill))
    after: list[str] = []
    again, second = taught(place, tmp_path / "again", progress=pipeline.Progress(step=after.append))
    assert (again.folder / "model.safetensors").read_bytes() == (whole.folder / "model.safetensors").read_bytes()
    assert second.data == report.data
    assert after.count("a step of the training") < 30 - 10
    assert not list(tmp_path.glob("*.partial"))


def test_a_command_that_was_killed_from_outside_goes_on_with_the_same_bytes(place: Path, tmp_path: Path) -> None:
    """SIGKILL as soon as the second checkpoint begins to appear: nothing of ours runs after it."""
    given = chosen(steps=150, checks=10)
    (tmp_path / "tiny.yaml").write_text(given.to_yaml(), encoding="utf-8")
    whole, report = taught(place, tmp_path / "whole", given)
    command = [
        sys.executable, "-m", "compresslab.cli", "distill", place / "teacher", "--layers", "2", "--out", tmp_path / "out",
        "--recipe", tmp_path / "tiny.yaml", "--data", place / "text.txt", "--no-measure", "--quiet", "--device", "cpu",
    ]  # fmt: skip
    process = subprocess.Popen(list(map(str, command)), env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        while process.poll() is None and len(list((tmp_path / "out.partial").rglob("checkpoint-*"))) < 2:
            time.sleep(0.01)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    steps: list[str] = []
    again, second = taught(place, tmp_path / "out", given, progress=pipeline.Progress(step=steps.append))
    assert 0 < steps.count("a step of the training") <= 150 - 15
    assert (again.folder / "model.safetensors").read_bytes() == (whole.folder / "model.safetensors").read_bytes()
    assert second.data == report.data
    assert not list(tmp_path.glob("*.partial"))


def test_another_recipe_does_not_go_on_with_a_killed_run(place: Path, tmp_path: Path) -> None:
    steps = []

    def kill(what: str) -> None:
        steps.append(what)
        if len(steps) > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        taught(place, tmp_path / "out", progress=pipeline.Progress(step=kill))
    plain, _ = taught(place, tmp_path / "out", chosen({"method": "reverse-kl"}))
    other, _ = taught(place, tmp_path / "other", chosen({"method": "reverse-kl"}))
    assert (plain.folder / "model.safetensors").read_bytes() == (other.folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["gpt2", "llama-tied"])
def test_other_architectures(kind: str, place: Path, tmp_path: Path) -> None:
    teacher = tiny.save(kind, tmp_path / "teacher")
    artifact, report = distill(
        teacher, Shape(layers=1), chosen(), str(place / "text.txt"), out=tmp_path / "out", measure=False
    )
    losses = [float(loss) for loss in report.data["training"]["losses"]]
    assert min(losses) < float(report.data["training"]["loss_before"])
    assert divergence(teacher, artifact.folder) >= 0


@pytest.mark.parametrize(("after", "left"), [(25, "that of step 20"), (3, "as it was before the training")])
def test_a_loss_that_is_no_number_keeps_the_last_good_student(
    after: int, left: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One forward tells whether the two fit, one takes the loss before; then each step has one, and a check every tenth step."""
    rows, calls = SoftLabels.rows, []

    def broken(self: SoftLabels, logits: Tensor, *more: Any) -> Any:
        calls.append(0)
        value, slope = rows(self, logits, *more)
        return value * (float("nan") if len(calls) > after else 1), slope

    monkeypatch.setattr(SoftLabels, "rows", broken)
    artifact, report = taught(place, tmp_path / "out")
    assert (
        f"diverged: the loss of step {22 if after > 3 else 2} is nan; the network is {left}"
        in (report.data["training"]["notice"])
    )
    untaught = student_of(models.find(place / "teacher"), Shape(layers=2))[0].weights
    stays = [
        torch.equal(models.find(artifact.folder).weights.get(name), untaught.get(name)) for name in untaught.names()
    ]
    assert all(stays) if after == 3 else not any(stays)


# -- classifiers -----------------------------------------------------------------------------------------------------


def pictures(count: int, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        pixels = torch.randn(3, 8, 8, generator=generator)
        pixels[:, : 1 + i % 5] += 2
        made.append({"pixel_values": pixels, "labels": torch.tensor(i % 5)})
    return made


@pytest.mark.parametrize("steps", [
    SOFT, [{"method": "dist"}], [{"method": "dkd", "others": 2.0}, {"method": "hard-labels"}],
    [{"method": "hints"}, {"method": "soft-labels"}], [{"method": "hints"}],
], ids=lambda steps: "+".join(step["method"] for step in steps))  # fmt: skip
def test_a_classifier_of_pictures(steps: list[dict[str, Any]], tmp_path: Path) -> None:
    teacher = tiny.save("vit", tmp_path / "teacher", num_hidden_layers=3)
    artifact, report = distill(
        teacher, Shape(layers=1), chosen(*steps, epochs=8, batch=8), pictures(60), out=tmp_path / "out", measure=False
    )
    training = report.data["training"]
    assert min(float(loss) for loss in training["losses"]) < float(training["loss_before"])
    assert "was its head ever trained?" in training["notice"]
    names = set(models.load(artifact.folder).state_dict())
    assert names == {name for name in models.load(teacher).state_dict() if ".1." not in name and ".2." not in name}


def test_an_encoder_learns_from_features_and_has_no_logits(place: Path, tmp_path: Path) -> None:
    teacher = tiny.save("bert", tmp_path / "teacher", num_hidden_layers=3)
    text = str(place / "text.txt")
    _, report = distill(
        teacher, Shape(layers=1), chosen({"method": "hints"}), text, out=tmp_path / "out", measure=False
    )
    training = report.data["training"]
    assert min(float(loss) for loss in training["losses"]) < float(training["loss_before"])
    with pytest.raises(CompressLabError, match="has no logits to teach"):
        distill(teacher, Shape(layers=1), chosen(), text, out=tmp_path / "no", measure=False)


def sorter(folder: Path, layers: int, seed: int) -> Path:
    """Of texts, dull or bright."""
    config = transformers.BertConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        max_position_embeddings=64, id2label={0: "dull", 1: "bright"}, label2id={"dull": 0, "bright": 1},
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformers.BertForSequenceClassification(config).save_pretrained(folder)
    tiny.save_tokenizer(folder)
    return folder


def test_a_classifier_of_texts_by_name(tmp_path: Path) -> None:
    """Of different lengths, so batches are padded; the teacher is taught first, without a teacher."""
    known = tiny.words()
    rows = [f"{' '.join(known[i % 2 * 50 + i * k % 40] for k in range(1, 4 + i % 5))}\t{i % 2}" for i in range(60)]
    table = tmp_path / "table.tsv"
    table.write_text("text\tlabel\n" + "\n".join(rows) + "\n", encoding="utf-8")
    raw, student = sorter(tmp_path / "raw", 2, seed=1), sorter(tmp_path / "student", 1, seed=2)
    teacher, _ = distill(
        raw, raw, chosen({"method": "hard-labels"}, epochs=8), str(table), out=tmp_path / "teacher", measure=False
    )
    artifact, report = distill(
        teacher.folder, student, chosen(epochs=8), str(table), out=tmp_path / "out", measure=False
    )
    training = report.data["training"]
    assert training["notice"] == ""
    assert min(float(loss) for loss in training["losses"]) < 0.3 * float(training["loss_before"])
    assert models.load(artifact.folder).config.id2label == {0: "dull", 1: "bright"}


def test_classes_that_differ(tmp_path: Path) -> None:
    folders = [tiny.save("vit", tmp_path / str(n), num_labels=n) for n in (5, 4)]
    with pytest.raises(CompressLabError, match=r"sort into other classes, 5 .* and 4 "):
        distill(*folders, chosen(), pictures(20), out=tmp_path / "out", measure=False)


# -- what is said ----------------------------------------------------------------------------------------------------


def test_a_teacher_worse_than_its_student(place: Path, tmp_path: Path) -> None:
    _, report = distill(
        place / "untaught",
        place / "teacher",
        chosen(epochs=1),
        str(place / "text.txt"),
        out=tmp_path / "out",
        measure=False,
    )
    notice = report.data["training"]["notice"]
    assert "the teacher is worse than the student" in notice
    assert "was its head ever trained?" in notice


def test_tokenizers_that_differ(place: Path, tmp_path: Path) -> None:
    student = tiny.save("llama", tmp_path / "student")
    path = student / "tokenizer.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = raw["model"]["vocab"]
    one, other = list(vocabulary)[5:7]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    path.write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(
        CompressLabError, match=f"tokenizers that differ.*'({one}|{other})' is . in one and . in the other"
    ):
        taught(place, tmp_path / "out", student=student)


def test_tokenizers_that_cut_differently(place: Path, tmp_path: Path) -> None:
    student = tiny.save("llama", tmp_path / "student")
    path = student / "tokenizer.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    raw["pre_tokenizer"] = None
    path.write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(CompressLabError, match="tokenizers that differ.*tokens in one and"):
        taught(place, tmp_path / "out", student=student)


def test_a_language_model_and_a_classifier(place: Path, tmp_path: Path) -> None:
    student = tiny.save("bert", tmp_path / "student")
    with pytest.raises(CompressLabError, match="do not answer the same question"):
        taught(place, tmp_path / "out", student=student)


def test_recipes_know_their_command(place: Path, tmp_path: Path) -> None:
    with pytest.raises(CompressLabError, match=r"teaches a student \(soft-labels\): run it with 'compresslab distill'"):
        pipeline.compress(place / "teacher", chosen(), out=tmp_path / "out")
    with pytest.raises(CompressLabError, match="has the step rtn, which is no loss"):
        taught(place, tmp_path / "out", tiny.recipe("rtn"))
    with pytest.raises(CompressLabError, match="learns from data"):
        taught(place, tmp_path / "out", data=None)


# -- lessons ---------------------------------------------------------------------------------------------------------


def examples(count: int = 6) -> list[Example]:
    """Of different lengths, with prompts that no loss counts."""
    made = []
    for i, row in enumerate(tiny.token_batches(count, 16)[0]["input_ids"]):
        labels = row.clone()
        labels[: 1 + i] = -100
        made.append({"input_ids": row[: 16 - i], "labels": labels[: 16 - i]})
    return made


def by_hand(student: Any, teacher: Any, rows: list[Example]) -> float:
    """One example and one token at a time, in float64, without padding."""
    total, count = 0.0, 0
    for row in rows:
        with torch.no_grad():
            z, t = (network.double()(input_ids=row["input_ids"][None]).logits[0] for network in (student, teacher))
        student.float(), teacher.float()
        for place in range(len(row["input_ids"]) - 1):
            label = int(row["labels"][place + 1])
            if label >= 0:
                soft = [(x[place] / 2).softmax(0) for x in (z, t)]
                total += 0.9 * 4 * float((soft[1] * (soft[1].log() - soft[0].log())).sum())
                total -= 0.1 * float(z[place].log_softmax(0)[label])
                count += 1
    return total / count


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_lesson_counts_what_counts(kind: str) -> None:
    student, teacher = (
        tiny.make(kind, seed=1),
        tiny.make(kind, seed=2, **({} if kind == "gpt2" else {"hidden_size": 64})),
    )
    losses, rows = (SoftLabels(weight=0.9), HardLabels(weight=0.1)), examples()
    lesson = Lesson.of(losses, student, teacher, rows[0])
    assert (lesson.after_student, lesson.after_teacher) == (After(), After())
    found = float(lesson(student, collate(rows)).detach())
    assert found == pytest.approx(by_hand(student, teacher, rows), rel=1e-4)


def test_logits_that_are_changed_after_the_head_are_taken_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = tiny.make("llama", seed=1), tiny.make("llama", seed=2)
    losses, rows = (SoftLabels(weight=0.9), HardLabels(weight=0.1)), examples()
    for network in (student, teacher):
        forward = network.forward

        def capped(*arguments: Any, forward: Any = forward, **more: Any) -> Any:
            found = forward(*arguments, **more)
            found.logits = 3 * torch.tanh(found.logits / 3)
            return found

        monkeypatch.setattr(network, "forward", capped)
    lesson = Lesson.of(losses, student, teacher, rows[0])
    assert lesson.after_student is lesson.after_teacher is None
    found = float(lesson(student, collate(rows)).detach())
    assert found == pytest.approx(by_hand(student, teacher, rows), rel=1e-4)


SHAPE = {
    "vocab_size": tiny.VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0,
    "initializer_range": 0.2,
}  # fmt: skip
CHANGED: dict[str, tuple[Any, Any, dict[str, Any], After]] = {
    "gemma2": (
        transformers.Gemma2Config, transformers.Gemma2ForCausalLM,
        {"head_dim": 8, "final_logit_softcapping": 3.0, "sliding_window": 32}, After(cap=3.0),
    ),
    "granite": (
        transformers.GraniteConfig, transformers.GraniteForCausalLM, {"logits_scaling": 4.0}, After(scale=0.25),
    ),
    "cohere": (
        transformers.CohereConfig, transformers.CohereForCausalLM, {"logit_scale": 0.125}, After(scale=0.125),
    ),
}  # fmt: skip


def changing(kind: str, seed: int = 0) -> Any:
    """A tiny network that caps or scales its logits behind its head, by so much that it shows."""
    config, network, more, _ = CHANGED[kind]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return network(config(**SHAPE | more)).eval()


@pytest.mark.parametrize("kind", CHANGED)
def test_caps_and_scales_behind_the_head_go_through_the_fused_loss(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = changing(kind, 1), changing(kind, 2)
    losses, rows = (SoftLabels(weight=0.9), HardLabels(weight=0.1)), examples()
    lesson = Lesson.of(losses, student, teacher, rows[0])
    assert (lesson.after_student, lesson.after_teacher) == (CHANGED[kind][3], CHANGED[kind][3])
    wanted = by_hand(student, teacher, rows)
    monkeypatch.setattr(teaching, "whole_logits", lambda *a: pytest.fail("logits were taken whole"))
    assert float(lesson(student, collate(rows)).detach()) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("kind", [*CHANGED, "unknown"])
def test_a_cache_of_a_teacher_that_changes_its_logits_behind_the_head(
    kind: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = changing("gemma2" if kind == "unknown" else kind)
    teacher.save_pretrained(tmp_path / "teacher")
    tiny.save_tokenizer(tmp_path / "teacher")
    if kind == "unknown":  # to us; its logits are taken whole
        monkeypatch.setattr("compresslab.caching.after_head", lambda *a: None)
    text, given = str(place / "text.txt"), chosen({"method": "soft-labels", "temperature": 1.0}, epochs=1)
    kept = teach_cache(tmp_path / "teacher", given, text, out=tmp_path / "cache", k=196)
    material = pairing.material_of(models.find(tmp_path / "teacher"), given, text, 0)
    asked = [(row["input_ids"], torch.ones(15, dtype=torch.bool)) for row in material.examples[:6]]
    ids = torch.stack([row for row, _ in asked])
    with torch.no_grad():
        logs = teacher(input_ids=ids).logits[:, :-1].log_softmax(2).flatten(0, 1)
    found = kept.rows(asked)
    torch.testing.assert_close(found.log_probs, logs.gather(1, found.ids), rtol=0.05, atol=0.02)
    nats = -logs.gather(1, ids[:, 1:].reshape(-1, 1)).squeeze(1)
    torch.testing.assert_close(kept.nats(asked), nats, rtol=2e-3, atol=2e-3)
    _, report = distill(
        tmp_path / "teacher", Shape(layers=1), given, text, out=tmp_path / "out", cache=kept.folder, measure=False
    )
    assert min(map(float, report.data["training"]["losses"])) < float(report.data["training"]["loss_before"])


# -- the cache -------------------------------------------------------------------------------------------------------


def record_by_hand(record: bytes, k: int) -> tuple[list[int], list[float]]:
    """A record read bit by bit."""
    ids, log_probs = [], []
    for i in range(k):
        high = record[2 * k + i // 4] >> (2 * (i % 4)) & 3
        ids.append(record[2 * i] + 256 * record[2 * i + 1] + 65536 * high)
        log_probs.append(-24.0 * (record[2 * k + k // 4 + i] / 255) ** 2)
    return ids, log_probs


def test_a_record_is_what_its_bytes_say() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(2**18, generator=generator)[:64] for _ in range(5)])
    log_probs = (4 * torch.randn(5, 64, generator=generator)).log_softmax(1)
    records = teacher_cache.packed(ids, log_probs)
    assert records.shape == (5, 208)
    numbers, found = teacher_cache.unpacked(records, 64)
    assert torch.equal(numbers, ids)
    for i in range(5):
        by_hand_ids, by_hand_logs = record_by_hand(records[i].tobytes(), 64)
        assert by_hand_ids == ids[i].tolist()
        assert by_hand_logs == pytest.approx(found[i].tolist(), abs=1e-5)
    step = 24 * ((log_probs.neg() / 24).sqrt() / 255 + 1 / 255**2)
    assert bool(((found - log_probs).abs() <= step.clamp(min=24 / 255**2))[log_probs > -24].all())


def cached(place: Path, out: Path, given: Recipe | None = None, **more: Any) -> TeacherCache:
    options: dict[str, Any] = {"data": str(place / "text.txt"), "k": 100} | more
    return teach_cache(place / "teacher", given or chosen(), out=out, **options)


def test_a_cache_says_what_the_teacher_says(place: Path, tmp_path: Path) -> None:
    kept = cached(place, tmp_path / "cache", k=64)
    assert (kept.folder / "rows.bin").stat().st_size == 24 * 15 * 208
    material = pairing.material_of(models.find(place / "teacher"), chosen(), str(place / "text.txt"), 0)
    row = material.examples[7]["input_ids"]
    found = kept.rows([(row, torch.ones(15, dtype=torch.bool))])
    teacher = models.load(place / "teacher", dtype=torch.float32)
    with torch.no_grad():
        wanted = (teacher(input_ids=row[None]).logits[0, :-1] / 2).log_softmax(1)
    top = wanted.topk(64)
    assert found.temperature == 2.0
    near = wanted.gather(1, found.ids)
    torch.testing.assert_close(near, top.values, rtol=1e-4, atol=1e-4)  # the same ones, but for ties
    torch.testing.assert_close(found.log_probs, near, rtol=0.05, atol=0.02)
    assert kept.manifest["rest_mean"] == pytest.approx(_left_out(teacher, material.examples), rel=1e-3)
    nats = doubting.cross_entropy(teacher, material.examples, 8)
    assert kept.manifest["facts"]["cross_entropy"] == pytest.approx(nats, rel=1e-4)
    with torch.no_grad():
        each = torch.nn.functional.cross_entropy(teacher(input_ids=row[None]).logits[0, :-1], row[1:], reduction="none")
    torch.testing.assert_close(kept.nats([(row, torch.ones(15, dtype=torch.bool))]), each, rtol=1e-3, atol=1e-3)


def _left_out(teacher: Any, rows: list[Example]) -> float:
    ids = torch.stack([row["input_ids"] for row in rows])
    with torch.no_grad():
        probabilities = (teacher(input_ids=ids).logits[:, :-1] / 2).softmax(2)
    return 1 - float(probabilities.topk(64).values.sum(2).mean())


def test_training_from_a_cache_agrees_with_the_live_teacher_within_what_is_left_out(
    place: Path, tmp_path: Path
) -> None:
    kept = cached(place, tmp_path / "cache", k=196)
    live, by_live = taught(place, tmp_path / "live")
    artifact, report = taught(place, tmp_path / "cached", cache=kept.folder)
    told = report.data["training"]["left_out_by_the_cache"]
    assert float(told.split()[0]) == pytest.approx(kept.manifest["rest_mean"], abs=1e-4)
    for ours, theirs in zip(report.data["training"]["losses"], by_live.data["training"]["losses"], strict=True):
        assert float(ours) == pytest.approx(float(theirs), rel=0.05)
    reference = divergence(place / "teacher", live.folder)
    assert divergence(place / "teacher", artifact.folder) == pytest.approx(reference, rel=0.1)
    assert "a cache of the model above, top 196 at temperature 2" in report.model["changed"]


def test_the_loss_from_a_cache_falls_short_by_the_divergence_of_the_rest() -> None:
    generator = torch.Generator().manual_seed(3)
    z, t = (3 * torch.randn(30, 50, generator=generator, dtype=torch.float64) for _ in range(2))
    top = t.log_softmax(1).topk(10)
    kept = TopK(ids=top.indices, log_probs=top.values.float(), temperature=1.0)
    loss = SoftLabels(temperature=1.0)
    short = loss.rows(z, t, None)[0] - loss.rows(z, kept, None)[0]
    others = torch.ones_like(t, dtype=torch.bool).scatter(1, top.indices, False)
    rest = t.softmax(1).masked_fill(~others, 0).sum(1)
    log_q, log_p = (x.masked_fill(~others, -torch.inf).log_softmax(1) for x in (t, z))
    q = log_q.exp()
    wanted = rest * torch.where(others, q * (log_q - log_p), 0).sum(1)
    torch.testing.assert_close(short, wanted, rtol=1e-3, atol=1e-5)


def test_a_killed_cache_goes_on_with_the_same_bytes(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caching.learning, "batch_size", lambda length: 4)
    whole = cached(place, tmp_path / "whole")
    steps: list[str] = []

    def kill(what: str) -> None:
        steps.append(what)
        if len(steps) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached(place, tmp_path / "killed", progress=pipeline.Progress(step=kill))
    with (tmp_path / "killed.partial" / "rows.bin").open("ab") as handle:
        handle.write(b"half a record")  # what a kill leaves of a batch
    with (tmp_path / "killed.partial" / "nats.bin").open("ab") as handle:
        handle.write(b"?")
    asked = []
    said = caching._said
    monkeypatch.setattr(caching, "_said", lambda *a: (asked.append(0), said(*a))[1])
    again = cached(place, tmp_path / "killed")
    assert len(asked) == 3
    for name in ("rows.bin", "nats.bin", "index.npy", "manifest.json"):
        assert (again.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    assert not (tmp_path / "killed.partial").exists()
    with pytest.raises(CompressLabError, match="unfinished cache of another temperature"):
        with pytest.raises(KeyboardInterrupt):
            steps.clear()
            cached(place, tmp_path / "other", progress=pipeline.Progress(step=kill))
        cached(place, tmp_path / "other", chosen({"method": "soft-labels", "temperature": 4.0}))


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"teacher": "untaught"}, "another teacher .*teacher.*untaught"),
        ({"given": chosen(samples=20)}, "another data .*24 samples.*20 samples"),
        ({"seed": 1}, "another data"),
        (
            {"given": chosen({"method": "soft-labels", "temperature": 4.0})},
            r"another temperature \(temperature: 2.0, not 4.0",
        ),
    ],
    ids=["teacher", "fewer", "seed", "temperature"],
)
def test_a_cache_of_something_else_is_refused_naming_what(
    other: dict[str, Any], named: str, place: Path, tmp_path: Path
) -> None:
    kept = cached(place, tmp_path / "cache")
    options = {"data": str(place / "text.txt"), "measure": False, "cache": kept.folder} | other
    teacher, given = place / str(options.pop("teacher", "teacher")), options.pop("given", chosen())
    with pytest.raises(CompressLabError, match=named):
        distill(teacher, Shape(layers=2), given, out=tmp_path / "out", **options)  # type: ignore[arg-type]


def test_a_cache_of_a_teacher_whose_tokenizer_was_changed_is_refused(place: Path, tmp_path: Path) -> None:
    """The data are token ids, so that nothing else would tell: a merge of other pieces, say."""
    kept = cached(place, tmp_path / "cache")
    assert len(kept.manifest["key"]["tokenizer"]["sha256"]) == 64
    changed = tmp_path / "teacher"
    shutil.copytree(place / "teacher", changed)
    told = {"student": Shape(layers=2), "recipe": chosen(), "data": str(place / "text.txt"), "measure": False}
    distill(changed, out=tmp_path / "same", cache=kept.folder, **told)  # type: ignore[arg-type]
    raw = json.loads((changed / "tokenizer.json").read_text(encoding="utf-8"))
    raw["normalizer"] = {"type": "Lowercase"}
    (changed / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(
        CompressLabError, match=r"is of another tokenizer \(tokenizer: sha256 \w{8}, not sha256 \w{8}\)"
    ):
        distill(changed, out=tmp_path / "out", cache=kept.folder, **told)  # type: ignore[arg-type]


def test_a_teacher_as_it_is_stored_says_nearly_the_same(place: Path, tmp_path: Path) -> None:
    """In bfloat16, of eight bits: how far off its logits are is measured, and what is learnt from it."""
    models.load(place / "teacher").to(torch.bfloat16).save_pretrained(tmp_path / "teacher")
    tiny.save_tokenizer(tmp_path / "teacher")
    stored = chosen({"method": "soft-labels", "temperature": 1.0}, {"method": "hints"}, teacher_dtype="stored")
    whole = chosen({"method": "soft-labels", "temperature": 1.0}, {"method": "hints"})
    pair = pairing.Pair.of(tmp_path / "teacher", Shape(layers=2))
    networks = [network_of(pair, losses_of(whole), torch.device("cpu"), kind) for kind in ("float32", "stored")]
    assert [next(network.parameters()).dtype for network in networks] == [torch.float32, torch.bfloat16]
    ids = tiny.token_batches(16)[0]["input_ids"]
    with torch.no_grad():
        logs = [network(input_ids=ids).logits.float().log_softmax(2) for network in networks]
    apart = float((logs[0].exp() * (logs[0] - logs[1])).sum(2).mean())
    assert 1e-7 < apart < 2e-3  # nats a token; the tiny teacher's own entropy is some nats
    text, told = str(place / "text.txt"), []
    for name, given in (("stored", stored), ("whole", whole)):
        _, report = distill(tmp_path / "teacher", Shape(layers=2), given, text, out=tmp_path / name, measure=False)
        told.append([float(loss) for loss in report.data["training"]["losses"]])
        assert report.data["training"]["notice"] == ""
    assert told[0] != told[1] and told[0] == pytest.approx(told[1], rel=0.02)
    alone = [
        chosen({"method": "soft-labels", "temperature": 1.0}, teacher_dtype=kind) for kind in ("stored", "float32")
    ]
    kept = teach_cache(tmp_path / "teacher", alone[0], text, out=tmp_path / "cache", k=64)
    with pytest.raises(CompressLabError, match=r"another teacher_dtype \(teacher_dtype: stored, not float32\)"):
        distill(tmp_path / "teacher", Shape(layers=2), alone[1], text, out=tmp_path / "no", cache=kept.folder)


def test_where_no_teacher_can_be_opened_as_it_is_stored(tmp_path: Path) -> None:
    teacher = tiny.save("vit", tmp_path / "teacher")
    for steps, words in (
        (SOFT, "reads pictures, which come in float32"),
        ([{"method": "mutual"}], "learns too, in float32"),
    ):
        with pytest.raises(CompressLabError, match=words):
            given = chosen(*steps, teacher_dtype="stored")
            distill(teacher, Shape(layers=1), given, pictures(20), out=tmp_path / "out", measure=False)
    with pytest.raises(CompressLabError, match="belongs to a recipe for teaching"):
        chosen({"method": "lsq"}, teacher_dtype="stored")


def test_a_batch_that_is_not_in_the_cache_is_named_by_its_tokens(place: Path, tmp_path: Path) -> None:
    kept = cached(place, tmp_path / "cache")
    student = models.load(place / "teacher")
    with pytest.raises(CompressLabError, match=r"begins with the tokens \[\d+, "):
        Lesson.of((SoftLabels(),), student, kept, examples()[0])


def test_a_damaged_or_unfinished_cache_is_refused(place: Path, tmp_path: Path) -> None:
    kept = cached(place, tmp_path / "cache")
    path = kept.folder / "rows.bin"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(CompressLabError, match="sha256 differs"):
        taught(place, tmp_path / "out", cache=kept.folder)
    path.write_bytes(content[:-1])
    with pytest.raises(CompressLabError, match="not what was written"):
        taught(place, tmp_path / "out", cache=kept.folder)
    with pytest.raises(CompressLabError, match="no teacher cache: make one with 'compresslab teach-cache"):
        taught(place, tmp_path / "out", cache=tmp_path / "nothing")


@pytest.mark.parametrize(
    ("k", "words"), [(6, "multiple of 4"), (200, "less than the vocabulary of 200"), (0, "at least 4")]
)
def test_a_k_that_no_record_holds(k: int, words: str, place: Path, tmp_path: Path) -> None:
    with pytest.raises(CompressLabError, match=words):
        cached(place, tmp_path / "cache", k=k)


def test_what_no_cache_can_serve(place: Path, tmp_path: Path) -> None:
    both = chosen(*({"method": "soft-labels", "temperature": t} for t in (1.0, 2.0)))
    for given, words in (
        (chosen({"method": "hard-labels"}), "no temperatures"),
        (both, "1 and 2 temperatures"),
        (chosen({"method": "hints"}), "looks inside the teacher"),
    ):
        with pytest.raises(CompressLabError, match=words):
            cached(place, tmp_path / "cache", given)
    vision = tiny.save("vit", tmp_path / "vit")
    with pytest.raises(CompressLabError, match="no causal language model"):
        teach_cache(vision, chosen(), pictures(20), out=tmp_path / "cache")


# -- the commands ----------------------------------------------------------------------------------------------------


def test_the_commands(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = tmp_path / "tiny.yaml"
    given.write_text(chosen(epochs=1).to_yaml(), encoding="utf-8")
    common = ["--recipe", given, "--data", place / "text.txt"]
    code, said, _ = tiny.run_cli(
        monkeypatch, capsys, "teach-cache", place / "teacher", *common, "--out", tmp_path / "cache", "--json"
    )
    assert code == 0
    assert json.loads(said)["bytes"] == 24 * 15 * 210
    code, said, told = tiny.run_cli(
        monkeypatch, capsys, "distill", place / "teacher", *common, "--layers", "2", "--cache", tmp_path / "cache",
        "--out", tmp_path / "out", "--no-measure",
    )  # fmt: skip
    assert code == 0, told
    assert "smaller" in said
    code, _, told = tiny.run_cli(monkeypatch, capsys, "distill", place / "teacher", *common, "--out", tmp_path / "no")
    assert code == 2
    assert "name a student, or say how to build one" in told
    code, _, told = tiny.run_cli(
        monkeypatch, capsys, "distill", place / "teacher", *common, "--out", tmp_path / "no", "--by", "taylor"
    )
    assert code == 2 and "--hidden" in told  # which says how to choose, and not what
    code, _, told = tiny.run_cli(
        monkeypatch, capsys, "distill", place / "untaught", place / "teacher", *common, "--out", tmp_path / "worse", "--quiet",
        "--no-measure",
    )  # fmt: skip
    assert code == 0
    assert "warning: " in told.replace("\n", " ")

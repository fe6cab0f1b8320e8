"""Training with rounding from end to end: what was trained, what the integers compute, and what the artifact computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from compresslab import aware, compress, data, models, pipeline, recipe
from compresslab.contract import Solver
from compresslab.deploy.compressed_tensors import read_weights
from compresslab.errors import CompressLabError
from compresslab.measure import fresh
from compresslab.methods import METHODS
from compresslab.numerics import integer
from compresslab.plan import make_plan
from compresslab.recipe import Recipe, Training
from compresslab.stages import stages_of
from compresslab.training import collate

NAMES = ("ste", "lsq", "pact", "dorefa")
SETTINGS = Training(steps=6, learning_rate=3e-3, batch=4, checks=2)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(fresh, "measure", tiny.fake_measure)
    with tiny.quick():
        yield


def images(count: int = 24, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "pixel_values": torch.randn(3, 8, 8, generator=generator) + (1 if i % 2 else -1),
            "labels": torch.tensor(i % 2),
        }
        for i in range(count)
    ]


def windows(count: int = 16) -> list[dict[str, Tensor]]:
    return [{"input_ids": row, "labels": row} for row in tiny.token_batches(count)[0]["input_ids"]]


def recipe_of(method: str = "lsq", *, training: dict[str, Any] | None = None, **settings: Any) -> Recipe:
    raw = {
        "name": "tiny", "version": 1, "steps": [{"method": method, **settings}],
        "calibration": {"samples": 16, "sequence_length": 16},
        "training": training or {"steps": 6, "learning_rate": 3e-3, "batch": 4, "checks": 2},
    }  # fmt: skip
    return recipe.parse(raw, "tiny")


def run(model: nn.Module, folder: Path, method: Any, examples: Any, **more: Any) -> aware.Outcome:
    source = models.find(model)
    layers = make_plan(source, ["@outside-blocks"]).layers
    return aware.train(source, dict.fromkeys(layers, method), examples, SETTINGS, folder, **more)


def spy(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The network that aware.train trains, as it is when the training is over."""
    seen: list[nn.Module] = []
    real = aware.train_

    def train_(model: nn.Module, *arguments: Any, **more: Any) -> Any:
        record = real(model, *arguments, **more)
        seen.append(model)
        return record

    monkeypatch.setattr(aware, "train_", train_)
    return seen


def logits(model: nn.Module, examples: list[dict[str, Tensor]]) -> Tensor:
    batch = collate(examples)
    batch.pop("labels")
    with torch.inference_mode():
        found: Tensor = model(**batch).logits
    return found


# -- the conversion --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", NAMES)
def test_the_artifact_computes_what_was_trained(
    name: str, bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opened by plain transformers, to the last bit; and neither is the float network."""
    trained, network = spy(monkeypatch), tiny.make("vit")
    artifact, report = compress(
        network, recipe_of(name, bits=bits, activation_bits=bits), images(), out=tmp_path / "out", measure=False
    )
    reloaded = artifact.load(dtype=torch.float32)
    found, wanted = logits(reloaded, images(seed=5)), logits(trained[0], images(seed=5))
    assert torch.equal(found, wanted)
    assert not torch.allclose(wanted, logits(network, images(seed=5)), atol=1e-2)
    assert {layer.activation_bits for layer in report.layers} == {bits}
    assert len(report.layers) == 12


@pytest.mark.parametrize("name", NAMES)
def test_a_language_model_learns_from_plain_text(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = spy(monkeypatch)
    model = tiny.save("llama", tmp_path / "model")
    text = str(tiny.write_text(tmp_path / "text.txt"))
    artifact, report = compress(model, recipe_of(name), text, out=tmp_path / "out", measure=False)
    assert torch.equal(logits(artifact.load(dtype=torch.float32), windows()), logits(trained[0], windows()))
    assert report.data is not None
    assert report.data["training"]["steps"] == 6
    assert report.data["samples"] == 16


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", NAMES)
def test_integer_products_give_what_the_trained_layer_gives(name: str, bits: int, tmp_path: Path) -> None:
    """Codes times codes, summed in int32 and scaled once: a runtime with integer multipliers computes this."""
    network = tiny.make("vit")
    outcome = run(network, tmp_path, METHODS[name](bits=bits, activation_bits=bits), images())
    model = models.materialise(outcome.source).requires_grad_(False)
    for layer, trained in outcome.layers.items():
        linear: Any = model.get_submodule(layer)
        assert trained.input is not None
        x = torch.randn(5, linear.in_features, generator=torch.Generator().manual_seed(3))
        codes, scale, zero_point = trained.input.quantize(x)
        assert zero_point is not None
        real = (codes.float() - zero_point) * scale
        wanted = nn.functional.linear(real, trained.weight.dequantize(), linear.bias)
        found = integer.linear(x, trained.input, trained.weight, linear.bias)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_the_codes_on_disk_are_those_that_were_trained(tmp_path: Path) -> None:
    artifact, _ = compress(tiny.make("vit"), recipe_of("lsq"), images(), out=tmp_path / "out", measure=False)
    kept = data.labelled_examples(images(), 0).train
    outcome = run(tiny.make("vit"), tmp_path / "again", METHODS["lsq"](), kept)
    stored = dict(read_weights(artifact.folder))
    assert stored.keys() == outcome.layers.keys()
    for layer, weight in stored.items():
        assert torch.equal(weight.codes, outcome.layers[layer].weight.codes)
        assert torch.equal(weight.scale, outcome.layers[layer].weight.scale)


def test_weights_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = spy(monkeypatch)
    artifact, report = compress(
        tiny.make("vit"), recipe_of("lsq", activation_bits=None), images(), out=tmp_path / "out", measure=False
    )
    found = logits(artifact.load(dtype=torch.float32), images())
    torch.testing.assert_close(found, logits(trained[0], images()))
    assert {layer.activation_bits for layer in report.layers} == {None}


def test_layers_may_differ_and_stay_in_float(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = spy(monkeypatch)
    differing = {"*.q_proj": {"bits": 8, "activation_bits": 8}, "*.mlp.*": {"bits": 3}, "vit.layers.1.mlp.fc2": "float"}
    artifact, report = compress(
        tiny.make("vit"), recipe_of("lsq", layers=differing), images(), out=tmp_path / "out", measure=False
    )
    assert torch.equal(logits(artifact.load(dtype=torch.float32), images()), logits(trained[0], images()))
    assert report.skipped["vit.layers.1.mlp.fc2"] == "left in float by the recipe"
    assert {layer.activation_bits for layer in report.layers} == {4, 8}


def test_the_network_given_is_not_changed(tmp_path: Path) -> None:
    network = tiny.make("vit")
    run(network, tmp_path, METHODS["ste"](), images())
    untouched = tiny.make("vit")
    assert all(
        torch.equal(a, b) for a, b in zip(network.state_dict().values(), untouched.state_dict().values(), strict=True)
    )


def test_biases_and_norms_are_trained_too(tmp_path: Path) -> None:
    outcome = run(tiny.make("vit"), tmp_path, METHODS["lsq"](), images())
    before = tiny.make("vit").state_dict()
    changed = {
        name
        for name in outcome.source.weights.names()
        if not torch.equal(outcome.source.weights.get(name), before[name])
    }
    assert {name for name in changed if name.endswith("bias")}
    assert not {name for name in outcome.source.weights.names() if "quantizer" in name}


# -- it is worth it --------------------------------------------------------------------------------------------------


def test_it_wins_back_what_rounding_costs(tmp_path: Path) -> None:
    """At 2 bits, on pictures that the float network was trained to tell apart."""
    from compresslab.training import train_

    network = tiny.make("vit")
    train_(network, images(96), Training(steps=60, learning_rate=3e-3, batch=16, checks=3), tmp_path / "float")
    source = models.find(network)
    methods = dict.fromkeys(make_plan(source, ["@outside-blocks"]).layers, METHODS["lsq"](bits=2, activation_bits=2))
    rounded = models.materialise(source)
    layers = aware.wrap_(rounded, methods, source)
    aware.watch_(rounded, layers, images(96), 16)
    batch = collate(images(96))
    with torch.no_grad():
        before, original = float(rounded(**batch).loss), float(network(**batch).loss)
    settings = Training(steps=60, learning_rate=2e-3, batch=16, checks=3)
    outcome = aware.train(source, methods, images(96), settings, tmp_path / "aware", held_back=images(96))
    assert original < 0.5 * before
    assert outcome.record.best_loss < 0.5 * before


# -- resume ----------------------------------------------------------------------------------------------------------


def test_a_killed_run_goes_on_and_makes_the_same_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill_at(step: int) -> pipeline.Progress:
        steps = iter(range(step))

        def count(what: str) -> None:
            if "training" in what and next(steps, None) is None:
                raise KeyboardInterrupt

        return pipeline.Progress(step=count)

    def go(out: Path, **more: Any) -> Any:
        return compress(tiny.make("vit"), recipe_of("pact"), images(), out=out, measure=False, **more)

    whole, _ = go(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "killed", progress=kill_at(4))
    steps: list[str] = []
    again, _ = go(tmp_path / "killed", progress=pipeline.Progress(step=steps.append))
    assert sum("training" in what for what in steps) == 3  # of 6, the check was after 3
    assert again.manifest()["weights_xxh3"] == whole.manifest()["weights_xxh3"]
    assert not (tmp_path / "killed.partial").exists()


def test_a_training_with_other_settings_is_not_gone_on_with(tmp_path: Path) -> None:
    def kill(what: str) -> None:
        kill.calls += 1  # type: ignore[attr-defined]
        if kill.calls == 5:  # type: ignore[attr-defined]
            raise KeyboardInterrupt

    kill.calls = 0  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        compress(
            tiny.make("vit"),
            recipe_of(),
            images(),
            out=tmp_path / "out",
            measure=False,
            progress=pipeline.Progress(step=kill),
        )
    other = recipe_of(training={"steps": 6, "learning_rate": 1e-3, "batch": 4, "checks": 2})
    changed, _ = compress(tiny.make("vit"), other, images(), out=tmp_path / "out", measure=False)
    clean, _ = compress(tiny.make("vit"), other, images(), out=tmp_path / "clean", measure=False)
    assert changed.manifest()["weights_xxh3"] == clean.manifest()["weights_xxh3"]


# -- classifiers of text ---------------------------------------------------------------------------------------------


def classifier(folder: Path) -> Path:
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=tiny.VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, num_labels=2, id2label={0: "dull", 1: "bright"}, label2id={"dull": 0, "bright": 1},
        )  # fmt: skip
        transformers.BertForSequenceClassification(config).save_pretrained(folder)
    tiny.save_tokenizer(folder)
    return folder


def table(path: Path, labels: tuple[str, str] = ("0", "1"), count: int = 60) -> Path:
    known = tiny.words()
    rows = [
        f"{' '.join(known[(i % 2) * 50 + (i * k) % 40] for k in range(1, 4 + i % 5))}\t{labels[i % 2]}"
        for i in range(count)
    ]
    path.write_text("text\tlabel\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return path


def test_a_classifier_learns_from_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = spy(monkeypatch)
    model = classifier(tmp_path / "model")
    artifact, report = compress(
        str(model), recipe_of("lsq"), str(table(tmp_path / "t.tsv")), out=tmp_path / "out", measure=False
    )
    found = data.labelled_texts(
        str(tmp_path / "t.tsv"), models.load_tokenizer(model, ""), longest=32, classes={0: "dull", 1: "bright"}
    )
    assert torch.equal(logits(artifact.load(dtype=torch.float32), found.test), logits(trained[0], found.test))
    assert report.data is not None
    assert report.data["samples"] == 48
    assert report.data["test_split"].endswith("test split")


def test_accuracy_is_measured_on_the_reloaded_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[fresh.Job] = []

    def here(job: fresh.Job) -> fresh.Result:
        jobs.append(job)
        found = fresh._run(job)
        assert job.examples is not None
        return found

    monkeypatch.setattr(fresh, "measure", here)
    _, report = compress(tiny.make("vit"), recipe_of("lsq"), images(40), out=tmp_path / "out")
    before, after = next(pair for pair in report.pairs() if pair[0].name == "accuracy")
    assert before.n == after.n == 4
    assert "4 of the 40 examples" in after.conditions
    assert len(jobs) == 2
    from compresslab.report.words import verdict

    assert "accuracy" in verdict(report)


def test_labels_by_name(tmp_path: Path) -> None:
    tokenizer = models.load_tokenizer(classifier(tmp_path / "model"), "")
    named = data.labelled_texts(
        str(table(tmp_path / "named.tsv", ("dull", "bright"))), tokenizer, longest=32, classes={0: "dull", 1: "bright"}
    )
    numbered = data.labelled_texts(
        str(table(tmp_path / "numbered.tsv")), tokenizer, longest=32, classes={0: "dull", 1: "bright"}
    )
    assert [int(e["labels"]) for e in named.train] == [int(e["labels"]) for e in numbered.train]
    assert named.sha256 == numbered.sha256
    assert max(len(e["input_ids"]) for e in named.train) <= 32


def test_a_folder_without_a_test_file_is_measured_on_its_validation_file(tmp_path: Path) -> None:
    tokenizer = models.load_tokenizer(classifier(tmp_path / "model"), "")
    (tmp_path / "set").mkdir()
    table(tmp_path / "set" / "train.tsv", count=20)
    table(tmp_path / "set" / "dev.tsv", count=6)
    found = data.labelled_texts(str(tmp_path / "set"), tokenizer, longest=32, classes={0: "dull", 1: "bright"})
    assert (len(found.train), len(found.test)) == (20, 6)
    assert found.test_split.endswith("validation split")


# -- faults ----------------------------------------------------------------------------------------------------------


def test_a_label_that_the_model_does_not_know(tmp_path: Path) -> None:
    model = classifier(tmp_path / "model")
    with pytest.raises(
        CompressLabError, match=r"label 'blue', which the model does not know; it knows 0 dull, 1 bright"
    ):
        compress(str(model), recipe_of(), str(table(tmp_path / "t.tsv", ("blue", "dull"))), out=tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_text_without_labels_for_a_classifier(tmp_path: Path) -> None:
    model = classifier(tmp_path / "model")
    text = str(tiny.write_text(tmp_path / "text.txt"))
    with pytest.raises(CompressLabError, match="has no labels to train towards"):
        compress(str(model), recipe_of(), text, out=tmp_path / "out")


def test_examples_without_labels(tmp_path: Path) -> None:
    bare = [{"pixel_values": example["pixel_values"]} for example in images()]
    with pytest.raises(CompressLabError, match=r"example 0 has no 'labels' to train towards \(it has pixel_values\)"):
        compress(tiny.make("vit"), recipe_of(), bare, out=tmp_path / "out")


def test_a_model_without_a_loss(tmp_path: Path) -> None:
    model = tiny.save("bert", tmp_path / "model")
    with pytest.raises(CompressLabError, match="neither a causal language model nor a classifier of texts"):
        compress(str(model), recipe_of(), str(table(tmp_path / "t.tsv")), out=tmp_path / "out")


def test_no_data(tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    with pytest.raises(CompressLabError, match="method lsq needs calibration data"):
        compress(str(model), recipe_of(), None, out=tmp_path / "out")


def test_layers_that_cannot_be_wrapped(tmp_path: Path) -> None:
    model = tiny.save("gpt2", tmp_path / "model")
    text = str(tiny.write_text(tmp_path / "text.txt"))
    for activation_bits in (4, None):
        with pytest.raises(CompressLabError, match=r"Conv1D.*--ignore"):
            compress(str(model), recipe_of(activation_bits=activation_bits), text, out=tmp_path / "out")


@pytest.mark.parametrize("bits", [1, 9, 16])
def test_bits_that_the_format_cannot_hold(bits: int) -> None:
    with pytest.raises(CompressLabError, match=f"method lsq: bits must be 2 to 8, not {bits}"):
        recipe_of(activation_bits=bits)


def test_a_divergence_before_the_first_check_names_the_learning_rate(tmp_path: Path) -> None:
    wild = [{"pixel_values": e["pixel_values"] * float("inf"), "labels": e["labels"]} for e in images()]
    with pytest.raises(CompressLabError, match=r"diverged.*learning rate"):
        run(tiny.make("vit"), tmp_path, METHODS["dorefa"](activation_bits=None), wild)


def test_a_divergence_later_is_told_of_every_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = aware.train_
    notice = "the training diverged: the loss of step 5 is nan"
    monkeypatch.setattr(aware, "train_", lambda *a, **k: dataclasses.replace(real(*a, **k), notice=notice))
    _, report = compress(tiny.make("vit"), recipe_of(), images(), out=tmp_path / "out", measure=False)
    assert {layer.note for layer in report.layers} == {notice}


def test_a_budget_does_not_go_with_training(tmp_path: Path) -> None:
    with pytest.raises(CompressLabError, match="a budget chooses among methods without training"):
        compress(tiny.make("vit"), recipe_of(), images(), out=tmp_path / "out", budget="3bits")


def test_a_step_for_activations_beside_training() -> None:
    raw = {"name": "x", "version": 1, "steps": [{"method": "static"}, {"method": "lsq"}]}
    with pytest.raises(CompressLabError, match="method lsq rounds activations itself"):
        stages_of(recipe.parse(raw, "here"))


def test_a_training_block_without_a_method_that_trains() -> None:
    raw = {"name": "x", "version": 1, "steps": [{"method": "rtn"}], "training": {"steps": 5}}
    with pytest.raises(CompressLabError, match="'training' belongs to a recipe with a method that trains"):
        recipe.parse(raw, "here")
    with pytest.raises(CompressLabError, match="did you mean 'learning_rate'"):
        recipe_of(training={"learning_rat": 1e-3})


def test_training_settings_can_be_overridden_and_are_written_down() -> None:
    changed = recipe_of().override({"training.steps": 99, "training.learning_rate": 0.01})
    assert changed.training is not None
    assert (changed.training.steps, changed.training.learning_rate) == (99, 0.01)
    assert recipe.parse({"name": "x", "version": 1, "steps": [{"method": "lsq"}]}, "here").training == Training()
    with pytest.raises(CompressLabError, match=r"training\.step"):
        recipe_of().override({"training.step": 99})


def test_the_preflight_knows_what_training_takes(tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    parameters = sum(p.numel() for p in tiny.make("llama").parameters())
    _, needs, chosen = pipeline.plan_only(str(model), recipe_of())
    _, without, _ = pipeline.plan_only(str(model), tiny.recipe("rtn", symmetric=True, group_size=None))
    assert needs.memory_bytes - without.memory_bytes >= 16 * parameters
    assert needs.disk_bytes - without.disk_bytes >= 24 * parameters
    assert needs.parts["train"] > 0
    assert chosen.training is not None


def test_what_stands_for_a_solver_is_one() -> None:
    assert isinstance(aware.Untrained(METHODS["lsq"]()), Solver)
    assert not isinstance(METHODS["lsq"](), Solver)

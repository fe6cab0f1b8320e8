"""Pruning and training in one run: what lies on disk, chains with rounding, kills, divergence, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import tiny
from compresslab import compress, data, models, pipeline, preflight, recovering
from compresslab.deploy.layouts import read_weights
from compresslab.errors import CompressLabError
from compresslab.measure import fresh
from compresslab.recipe import Recipe, parse

TRAINING = {"steps": 8, "learning_rate": 3e-3, "batch": 4, "checks": 4, "weight_decay": 0.01}
MAGNITUDE = {"method": "magnitude", "sparsity": 0.6}
GPTQ = {"method": "gptq", "bits": 4, "group_size": 16, "symmetric": False}
IN_TRAINING = {
    "gradual": {"method": "gradual", "sparsity": 0.6},
    "gradual, one threshold": {"method": "gradual", "sparsity": 0.6, "scope": "global", "updates": 3},
    "movement": {"method": "movement", "sparsity": 0.6},
    "soft movement": {"method": "soft-movement", "strength": 100.0},
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(fresh, "measure", tiny.fake_measure)
    with tiny.quick():
        yield


def images(count: int = 40, size: int = 8) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "pixel_values": torch.randn(3, size, size, generator=generator) + (1 if i % 2 else -1),
            "labels": torch.tensor(i % 2),
        }
        for i in range(count)
    ]


def recipe(*steps: dict[str, Any], training: dict[str, Any] | None = TRAINING, **more: Any) -> Recipe:
    raw = {"name": "tiny", "version": 1, "steps": list(steps), "calibration": {"samples": 16, "sequence_length": 16}}
    return parse(raw | ({"training": training} if training else {}) | more, "tiny")


def stored(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def run(folder: Path, *steps: dict[str, Any], model: Any = None, given: Any = None, **more: Any) -> Any:
    return compress(
        model if model is not None else tiny.make("vit", hidden_dropout_prob=0.1), recipe(*steps, **more),
        images() if given is None else given, out=folder, measure=False, device="cpu",
    )  # fmt: skip


def zeros(tensors: dict[str, Tensor], report: Any) -> dict[str, Tensor]:
    return {layer.name: tensors[f"{layer.name}.weight"] == 0 for layer in report.layers}


# --- prune, then recover -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_artifact_has_exactly_the_zeros_that_were_masked(tmp_path: Path, optimizer: str) -> None:
    alone, before = run(tmp_path / "alone", MAGNITUDE, training=None)
    artifact, report = run(tmp_path / "trained", MAGNITUDE, training=TRAINING | {"optimizer": optimizer})
    masked, found = zeros(stored(alone.folder), before), zeros(stored(artifact.folder), report)
    assert len(found) == 12
    for name, mask in masked.items():
        assert torch.equal(found[name], mask)
        assert not torch.equal(stored(alone.folder)[f"{name}.weight"], stored(artifact.folder)[f"{name}.weight"])
    opened = transformers.AutoModelForImageClassification.from_pretrained(artifact.folder)
    assert all(torch.equal(opened.get_submodule(name).weight == 0, mask) for name, mask in masked.items())
    assert {(layer.sparsity, layer.pattern) for layer in report.layers} == {(0.6, None)}
    training = report.data["training"]
    assert training["steps"] == 8 and training["notice"] == ""
    assert min(map(float, training["losses"])) < float(training["loss_before"])
    card = (artifact.folder / "README.md").read_text(encoding="utf-8")
    assert "training: loss before" in card and "60.0 % of the weights of 12 layers are zero" in card


def test_the_loss_before_is_that_of_the_pruned_network(tmp_path: Path) -> None:
    """On the examples held back, in the batches of the training's checks."""
    alone, _ = run(tmp_path / "alone", MAGNITUDE, training=None)
    kept = data.labelled_examples(images(), 0).train
    _, held_back = recovering.split(kept, 0.1, 0)
    model = models.load(alone.folder, dtype=torch.float32)
    with torch.no_grad():
        wanted = float(model(**recovering.collate(held_back)).loss)
    _, report = run(tmp_path / "trained", MAGNITUDE)
    assert float(report.data["training"]["loss_before"]) == pytest.approx(wanted, abs=6e-5)


@pytest.mark.parametrize("kind", ["llama-tied", "gpt2"])
def test_a_language_model_learns_its_own_text(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny.make(kind).to(torch.bfloat16).save_pretrained(folder)
    tiny.save_tokenizer(folder)
    text = str(tiny.write_text(tmp_path / "text.txt"))
    step = {"method": "wanda", "pattern": "2:4"}
    alone, _ = run(tmp_path / "alone", step, model=folder, given=text, training=None)
    artifact, report = run(tmp_path / "out", step, model=folder, given=text)
    masked, found = zeros(stored(alone.folder), report), zeros(stored(artifact.folder), report)
    # A step of Adam in bfloat16 may round a kept weight to zero no more often than that.
    assert all(bool((found[name] | ~mask).all()) for name, mask in masked.items())
    assert sum(int((found[name] & ~mask).sum()) for name, mask in masked.items()) < 3
    assert {layer.pattern for layer in report.layers} == {"2:4"}
    assert report.data["samples"] == 16 and report.data["training"]["steps"] == 8
    opened = transformers.AutoModelForCausalLM.from_pretrained(artifact.folder)
    assert opened.dtype == torch.bfloat16 and torch.isfinite(opened(torch.tensor([[5, 6, 7]])).logits).all()


def write_shades(folder: Path, count: int = 40) -> str:
    """Pictures of class 0 are dark, those of class 1 are bright."""
    generator = torch.Generator().manual_seed(0)
    for label in (0, 1):
        (folder / str(label)).mkdir(parents=True)
        for number in range(count):
            pixels = torch.randint(100 * label, 100 * label + 150, (16, 16, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / str(label) / f"{number:03d}.png")
    return str(folder)


def test_convolutions_learn_from_a_folder_of_pictures(tmp_path: Path) -> None:
    """Their labels are the folders' names; batch norms are trained along; Wanda reads the same pictures."""
    model, pictures = tiny.save_convnet("resnet", tmp_path / "model"), write_shades(tmp_path / "pictures")
    step, small = {"method": "wanda", "sparsity": 0.4}, {"calibration": {"samples": 16}}
    more = {"model": model, "given": pictures, **small}
    artifact, report = run(tmp_path / "out", step, training=TRAINING | {"learning_rate": 1e-2}, **more)
    alone, _ = run(tmp_path / "alone", step, training=None, **more)
    masked, found = zeros(stored(alone.folder), report), zeros(stored(artifact.folder), report)
    assert all(torch.equal(found[name], mask) for name, mask in masked.items())
    changed = [n for n, t in stored(alone.folder).items() if not torch.equal(t, stored(artifact.folder)[n])]
    assert any("running_mean" in name for name in changed) and any("normalization.weight" in name for name in changed)
    assert report.data["source"] == pictures and report.data["training"]["examples"] == 14


def test_neurons_taken_out_are_recovered_from(tmp_path: Path) -> None:
    step = {"method": "ziplm", "neuron_frac": 0.5}
    text, model = str(tiny.write_text(tmp_path / "text.txt")), tiny.save("llama", tmp_path / "model")
    artifact, report = run(tmp_path / "out", step, model=model, given=text)
    config = json.loads((artifact.folder / "config.json").read_text(encoding="utf-8"))
    assert config["intermediate_size"] == 32
    training = report.data["training"]
    assert min(map(float, training["losses"])) < float(training["loss_before"])
    assert all(layer.sparsity is None for layer in report.layers)


# --- zeros that are found in the training --------------------------------------------------------------------------


@pytest.mark.parametrize("name", IN_TRAINING)
def test_zeros_are_found_in_the_training(name: str, tmp_path: Path) -> None:
    artifact, report = run(tmp_path / "out", IN_TRAINING[name], training=TRAINING | {"steps": 12})
    found = zeros(stored(artifact.folder), report)
    total = sum(mask.numel() for mask in found.values())
    share = sum(int(mask.sum()) for mask in found.values()) / total
    shares = {round(float(mask.double().mean()), 3) for mask in found.values()}
    if name == "soft movement":
        assert 0.2 < share < 0.995
    else:
        assert share == pytest.approx(0.6, abs=0.0005)
    assert (len(shares) == 1) is (name in ("gradual", "movement"))
    for layer in report.layers:
        assert layer.sparsity == pytest.approx(float(found[layer.name].double().mean()))
    assert not any(torch.signbit(t[t == 0]).any() for t in stored(artifact.folder).values() if t.is_floating_point())
    opened = models.load(artifact.folder, dtype=torch.float32)
    assert [type(module) for module in opened.modules()] == [type(module) for module in tiny.make("vit").modules()]
    training = report.data["training"]
    assert training["best_step"] - 1 >= 0.7 * 12 and "loss_before" not in training


@pytest.mark.parametrize("name", ["recovery", "gradual, one threshold", "soft movement"])
def test_killed_and_called_again_is_undisturbed(name: str, tmp_path: Path) -> None:
    step = IN_TRAINING.get(name, MAGNITUDE)
    whole, _ = run(tmp_path / "whole", step)

    class Killed(Exception):
        pass

    def kill(what: str) -> None:
        seen.append(what)
        if seen.count("a step of the training") == 7:
            raise Killed

    seen: list[str] = []
    arguments: Any = {"out": tmp_path / "out", "measure": False, "device": "cpu"}
    with pytest.raises(Killed):
        compress(
            tiny.make("vit", hidden_dropout_prob=0.1), recipe(step), images(),
            progress=pipeline.Progress(step=kill), **arguments,
        )  # fmt: skip
    steps: list[str] = []
    artifact, _ = compress(
        tiny.make("vit", hidden_dropout_prob=0.1), recipe(step), images(),
        progress=pipeline.Progress(step=steps.append), **arguments,
    )  # fmt: skip
    assert steps.count("a step of the training") == 2
    weights = "model.safetensors"
    assert (artifact.folder / weights).read_bytes() == (whole.folder / weights).read_bytes()


# --- taught by the network as it was ---------------------------------------------------------------------------------

HALF = {"method": "filter-norm", "neuron_frac": 0.5, "head_frac": 0.5, "multiple": 8}
HINTS = {"method": "hints", "blocks": "end", "project": "needed"}
SOFT = {"method": "soft-labels", "temperature": 2.0}


def save_with_text(kind: str, folder: Path) -> dict[str, Any]:
    """A model of text in a folder, and text, as `run` takes them."""
    return {
        "model": tiny.save(kind, folder / "model"),
        "given": str(tiny.write_text(folder / "text.txt", 12_000)),
        "calibration": {"samples": 40, "sequence_length": 16},
    }


def held_back_of(folder: Path, kind: str) -> tuple[nn.Module, list[Tensor]]:
    """The whole network, and the rows of token ids that a recovery judges itself by, found without it."""
    gather = data.calibration_passages if kind == "bert" else data.calibration
    tokenizer = models.find(folder / "model").tokenizer()
    found = gather(str(folder / "text.txt"), tokenizer, samples=40, sequence_length=16, seed=0, batch_size=8)
    rows: list[Tensor] = []
    for batch in found.batches:
        masks = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        rows += [ids[mask] for ids, mask in zip(batch["input_ids"], masks, strict=True)]
    _, held_back = recovering.split([{"input_ids": row} for row in rows], 0.1, 0)
    return models.load(folder / "model", dtype=torch.float32), [one["input_ids"] for one in held_back]


@torch.no_grad()
def last_states(network: nn.Module, ids: Tensor) -> Tensor:
    found: Tensor = network(input_ids=ids[None]).last_hidden_state
    return found


def test_an_encoder_without_labels_learns_from_what_it_was(tmp_path: Path) -> None:
    """Its loss is the distance of hidden states from those of the network before anything was taken out, and it shrinks."""
    given = save_with_text("bert", tmp_path)
    alone, _ = run(tmp_path / "alone", HALF, training=None, **given)
    artifact, report = run(tmp_path / "out", HALF, HINTS, **given)
    whole, rows = held_back_of(tmp_path, "bert")
    squared, count = {"alone": 0.0, "out": 0.0}, 0
    for ids in rows:
        wanted = last_states(whole, ids)
        count += wanted.numel()
        for name, folder in (("alone", alone.folder), ("out", artifact.folder)):
            found = last_states(models.load(folder, dtype=torch.float32), ids)
            squared[name] += float((found - wanted).square().sum())
    training = report.data["training"]
    assert len(rows) == 6  # of all passages a tenth
    assert float(training["loss_before"]) == pytest.approx(squared["alone"] / count, rel=1e-3)
    assert min(map(float, training["losses"])) == pytest.approx(squared["out"] / count, rel=1e-3)
    assert squared["out"] < 0.98 * squared["alone"]
    assert training["learnt_by"] == "hints from the network as it was"
    card = (artifact.folder / "README.md").read_text(encoding="utf-8")
    assert "hints from the network as it was" in card
    assert not any("judge" in name for name in stored(artifact.folder))


def test_a_language_model_learns_the_distributions_of_what_it_was(tmp_path: Path) -> None:
    """The loss before is T^2 KL of the whole network's next tokens from the pruned one's."""
    given, step = (
        save_with_text("llama", tmp_path),
        {"method": "activation-norm", "channel_frac": 0.0, "width_frac": 0.25},
    )
    alone, _ = run(tmp_path / "alone", step, training=None, **given)
    _, report = run(tmp_path / "out", step, SOFT, **given)
    whole, rows = held_back_of(tmp_path, "llama")
    pruned, apart = models.load(alone.folder, dtype=torch.float32), []
    for ids in rows:
        p, q = (
            (network(input_ids=ids[None]).logits[0, :-1] / 2).double().log_softmax(-1) for network in (pruned, whole)
        )
        apart.append(4 * (q.exp() * (q - p)).sum(-1))
    training = report.data["training"]
    assert float(training["loss_before"]) == pytest.approx(float(torch.cat(apart).mean()), rel=2e-3)
    assert min(map(float, training["losses"])) < 0.98 * float(training["loss_before"])


@pytest.mark.parametrize("kind", ["zeros before", "zeros in training", "a learnt projection"])
def test_killed_while_it_is_taught_and_called_again(kind: str, tmp_path: Path) -> None:
    steps = {
        "zeros before": (HALF, MAGNITUDE, HINTS),
        "zeros in training": (IN_TRAINING["gradual"], HINTS),
        "a learnt projection": (HALF, HINTS | {"project": "always"}),
    }[kind]
    given = save_with_text("bert", tmp_path)
    whole, report = run(tmp_path / "whole", *steps, **given)
    assert ("loss_before" in report.data["training"]) is (kind == "zeros before")

    class Killed(Exception):
        pass

    def kill(what: str) -> None:
        seen.append(what)
        if seen.count("a step of the training") == 7:
            raise Killed

    seen: list[str] = []
    chosen = recipe(*steps, calibration=given["calibration"])
    arguments: Any = {"out": tmp_path / "out", "measure": False, "device": "cpu"}
    with pytest.raises(Killed):
        compress(given["model"], chosen, given["given"], progress=pipeline.Progress(step=kill), **arguments)
    again: list[str] = []
    artifact, _ = compress(
        given["model"], chosen, given["given"], progress=pipeline.Progress(step=again.append), **arguments
    )
    assert again.count("a step of the training") == 2
    weights = "model.safetensors"
    assert (artifact.folder / weights).read_bytes() == (whole.folder / weights).read_bytes()


def test_prune_learn_quantise_is_one_run(tmp_path: Path) -> None:
    """The codes are those of the taught network, and the network that was given stays as it is."""
    given, model = save_with_text("bert", tmp_path), tiny.make("bert")
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    words = data.calibration_passages(
        given["given"], models.find(given["model"]).tokenizer(), samples=40, sequence_length=16, seed=0, batch_size=8
    )
    alone, before = run(tmp_path / "alone", HALF, HINTS, model=model, given=words)
    artifact, report = run(
        tmp_path / "out", HALF, HINTS, {"method": "gptq", "bits": 8, "group_size": 8}, model=model, given=words
    )
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
    assert report.data["training"] == before.data["training"]
    for name, weight in read_weights(artifact.folder):
        wanted = stored(alone.folder)[f"{name}.weight"]
        assert float((weight.dequantize() - wanted).norm() / wanted.norm()) < 0.02
    assert {layer.method for layer in report.layers} == {"filter-norm + gptq"}


def test_a_classifier_learns_from_what_it_was_and_from_labels(tmp_path: Path) -> None:
    """The loss before is the weighted sum of both terms, of zeros that stay."""
    labels = {"method": "hard-labels", "weight": 0.5}
    alone, _ = run(tmp_path / "alone", MAGNITUDE, training=None)
    artifact, report = run(tmp_path / "out", MAGNITUDE, SOFT, labels)
    _, held_back = recovering.split(data.labelled_examples(images(), 0).train, 0.1, 0)
    batch = recovering.collate(held_back)
    with torch.no_grad():
        p, q = (
            network(pixel_values=batch["pixel_values"]).logits.double()
            for network in (models.load(alone.folder, dtype=torch.float32), tiny.make("vit"))
        )
    log_p, log_q = (p / 2).log_softmax(-1), (q / 2).log_softmax(-1)
    wanted = 4 * (log_q.exp() * (log_q - log_p)).sum(-1).mean() + 0.5 * nn.functional.cross_entropy(p, batch["labels"])
    training = report.data["training"]
    assert float(training["loss_before"]) == pytest.approx(float(wanted), rel=1e-3)
    assert min(map(float, training["losses"])) < float(training["loss_before"])
    assert training["learnt_by"] == "soft-labels, hard-labels from the network as it was"
    masked, found = zeros(stored(alone.folder), report), zeros(stored(artifact.folder), report)
    assert all(torch.equal(found[name], mask) for name, mask in masked.items())


def test_teaching_that_only_harms_leaves_the_pruned_network(tmp_path: Path) -> None:
    given = save_with_text("bert", tmp_path)
    alone, _ = run(tmp_path / "alone", HALF, training=None, **given)
    artifact, report = run(tmp_path / "out", HALF, HINTS, training=TRAINING | {"learning_rate": 9.0}, **given)
    assert "left as it was pruned: training took the loss from" in report.data["training"]["notice"]
    before, after = stored(alone.folder), stored(artifact.folder)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("kind", "steps", "said"),
    [
        ("bert", [HALF, SOFT], "an encoder without a head, so it has no logits to teach"),
        ("bert", [HINTS, GPTQ], "takes nothing out of the network that could be learnt again by hints"),
        ("bert", [HALF, GPTQ, HINTS], "any losses by which what is left learns from the network as it was"),
        ("vit", [HALF, HINTS, {"method": "lsq"}], "lsq trains by a loss of its own: leave it out, or leave out hints"),
        ("llama", [HALF, SOFT, {"method": "rtn"}, {"method": "e2e-qp"}], "e2e-qp trains by a loss of its own"),
        ("vit", [HALF, {"method": "mutual"}], "mutual, which is for a student beside its teacher"),
        ("llama", [HALF, SOFT, {"method": "hard-labels"}, {"method": "on-policy"}], "is no label: leave hard-labels out"),
        ("bert", [HALF, HINTS | {"blocks": "0:7"}], "there is no block 7 among 2"),
    ],
)  # fmt: skip
def test_teachings_that_cannot_be(kind: str, steps: list[dict[str, Any]], said: str, tmp_path: Path) -> None:
    given = {"model": tiny.make(kind)} if kind == "vit" else save_with_text(kind, tmp_path)
    with pytest.raises(CompressLabError, match=said):
        run(tmp_path / "out", *steps, **given)
    assert not (tmp_path / "out").exists()


# --- chains --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "solver"),
    [(MAGNITUDE, GPTQ), (IN_TRAINING["movement"], {"method": "rtn", "bits": 8, "group_size": 16})],
    ids=["recovery and gptq", "movement and rtn"],
)
def test_prune_recover_quantise_is_one_run_and_one_report(
    step: dict[str, Any], solver: dict[str, Any], tmp_path: Path
) -> None:
    alone, before = run(tmp_path / "alone", step)
    artifact, report = run(tmp_path / "chain", step, solver)
    masked = zeros(stored(alone.folder), before)
    found = dict(read_weights(artifact.folder))
    assert found.keys() == masked.keys()
    for name, mask in masked.items():
        assert bool((found[name].dequantize()[mask] == 0).all())
    for layer in report.layers:
        assert layer.method == f"{step['method']} + {solver['method']}" and layer.nonzero_frac <= 0.41
        assert layer.bits_per_weight < 32 / 3 and layer.sparsity == pytest.approx(0.6, abs=0.001)
    assert report.data["training"] == before.data["training"]  # rounding comes after the same training
    name = next(iter(found))
    wanted = stored(alone.folder)[f"{name}.weight"]
    error = (found[name].dequantize() - wanted).norm() / wanted.norm()
    assert float(error) < 0.2  # they are codes of the trained weights


def test_layers_have_settings_of_their_own(tmp_path: Path) -> None:
    layers = {"*.query": {"sparsity": 0.25}, "*q_proj": {"sparsity": 0.25}, "*fc2": "float"}
    names = [name for name, module in tiny.make("vit").named_modules() if isinstance(module, nn.Linear)]
    used = {k: v for k, v in layers.items() if any(n.endswith(k.lstrip("*")) for n in names)}
    assert len(used) == 2
    _, report = run(tmp_path / "out", IN_TRAINING["gradual"] | {"layers": used})
    shares = {layer.name: round(1 - layer.nonzero_frac, 2) for layer in report.layers}
    assert set(shares.values()) == {0.25, 0.6} and not any(name.endswith("fc2") for name in shares)


# --- trainings that go wrong ---------------------------------------------------------------------------------------


def failing(after: int, value: float = float("nan")) -> Callable[..., Tensor]:
    calls: list[int] = []

    def loss(network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        if network.training:
            calls.append(0)
        found: Tensor = network(**batch).loss
        return found * value if len(calls) > after else found

    return loss


def test_a_recovery_that_diverges_keeps_the_best_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovering, "own_loss", failing(after=5))
    artifact, report = run(tmp_path / "out", MAGNITUDE)
    assert "diverged: the loss of step 6 is nan; the network is that of step 4" in report.data["training"]["notice"]
    assert all("diverged" in layer.note for layer in report.layers)
    assert "diverged" in (artifact.folder / "README.md").read_text(encoding="utf-8")
    tensors = stored(artifact.folder)
    assert all(torch.isfinite(t).all() for t in tensors.values() if t.is_floating_point())
    assert all(float(mask.float().mean()) == pytest.approx(0.6, abs=0.001) for mask in zeros(tensors, report).values())


def test_a_divergence_before_all_zeros_are_there_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovering, "own_loss", failing(after=5))
    with pytest.raises(
        CompressLabError, match=r"diverged: the loss of step 6 is nan, before any check.*lower the learning"
    ):
        run(tmp_path / "out", IN_TRAINING["gradual"])
    assert not (tmp_path / "out").exists()


def test_a_recovery_that_only_harms_leaves_the_pruned_network(tmp_path: Path) -> None:
    """Labels that nothing in the pictures tells, and steps much too long."""
    noise = [one | {"labels": torch.tensor(i * i * 7 % 5)} for i, one in enumerate(images())]
    alone, _ = run(tmp_path / "alone", MAGNITUDE, given=noise, training=None)
    artifact, report = run(tmp_path / "out", MAGNITUDE, given=noise, training=TRAINING | {"learning_rate": 9.0})
    assert "left as it was pruned: training took the loss from" in report.data["training"]["notice"]
    before, after = stored(alone.folder), stored(artifact.folder)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_layer_that_one_threshold_empties(tmp_path: Path) -> None:
    model = tiny.make("vit")
    name = next(n for n, module in model.named_modules() if isinstance(module, nn.Linear))
    with torch.no_grad():
        model.get_submodule(name).weight.mul_(1e-6)
    step = IN_TRAINING["gradual, one threshold"]
    with pytest.raises(
        CompressLabError, match=rf"layer {name} was emptied in the training.*scope=layer.*--ignore '{name}'"
    ):
        run(tmp_path / "out", step, model=model, training=TRAINING | {"learning_rate": 1e-5})


@pytest.mark.parametrize(
    ("steps", "training", "said"),
    [
        ([IN_TRAINING["gradual"]], {"steps": 3}, "a training of 3 steps is over before its zeros are all there, at 0.7 of it"),
        ([{"method": "owl"}, IN_TRAINING["movement"]], {}, "owl says how sparse each layer shall be before a training"),
        ([IN_TRAINING["gradual"], {"method": "lsq"}], {}, "lsq learns anew what gradual has set to zero"),
        ([MAGNITUDE, {"method": "lsq"}], {}, "lsq learns anew what magnitude has set to zero"),
        ([MAGNITUDE, {"method": "bias-correction"}], {}, "bias-correction would correct biases that are then trained"),
        ([{"method": "wanda"}, IN_TRAINING["gradual"]], {}, "at most one that prunes"),
        ([{"method": "gradual", "sparsity": 0.9999}], {}, "a sparsity of 0.9999 would empty it"),
    ],
)  # fmt: skip
def test_recipes_that_cannot_be(
    steps: list[dict[str, Any]], training: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(CompressLabError, match=said):
        run(tmp_path / "out", *steps, training=TRAINING | training)
    assert not (tmp_path / "out").exists()


def test_a_training_block_needs_something_to_train() -> None:
    with pytest.raises(
        CompressLabError, match=r"with a method that trains, such as lsq, or that prunes; this one has none"
    ):
        recipe(GPTQ)
    assert recipe(MAGNITUDE, training=None).training is None
    assert recipe(IN_TRAINING["gradual"], training=None).training is not None


def test_a_budget_beside_a_recovery(tmp_path: Path) -> None:
    step = {"method": "ziplm", "neuron_frac": 0.5}
    with pytest.raises(CompressLabError, match="leave the budget out, or the block 'training'"):
        compress(
            tiny.save("llama", tmp_path / "model"), recipe(step, GPTQ), "wiki", out=tmp_path / "out", budget="6bits"
        )


def test_data_that_cannot_teach(tmp_path: Path) -> None:
    with pytest.raises(CompressLabError, match="the training needs calibration data"):
        compress(tiny.make("vit"), recipe(MAGNITUDE), None, out=tmp_path / "out", measure=False)
    bare = data.Calibration(
        source="x", revision="", split="x", samples=2, sequence_length=None, tokens=None, seed=0, sha256="",
        batches=[{"pixel_values": torch.zeros(2, 3, 8, 8)}],
    )  # fmt: skip
    with pytest.raises(CompressLabError, match="is trained towards labels, and a Calibration has none"):
        run(tmp_path / "out", MAGNITUDE, given=bare)
    text = str(tiny.write_text(tmp_path / "text.txt"))
    with pytest.raises(CompressLabError, match="neither a causal language model nor a classifier of texts"):
        run(tmp_path / "out", MAGNITUDE, model=tiny.save("bert", tmp_path / "bert"), given=text)


def test_the_plan_foretells_a_training() -> None:
    for step in (MAGNITUDE, IN_TRAINING["movement"]):
        _, with_one, _ = pipeline.plan_only(tiny.make("llama"), recipe(step))
        assert "train" in with_one.parts and with_one.parts["train"] > 0
    _, without, _ = pipeline.plan_only(tiny.make("llama"), recipe(MAGNITUDE, training=None))
    assert "train" not in without.parts


def test_the_plan_foretells_a_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another network in float32, that reads what the other learns from: two products of its weights' size for six."""
    monkeypatch.setattr(preflight, "rates", lambda device: (1e9, 1e9, 1e9))
    model = tiny.make("llama")
    _, alone, _ = pipeline.plan_only(model, recipe(HALF))
    _, taught, _ = pipeline.plan_only(model, recipe(HALF, SOFT))
    _, labels, _ = pipeline.plan_only(model, recipe(HALF, {"method": "hard-labels"}))
    assert taught.memory_bytes - alone.memory_bytes == 4 * sum(p.numel() for p in model.parameters())
    assert taught.parts["train"] == pytest.approx(8 / 6 * alone.parts["train"])
    assert (labels.memory_bytes, labels.parts["train"]) == (alone.memory_bytes, alone.parts["train"])
    model, settings = model.bfloat16(), {"training": TRAINING | {"teacher_dtype": "stored"}}
    _, half, _ = pipeline.plan_only(model, recipe(HALF, SOFT, **settings))
    assert half.memory_bytes - pipeline.plan_only(model, recipe(HALF))[1].memory_bytes == 2 * sum(
        p.numel() for p in model.parameters()
    )


def test_a_teacher_is_opened_as_it_is_stored_where_that_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[torch.dtype] = []
    whole_model = pipeline.whole_model

    def seen(*given: Any) -> Any:
        opened.append(given[2])
        return whole_model(*given)

    monkeypatch.setattr(pipeline, "whole_model", seen)
    model, text = tmp_path / "model", str(tiny.write_text(tmp_path / "text.txt"))
    tiny.make("llama").bfloat16().save_pretrained(model)
    tiny.save_tokenizer(model)
    for number, dtype in enumerate(("float32", "stored")):
        training = TRAINING | {"teacher_dtype": dtype}
        run(tmp_path / f"out-{number}", HALF, SOFT, model=model, given=text, training=training)
    assert opened == [torch.float32, torch.bfloat16]

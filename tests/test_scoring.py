"""Scores of a whole network through the driver: losses and flows of real architectures, and runs from recipe to artifact."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import tiny
from compresslab import models, pipeline
from compresslab.artifact import Artifact, Writer
from compresslab.contract import NetworkPruner
from compresslab.deploy.layouts import read_weights
from compresslab.errors import CompressLabError
from compresslab.methods import METHODS
from compresslab.plan import make_plan
from compresslab.positive import make_positive_
from compresslab.prune.fisher import Fisher
from compresslab.prune.grasp import GraSP
from compresslab.prune.obd import OBD
from compresslab.prune.snip import SNIP
from compresslab.prune.synflow import SynFlow
from compresslab.recipe import Recipe, parse
from compresslab.report.schema import Report
from compresslab.scoring import WholeNetwork, find_masks, network_of
from compresslab.solving import Pass

torch.set_num_threads(1)

PRUNERS = [name for name, cls in METHODS.items() if isinstance(cls(), NetworkPruner)]
GPTQ = {"method": "gptq", "bits": 4, "group_size": 16, "symmetric": False}
Compress = Callable[..., tuple[Artifact, Report]]


def text_examples(count: int = 6, length: int = 12) -> list[dict[str, Tensor]]:
    rows = tiny.token_batches(count, length)[0]["input_ids"]
    return [{"input_ids": row, "labels": row} for row in rows]


def picture_examples(count: int = 10, pixels: int = 8) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 5
    pictures = torch.randn(count, 3, pixels, pixels, generator=generator) + labels[:, None, None, None]
    return [{"pixel_values": x, "labels": y} for x, y in zip(pictures, labels, strict=True)]


def opened(model: nn.Module, method: Any, examples: list[dict[str, Tensor]], **more: Any) -> WholeNetwork:
    source = models.find(model)
    plan = make_plan(source, ["@outside-blocks"])
    return network_of(Pass(source=source, plan=plan, batches=None), plan.layers, method, examples, **more)


# --- a network as a function of its weights ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama-tied", "gpt2", "qwen2"])
def test_the_loss_is_that_of_transformers_and_so_is_its_gradient(kind: str) -> None:
    model, examples = tiny.make(kind).requires_grad_(True), text_examples()
    network = opened(model, SNIP(), examples)
    ids = torch.stack([example["input_ids"] for example in examples])
    expected = model(input_ids=ids, labels=ids).loss
    expected.backward()
    found = torch.stack([share * loss(network.weights) for share, loss in network.losses()]).sum()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    one_by_one = [(share, float(loss(network.weights).detach())) for share, loss in network.losses(size=1)]
    assert sum(share * value for share, value in one_by_one) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert len({value for _, value in one_by_one}) == len(examples)
    for layer, score in SNIP().score(network).values.items():
        module = model.get_submodule(layer)
        product = (module.weight.grad * module.weight).abs().detach()
        wanted = product.t() if kind == "gpt2" else product
        torch.testing.assert_close(score, wanted, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("kind", ["vit", "resnet", "mobilenet"])
def test_labelled_pictures_and_convolutions(kind: str) -> None:
    model = (tiny.make(kind) if kind == "vit" else tiny.make_convnet(kind)).requires_grad_(True)
    examples = picture_examples(pixels=8 if kind == "vit" else tiny.PIXELS)
    network = opened(model, SNIP(), examples)
    pictures, labels = (torch.stack([example[key] for example in examples]) for key in ("pixel_values", "labels"))
    expected = nn.functional.cross_entropy(model(pixel_values=pictures).logits, labels)
    expected.backward()
    ((share, loss),) = network.losses()
    assert share == 1
    assert float(loss(network.weights).detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for layer, score in SNIP().score(network).values.items():
        module = model.get_submodule(layer)
        torch.testing.assert_close(
            score, (module.weight.grad * module.weight).abs().flatten(1).detach(), rtol=1e-3, atol=1e-6
        )


def test_padding_and_labels_left_out_count_for_nothing() -> None:
    """Texts of several lengths, one of them with a part that is not learned from."""
    examples = text_examples()
    examples[0] = {key: value[:7] for key, value in examples[0].items()}
    examples[1] = examples[1] | {"labels": examples[1]["labels"].where(torch.arange(12) > 5, -100)}
    model = tiny.make("llama")
    network = opened(model, SNIP(), examples)
    total, count = 0.0, 0
    model.requires_grad_(False)
    for example in examples:
        logits = model(input_ids=example["input_ids"][None]).logits[0, :-1]
        labels = example["labels"][1:]
        total += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
        count += int((labels != -100).sum())
    found = sum(share * float(loss(network.weights).detach()) for share, loss in network.losses(size=4))
    assert found == pytest.approx(total / count, rel=1e-5)


def test_drawn_labels_give_the_gauss_newton_matrix() -> None:
    """Of one layer with few weights that are looked at: E[g g^T] against J^T (diag(p) - p p^T) J, of every token by itself."""
    model, examples = tiny.make("llama").double(), text_examples(2, 6)
    name = "model.layers.1.mlp.down_proj"
    network = opened(model, OBD(), examples)
    ids = torch.stack([example["input_ids"] for example in examples])

    def logits(weight: Tensor) -> Tensor:
        kept = {f"{name}.weight": weight}
        return torch.func.functional_call(model, kept, kwargs={"input_ids": ids}).logits[:, :-1].flatten(0, 1)

    weight = model.requires_grad_(False).get_submodule(name).weight
    basis = [(0, 0), (3, 7), (31, 63)]
    columns = []
    for place in basis:
        direction = torch.zeros_like(weight)
        direction[place] = 1e-5
        columns.append((logits(weight + direction) - logits(weight - direction)) / 2e-5)
    j, p = torch.stack(columns, dim=-1), logits(weight).softmax(dim=-1)
    exact = torch.einsum("nci,ncd,ndj->ij", j, torch.diag_embed(p) - p[:, :, None] * p[:, None, :], j) / len(p)
    draws = []
    for draw in range(150):
        ((_, loss),) = network.drawn_losses(draw)
        (slope,) = torch.autograd.grad(loss(network.weights), [network.weights[name]])
        draws.append(torch.stack([slope[place] for place in basis]))
    g = torch.stack(draws)
    found = (g.t() @ g / len(g)).double()
    spread = (exact.diagonal()[:, None] * exact.diagonal()[None, :] + exact.square()).sqrt() / len(g) ** 0.5
    assert bool(((found - exact).abs() < 4.5 * spread).all())
    assert bool((exact.diagonal() > 4.5 * spread.diagonal()).all())


def test_statistics_of_the_batch_for_a_network_that_was_never_trained() -> None:
    model, examples = tiny.make_convnet("resnet"), picture_examples(pixels=tiny.PIXELS)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    network = opened(model, SNIP(), examples, in_training=True)
    ((_, loss),) = network.losses()
    pictures, labels = (torch.stack([example[key] for example in examples]) for key in ("pixel_values", "labels"))
    value = float(loss(network.weights).detach())
    assert value == float(loss(network.weights).detach())  # nothing is remembered
    model.train()
    assert value == pytest.approx(float(nn.functional.cross_entropy(model(pictures).logits, labels)), rel=1e-4)
    model.eval().load_state_dict(before, strict=False)
    assert value != pytest.approx(float(nn.functional.cross_entropy(model(pictures).logits, labels)), rel=1e-3)


# --- flow ----------------------------------------------------------------------------------------------------------


def fresh_convnet(kind: str) -> nn.Module:
    """With batch norms as they are at initialisation."""
    model = tiny.make_convnet(kind)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
    return model


def test_flow_of_a_convolutional_network_is_that_of_its_magnitudes() -> None:
    """A ResNet at initialisation needs nothing but magnitudes: plain torch in float64 gives the same R and the same slopes."""
    model = fresh_convnet("resnet")
    network = opened(model, SynFlow(), [])
    magnitudes = {x: w.detach().double().abs().requires_grad_(True) for x, w in network.weights.items()}
    flow = network.flow(magnitudes)
    plain = fresh_convnet("resnet").double()
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0
    for parameter in plain.parameters():
        parameter.abs_()
        parameter.requires_grad_(True)
    expected = plain(torch.ones(1, *models.picture_shape(plain.config), dtype=torch.float64)).logits.sum()
    expected.backward()
    assert float(flow.detach()) == pytest.approx(float(expected.detach()), rel=1e-9)
    for layer, slope in zip(magnitudes, torch.autograd.grad(flow, list(magnitudes.values())), strict=True):
        weight = plain.get_submodule(layer).weight
        torch.testing.assert_close(slope, weight.grad.flatten(1), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "vit", "bert", "mobilenet", "efficientnet-lite"])
def test_every_layer_carries_flow_and_none_is_negative(kind: str) -> None:
    model = tiny.make_convnet(kind) if kind in tiny.CONVNETS else tiny.make(kind)
    network = opened(model, SynFlow(), [])
    values = SynFlow().score(network).values
    for layer, score in values.items():
        assert float(score.min()) >= 0 and float(score.max()) > 0, layer
    flipped = dataclasses.replace(network, weights={x: -w.detach() for x, w in network.weights.items()})
    again = SynFlow().score(flipped).values
    assert all(torch.equal(again[layer], score) for layer, score in values.items())


def test_layers_through_which_all_must_pass_have_the_same_sum() -> None:
    """Conservation in a transformer: queries, keys and values each carry what their attention does, and so does the output."""
    network = opened(tiny.make("llama"), SynFlow(), [])
    sums = {layer: float(score.double().sum()) for layer, score in SynFlow().score(network).values.items()}
    for block in (0, 1):
        found = [sums[f"model.layers.{block}.self_attn.{x}_proj"] for x in "qkvo"]
        assert found == pytest.approx([found[0]] * 4, rel=1e-4)
        up, down = (sums[f"model.layers.{block}.mlp.{x}_proj"] for x in ("up", "down"))
        assert up == pytest.approx(down, rel=1e-4)


def test_rounds_share_the_network_that_is_open_and_branches_go_as_a_whole() -> None:
    """A branch beside a residual connection may be emptied, but then all of its layers are: none is a dead end."""
    network = opened(tiny.make("llama"), SynFlow(), [])
    kept = find_masks(SynFlow(sparsity=0.8, rounds=15), network).kept
    assert list(network.opened) == ["positive"]
    for block in (0, 1):
        for branch, layers in {"self_attn": "qkvo", "mlp": ("gate", "up", "down")}.items():
            left = [bool(kept[f"model.layers.{block}.{branch}.{layer}_proj"].any()) for layer in layers]
            assert len(set(left)) == 1, (block, branch, left)


def test_a_positive_network_has_nothing_negative() -> None:
    model = make_positive_(tiny.make("gpt2").requires_grad_(False))
    seen: list[float] = []
    for module in model.modules():
        module.register_forward_hook(
            lambda m, a, out: seen.append(float(out.min())) if isinstance(out, Tensor) else None
        )
    model(inputs_embeds=torch.ones(1, 1, tiny.HIDDEN))
    assert len(seen) > 20 and min(seen) >= 0


# --- runs ----------------------------------------------------------------------------------------------------------


def recipe(*steps: dict[str, Any], **more: Any) -> Recipe:
    raw = {"name": "tiny", "version": 1, "steps": list(steps), "calibration": {"samples": 8, "sequence_length": 16}}
    return parse(raw | more, "tiny")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.write_text(tmp_path_factory.mktemp("text") / "text.txt"))


@pytest.fixture
def compress(model: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compress:
    """compress() of the tiny model with these steps; the fresh process is left out unless `measured` is given."""

    def run(
        *steps: dict[str, Any],
        given: Any = model,
        out: Path | None = None,
        data: Any = text,
        measured: bool = False,
        **more: Any,
    ) -> tuple[Artifact, Report]:
        if not measured:
            monkeypatch.setattr(pipeline.fresh, "measure", tiny.fake_measure)
        with tiny.quick():
            return pipeline.compress(
                given, recipe(*steps, **more), data, out=out or tmp_path / "out", measure=measured, device="cpu"
            )

    return run


def share_of_zeros(report: Report) -> float:
    sizes = [(layer.shape[0] * layer.shape[1], layer.nonzero_frac) for layer in report.layers]
    return 1 - sum(size * left for size, left in sizes) / sum(size for size, _ in sizes)


@pytest.mark.parametrize("method", PRUNERS)
def test_every_method_prunes_a_language_model(compress: Compress, model: Path, method: str) -> None:
    step = {"method": method, "sparsity": 0.4} | ({"rounds": 4} if method == "synflow" else {})
    artifact, report = compress(step)
    assert share_of_zeros(report) == pytest.approx(0.4, abs=0.002)
    before, after = (load_file(folder / "model.safetensors") for folder in (model, artifact.folder))
    for layer in report.layers:
        weight = after[f"{layer.name}.weight"]
        assert layer.sparsity == pytest.approx(float((weight == 0).float().mean()), abs=1e-6)
        if method != "obs":
            assert torch.equal(weight, before[f"{layer.name}.weight"].where(weight != 0, 0))
    logits = transformers.AutoModelForCausalLM.from_pretrained(artifact.folder)(torch.tensor([[5, 6, 7]])).logits
    assert torch.isfinite(logits).all()


def test_a_run_has_the_masks_that_the_method_finds(compress: Compress, model: Path, text: str) -> None:
    step = {"method": "fisher", "sparsity": 0.5, "rounds": 2}
    artifact, _ = compress(step)
    source = models.find(model)
    plan = make_plan(source, ["@outside-blocks"])
    found = pipeline.Material.of(source, pipeline.stages_of(recipe(step)), recipe(step), text, 0)
    method = Fisher(sparsity=0.5, rounds=2)
    calibration = Pass(
        source=source, plan=plan, batches=None, compute_dtype=pipeline._compute_dtype(source, torch.device("cpu"))
    )
    kept = find_masks(method, network_of(calibration, plan.layers, method, found.examples)).kept
    written = load_file(artifact.folder / "model.safetensors")
    assert all(torch.equal(written[f"{layer}.weight"] != 0, mask) for layer, mask in kept.items())


def test_a_labelled_classifier_is_scored_on_its_labels_and_measured_on_others(
    compress: Compress, tmp_path: Path
) -> None:
    examples = picture_examples(40)
    folder = tiny.save("vit", tmp_path / "model")
    artifact, report = compress({"method": "snip", "sparsity": 0.3}, given=folder, data=examples, measured=True)
    assert report.data is not None and report.data["samples"] == 36
    assert any("accuracy" in m.name for m in report.after)
    opened_again = transformers.AutoModelForImageClassification.from_pretrained(artifact.folder)
    assert float((opened_again.get_submodule(report.layers[0].name).weight == 0).float().mean()) > 0
    assert share_of_zeros(report) == pytest.approx(0.3, abs=0.002)


def test_convolutions_in_groups_keep_the_mask_that_was_found_for_all_of_them(
    compress: Compress, tmp_path: Path
) -> None:
    folder = tiny.save_convnet("mobilenet", tmp_path / "model")
    pictures = str(tiny.write_pictures(tmp_path / "pictures"))
    step = {"method": "synflow", "sparsity": 0.3, "scope": "layer", "rounds": 3}
    alone, _ = compress(step, given=folder, data=pictures, out=tmp_path / "alone", calibration={"samples": 8})
    both, _ = compress(step, {"method": "gptq", "bits": 8, "group_size": None, "symmetric": True}, given=folder,
                       data=pictures, out=tmp_path / "both", calibration={"samples": 8})  # fmt: skip
    pruned = load_file(alone.folder / "model.safetensors")
    for name, weight in read_weights(both.folder):
        gone = pruned[f"{name}.weight"].flatten(1) == 0
        assert bool((weight.dequantize()[gone] == 0).all()), name


def test_it_chains_with_rounding_in_one_run(compress: Compress) -> None:
    _, report = compress({"method": "obs", "sparsity": 0.5}, GPTQ)
    assert report.parity.tensors == len(report.layers) == 14
    assert {layer.method for layer in report.layers} == {"obs + gptq"}
    assert share_of_zeros(report) >= 0.5 and all(layer.bits_per_weight < 8 for layer in report.layers)
    assert "score weights" in report.seconds


@pytest.mark.parametrize("steps", [({"method": "snip", "rounds": 2},), ({"method": "obs"}, GPTQ)], ids=["snip", "obs"])
def test_a_killed_run_goes_on_to_the_same_bytes(
    compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: tuple[dict[str, Any], ...]
) -> None:
    whole, _ = compress(*steps, out=tmp_path / "whole")
    write = Writer.write

    def once(self: Writer, *args: Any) -> None:
        write(self, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Writer, "write", once)
        compress(*steps)
    artifact, _ = compress(*steps)
    weights = "model.safetensors"
    assert (artifact.folder / weights).read_bytes() == (whole.folder / weights).read_bytes()


def test_layers_are_left_alone(compress: Compress, model: Path) -> None:
    artifact, report = compress({"method": "snip", "layers": {"*.down_proj": "float"}})
    assert not [layer for layer in report.layers if layer.name.endswith("down_proj")]
    before, after = (load_file(folder / "model.safetensors") for folder in (model, artifact.folder))
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(before[name], after[name])
    assert share_of_zeros(report) == pytest.approx(0.5, abs=0.002)


def test_the_plan_foretells_the_memory_of_the_whole_network(model: Path) -> None:
    with tiny.quick():
        _, snip, _ = pipeline.plan_only(model, recipe({"method": "snip"}))
        _, obs, _ = pipeline.plan_only(model, recipe({"method": "obs"}))
        _, magnitude, _ = pipeline.plan_only(model, recipe({"method": "magnitude"}))
    parameters = sum(value.numel() for value in load_file(model / "model.safetensors").values())
    assert obs.memory_bytes - snip.memory_bytes >= 4 * 8 * parameters  # a gradient of every example
    assert snip.parts["score"] > 0 and "score" not in magnitude.parts


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([{"method": "snip"}, {"method": "wanda"}], "at most one that prunes"),
        ([{"method": "owl"}, {"method": "fisher"}], "owl and fisher both say how sparse"),
        ([{"method": "smoothquant"}, {"method": "obd"}], "smoothquant prepares a network for rounding"),
        ([{"method": "snip"}, {"method": "lsq"}], "lsq learns anew what snip has set to zero"),
        ([{"method": "snip", "layers": {"*.q_proj": {"sparsity": 0.1}}}], "snip scores all layers together"),
        ([{"method": "snip", "layers": {"*": "float"}}], "no linear layer left"),
        ([{"method": "random-mask", "sparsity": 0.9999}], "a sparsity of 0.9999 would empty it"),
    ],
)  # fmt: skip
def test_recipes_that_cannot_be(compress: Compress, tmp_path: Path, steps: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(CompressLabError, match=said):
        compress(*steps)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["snip", "grasp", "synflow"])
def test_a_head_that_is_the_embedding_stays_whole_and_tied(compress: Compress, tmp_path: Path, method: str) -> None:
    """Also where nothing is ignored, so that one threshold for all layers might reach it."""
    folder = tiny.save("llama-tied", tmp_path / "model")
    before = models.load(folder)
    step = {"method": method, "sparsity": 0.5, "scope": "global", "rounds": 2}
    artifact, report = compress(step, given=folder, ignore=[])
    after = models.load(artifact.folder)
    head, embedding = after.get_output_embeddings().weight, after.get_input_embeddings().weight
    assert head is embedding and torch.equal(head, before.get_input_embeddings().weight)
    assert "shares its weight with model.embed_tokens" in report.skipped["lm_head"]
    assert not any("embed" in layer.name or "lm_head" in layer.name for layer in report.layers)
    assert share_of_zeros(report) == pytest.approx(0.5, abs=1e-3)
    assert "lm_head.weight" not in load_file(artifact.folder / "model.safetensors")


def test_a_threshold_that_empties_a_layer(compress: Compress, tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "model")
    small = "model.layers.0.self_attn.k_proj"
    tiny.change_tensors(folder, lambda tensors: tensors[f"{small}.weight"].mul_(1e-6))
    with pytest.raises(CompressLabError, match=r"layer .*[qk]_proj would be emptied: .* scope=layer, raise rounds"):
        compress({"method": "snip"}, given=folder)
    _, report = compress({"method": "snip", "scope": "layer"}, given=folder)
    assert {layer.sparsity for layer in report.layers} == {0.5}


def test_nothing_to_score_on(compress: Compress, tmp_path: Path) -> None:
    with pytest.raises(CompressLabError, match="method snip needs calibration data: name it with --data"):
        compress({"method": "snip"}, data=None)
    encoder = tiny.save("bert", tmp_path / "bert")
    with pytest.raises(CompressLabError, match="neither a causal language model nor a classifier of texts"):
        compress({"method": "snip"}, given=encoder)
    _, report = compress({"method": "synflow", "rounds": 3}, given=encoder, data=None)
    assert share_of_zeros(report) == pytest.approx(0.5, abs=0.002)


@pytest.mark.parametrize("labels", [torch.tensor(0.5), torch.tensor([1, 2])], ids=["a number", "several"])
def test_labels_that_are_no_classes(labels: Tensor) -> None:
    examples = [example | {"labels": labels} for example in picture_examples()]
    with pytest.raises(CompressLabError, match="needs 'labels' that are classes"):
        opened(tiny.make("vit"), SNIP(), examples)


def test_second_derivatives_pass_through_attention() -> None:
    """The fused kernels have none."""
    for method in (GraSP(sparsity=0.2), OBD(sparsity=0.2, curvature="hessian")):
        found = find_masks(method, opened(tiny.make("llama"), method, text_examples(3, 8)))
        assert sum(int((~kept).sum()) for kept in found.kept.values()) > 0


def test_so_many_examples_are_read_and_no_more() -> None:
    examples = text_examples(9)
    networks = [opened(tiny.make("llama"), SNIP(examples=4), examples, seed=seed) for seed in (0, 0, 1)]
    read = [[example["input_ids"].tolist() for example in network.examples] for network in networks]
    assert [len(rows) for rows in read] == [4, 4, 4]
    assert read[0] == read[1] != read[2]
    assert len(opened(tiny.make("llama"), SNIP(examples=40), examples).examples) == 9


def test_a_mask_before_a_training_is_kept_by_it(compress: Compress, tmp_path: Path) -> None:
    """One run: scores, masks, a training with the zeros kept."""
    folder = tiny.save("vit", tmp_path / "model")
    step = {"method": "synflow", "sparsity": 0.6, "rounds": 5, "scope": "layer"}
    alone, _ = compress(step, given=folder, data=None, out=tmp_path / "alone")
    training = {"steps": 12, "learning_rate": 1e-3, "batch": 8, "checks": 2}
    both, report = compress(step, given=folder, data=picture_examples(40), out=tmp_path / "both", training=training)
    assert report.data is not None and "training" in report.data
    before, after = (load_file(artifact.folder / "model.safetensors") for artifact in (alone, both))
    for layer in report.layers:
        name = f"{layer.name}.weight"
        assert torch.equal(before[name] == 0, after[name] == 0)
    assert any(not torch.equal(before[name], after[name]) for name in before)

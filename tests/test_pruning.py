"""Pruning through the driver: what lies on disk, what opens it, chains with rounding, and what the report says."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import tiny
from compresslab import models, pipeline
from compresslab.artifact import Artifact, Writer
from compresslab.contract import Pruner, Solver
from compresslab.deploy.layouts import read_weights
from compresslab.errors import CompressLabError
from compresslab.exporters import export
from compresslab.methods import METHODS
from compresslab.prune.magnitude import Magnitude
from compresslab.prune.wanda import Wanda
from compresslab.recipe import Recipe, parse
from compresslab.report import render
from compresslab.report.schema import Report

torch.set_num_threads(1)

Compress = Callable[..., tuple[Artifact, Report]]
GPTQ = {"method": "gptq", "bits": 4, "group_size": 16, "symmetric": False}


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
                given, recipe(*steps, **more), data, out=out or tmp_path / "out", measure=False, device="cpu"
            )

    return run


def zeros(folder: Path, layer: str = "model.layers.1.mlp.down_proj") -> float:
    return float((load_file(folder / "model.safetensors")[f"{layer}.weight"] == 0).float().mean())


# --- a pruned model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kind", "step"),
    [
        ("llama-tied", {"method": "sparsegpt", "sparsity": 0.6}),
        ("gpt2", {"method": "wanda", "pattern": "2:4"}),
        ("qwen2", {"method": "magnitude", "scope": "global", "sparsity": 0.3}),
    ],
)
def test_plain_transformers_opens_it_and_counts_the_zeros(
    compress: Compress, tmp_path: Path, kind: str, step: dict[str, Any], dtype: torch.dtype
) -> None:
    folder = tmp_path / "model"
    tiny.make(kind).to(dtype).save_pretrained(folder)
    tiny.save_tokenizer(folder)
    artifact, report = compress(step, given=folder, measured=kind == "gpt2" and dtype == torch.bfloat16)
    config = json.loads((artifact.folder / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in config
    opened = transformers.AutoModelForCausalLM.from_pretrained(artifact.folder)
    assert opened.dtype == dtype
    total = nonzero = 0
    for layer in report.layers:
        weight = opened.get_submodule(layer.name).weight
        assert layer.nonzero_frac == pytest.approx(float(weight.count_nonzero()) / weight.numel())
        assert layer.bytes_after == layer.bytes_before and layer.bits_per_weight == 8 * dtype.itemsize
        assert layer.pattern == step.get("pattern") and layer.sparsity is not None
        total, nonzero = total + weight.numel(), nonzero + int(weight.count_nonzero())
    assert 1 - nonzero / total == pytest.approx(step.get("sparsity", 0.5), abs=0.005)
    assert report.parity.tensors == len(report.layers)
    before = models.load(folder)
    assert torch.equal(before.get_input_embeddings().weight, opened.get_input_embeddings().weight)
    text = opened.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False)
    assert text.shape[1] > 3


def test_the_layout_of_a_conv1d_is_its_own(compress: Compress, tmp_path: Path) -> None:
    """2:4 runs over input channels, which GPT-2 keeps in the rows."""
    artifact, _ = compress({"method": "wanda", "pattern": "2:4"}, given=tiny.save("gpt2", tmp_path / "model"))
    stored = load_file(artifact.folder / "model.safetensors")
    name = next(name for name in stored if name.endswith("h.0.mlp.c_fc.weight"))
    by_input = (stored[name] == 0).t().reshape(stored[name].shape[1], -1, 4)
    assert bool((by_input.sum(dim=2) == 2).all())


def test_sequential_order_prunes_on_pruned_inputs(compress: Compress, model: Path, text: str) -> None:
    """The second layer's mask is Wanda's on what the pruned first block gives it, not on the float network's."""
    artifact, _ = compress({"method": "wanda", "sparsity": 0.7})
    source = models.find(model)
    found = pipeline.Material.of(
        source, pipeline.stages_of(recipe({"method": "wanda"})), recipe({"method": "wanda"}), text, 0
    )
    name = "model.layers.1.self_attn.q_proj"

    def mask(network: Any) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        network.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
        with torch.inference_mode():
            for batch in found.batches:
                network(**batch)
        score = source.weights.get(f"{name}.weight").abs() * torch.cat(seen).float().norm(dim=0)
        order = score.argsort(dim=1, stable=True)
        return torch.ones_like(score, dtype=torch.bool).scatter(1, order[:, : round(0.7 * score.shape[1])], False)

    ours = load_file(artifact.folder / "model.safetensors")[f"{name}.weight"] != 0
    pruned, whole = (
        mask(models.load(artifact.folder, dtype=torch.float32)),
        mask(models.load(model, dtype=torch.float32)),
    )
    agreements = [float((ours == other).float().mean()) for other in (pruned, whole)]
    assert agreements[0] > 0.98 > agreements[1]


def test_convolutions_in_groups_are_pruned_group_by_group(compress: Compress, tmp_path: Path) -> None:
    folder = tiny.save_convnet("mobilenet", tmp_path / "model")
    pictures = str(tiny.write_pictures(tmp_path / "pictures"))
    artifact, report = compress(
        {"method": "sparsegpt", "sparsity": 0.4}, given=folder, data=pictures, calibration={"samples": 8},
        ignore=["@outside-blocks"],
    )  # fmt: skip
    opened = transformers.AutoModelForImageClassification.from_pretrained(artifact.folder)
    for layer in report.layers:
        weight = opened.get_submodule(layer.name).weight
        assert float((weight == 0).float().mean()) == pytest.approx(0.4, abs=0.12), layer.name
    assert torch.isfinite(opened(**tiny.picture_batches(2)[0]).logits).all()


def test_a_killed_run_goes_on_to_the_same_bytes(
    compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = ({"method": "owl", "threshold": 2.0}, {"method": "sparsegpt", "sparsity": 0.6})
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


def test_exports_take_it_for_a_plain_model(compress: Compress, tmp_path: Path) -> None:
    artifact, _ = compress({"method": "magnitude"})
    assert list(read_weights(artifact.folder)) == []
    done = export(artifact.folder, "safetensors-bf16", out=tmp_path / "plain")
    assert zeros(done.folder) == zeros(artifact.folder) == 0.5


# --- chains --------------------------------------------------------------------------------------------------------

SOLVERS = [name for name, cls in METHODS.items() if isinstance(cls(), Solver) and name not in ("autoround",)]
PRUNERS = [name for name, cls in METHODS.items() if isinstance(cls(), Pruner)]


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_zeros_stay_zeros_whatever_rounds(compress: Compress, solver: str, symmetric: bool) -> None:
    fields = METHODS[solver].__dataclass_fields__
    wanted = {"bits": 4, "group_size": 16, "symmetric": symmetric}
    step = {"method": solver} | {key: value for key, value in wanted.items() if key in fields}
    try:
        artifact, report = compress({"method": "wanda", "pattern": "2:4"}, step)
    except CompressLabError as error:
        assert "asymmetric" in str(error) or "symmetric" in str(error)  # a format that has no such grid
        return
    found = dict(read_weights(artifact.folder))
    assert len(found) == len(report.layers)
    for name, weight in found.items():
        by_four = (weight.dequantize() == 0).view(weight.codes.shape[0], -1, 4).sum(dim=2)
        assert int(by_four.min()) >= 2, name
    for layer in report.layers:
        assert layer.method == f"wanda + {solver}" and layer.nonzero_frac <= 0.5
        assert (layer.sparsity, layer.pattern) == (0.5, "2:4")


@pytest.mark.parametrize("number_format", ["nvfp4", "mxfp4", "fp8-e4m3"])
def test_zeros_stay_zeros_in_other_numbers(number_format: str) -> None:
    sizes = {"nvfp4": {"group_size": 16}, "mxfp4": {"group_size": 32}, "fp8-e4m3": {"bits": 8, "group_size": None}}
    solver = METHODS["gptq"](symmetric=True, format=number_format, **sizes[number_format])
    layers = ("model.layers.0.mlp.up_proj",)
    sink = tiny.solve(
        tiny.make("llama"), tiny.token_batches(4), solver=solver,
        pruners=dict.fromkeys(layers, Wanda(sparsity=0.5)), encode=lambda *given: {},
    )  # fmt: skip
    assert float((sink.solved[layers[0]].weight.dequantize() == 0).float().mean()) >= 0.5
    assert sink.solved["model.layers.1.mlp.up_proj"].record.sparsity is None


def test_a_solver_that_knows_of_zeros_makes_up_for_them() -> None:
    """GPTQ with the mask does better than GPTQ whose codes are set to zero afterwards."""
    model, batches = tiny.make("llama"), tiny.token_batches(16)
    pruners = dict.fromkeys(tiny.solve(model, None, solver=METHODS["rtn"](bits=3)).solved, Magnitude(sparsity=0.5))
    knows = METHODS["gptq"](bits=3, group_size=16)

    class Forgets(METHODS["gptq"]):  # type: ignore[misc]
        knows_zeros = False

    errors = []
    for solver in (knows, Forgets(bits=3, group_size=16)):
        sink = tiny.solve(model, batches, solver=solver, pruners=pruners)
        errors.append(sum(10 ** (-found.record.sqnr_db / 10) for found in sink.solved.values()))
    assert errors[0] < errors[1]


def test_a_chain_is_one_run_and_one_report(compress: Compress) -> None:
    artifact, report = compress({"method": "sparsegpt", "sparsity": 0.5}, GPTQ, measured=True)
    assert report.parity.tensors == len(report.layers) == 14
    assert [step["method"] for step in report.recipe["steps"]] == ["sparsegpt", "gptq"]
    assert all(layer.bits_per_weight < 8 and layer.nonzero_frac <= 0.51 for layer in report.layers)
    opened = models.load(artifact.folder, dtype=torch.float32)
    models.decompress_(opened)
    weight = opened.get_submodule("model.layers.0.mlp.gate_proj").weight
    assert float((weight == 0).float().mean()) >= 0.5


def test_inputs_and_biases_beside_pruning(compress: Compress, tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "model", attention_bias=True)
    _, report = compress(
        {"method": "dynamic"},
        {"method": "wanda"},
        {"method": "rtn", "bits": 8},
        {"method": "bias-correction"},
        given=folder,
    )
    assert {layer.activation_bits for layer in report.layers} == {8}
    assert all(layer.nonzero_frac <= 0.51 for layer in report.layers)
    alone, _ = compress({"method": "wanda"}, {"method": "bias-correction"}, given=folder, out=tmp_path / "alone")
    name = "model.layers.1.self_attn.q_proj.bias"
    before, after = (load_file(path / "model.safetensors")[name] for path in (folder, alone.folder))
    assert not torch.equal(before, after)


# --- what each layer loses -----------------------------------------------------------------------------------------


def test_layers_have_settings_of_their_own(compress: Compress) -> None:
    layers = {"*.q_proj": {"sparsity": 0.25}, "*.down_proj": "float"}
    artifact, report = compress({"method": "wanda", "sparsity": 0.5, "layers": layers}, GPTQ)
    found = {layer.name: layer for layer in report.layers}
    assert found["model.layers.0.self_attn.q_proj"].sparsity == 0.25
    down = found["model.layers.0.mlp.down_proj"]
    assert down.sparsity is None and down.nonzero_frac > 0.6 and down.bits_per_weight < 8  # rounded, not pruned
    alone, report = compress({"method": "wanda", "layers": layers}, out=artifact.folder.parent / "alone")
    assert report.skipped["model.layers.0.mlp.down_proj"] == "left in float by the recipe"
    assert zeros(alone.folder) == 0


def test_owl_prunes_blocks_alike_and_the_whole_as_asked(compress: Compress, model: Path) -> None:
    _, report = compress({"method": "owl", "threshold": 2.0, "spread": 0.1}, {"method": "wanda", "sparsity": 0.6})
    shares = {layer.name: layer.sparsity for layer in report.layers}
    by_block = [{v for k, v in shares.items() if k.startswith(f"model.layers.{b}.")} for b in (0, 1)]
    assert [len(found) for found in by_block] == [1, 1] and by_block[0] != by_block[1]
    sizes = {layer.name: math.prod(layer.shape) for layer in report.layers}
    zero = sum(sizes[layer.name] * (1 - layer.nonzero_frac) for layer in report.layers)
    assert zero / sum(sizes.values()) == pytest.approx(0.6, abs=0.01)


def test_a_global_threshold_that_empties_a_layer(compress: Compress, tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "model")
    small = "model.layers.0.self_attn.k_proj"
    tiny.change_tensors(folder, lambda tensors: tensors[f"{small}.weight"].mul_(1e-4))
    step = {"method": "magnitude", "scope": "global", "sparsity": 0.5}
    with pytest.raises(CompressLabError, match=rf"layer {small} would be emptied: .* scope=layer.* --ignore '{small}'"):
        compress(step, given=folder)
    assert not (tmp_path / "out").exists()
    artifact, _ = compress(step, given=folder, ignore=["@outside-blocks", small])
    assert zeros(artifact.folder, small) == 0


# --- the report ----------------------------------------------------------------------------------------------------


def test_the_report_says_what_zeros_are_worth(compress: Compress, tmp_path: Path) -> None:
    artifact, report = compress({"method": "wanda", "sparsity": 0.5})
    card = (artifact.folder / "README.md").read_text(encoding="utf-8")
    assert "50.0 % of the weights of 14 layers are zero" in card
    assert "the mask makes this folder neither smaller nor faster" in card
    assert "pip install transformers\n" in card and "- pruned" in card and "quantized" not in card
    page = (artifact.folder / "report.html").read_text(encoding="utf-8")
    assert "neither smaller nor faster" in page and page.count("50.0 %") >= 14
    assert "50.0 % of the weights" in tiny_text(render.to_terminal(report))
    _, report = compress({"method": "wanda", "pattern": "2:4"}, GPTQ, out=tmp_path / "chain")
    card = render.to_markdown(report)
    assert "zero (2:4)" in card and "pattern 2:4" in card and "- quantized" in card and "compressed-tensors" in card
    _, report = compress(GPTQ, out=tmp_path / "rounded")
    assert "are zero" not in render.to_markdown(report) and "neither smaller" not in render.to_markdown(report)


def tiny_text(made: Any) -> str:
    from rich.console import Console

    console = Console(width=200, record=True, file=io.StringIO())
    console.print(made)
    return console.export_text()


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([{"method": "owl"}], "it needs one that rounds .such as gptq., prunes .such as wanda. or takes out"),
        ([{"method": "owl"}, GPTQ], "add a step that prunes"),
        ([GPTQ, {"method": "wanda"}], "in this order"),
        ([{"method": "wanda"}, {"method": "magnitude"}], "at most one that prunes"),
        ([{"method": "owl"}, {"method": "magnitude", "scope": "global"}], "owl and magnitude both say how sparse"),
        ([{"method": "owl"}, {"method": "wanda", "pattern": "2:4"}], "pattern 2:4: leave one out"),
        ([{"method": "smoothquant"}, {"method": "wanda"}], "smoothquant prepares a network for rounding"),
        ([{"method": "wanda"}, {"method": "lsq"}], "lsq learns anew what wanda has set to zero"),
        ([{"method": "wanda"}, GPTQ, {"method": "autoround"}], "autoround learns anew"),
        ([{"method": "wanda"}, GPTQ, {"method": "e2e-qp"}], "e2e-qp learns anew"),
        ([{"method": "wanda", "pattern": "5:10"}], r"layer model\.layers\.0\..*, \[32, 32\]: pattern 5:10 does not"),
        ([{"method": "wanda", "sparsity": 0.99}], r"q_proj, \[32, 32\]: a sparsity of 0\.99 would empty it"),
        ([{"method": "wanda", "layers": {"*.x": {"sparsity": 0.1}}}], "matches no linear layer"),
    ],
)  # fmt: skip
def test_recipes_that_cannot_be(compress: Compress, tmp_path: Path, steps: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(CompressLabError, match=said):
        compress(*steps)
    assert not (tmp_path / "out").exists()


def test_a_method_that_needs_data_without_data(compress: Compress) -> None:
    for steps in (
        [{"method": "wanda"}],
        [{"method": "sparsegpt"}, {"method": "rtn"}],
        [{"method": "owl"}, {"method": "magnitude"}],
    ):
        with pytest.raises(
            CompressLabError, match=rf"method {steps[0]['method']} needs calibration data: name it with --data"
        ):
            compress(*steps, data=None)


def test_a_budget_beside_pruning(model: Path, text: str, tmp_path: Path) -> None:
    with pytest.raises(CompressLabError, match="leave it out, leave out wanda, or share out its zeros"), tiny.quick():
        pipeline.compress(model, recipe({"method": "wanda"}, GPTQ), text, out=tmp_path / "out", budget="6bits")


def test_the_plan_of_a_recipe_that_only_prunes(model: Path) -> None:
    with tiny.quick():
        plan, estimate, _ = pipeline.plan_only(model, recipe({"method": "owl"}, {"method": "sparsegpt"}))
    assert len(plan.layers) == 14
    weights = (model / "model.safetensors").stat().st_size
    assert estimate.artifact_bytes == pytest.approx(weights, rel=0.05)

"""Mixed precision: layers of different grids in one artifact, and budgets that are kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import tiny
from compresslab import budget as budgets
from compresslab import damage, data, layerwise, methods, mixed, models, pipeline
from compresslab.artifact import Artifact, Writer
from compresslab.contract import Smoother, Solver
from compresslab.deploy import torch_packed
from compresslab.deploy.compressed_tensors import read_weights
from compresslab.errors import CompressLabError
from compresslab.plan import make_plan
from compresslab.quantize.rtn import RTN
from compresslab.recipe import FLOAT, HALVES, Recipe
from compresslab.report.schema import Report
from compresslab.search.sensitivity import kl_divergence, output_noise
from compresslab.solving import Pass

torch.set_num_threads(1)
LAYERS: dict[str, Any] = {
    "model.layers.0.*": {"bits": 8, "group_size": None, "symmetric": True},
    "*.up_proj": {"bits": 3},
    "*.0.*.down_proj": FLOAT,
}
Compress = Callable[..., tuple[Artifact, Report]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_text(tmp_path_factory.mktemp("text") / "words.txt")


@pytest.fixture
def compress(model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Compress]:
    """pipeline.compress without fresh processes."""
    monkeypatch.setattr(pipeline.fresh, "measure", tiny.fake_measure)

    def run(budget: str | None = None, **more: Any) -> tuple[Artifact, Report]:
        settings = {"model": model, "recipe": tiny.recipe(), "data": str(text), "out": tmp_path / "out", **more}
        return pipeline.compress(**settings, budget=budget, measure=False)

    with tiny.quick():
        yield run


def calibration(source: models.Source, batches: list[dict[str, Tensor]] | None) -> Pass:
    return Pass(source=source, plan=make_plan(source, ["@outside-blocks"]), batches=batches)


# --- the settings of single layers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_plain_transformers_opens_a_mixed_artifact_bit_by_bit(text: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """3, 4 and 8 bits, with and without zero points, and a layer in float; the pipeline compares in a fresh process."""
    original = tiny.make("llama").to(dtype)
    recipe = tiny.recipe().override({"layers": LAYERS})
    with tiny.quick():
        artifact, report = pipeline.compress(
            original, recipe, data.Calibration(**calibration_fields()), out=tmp_path / "out", measure=False
        )
    assert report.parity.tensors == 13 and report.parity.max_abs_difference == 0
    assert report.skipped["model.layers.0.mlp.down_proj"] == "left in float by the recipe"
    assert report.recipe["steps"][0]["layers"] == LAYERS
    assert (
        sum(kind.after_bytes for kind in report.bytes) == artifact.folder.joinpath("model.safetensors").stat().st_size
    )

    opened = transformers.AutoModelForCausalLM.from_pretrained(artifact.folder, dtype=torch.float32)
    expected = tiny.make("llama")
    expected.load_state_dict(original.state_dict())
    solved = dict(read_weights(artifact.folder))
    assert sorted({weight.grid.bits for weight in solved.values()}) == [3, 4, 8]
    assert len(solved) == 13
    for name, weight in solved.items():
        expected.get_submodule(name).weight.data = weight.dequantize()
    ids = torch.arange(3, 23)[None]
    with torch.inference_mode():
        assert torch.equal(opened(ids).logits, expected(ids).logits)  # the first forward multiplies weights out
    for name, parameter in expected.named_parameters():
        assert torch.equal(opened.get_parameter(name), parameter), name
    bits = {layer.name: layer.bits_per_weight for layer in report.layers}
    assert (
        bits["model.layers.0.mlp.gate_proj"] > bits["model.layers.1.mlp.gate_proj"] > bits["model.layers.1.mlp.up_proj"]
    )


def calibration_fields() -> dict[str, Any]:
    batches = tiny.token_batches(8, size=4)
    return {"source": "made up", "revision": "1", "split": "calibration", "samples": 8, "sequence_length": 16,
            "tokens": 128, "seed": 0, "sha256": "0", "batches": batches}  # fmt: skip


def test_each_layer_is_solved_as_its_settings_say(compress: Compress, model: Path) -> None:
    artifact, _ = compress(recipe=tiny.recipe("rtn").override({"layers": LAYERS}), data=None)
    weights = models.find(model).weights
    for name, found in read_weights(artifact.folder):
        if "layers.0." in name and "up_proj" not in name:
            solver = RTN(bits=8)
        else:
            solver = RTN(bits=3 if "up_proj" in name else 4, group_size=16, symmetric=False)
        expected = solver.solve(weights.get(f"{name}.weight"), None, scale_dtype=torch.float32).weight
        assert found.grid == expected.grid, name
        assert torch.equal(found.dequantize(), expected.dequantize()), name


def test_packed_kernels_take_what_they_can_of_a_mixed_artifact(text: Path, tmp_path: Path) -> None:
    torch_packed = pytest.importorskip("compresslab.deploy.torch_packed")
    if not torch_packed.is_fast_here():
        pytest.skip("this CPU does not multiply bfloat16 natively")
    original = tiny.make("llama").bfloat16()
    recipe = tiny.recipe("rtn", group_size=32).override({"layers": {"*.o_proj": {"bits": 3}}})
    with tiny.quick(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.fresh, "measure", tiny.fake_measure)
        artifact, _ = pipeline.compress(original, recipe, None, out=tmp_path / "out", measure=False)
    packed, count = torch_packed.load(artifact.folder)
    assert count == 12  # all but o_proj, which has no kernel
    ids = torch.arange(3, 8)[None]
    with torch.inference_mode():
        plain = artifact.load()(ids).logits.float()
        assert float((packed(ids).logits - plain).norm() / plain.norm()) < 0.05


@pytest.mark.parametrize(
    ("layers", "pattern"),
    [
        (
            {"model.layers.7.*": {"bits": 8}},
            r"pattern 'model\.layers\.7\.\*' of the recipe's layers matches no linear layer",
        ),
        ({"lm_head": {"bits": 8}}, r"matches only lm_head, which is left in float: outside the repeated blocks"),
        ({"*": FLOAT}, "has no linear layer left to compress"),
        ({"*.q_proj": {"group_size": None}}, "asymmetric grid per output channel beside other grids"),
        (
            {"*.q_proj": {"group_size": 5}},
            r"layer model\.layers\.0\.self_attn\.q_proj.*group size 5 does not divide 32",
        ),
    ],
)
def test_layers_that_do_not_fit_the_model(compress: Compress, tmp_path: Path, layers: Any, pattern: str) -> None:
    with pytest.raises(CompressLabError, match=pattern):
        compress(recipe=tiny.recipe().override({"layers": layers}))
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_not_continued_with_the_patterns_in_another_order(
    compress: Compress, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two mappings in different orders are equal, and do not mean the same."""
    layers = {"*.0.*": {"bits": 8}, "*.up_proj": {"bits": 3}}
    write = Writer.write

    def once(self: Writer, *args: Any) -> None:
        write(self, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Writer, "write", once)
        compress(recipe=tiny.recipe().override({"layers": layers}))
    with pytest.raises(CompressLabError, match="unfinished run with another order of layers"):
        compress(recipe=tiny.recipe().override({"layers": dict(reversed(layers.items()))}))
    compress(recipe=tiny.recipe().override({"layers": layers}))


# --- budgets ---------------------------------------------------------------------------------------------------------


def bits_on_disk(artifact: Artifact) -> float:
    """Average bits of the blocks' linear layers, from the file itself."""
    tensors = models.FolderWeights(artifact.folder)
    ours = [n for n in tensors.names() if "layers." in n and "norm" not in n]
    used = sum(8 * tensors.get(name).nbytes for name in ours)
    return used / (2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64))


@pytest.mark.parametrize("amount", [5.0, 6.25, 8.0, 13.0])
def test_a_budget_in_bits_is_kept_and_used(compress: Compress, amount: float) -> None:
    artifact, report = compress(f"{amount}bits")
    assert amount * 0.9 < bits_on_disk(artifact) <= amount
    floats = [name for name, why in report.skipped.items() if "by the recipe" in why]
    assert bool(floats) == (amount == 13)


@pytest.mark.parametrize("amount", [0.075, 0.08, 0.09])
def test_a_budget_in_megabytes_is_kept_and_used(compress: Compress, amount: float) -> None:
    artifact, report = compress(f"{amount}MB")
    assert amount * 0.95e6 < artifact.folder.joinpath("model.safetensors").stat().st_size <= amount * 1e6
    assert report.recipe["steps"][0]["layers"]


def test_the_recipe_in_the_report_repeats_the_run_without_a_search(compress: Compress, tmp_path: Path) -> None:
    first, report = compress("6bits")
    again, _ = compress(recipe=Recipe.model_validate(report.recipe), out=tmp_path / "again")
    weights = "model.safetensors"
    assert (first.folder / weights).read_bytes() == (again.folder / weights).read_bytes()
    assert (first.folder / "config.json").read_bytes() == (again.folder / "config.json").read_bytes()


@pytest.mark.parametrize("unit", ["bits", "MB"])
def test_too_small_a_budget_names_the_least_possible_which_can_be_had(compress: Compress, unit: str) -> None:
    with pytest.raises(
        CompressLabError, match=rf"budget of 0\.01{unit} cannot be met: the least possible is "
    ) as caught:
        compress(f"0.01{unit}")
    least = str(caught.value).rpartition(" ")[2]
    _, report = compress(least)
    chosen = list(report.recipe["steps"][0]["layers"].values())
    assert chosen.count({"bits": 2}) >= 12 and len(report.layers) == 14  # it is named in four digits, rounded up


@pytest.mark.parametrize("budget", ["33bits", "5MB"])
def test_too_large_a_budget_leaves_nothing_to_do(compress: Compress, tmp_path: Path, budget: str) -> None:
    with pytest.raises(CompressLabError, match=f"a budget of {budget} leaves no layer to round: the model takes "):
        compress(budget)
    assert list(tmp_path.iterdir()) == []


def test_no_worse_than_one_width_for_all_at_its_size(model: Path) -> None:
    """With GPTQ's own damage at every width, for a budget of exactly what 4 bits everywhere take."""
    source, step = models.find(model), tiny.recipe().rounding
    passing = calibration(source, tiny.token_batches(8))
    solvers = dict.fromkeys(passing.plan.layers, step.build())
    widths = mixed._solvers_by_width(step)
    survey = mixed.Survey(passing, step, widths, mixed._layout(solvers, widths, passing, step),
                          lambda name, weight, rounded, gram: output_noise(weight, rounded, gram),
                          budgets.Bits(passing))  # fmt: skip
    options = survey.options()
    assert all(
        [option.name for option in mine] == [*map(str, mixed.WIDTHS), *HALVES, FLOAT] for mine in options.values()
    )
    for mine in options.values():
        assert [o.cost for o in mine] == sorted(o.cost for o in mine)
        assert [o.damage for o in mine] == sorted((o.damage for o in mine), reverse=True)
    four = [next(o for o in mine if o.name == "4") for mine in options.values()]
    found = mixed.allocate(options, sum(o.cost for o in four))
    assert found.damage < sum(o.damage for o in four)
    assert len({o.name for o in found.chosen.values()}) > 1


def test_the_survey_measures_the_uncompressed_network(model: Path) -> None:
    """Each layer's noise is what its own rounding adds to the outputs of the float model."""
    source, batches = models.find(model), tiny.token_batches(4)
    passing = calibration(source, batches)
    step = tiny.recipe("rtn").rounding
    widths = mixed._solvers_by_width(step)
    solvers = dict.fromkeys(passing.plan.layers, step.build())
    seen: dict[str, float] = {}
    survey = mixed.Survey(passing, step, widths, mixed._layout(solvers, widths, passing, step),
                          lambda name, w, q, gram: seen.setdefault(name, output_noise(w, q, gram)),
                          budgets.Bits(passing))  # fmt: skip
    survey.options()
    network, inputs = models.load(model, dtype=torch.float32), {}
    for name in passing.plan.layers:
        network.get_submodule(name).register_forward_hook(
            lambda m, args, out, name=name: inputs.update({name: args[0]})
        )
    with torch.inference_mode():
        network(**batches[0])
    for name, x in inputs.items():
        weight = network.get_submodule(name).weight
        two = RTN(bits=2, group_size=16, symmetric=False).solve(weight, None, scale_dtype=torch.float32).weight
        y, error = x @ weight.t(), x @ (weight - two.dequantize()).t()
        assert seen[name] == pytest.approx(float(error.square().sum() / y.square().sum()), rel=1e-3), name


def test_half_precision_is_a_choice_where_it_is_fewer_bits(compress: Compress, model: Path, tmp_path: Path) -> None:
    """Of a model in float32; what a file says it holds is what the model that is opened from it computes with."""
    artifact, report = compress("13bits")
    layers = report.recipe["steps"][0]["layers"]
    halves = [name for name, said in layers.items() if said == "fp16"]
    assert halves
    stored = load_file(artifact.folder / "model.safetensors")
    floats, opened = load_file(model / "model.safetensors"), artifact.load(dtype=torch.float32)
    for name in halves:
        assert stored[f"{name}.weight"].dtype == torch.float16
        assert report.skipped[name] == "stored in fp16 by the recipe"
        wanted = floats[f"{name}.weight"].half().float()
        assert torch.equal(opened.get_submodule(name).weight, wanted), name
    assert 12 < bits_on_disk(artifact) <= 13
    assert report.search is not None
    assert report.search.uniform["fp16"][1] < report.search.uniform["bf16"][1]


def test_numbers_that_fp16_cannot_hold_are_neither_chosen_nor_written(tmp_path: Path, text: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    large = "model.layers.0.mlp.up_proj"
    tiny.change_tensors(model, lambda tensors: tensors[f"{large}.weight"][0, :1].fill_(1e5))
    source = models.find(model)
    passing, step = calibration(source, tiny.token_batches(4)), tiny.recipe().rounding
    solvers, widths = dict.fromkeys(passing.plan.layers, step.build()), mixed._solvers_by_width(step)
    survey = mixed.Survey(passing, step, widths, mixed._layout(solvers, widths, passing, step),
                          lambda name, weight, rounded, gram: output_noise(weight, rounded, gram),
                          budgets.Bits(passing))  # fmt: skip
    offered = {name: {option.name for option in mine} for name, mine in survey.options().items()}
    assert "fp16" not in offered[large]
    assert "bf16" in offered[large]
    assert "fp16" in offered["model.layers.1.mlp.up_proj"]
    chosen = tiny.recipe().override({"layers": {large: "fp16"}})
    with pytest.raises(CompressLabError, match=rf"{large}.weight has numbers up to 1e\+05.*bf16"), tiny.quick():
        pipeline.compress(model, chosen, str(text), out=tmp_path / "out", measure=False)


def test_layers_that_the_recipe_settles_are_kept(compress: Compress) -> None:
    settled = {"*.q_proj": {"bits": 8}, "*.0.*.up_proj": FLOAT}
    artifact, report = compress("6bits", recipe=tiny.recipe().override({"layers": settled}))
    layers = report.recipe["steps"][0]["layers"]
    assert {pattern: layers[pattern] for pattern in settled} == settled
    assert not [name for name in layers if name.endswith("q_proj") and name not in settled]
    assert report.skipped["model.layers.0.mlp.up_proj"] == "left in float by the recipe"
    assert all(w.grid.bits == 8 for name, w in read_weights(artifact.folder) if name.endswith("q_proj"))


def test_without_data_the_weights_themselves_are_measured(compress: Compress) -> None:
    artifact, _ = compress("6bits", recipe=tiny.recipe("rtn"), data=None)
    assert 5.4 < bits_on_disk(artifact) <= 6


def test_a_killed_run_finds_the_same_shares_and_goes_on(
    compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = compress("6bits", out=tmp_path / "whole")
    write = Writer.write

    def once(self: Writer, *args: Any) -> None:
        write(self, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Writer, "write", once)
        compress("6bits")
    units: list[str] = []
    monkeypatch.setattr(Writer, "write", lambda self, unit, *args: (units.append(unit.name), write(self, unit, *args)))
    artifact, _ = compress("6bits")
    assert len(units) == 2  # of three
    weights = "model.safetensors"
    assert (artifact.folder / weights).read_bytes() == (whole.folder / weights).read_bytes()


def test_a_choice_by_measured_times_stays_over_a_kill(
    compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured again, times are others, and so would be the choice."""
    whole, _ = compress("6bits", out=tmp_path / "whole")
    share_out, asked = pipeline.mixed.share_out, []

    def noisy(calibration: Any, recipe: Any, solvers: Any, budget: Any, **more: Any) -> Any:
        asked.append(budget)
        return share_out(
            calibration, recipe, solvers, budget if len(asked) == 1 else budgets.parse_budget("5bits"), **more
        )

    def once(self: Writer, *args: Any) -> None:
        write(self, *args)
        raise KeyboardInterrupt

    write = Writer.write
    monkeypatch.setattr(pipeline.mixed, "share_out", noisy)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Writer, "write", once)
        compress("6bits")
    artifact, report = compress("6bits")
    assert len(asked) == 1
    assert report.search is not None and report.search.budget == "6bits"
    weights = "model.safetensors"
    assert (artifact.folder / weights).read_bytes() == (whole.folder / weights).read_bytes()


SMOOTHERS = [n for n, cls in methods.METHODS.items() if isinstance(cls(), Smoother) and not isinstance(cls(), Solver)]


@pytest.mark.parametrize("method", SMOOTHERS)
def test_a_smoothed_network_is_what_is_surveyed(
    compress: Compress, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    sources = []
    survey = layerwise.survey
    monkeypatch.setattr(layerwise, "survey", lambda p, *more: (sources.append(p.source), survey(p, *more))[1])
    raw = tiny.recipe().model_dump(mode="json")
    raw["steps"] = [{"method": method}, *raw["steps"]]
    artifact, _ = compress("6bits", recipe=Recipe.model_validate(raw))
    assert 5.4 < bits_on_disk(artifact) <= 6
    # To find the scales, on what they make of the network, and (it is smoothed anew for the chosen grids) once more.
    assert len(sources) == 3
    assert sources[0].weights.sha256 == sources[2].weights.sha256 != sources[1].weights.sha256


# --- leave one out ---------------------------------------------------------------------------------------------------


def test_leaving_one_out_is_swapping_one_weight(model: Path) -> None:
    passing = calibration(models.find(model), tiny.token_batches(6, 20, size=5))
    measure = damage.LeaveOneOut(passing)
    network = models.load(model, dtype=torch.float32)
    ids = passing.batches[0]["input_ids"][: damage.KL_WINDOWS]  # type: ignore[index]
    with torch.inference_mode():
        before = network(ids).logits
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        weight = network.get_submodule(name).weight.data.clone()
        rounded = RTN(bits=2).solve(weight, None, scale_dtype=torch.float32).weight.dequantize()
        network.get_submodule(name).weight.data = rounded
        with torch.inference_mode():
            expected = kl_divergence(before, network(ids).logits)
        network.get_submodule(name).weight.data = weight
        assert expected > 1e-4
        assert measure(name, weight, weight, None) == 0
        assert measure(name, weight, rounded, None) == pytest.approx(
            expected, rel=1e-3
        )  # the layer before was put back


@pytest.mark.parametrize("kind", ["llama-tied", "gpt2", "qwen2"])
def test_the_whole_model_from_its_source_is_the_model(kind: str) -> None:
    original = tiny.make(kind)
    again = damage.whole_model(models.find(original), torch.device("cpu"), torch.float32)
    ids = tiny.token_batches(2)[0]["input_ids"]
    with torch.inference_mode():
        assert torch.equal(again(ids).logits, original(ids).logits)


def test_padding_does_not_count(model: Path) -> None:
    ids = tiny.token_batches(2, 12)[0]["input_ids"]
    padded, mask = torch.nn.functional.pad(ids, (0, 4)), torch.nn.functional.pad(torch.ones_like(ids), (0, 4))
    source = models.find(model)
    plain = damage.LeaveOneOut(calibration(source, [{"input_ids": ids}]))
    masked = damage.LeaveOneOut(calibration(source, [{"input_ids": padded, "attention_mask": mask}]))
    name = "model.layers.0.mlp.up_proj"
    weight = source.weights.get(f"{name}.weight")
    assert masked(name, weight, weight * 0.9, None) == pytest.approx(plain(name, weight, weight * 0.9, None), rel=1e-4)


@pytest.mark.parametrize("sensitivity", [*damage.SENSITIVITIES, None])
def test_a_budget_by_every_sensitivity(compress: Compress, sensitivity: str | None) -> None:
    artifact, report = compress("6bits", sensitivity=sensitivity)
    assert report.search is not None and report.search.sensitivity == (sensitivity or "fisher")
    assert 5.4 < bits_on_disk(artifact) <= 6
    assert len({layer.bits_per_weight for layer in report.layers}) > 1


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["", "bits", "3.5", "-3bits", "0bits", "0.0MB", "3,5bits", "20s", "80GB", "nanMB", "1e3MB"]
)
def test_budgets_that_make_no_sense(text: str) -> None:
    with pytest.raises(CompressLabError, match="average bits per weight, megabytes .* such as 3.5bits, 80MB or 20ms"):
        budgets.parse_budget(text)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("3.5bits", "3.5bits"),
        (" 4 Bits ", "4bits"),
        ("80mb", "80MB"),
        (".5MB", "0.5MB"),
        ("1.bit", "1bits"),
        ("20 MS", "20ms"),
    ],
)
def test_budgets_that_do(text: str, meant: str) -> None:
    assert str(budgets.parse_budget(text)) == meant


def test_what_cannot_share_a_budget_out(compress: Compress, tmp_path: Path) -> None:
    with pytest.raises(CompressLabError, match="asymmetric grid per output channel"):
        compress("6bits", recipe=tiny.recipe(group_size=None))
    with pytest.raises(CompressLabError, match=r"h\.0\.attn\.c_attn is a Conv1D"):
        compress("6bits", model=tiny.make("gpt2"), recipe=tiny.recipe("rtn", group_size=8), data=None)
    with pytest.raises(CompressLabError, match="unknown sensitivity 'kll': did you mean 'kl'"):
        compress("6bits", sensitivity="kll")
    with pytest.raises(
        CompressLabError, match="sensitivity 'kl' runs the model on calibration text, which recipe 'tiny'"
    ):
        compress("6bits", sensitivity="kl", recipe=tiny.recipe("rtn"))
    with pytest.raises(CompressLabError, match="BertModel has none: take sensitivity 'gram'"):
        damage.damage_of("kl", calibration(models.find(tiny.make("bert")), tiny.token_batches(2)), "tiny")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_over_its_budget_is_not_published(compress: Compress, model: Path, tmp_path: Path) -> None:
    artifact, report = compress("6bits")
    source, layers = models.find(model), [layer.name for layer in report.layers]
    found = bits_on_disk(artifact)
    budgets.check(artifact.folder, budgets.Budget(amount=found, unit="bits"), source, layers)
    with pytest.raises(CompressLabError, match="more than 5bits: please report this"):
        budgets.check(artifact.folder, budgets.Budget(amount=5, unit="bits"), source, layers)
    with pytest.raises(CompressLabError, match="more than 0.01MB: please report this"):
        budgets.check(artifact.folder, budgets.Budget(amount=0.01, unit="MB"), source, layers)


def test_the_command_line(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipeline.fresh, "measure", tiny.fake_measure)
    (tmp_path / "tiny.yaml").write_text(tiny.recipe().to_yaml(), encoding="utf-8")
    out = tmp_path / "out"
    command = ("compress", model, "--recipe", tmp_path / "tiny.yaml", "--data", text, "--out", out, "--no-measure")
    with tiny.quick():
        code, said, err = tiny.run_cli(monkeypatch, capsys, *command, "--budget", "20s")
        assert (
            (code, said) == (2, "")
            and err.startswith("error: budget '20s': give average bits")
            and err.count("\n") == 1
        )
        code, said, _ = tiny.run_cli(monkeypatch, capsys, *command, "--budget", "6bits", "--dry-run")
        assert code == 0 and "6bits; what it makes of" in " ".join(said.split())
        code, said, _ = tiny.run_cli(monkeypatch, capsys, *command, "--budget", "6bits", "--dry-run", "--json")
        assert code == 0 and json.loads(said)["budget"].startswith("6bits; what it makes of")
        assert not out.exists()
        code, said, _ = tiny.run_cli(monkeypatch, capsys, *command, "--budget", "6bits", "--json")
    assert code == 0
    layers = json.loads(said)["recipe"]["steps"][0]["layers"]
    assert layers and all(value == FLOAT or value["bits"] in mixed.WIDTHS for value in layers.values())


# --- milliseconds ----------------------------------------------------------------------------------------------------

needs_kernels = pytest.mark.skipif(not torch_packed.is_fast_here(), reason="torch has no packed kernels for this CPU")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with layers that packed kernels take, in bfloat16."""
    folder = tmp_path_factory.mktemp("wide")
    tiny.make("llama", hidden_size=64, intermediate_size=128).to(torch.bfloat16).save_pretrained(folder)
    tiny.save_tokenizer(folder)
    return folder


@needs_kernels
def test_books_in_milliseconds_time_each_kind_of_layer_once(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "CACHE_BYTES", 100_000)
    timed: list[tuple[Any, ...]] = []
    real = budgets._layer_ms
    monkeypatch.setattr(
        budgets, "_layer_ms", lambda shape, solved: timed.append((shape, solved)) or real(shape, solved)
    )
    books = budgets.Milliseconds(calibration(models.find(wide), tiny.token_batches(2)))
    shapes = {tuple(shape) for shape, _ in timed}
    assert len(timed) == len(shapes) and all(solved is None for _, solved in timed)
    name = "model.layers.0.mlp.down_proj"
    weight = torch.randn(64, 128)
    four, three, float_ms = (
        None if bits is None else RTN(bits=bits, group_size=32).solve(weight, None, scale_dtype=torch.bfloat16).weight
        for bits in (4, 3, None)
    )
    dense = books.cost(name, {}, float_ms)
    assert 0 < dense == books.cost(name, {}, three)  # no kernel takes 3 bits: they are multiplied out
    before = len(timed)
    assert books.cost(name, {}, four) > 0 and len(timed) == before + 1
    assert books.cost("model.layers.1.mlp.down_proj", {}, four) == books.cost(name, {}, four)
    assert len(timed) == before + 1
    budget = budgets.Budget(amount=5, unit="ms")
    assert books.amount(books.left(budget)) == pytest.approx(5)


def test_milliseconds_choose_what_the_kernels_take(
    wide: Path, compress: Compress, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With times that are given: 4 bits take half of float, every other width as long as float."""

    class Given(budgets.Milliseconds):
        def __init__(self, calibration: Pass) -> None:
            self.other_ms = 1.0

        def cost(self, name: str, tensors: Any, solved: Any) -> float:
            return 0.05 if solved is not None and solved.grid.bits == 4 else 0.1

    monkeypatch.setattr(budgets, "Milliseconds", Given)
    _, report = compress("2ms", model=wide, recipe=tiny.recipe(bits=4, group_size=32))
    floats = [name for name, value in report.recipe["steps"][0]["layers"].items() if value == FLOAT]
    assert report.search is not None and report.search.chosen[0] == pytest.approx(2.0)
    assert len(floats) == 6 and len(report.layers) == 8  # 1 + 6 * 0.1 + 8 * 0.05


def test_milliseconds_say_what_they_need(model: Path, compress: Compress) -> None:
    with pytest.raises(CompressLabError, match="a budget in ms is measured on torch's packed kernels, which need"):
        compress("20ms")

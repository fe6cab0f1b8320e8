"""What is written, read back by the compressed-tensors library itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.naive_quantized.base import IntQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compresslab import recipe as recipes
from compresslab.activations.dynamic import Dynamic
from compresslab.aware import Untrained
from compresslab.contract import ActivationQuantizer, Along, AwareTraining, Solver
from compresslab.deploy.compressed_tensors import Layout, read_weights
from compresslab.errors import CompressLabError
from compresslab.numerics.gram import Gram
from compresslab.quantize.gptq import GPTQ
from compresslab.quantize.rtn import RTN

torch.set_num_threads(1)  # tiny matrices: threads that wait for each other would cost more than they give

ROWS, COLUMNS = 14, 60  # neither fills a 32-bit word at any width but 8


def weights() -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)) + 0.2


def scheme_of(layout: Layout) -> QuantizationScheme:
    return QuantizationConfig.model_validate(layout.config(["lm_head"])).config_groups["group_0"]


def opened(
    solver: Solver, scale_dtype: torch.dtype, gram: Gram | None = None, *, transposed: bool = False,
    activations: ActivationQuantizer | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The weight as compressed-tensors reads it, and as we meant it, both as the module keeps it."""
    layout = Layout({"layer": solver}, {} if activations is None else {"layer": activations})
    along: Along = "out" if transposed else "in"
    solved = solver.solve(weights(), gram, scale_dtype=scale_dtype, groups_along=along).weight
    module = Conv1D(ROWS, COLUMNS) if transposed else nn.Linear(COLUMNS, ROWS, bias=False)
    layout.check_module("layer", module)
    tensors = layout.encode("layer", solved, module)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    scheme = scheme_of(layout)
    compressor = PackedQuantizationCompressor if scheme.format == "pack-quantized" else IntQuantizationCompressor
    assert set(tensors) == set(compressor.compression_param_names(scheme))
    assert BaseCompressor.get_value_from_registry(scheme.format) is compressor
    assert compressor.can_compress(nn.Linear, scheme)
    meant = solved.dequantize().t() if transposed else solved.dequantize()
    found = compressor.decompress(tensors, scheme)["weight"]
    assert found.shape == module.weight.shape
    return found, meant


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group_size", [None, 12, 20])
@pytest.mark.parametrize("bits", range(2, 9))
def test_packed_weights_read_back(bits: int, group_size: int | None, symmetric: bool, scale_dtype: torch.dtype) -> None:
    theirs, ours = opened(RTN(bits=bits, group_size=group_size, symmetric=symmetric), scale_dtype)
    # The reader multiplies in the dtype of the scales; code - zero point is exact in each of them.
    assert theirs.dtype == scale_dtype
    assert torch.equal(theirs, ours.to(scale_dtype))


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group_size", [None, 7])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_weight_kept_transposed_reads_back(bits: int, group_size: int | None, symmetric: bool) -> None:
    solver = RTN(bits=bits, group_size=group_size, symmetric=symmetric)
    theirs, ours = opened(solver, torch.float32, transposed=True)
    assert torch.equal(theirs, ours)


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
def test_solved_from_data_read_back(transposed: bool) -> None:
    gram = Gram(COLUMNS)
    gram.add_(torch.randn(200, COLUMNS, generator=torch.Generator().manual_seed(1)) + 0.5)
    theirs, ours = opened(GPTQ(bits=3, group_size=2), torch.float32, gram, transposed=transposed)
    assert torch.equal(theirs, ours)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_int8_weights_read_back(scale_dtype: torch.dtype, symmetric: bool) -> None:
    theirs, ours = opened(RTN(bits=8, symmetric=symmetric), scale_dtype, activations=Dynamic())
    assert torch.equal(theirs, ours.to(scale_dtype))


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_the_same_bytes_as_their_own_compressor(symmetric: bool) -> None:
    """Their rounding of our de-quantised weight with our scales gives the very tensors that we wrote."""
    solver = RTN(bits=4, group_size=20, symmetric=symmetric)
    layout = Layout({"layer": solver})
    solved = solver.solve(weights(), None, scale_dtype=torch.float32).weight
    ours = layout.encode("layer", solved, nn.Linear(COLUMNS, ROWS, bias=False))
    state = {"weight": solved.dequantize(), "weight_scale": solved.scale}
    if solved.zero_point is not None:
        state["weight_zero_point"] = solved.zero_point
    theirs = PackedQuantizationCompressor.compress(state, scheme_of(layout))
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


def codes_of(name: str) -> bool:
    """Whether a recipe's folder is one of compressed-tensors: bitsandbytes has NF4, and a mask alone has no codes."""
    return name != "w4a16-nf4" and recipes.read(name).rounding is not None


@pytest.mark.parametrize("name", [name for name in recipes.shipped() if codes_of(name)])
def test_the_config_of_every_recipe_is_valid(name: str) -> None:
    recipe = recipes.read(name)
    assert recipe.rounding is not None
    solver, quantizer = recipe.rounding.build(), recipe.activations and recipe.activations.build()
    if isinstance(solver, AwareTraining):  # says how inputs are rounded, too
        solver = quantizer = Untrained(solver)
    assert isinstance(solver, Solver)
    assert quantizer is None or isinstance(quantizer, ActivationQuantizer)
    layout = Layout({"a": solver, "b": solver}, {"a": quantizer, "b": quantizer} if quantizer else {})
    config = layout.config(["lm_head", "model.embed_tokens"])
    parsed = QuantizationConfig.model_validate(config)
    assert parsed.format == config["format"]
    assert parsed.ignore == ["lm_head", "model.embed_tokens"]
    scheme = parsed.config_groups["group_0"]
    grid = solver.grid()
    assert scheme.targets == ["Linear"]
    assert (scheme.weights.num_bits, scheme.weights.symmetric) == (grid.bits, grid.symmetric)
    strategy = "tensor_group" if grid.format == "nvfp4" else grid.granularity
    assert (scheme.weights.strategy, scheme.weights.group_size) == (strategy, grid.group_size)
    assert scheme.weights.type == ("int" if grid.format == "int" else "float")
    if quantizer is None:
        assert scheme.input_activations is None
        return
    inputs = quantizer.activation_grid()
    assert (scheme.input_activations.num_bits, scheme.input_activations.symmetric) == (inputs.bits, inputs.symmetric)
    assert scheme.input_activations.strategy == inputs.granularity
    assert scheme.input_activations.dynamic is not quantizer.needs_data


def test_packed_asymmetric_channels_beside_rounded_activations_do_not_open() -> None:
    Layout({"layer": RTN(bits=8, symmetric=False)}, {"layer": Dynamic()})
    Layout({"layer": RTN(bits=4, symmetric=False, group_size=20)}, {"layer": Dynamic()})
    with pytest.raises(
        CompressLabError, match="nor one below 8 bits with rounded activations: set symmetric=true or a group"
    ):
        Layout({"layer": RTN(bits=4, symmetric=False)}, {"layer": Dynamic()})


def test_modules_that_the_format_cannot_hold() -> None:
    packed = Layout(dict.fromkeys(("a.b", "c", "d"), RTN(bits=4, group_size=20)))
    rounded = Layout({"a.b": RTN(bits=8)}, {"a.b": Dynamic(granularity="group", group_size=20)})
    packed.check_module("a.b", nn.Linear(COLUMNS, ROWS))
    rounded.check_module("a.b", nn.Linear(COLUMNS, ROWS))
    with pytest.raises(CompressLabError, match=r"layer a\.b is a Conv1D.*--ignore 'a\.b'"):
        rounded.check_module("a.b", Conv1D(ROWS, COLUMNS))
    with pytest.raises(CompressLabError, match=r"layer a\.b: groups of 20 activations do not divide its 50 inputs"):
        rounded.check_module("a.b", nn.Linear(50, ROWS))
    with pytest.raises(CompressLabError, match=r"layer c.*group size 20 does not divide 50 .*group_size"):
        packed.check_module("c", nn.Linear(50, ROWS))
    with pytest.raises(CompressLabError, match=r"layer d.*group size 20 does not divide 14 .*group_size"):
        packed.check_module("d", Conv1D(ROWS, COLUMNS))  # kept as [60, 14]


# --- mixed precision ------------------------------------------------------------------------------------------------

MIXED: dict[str, Solver] = {
    "a.three": RTN(bits=3, group_size=12, symmetric=False),
    "a.four": RTN(bits=4, group_size=20),
    "b.three": RTN(bits=3, group_size=12, symmetric=False),
    "b.eight": RTN(bits=8),
    "b.dynamic": RTN(bits=8),
}
INPUTS: dict[str, ActivationQuantizer] = {"b.dynamic": Dynamic()}


def test_one_group_for_each_pair_of_grids() -> None:
    layout = Layout(MIXED, INPUTS)
    config = layout.config(["lm_head"])
    parsed = QuantizationConfig.model_validate(config)
    assert [scheme.targets for scheme in parsed.config_groups.values()] == [
        ["a.three", "b.three"], ["a.four"], ["b.eight"], ["b.dynamic"]
    ]  # fmt: skip
    assert [scheme.format for scheme in parsed.config_groups.values()] == ["pack-quantized"] * 3 + ["int-quantized"]
    assert parsed.format == "mixed-precision"
    assert "dequantize" not in config  # transformers would take every layer to be of the first group
    packed = Layout({name: solver for name, solver in MIXED.items() if name != "b.dynamic"})
    assert packed.config([])["format"] == "pack-quantized"


def test_equal_grids_are_one_group_whatever_else_differs() -> None:
    config = Layout({"a": GPTQ(damp_frac=0.01), "b": GPTQ(damp_frac=0.1)}).config([])
    assert [group["targets"] for group in config["config_groups"].values()] == [["Linear"]]
    assert config["dequantize"] is True


@pytest.mark.parametrize("name", MIXED)
def test_mixed_weights_read_back(name: str) -> None:
    layout, solver = Layout(MIXED, INPUTS), MIXED[name]
    module = nn.Linear(COLUMNS, ROWS, bias=False)
    layout.check_module(name, module)
    solved = solver.solve(weights(), None, scale_dtype=torch.bfloat16).weight
    tensors = layout.encode(name, solved, module)
    groups = QuantizationConfig.model_validate(layout.config([])).config_groups.values()
    scheme = next(group for group in groups if name in group.targets)
    found = BaseCompressor.get_value_from_registry(scheme.format).decompress(tensors, scheme)["weight"]
    assert torch.equal(found, solved.dequantize().to(torch.bfloat16))
    assert torch.equal(layout.as_opened(solved, False), solved.dequantize())  # filled in float32, scales and all


def test_the_mixed_folder_as_it_lies_on_disk(tmp_path: Path) -> None:
    layout, module = Layout(MIXED, INPUTS), nn.Linear(COLUMNS, ROWS, bias=False)
    solved = {name: s.solve(weights(), None, scale_dtype=torch.bfloat16).weight for name, s in MIXED.items()}
    tensors = {f"{n}.{suffix}": t for n, w in solved.items() for suffix, t in layout.encode(n, w, module).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": layout.config([])}), encoding="utf-8")
    found = dict(read_weights(tmp_path))
    assert found.keys() == solved.keys()
    for name, weight in solved.items():
        assert found[name].grid == weight.grid
        assert torch.equal(found[name].codes, weight.codes)
        assert torch.equal(found[name].dequantize(), weight.dequantize())
    config = layout.config([])
    del config["config_groups"]["group_1"]
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}), encoding="utf-8")
    with pytest.raises(CompressLabError, match=r"no group for layer a\.four"):
        dict(read_weights(tmp_path))


def test_what_cannot_be_mixed() -> None:
    four, eight = RTN(bits=4, symmetric=False), RTN(bits=8)
    Layout({"a": four})
    with pytest.raises(
        CompressLabError, match="no asymmetric grid per output channel .* symmetric=true or a group_size"
    ):
        Layout({"a": four, "b": eight})
    with pytest.raises(CompressLabError, match=r"layer a is a Conv1D.*mixed grids.*--ignore 'a'"):
        Layout(MIXED | {"a": eight}).check_module("a", Conv1D(ROWS, COLUMNS))

"""What is written, read back by the compressed-tensors library itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.naive_quantized.base import IntQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compresslab import recipe as recipes
from compresslab.contract import Along, Solver
from compresslab.deploy.compressed_tensors import Layout
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
    solver: Solver, scale_dtype: torch.dtype, gram: Gram | None = None, *, transposed: bool = False
) -> tuple[Tensor, Tensor]:
    """The weight as compressed-tensors reads it, and as we meant it, both as the module keeps it."""
    layout = Layout(solver)
    along: Along = "out" if transposed else "in"
    solved = solver.solve(weights(), gram, scale_dtype=scale_dtype, groups_along=along).weight
    module = Conv1D(ROWS, COLUMNS) if transposed else nn.Linear(COLUMNS, ROWS, bias=False)
    layout.check_module("layer", module)
    tensors = layout.encode(solved, module)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    scheme = scheme_of(layout)
    compressor = PackedQuantizationCompressor if layout.format == "pack-quantized" else IntQuantizationCompressor
    assert set(tensors) == set(compressor.compression_param_names(scheme))
    assert BaseCompressor.get_value_from_registry(layout.format) is compressor
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


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_int8_weights_read_back(scale_dtype: torch.dtype) -> None:
    theirs, ours = opened(RTN(bits=8, activation_bits=8), scale_dtype)
    assert torch.equal(theirs, ours.to(scale_dtype))


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_the_same_bytes_as_their_own_compressor(symmetric: bool) -> None:
    """Their rounding of our de-quantised weight with our scales gives the very tensors that we wrote."""
    solver = RTN(bits=4, group_size=20, symmetric=symmetric)
    layout = Layout(solver)
    solved = solver.solve(weights(), None, scale_dtype=torch.float32).weight
    ours = layout.encode(solved, nn.Linear(COLUMNS, ROWS, bias=False))
    state = {"weight": solved.dequantize(), "weight_scale": solved.scale}
    if solved.zero_point is not None:
        state["weight_zero_point"] = solved.zero_point
    theirs = PackedQuantizationCompressor.compress(state, scheme_of(layout))
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("name", list(recipes.shipped()))
def test_the_config_of_every_recipe_is_valid(name: str) -> None:
    solver = recipes.read(name).steps[-1].build()
    assert isinstance(solver, Solver)
    config = Layout(solver).config(["lm_head", "model.embed_tokens"])
    parsed = QuantizationConfig.model_validate(config)
    assert parsed.format == config["format"]
    assert parsed.ignore == ["lm_head", "model.embed_tokens"]
    scheme = parsed.config_groups["group_0"]
    grid = solver.grid()
    assert scheme.targets == ["Linear"]
    assert (scheme.weights.num_bits, scheme.weights.symmetric) == (grid.bits, grid.symmetric)
    assert (scheme.weights.strategy, scheme.weights.group_size) == (grid.granularity, grid.group_size)
    activations = solver.activation_grid()
    if activations is None:
        assert scheme.input_activations is None
    else:
        assert scheme.input_activations.num_bits == activations.bits
        assert scheme.input_activations.strategy == "token"
        assert scheme.input_activations.dynamic is True


@pytest.mark.parametrize("settings", [{"bits": 4}, {"bits": 4, "group_size": 20}, {"bits": 8, "symmetric": False}])
def test_8_bit_activations_need_symmetric_8_bit_weights(settings: dict[str, Any]) -> None:
    with pytest.raises(CompressLabError, match="bits=8, symmetric=true and activation_bits=8"):
        Layout(RTN(**settings, activation_bits=8))


def test_modules_that_the_format_cannot_hold() -> None:
    packed, rounded = Layout(RTN(bits=4, group_size=20)), Layout(RTN(bits=8, activation_bits=8))
    packed.check_module("a.b", nn.Linear(COLUMNS, ROWS))
    rounded.check_module("a.b", nn.Linear(COLUMNS, ROWS))
    with pytest.raises(CompressLabError, match=r"layer a\.b is a Conv1D.*--ignore 'a\.b'"):
        rounded.check_module("a.b", Conv1D(ROWS, COLUMNS))
    with pytest.raises(CompressLabError, match=r"layer c.*group size 20 does not divide 50 .*group_size"):
        packed.check_module("c", nn.Linear(50, ROWS))
    with pytest.raises(CompressLabError, match=r"layer d.*group size 20 does not divide 14 .*group_size"):
        packed.check_module("d", Conv1D(ROWS, COLUMNS))  # kept as [60, 14]

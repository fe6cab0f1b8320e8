"""The number formats against lists of their values, torch's casts and compressed-tensors; and their laws under every solver."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from compressed_tensors.quantization.utils.fp4_utils import cast_to_fp4
from torch import Tensor

from compresslab import methods
from compresslab.contract import Along
from compresslab.errors import CompressLabError
from compresslab.numerics.formats import FORMATS, NF4, exponents, from_exponents, split_scale
from compresslab.numerics.gram import Gram
from compresslab.numerics.grid import Grid, QuantWeight, fit_minmax, quantize, round_to_nearest
from compresslab.numerics.linalg import quadratic_error
from compresslab.numerics.packing import pack_nibbles, to_patterns, to_signed, unpack_nibbles
from compresslab.numerics.ranges import SHRINKS, fit_search
from compresslab.quantize.awq import AWQ
from compresslab.quantize.gptq import GPTQ
from compresslab.quantize.qep import QEP
from compresslab.quantize.rtn import RTN
from oracles import formats as oracle
from oracles import gptq as refit

torch.set_num_threads(1)  # tiny matrices: threads that wait for each other would cost more than they give

ROWS, COLUMNS = 32, 64
NAMES = list(FORMATS)
SOLVERS = [RTN, GPTQ, QEP, AWQ]
CASTS = {"fp8-e4m3": torch.float8_e4m3fn, "fp8-e5m2": torch.float8_e5m2}


def settings_of(name: str) -> dict[str, Any]:
    return {"bits": FORMATS[name].bits, "symmetric": True, "format": name, "group_size": FORMATS[name].group_size or 16}


def grid_of(name: str) -> Grid:
    return Grid.of_weights(**settings_of(name))


def weights(seed: int = 0, rows: int = ROWS, columns: int = COLUMNS) -> Tensor:
    """Rows of very different sizes, some of them of one sign, with exact zeros and a group of zeros."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 10 ** torch.linspace(-4, 1, rows)[:, None]
    weight[3] = weight[3].abs()
    weight[:, 5] = 0
    weight[7, :32] = 0
    return weight


def gram_of(seed: int = 1, columns: int = COLUMNS) -> Gram:
    generator = torch.Generator().manual_seed(seed)
    gram = Gram(columns)
    gram.add_(torch.randn(3 * columns, columns, generator=generator) + torch.randn(3 * columns, 1, generator=generator))
    return gram


# -- tables ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in NAMES if name != "nf4"])
def test_the_values_of_a_float_are_those_of_its_bit_patterns(name: str) -> None:
    assert FORMATS[name].values.tolist() == oracle.TABLES[name]


def test_the_values_of_nf4_are_the_quantiles_of_a_normal_distribution() -> None:
    """QLoRA's derivation gives what it published, to the float32 it was published in."""
    assert torch.allclose(torch.tensor(NF4), torch.tensor(oracle.nf4_values()), rtol=0, atol=2e-7)
    assert FORMATS["nf4"].values.tolist() == list(NF4)


@pytest.mark.parametrize("name", NAMES)
def test_codes_are_signed_and_0_is_0(name: str) -> None:
    table, grid = FORMATS[name], grid_of(name)
    codes = torch.arange(grid.qmin, grid.qmax + 1, dtype=torch.int8)
    values = table.decode(codes)
    assert torch.equal(values, table.values)
    assert torch.equal(values.sign(), codes.sign().float())
    assert torch.equal(table.encode(values), codes)  # representable values are fixed points
    assert len(codes) <= grid.levels


@pytest.mark.parametrize("name", CASTS)
def test_rounding_to_a_float_of_8_bits_is_torchs_cast(name: str) -> None:
    table, dtype = FORMATS[name], CASTS[name]
    values = table.values.double()
    halfway = ((values[1:] + values[:-1]) / 2).float()
    largest = float(table.values[-1])
    x = torch.cat([table.values, halfway, torch.nextafter(halfway, torch.tensor(torch.inf)), torch.randn(2000) * 3])
    x = x.clamp(-largest, largest)
    codes = table.encode(x)
    assert torch.equal(table.decode(codes), x.to(dtype).float())
    patterns = to_patterns(codes, 8)
    assert torch.equal(patterns.view(dtype).float(), table.decode(codes))
    assert torch.equal(to_signed(patterns, 8), codes)


def test_rounding_to_a_float_of_4_bits_is_compressed_tensors_cast() -> None:
    x = torch.cat([torch.arange(-800, 801) / 100, torch.randn(2000) * 3])
    assert torch.equal(FORMATS["mxfp4"].decode(FORMATS["mxfp4"].encode(x)), cast_to_fp4(x.clone()) + 0.0)


def test_nibbles() -> None:
    codes = torch.randint(-7, 8, (5, 12), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    packed = pack_nibbles(codes)
    assert packed.shape == (5, 6)
    assert torch.equal(unpack_nibbles(packed), codes)


# -- rounding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("groups_along", ["in", "out"])
@pytest.mark.parametrize("name", NAMES)
def test_every_weight_goes_to_the_nearest_value(name: str, groups_along: Along, scale_dtype: torch.dtype) -> None:
    solved = round_to_nearest(weights(), grid_of(name), scale_dtype, groups_along)
    oracle.assert_nearest(weights(), solved.dequantize(), solved.scale, oracle.TABLES[name], tie=3e-7)
    assert bool((solved.scale.float() > 0).all())
    assert bool((solved.dequantize()[:, 5] == 0).all())


@pytest.mark.parametrize("name", NAMES)
def test_rounding_twice_changes_nothing(name: str) -> None:
    once = round_to_nearest(weights(), grid_of(name), torch.float32, "in")
    again = quantize(once.dequantize(), once.scale, None, once.grid)
    assert torch.equal(again.codes, once.codes)


@pytest.mark.parametrize("name", NAMES)
def test_a_power_of_two_goes_through_a_format(name: str) -> None:
    plain = round_to_nearest(weights(), grid_of(name), torch.float32, "in")
    scaled = round_to_nearest(weights() * 2.0**-9, grid_of(name), torch.float32, "in")
    assert torch.equal(scaled.codes, plain.codes)
    where = plain.codes != 0  # the scale of a group of zeros says nothing
    assert torch.equal(scaled.dequantize()[where], plain.dequantize()[where] * 2.0**-9)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-30, 1e30])
def test_extreme_weights_have_a_scale(name: str, size: float) -> None:
    weight = torch.full((ROWS, COLUMNS), size)
    weight[0, 0] = -size
    solved = round_to_nearest(weight, grid_of(name), torch.float32, "in")
    real = solved.dequantize()
    assert bool(torch.isfinite(real).all())
    if size not in (0.0, 1e-38):
        assert torch.allclose(real, weight, rtol=0.2)
    else:
        assert float(real.abs().max()) <= 1.2 * size


# -- scales ----------------------------------------------------------------------------------------------------------


def test_scales_of_mxfp4_are_those_of_compressed_tensors() -> None:
    largest = torch.cat([torch.rand(500) * 10 ** torch.linspace(-6, 6, 500), torch.tensor([1.75, 1.7499999, 2.0, 3.5])])
    args = QuantizationArgs(num_bits=4, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8)
    theirs, _ = calculate_qparams(-largest, largest / 2, args)
    ours = FORMATS["mxfp4"].scale_for(largest, torch.float32)
    assert torch.equal(ours, theirs)


def test_the_exponents_of_mxfp4() -> None:
    scale = 2.0 ** torch.arange(-100, 101).float()
    assert exponents(scale).tolist() == list(range(27, 228))
    assert torch.equal(from_exponents(exponents(scale)), scale)


def test_scales_of_nvfp4_are_e4m3_numbers_by_a_power_of_two() -> None:
    largest = weights().abs().view(ROWS, -1, 16).amax(dim=2)
    scale = FORMATS["nvfp4"].scale_for(largest, torch.bfloat16)
    stored, global_scale = split_scale(scale)
    assert stored.dtype == torch.float8_e4m3fn
    assert torch.equal(stored.float() / global_scale, scale)
    assert float(torch.log2(global_scale)) % 1 == 0
    assert 224 <= float(stored.float().max()) <= 448
    fine = largest / 6 * global_scale > 2**-6
    assert torch.allclose(scale[fine], (largest / 6)[fine], rtol=1 / 16)
    # The two can be told from their quotient again when the largest scale is gone.
    less = scale.clone()
    less[largest == largest.max()] /= 4
    again, power = split_scale(less)
    assert torch.equal(again.float() / power, less)


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_what_is_multiplied_out_in_bfloat16_loses_nothing(name: str) -> None:
    real = round_to_nearest(weights(), grid_of(name), torch.bfloat16, "in").dequantize()
    assert torch.equal(real.bfloat16().float(), real)


@pytest.mark.parametrize(("name", "bits"), [("nf4", 5.0), ("fp8-e4m3", 9.0), ("mxfp4", 4.25), ("nvfp4", 4.5)])
def test_bits_per_weight(name: str, bits: float) -> None:
    assert round_to_nearest(weights(), grid_of(name), torch.bfloat16, "in").bits_per_weight == bits


# -- solvers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", NAMES)
def test_every_solver_takes_every_format(name: str, solver: Any) -> None:
    gram, weight = gram_of(), weights()
    solved = solver(**settings_of(name)).solve(weight, gram, scale_dtype=torch.bfloat16).weight
    assert solved.grid == grid_of(name)
    table = torch.tensor(oracle.TABLES[name])
    values = solved.dequantize() / solved.scale.float().repeat_interleave(solved.grid.group_size, dim=1)
    assert float((values[..., None] - table).abs().amin(dim=2).div(1 + values.abs()).max()) < 1e-6
    difference, plain = solved.dequantize() - weight, round_to_nearest(weight, solved.grid, torch.bfloat16, "in")
    # AWQ's clipping looks at diag(H) only.
    matrix = gram.diagonal.diag() if solver is AWQ else gram.matrix
    errors = [float(quadratic_error(d, matrix)) for d in (difference, plain.dequantize() - weight)]
    assert errors[0] <= errors[1] if solver is RTN or FORMATS[name].bits == 8 else errors[0] < errors[1]


@pytest.mark.parametrize("name", NAMES)
def test_gptq_of_a_white_input_rounds_to_nearest(name: str) -> None:
    gram = Gram(COLUMNS)
    gram.add_(torch.eye(COLUMNS))
    solver = GPTQ(**settings_of(name), range_search=False)
    solved = solver.solve(weights(), gram, scale_dtype=torch.bfloat16).weight
    plain = round_to_nearest(weights(), grid_of(name), torch.bfloat16, "in")
    assert torch.equal(solved.codes, plain.codes)
    assert torch.equal(solved.scale, plain.scale)


@pytest.mark.parametrize("name", NAMES)
def test_gptq_is_the_refit_on_a_table(name: str) -> None:
    """Code by code, against the least squares of oracles/gptq.py with this format's values in the place of integers."""
    gram, weight = gram_of(), weights() / 10 ** torch.linspace(-4, 1, ROWS)[:, None]
    solver = GPTQ(**settings_of(name), range_search=False)
    solved = solver.solve(weight, gram, scale_dtype=torch.float32).weight
    order = sorted(range(COLUMNS), key=lambda k: -float(gram.matrix[k, k]))
    followed = refit.solve(
        weight, gram.matrix, solved.scale, None, solver.bits, order=order, damp_frac=solver.damp_frac,
        follow=solved.codes, values=torch.tensor(oracle.TABLES[name], dtype=torch.float64),
    )  # fmt: skip
    assert torch.allclose(followed.quantized, solved.dequantize().double(), rtol=1e-6, atol=0)
    oracle.assert_nearest(followed.refitted, solved.dequantize(), solved.scale, oracle.TABLES[name], tie=1e-4)
    plain = quantize(weight, solved.scale, None, solved.grid)
    assert not torch.equal(plain.codes, solved.codes)


@pytest.mark.parametrize("name", ["nf4", "mxfp4", "nvfp4"])
def test_the_search_takes_the_best_of_its_scales(name: str) -> None:
    weight, importance = weights(), torch.rand(COLUMNS, generator=torch.Generator().manual_seed(2)) ** 4
    grid = grid_of(name)
    scale, _ = fit_search(weight, importance, grid, torch.float32)
    size = grid.group_size or COLUMNS
    largest = weight.abs().view(ROWS, -1, size).amax(dim=2)
    factors = (1.0, 0.5, 2.0) if name == "mxfp4" else SHRINKS
    candidates = FORMATS[name].scale_for(torch.stack([factor * largest for factor in factors]), torch.float32)
    cost = torch.stack(
        [
            torch.from_numpy(oracle.errors(weight, candidate, oracle.TABLES[name]).min(axis=2))
            .mul(candidate.double().repeat_interleave(size, dim=1)).square().mul(importance.double())
            .view(ROWS, -1, size).sum(dim=2)
            for candidate in candidates
        ]
    )  # fmt: skip
    taken = torch.stack([(candidate == scale).double() for candidate in candidates])
    assert bool((taken.sum(dim=0) >= 1).all())
    ours = torch.where(taken > 0, cost, torch.inf).amin(dim=0)
    assert bool((ours <= cost.amin(dim=0) * (1 + 1e-4)).all())
    assert not torch.equal(scale, fit_minmax(weight, grid, torch.float32)[0])


# -- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "nvfp4"}, "nvfp4 cannot have symmetric=false, group_size=64: set symmetric=true, group_size=16"),
        ({"format": "mxfp4", "bits": 8, "symmetric": True, "group_size": 32}, "cannot have bits=8: set bits=4"),
        ({"format": "fp8-e4m3", "symmetric": True}, "cannot have bits=4: set bits=8"),
        ({"format": "nf4", "group_size": None}, "cannot have symmetric=false: set symmetric=true"),
        ({"format": "mxfp4", "symmetric": True, "group_size": None}, "group_size=null: set group_size=32"),
        ({"format": "fp4"}, "unknown number format 'fp4': choose int, nf4"),
    ],
)
def test_settings_that_a_format_does_not_have(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CompressLabError, match=f"method gptq: .*{message}"):
        methods.build("gptq", settings)


def test_dequantize_is_the_scale_times_the_value() -> None:
    codes = torch.tensor([[-7, -1, 0, 7]], dtype=torch.int8)
    grid = Grid(bits=4, format="nf4")
    solved = QuantWeight(codes=codes, scale=torch.tensor([[2.0]]), zero_point=None, grid=grid)
    assert solved.dequantize().tolist() == [[-2.0, 2 * NF4[6], 0.0, 2 * NF4[14]]]

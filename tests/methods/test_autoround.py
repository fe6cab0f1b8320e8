"""AutoRound: gradients, its start, what it finds on tiny layers, and its place in the driver."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from compresslab import models, pipeline
from compresslab.artifact import Writer
from compresslab.contract import BlockForward, Refiner
from compresslab.numerics.gram import Gram
from compresslab.numerics.grid import Grid, QuantWeight, fit_minmax, per_element, quantize
from compresslab.quantize.autoround import AutoRound, Learned, StraightThrough
from compresslab.quantize.gptq import GPTQ
from compresslab.quantize.rtn import RTN
from compresslab.recipe import parse
from oracles import autoround as oracle

torch.set_num_threads(1)


def layer(seed: int, rows: int = 24, columns: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(columns) + 0.15 * torch.randn(columns, columns, generator=generator)
    weight = torch.randn(rows, columns, generator=generator)
    return weight, torch.randn(600, columns, generator=generator) @ mixing


def rounded(weight: Tensor, grid: Grid) -> QuantWeight:
    return quantize(weight, *fit_minmax(weight, grid, torch.float32), grid)


def error(x: Tensor, weight: Tensor, found: QuantWeight) -> float:
    return float((x @ (weight - found.dequantize()).t()).square().sum())


def refine(method: AutoRound, weight: Tensor, start: QuantWeight, x: Tensor, batches: int = 4) -> QuantWeight:
    """A 'block' of one linear layer."""
    parts = x.chunk(batches)

    class Forward:
        def __call__(self, index: int, weights: Mapping[str, Tensor]) -> Tensor:
            return parts[index] @ weights["linear"].t()

        def backward(self, indices: Sequence[int], loss: Callable[[int], Tensor], parameters: Sequence[Tensor]) -> None:
            torch.stack([loss(index) for index in indices]).sum().backward()

    return method.refine({"linear": weight}, {"linear": start}, Forward(), [part @ weight.t() for part in parts])[
        "linear"
    ]


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [2, 4])
def test_gradients_weight_by_weight(bits: int, symmetric: bool) -> None:
    grid = Grid(bits=bits, symmetric=symmetric, granularity="group", group_size=16)
    start = rounded(layer(bits)[0], grid)
    scale, zero = (None if x is None else x.double() for x in per_element(start.scale, start.zero_point, (24, 64)))
    assert scale is not None
    zero = torch.zeros_like(scale) if zero is None else zero
    generator = torch.Generator().manual_seed(9)
    position = (torch.rand(24, 64, generator=generator).double() - 0.5) * 2.6 * 2 ** (bits - 1)  # the clamp holds some
    offset = (torch.rand(24, 64, generator=generator).double() - 0.5).requires_grad_()
    factor = (0.7 + 0.6 * torch.rand(24, 64, generator=generator).double()).requires_grad_()
    upstream = torch.rand(24, 64, generator=generator).double() - 0.5
    found = StraightThrough.apply(position, scale, zero, offset, factor, grid)
    (found * upstream).sum().backward()
    held = 0
    for row in range(24):
        for k in range(64):
            given = [float(t[row, k].detach()) for t in (position, offset, factor, scale, zero)]
            expected = oracle.gradients(*given, grid.qmin, grid.qmax)
            held += expected[0] == 0
            assert float(found[row, k].detach()) == pytest.approx(
                oracle.fake_quantised(*given, grid.qmin, grid.qmax), abs=1e-12
            )
            for gradient, value in zip((offset.grad, factor.grad), expected, strict=True):
                assert gradient is not None
                assert float(gradient[row, k]) == pytest.approx(value * float(upstream[row, k]), abs=1e-12)
    assert 50 < held < 1000


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_it_starts_at_the_solvers_codes(bits: int, scale_dtype: torch.dtype) -> None:
    weight, x = layer(1)
    gram = Gram(weight.shape[1])
    gram.add_(x)
    for solver in (GPTQ(bits=bits, group_size=16), GPTQ(bits=bits, group_size=16, symmetric=True), RTN(bits=bits)):
        start = solver.solve(weight, gram, scale_dtype=scale_dtype).weight
        learned = Learned(weight, start, AutoRound())
        again = learned.rounded()
        assert torch.equal(again.codes, start.codes)
        assert torch.equal(again.scale, start.scale)
        torch.testing.assert_close(learned().detach(), start.dequantize(), rtol=1e-6, atol=1e-6)
        assert float((learned.position - start.codes).abs().max()) <= AutoRound().lean + 1e-4


LONG = {"steps": 100, "offset_step": 0.01, "scale_step": 0.003}


def test_rows_against_all_combinations_of_codes() -> None:
    """6 weights of 3 bits, on scales that stay: never below the best of all codes, and nearer to it than nearest rounding."""
    best, learned, nearest = 0.0, 0.0, 0.0
    for seed in range(8):
        weight, x = layer(seed, rows=1, columns=6)
        x = x @ torch.randn(6, 6, generator=torch.Generator().manual_seed(seed))
        start = rounded(weight, Grid(bits=3, symmetric=True, granularity="channel"))
        least = oracle.best_error(weight[0], float(start.scale[0, 0]), x, start.grid.qmin, start.grid.qmax)
        found = error(x, weight, refine(AutoRound(**LONG | {"scale_step": 0.0}), weight, start, x))
        assert found >= least * (1 - 1e-4)
        best, learned, nearest = best + least, learned + found, nearest + error(x, weight, start)
    assert learned < nearest - 0.15 * (nearest - best)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_better_than_where_it_started(bits: int) -> None:
    """Rounding and scales from nearest rounding; from GPTQ's codes the scales alone (on random weights they are best left)."""
    weight, x = layer(7)
    gram = Gram(weight.shape[1])
    gram.add_(x)
    nearest = rounded(weight, Grid(bits=bits, symmetric=False, granularity="group", group_size=16))
    scales = AutoRound(**LONG | {"offset_step": 0.0})
    by_scales = error(x, weight, refine(scales, weight, nearest, x))
    assert error(x, weight, refine(AutoRound(**LONG), weight, nearest, x)) < 0.93 * error(x, weight, nearest)
    assert by_scales < 0.93 * error(x, weight, nearest)
    second_order = GPTQ(bits=bits, group_size=16).solve(weight, gram, scale_dtype=torch.float32).weight
    assert error(x, weight, refine(scales, weight, second_order, x)) < 0.95 * error(x, weight, second_order)


def test_the_same_bits_every_time_and_other_settings_count() -> None:
    weight, x = layer(3)
    start = rounded(weight, Grid(bits=3, symmetric=False, granularity="group", group_size=16))
    first, second = (refine(AutoRound(), weight, start, x) for _ in range(2))
    assert torch.equal(first.codes, second.codes) and torch.equal(first.scale, second.scale)
    assert torch.equal(refine(AutoRound(scale_step=0.0), weight, start, x).scale, start.scale)
    assert torch.equal(refine(AutoRound(offset_step=0.0), weight, start, x).codes, start.codes)
    assert not torch.equal(first.scale, start.scale)
    far = {"offset_step": 0.1}
    assert not torch.equal(
        refine(AutoRound(**far, seed=1), weight, start, x).codes, refine(AutoRound(**far), weight, start, x).codes
    )


def test_a_number_format_has_no_cells_to_round_into() -> None:
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    start = RTN(bits=4, group_size=32, format="mxfp4").solve(weight, None, scale_dtype=torch.float32).weight
    with pytest.raises(ValueError, match="linear is in format mxfp4, and only integers"):
        refine(AutoRound(), weight, start, torch.randn(8, 32))


@pytest.mark.parametrize("setting", [{"steps": 0}, {"batches": 0}, {"lean": 0.5}, {"lean": -0.1}])
def test_settings_out_of_range(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        AutoRound(**setting)


# -- in the driver ---------------------------------------------------------------------------------------------------


def block_errors(model: Any, found: tiny.MemorySink, batches: list[dict[str, Tensor]]) -> float:
    """|logits of the uncompressed model - logits with these weights|^2."""
    import copy

    other = copy.deepcopy(model)
    for name, solved in found.solved.items():
        weight = solved.weight.dequantize()
        other.get_submodule(name).weight.data = weight.t().contiguous() if solved.transposed else weight
    with torch.no_grad():
        return sum(float((model(**b)[0] - other(**b)[0]).square().sum()) for b in batches)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "qwen2"])
def test_blocks_come_out_better(kind: str) -> None:
    model, batches = tiny.make(kind), tiny.token_batches(4)
    solver = GPTQ(bits=2, group_size=16)
    plain = tiny.solve(model, batches, solver=solver)
    refined = tiny.solve(model, batches, solver=solver, refiner=AutoRound(steps=40))
    assert block_errors(model, refined, batches) < block_errors(model, plain, batches)
    assert sorted(plain.units) == sorted(refined.units)
    changed = [name for name in plain.solved if not torch.equal(plain.codes()[name], refined.codes()[name])]
    assert len(changed) > len(plain.solved) / 2


@dataclass(frozen=True, kw_only=True)
class Spoiler:
    """A refiner that makes everything worse."""

    paper = AutoRound.paper
    needs_data = True
    needs_labels = False

    def refine(
        self, weights: Mapping[str, Tensor], solved: Mapping[str, QuantWeight], forward: BlockForward,
        targets: Sequence[Tensor],
    ) -> dict[str, QuantWeight]:  # fmt: skip
        return {name: rounded(-weights[name], solved[name].grid) for name in weights}


def test_what_is_worse_is_not_kept() -> None:
    model, batches = tiny.make("llama"), tiny.token_batches(3)
    assert isinstance(Spoiler(), Refiner)
    plain = tiny.solve(model, batches)
    spoiled = tiny.solve(model, batches, refiner=Spoiler())
    assert all(torch.equal(codes, spoiled.codes()[name]) for name, codes in plain.codes().items())


def test_targets_come_from_the_uncompressed_network(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = tiny.make("llama"), tiny.token_batches(3)
    seen: list[list[Tensor]] = []

    class Noted(AutoRound):
        def refine(self, *args: Any, **kwargs: Any) -> dict[str, QuantWeight]:
            seen.append([target.clone() for target in args[3]])
            return super().refine(*args, **kwargs)

    tiny.solve(model, batches, solver=GPTQ(bits=2, group_size=16), refiner=Noted(steps=2))
    assert len(seen) == 2
    for i, batch in enumerate(batches):
        with torch.no_grad():
            states = model(**batch, output_hidden_states=True).hidden_states
        torch.testing.assert_close(seen[0][i], states[1], rtol=1e-4, atol=1e-4)


def test_end_to_end_and_resumed_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.fresh, "measure", tiny.fake_measure)
    model = tiny.save("llama", tmp_path / "model")
    text = tiny.write_text(tmp_path / "text.txt")
    raw = tiny.recipe(bits=3).model_dump(mode="json")
    raw["steps"].append({"method": "autoround", "steps": 5})
    recipe = parse(raw, "test")

    def run(out: str) -> bytes:
        artifact, _ = pipeline.compress(str(model), recipe, str(text), out=tmp_path / out, measure=False)
        return (artifact.folder / "model.safetensors").read_bytes()

    whole = run("whole")
    write, count = Writer.write, 0

    def stopped(self: Writer, *args: Any) -> None:
        nonlocal count
        write(self, *args)
        count += 1
        if count == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Writer, "write", stopped)
    with pytest.raises(KeyboardInterrupt):
        run("cut")
    assert run("cut") == whole
    loaded = models.load(tmp_path / "whole")
    assert sum(p.numel() for p in loaded.parameters()) > 0

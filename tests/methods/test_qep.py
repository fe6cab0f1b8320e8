"""QEP: the correction against a plain least-squares fit, what it leaves alone, and what it does in the driver."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

import tiny
from compresslab.layerwise import Forward, Stop, Walk
from compresslab.numerics.gram import Gram, Precision
from compresslab.quantize.gptq import GPTQ
from compresslab.quantize.qep import QEP, make_up
from oracles import qep as oracle

torch.set_num_threads(1)

ROWS, COLUMNS = 20, 48


def case(seed: int, noise: float = 0.2) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, the uncompressed network's input and the compressed one's."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(COLUMNS, COLUMNS, generator=generator) * torch.logspace(0, -1, COLUMNS)
    reference = torch.randn(500, COLUMNS, generator=generator) @ mixing
    # The drift has a part that x can tell, as rounded layers before leave it, and a part that it cannot.
    drift = reference @ torch.randn(COLUMNS, COLUMNS, generator=generator) * (noise / COLUMNS**0.5)
    drift += noise * torch.randn(500, COLUMNS, generator=generator)
    return torch.randn(ROWS, COLUMNS, generator=generator), reference, reference + drift


def gram_of(x: Tensor, reference: Tensor | None, precision: Precision = "float32", parts: int = 3) -> Gram:
    gram = Gram(x.shape[1], precision=precision)
    for i, part in enumerate(x.chunk(parts)):
        gram.add_(part)
        if reference is not None:
            gram.add_drift_(reference.chunk(parts)[i], part)
    return gram


@pytest.mark.parametrize("damp_frac", [0.001, 0.01, 0.1])
@pytest.mark.parametrize("seed", range(3))
def test_the_correction_is_the_least_squares_fit_of_the_uncompressed_output(seed: int, damp_frac: float) -> None:
    weight, reference, x = case(seed)
    gram = gram_of(x, reference)
    damp = damp_frac * float(gram.diagonal.mean())
    expected = oracle.best_weight(weight, reference, x, damp)
    torch.testing.assert_close(weight + make_up(weight, gram, damp_frac), expected.float(), rtol=2e-3, atol=2e-3)


def test_the_drift_of_rounded_tokens_is_near_the_exact_one() -> None:
    _, reference, x = case(1)
    exact, rounded = gram_of(x, reference).drift, gram_of(x, reference, "int8").drift
    assert exact is not None and rounded is not None
    assert float((exact - rounded).norm()) < 0.02 * float(exact.norm())
    torch.testing.assert_close(exact, (reference - x).t() @ x, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("settings", [{"strength": 0.0}, {"strength": 1.0}])
def test_without_strength_or_without_drift_it_is_gptq(settings: dict[str, float]) -> None:
    weight, reference, x = case(2)
    gram = gram_of(x, reference if settings["strength"] == 0 else None)
    found = QEP(bits=3, group_size=16, **settings).solve(weight, gram, scale_dtype=torch.float32).weight
    plain = GPTQ(bits=3, group_size=16).solve(weight, gram_of(x, None), scale_dtype=torch.float32).weight
    assert torch.equal(found.codes, plain.codes) and torch.equal(found.scale, plain.scale)
    same = gram_of(x, x)
    found = QEP(bits=3, group_size=16, strength=1.0).solve(weight, same, scale_dtype=torch.float32).weight
    assert torch.equal(found.codes, plain.codes)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_nearer_to_the_uncompressed_output_than_gptq(bits: int) -> None:
    weight, reference, x = case(3)
    gram = gram_of(x, reference)

    def error(solver: GPTQ) -> float:
        found = solver.solve(weight, gram, scale_dtype=torch.float32).weight
        return float((reference @ weight.t() - x @ found.dequantize().t()).square().sum())

    plain, half, full = (error(s) for s in (GPTQ(bits=bits, group_size=16), QEP(bits=bits, group_size=16),
                                            QEP(bits=bits, group_size=16, strength=1.0)))  # fmt: skip
    assert full < half < plain


def test_inputs_that_say_nothing() -> None:
    """Silence throughout, and channels that repeat each other: no factorisation without more damping than was asked for."""
    weight, reference, x = case(4)
    silent = gram_of(torch.zeros_like(x), torch.zeros_like(x))
    assert "rounded to nearest" in QEP(group_size=16).solve(weight, silent, scale_dtype=torch.float32).note
    x[:, 1:20] = x[:, :1]
    solution = QEP(group_size=16, damp_frac=0.0).solve(weight, gram_of(x, reference), scale_dtype=torch.float32)
    assert "damping raised" in solution.note
    assert bool(torch.isfinite(solution.weight.dequantize()).all())


@pytest.mark.parametrize("strength", [-0.1, 1.1])
def test_a_strength_is_a_fraction(strength: float) -> None:
    with pytest.raises(ValueError, match="strength is a fraction"):
        QEP(strength=strength)


# -- in the driver ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "qwen2"])
def test_later_layers_differ_from_gptqs_and_the_first_do_not(kind: str) -> None:
    model, batches = tiny.make(kind), tiny.token_batches(4)
    plain = tiny.solve(model, batches, solver=GPTQ(bits=2, group_size=16)).codes()
    found = tiny.solve(model, batches, solver=QEP(bits=2, group_size=16, strength=1.0)).codes()
    names = list(plain)
    assert torch.equal(found[names[0]], plain[names[0]])  # nothing has drifted before the first layer
    assert not torch.equal(found[names[-1]], plain[names[-1]])


def test_the_references_walk_through_the_uncompressed_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """What each layer's reference input was, against the model's own forward."""
    model, batches = tiny.make("llama"), tiny.token_batches(2, size=1)
    seen: list[Tensor] = []
    add = Gram.add_drift_

    def noted(self: Gram, reference: Tensor, x: Tensor) -> None:
        seen.append(reference.clone())
        add(self, reference, x)

    monkeypatch.setattr(Gram, "add_drift_", noted)
    tiny.solve(model, batches, solver=QEP(bits=2, group_size=16))
    expected: list[Tensor] = []
    for layer in model.model.layers:
        for module in (layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp.gate_proj, layer.mlp.down_proj):
            for batch in batches:
                handle = module.register_forward_pre_hook(lambda module, args: expected.append(args[0].clone()))
                with torch.no_grad():
                    model(**batch)
                handle.remove()
    assert len(seen) == len(expected) == 2 * 4 * 2
    for found, wanted in zip(seen, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_references_do_not_hold_what_the_last_layer_of_a_block_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the widest tensor of a block: with it, every reference would take as much memory as the batch itself."""
    waited: list[tuple[str, bool]] = []
    wait = Forward._wait

    def noted(self: Forward, stop: Stop, walk: Walk, x: Tensor) -> None:
        waited.append((stop.layer.rpartition(".")[2], walk.is_reference))
        wait(self, stop, walk, x)

    monkeypatch.setattr(Forward, "_wait", noted)
    batches = tiny.token_batches(3, size=1)
    tiny.solve(tiny.make("llama"), batches, solver=QEP(bits=2, group_size=16))
    assert Counter(waited) == {
        ("q_proj", False): 6, ("q_proj", True): 6, ("o_proj", False): 6, ("o_proj", True): 6,
        ("gate_proj", False): 6, ("gate_proj", True): 6, ("down_proj", False): 6,
    }  # fmt: skip

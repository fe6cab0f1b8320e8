"""The chapters: both languages say the same, numbers are those of the results, figures are there, the terminal shows no LaTeX."""

from __future__ import annotations

import importlib
import itertools
import math
import re
import runpy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import transformers
from scipy.sparse import csr_array
from torch import Tensor, nn
from typer.testing import CliRunner

from compresslab import cli
from compresslab.contract import Feature, Loss, Weights
from compresslab.coupling import couplings
from compresslab.course import theory
from compresslab.distill import hints
from compresslab.distill.dkd import DKD
from compresslab.distill.hard_labels import HardLabels
from compresslab.distill.pairs import Linears
from compresslab.distill.reverse_kl import ReverseKL
from compresslab.distill.soft_labels import SoftLabels
from compresslab.distill.teacher_cache import record_bytes
from compresslab.distill.uld import ULD
from compresslab.errors import CompressLabError
from compresslab.numerics.gram import Gram
from compresslab.numerics.grid import Grid, fit_minmax
from compresslab.numerics.linalg import feedback_factor
from compresslab.numerics.selection import keep_n_of_m
from compresslab.prune.gradual import cubic
from compresslab.prune.magnitude import Magnitude
from compresslab.prune.movement import HardGate
from compresslab.prune.obd import OBD
from compresslab.prune.snip import SNIP
from compresslab.prune.sparsegpt import SparseGPT
from compresslab.prune.synflow import SynFlow
from compresslab.prune.wanda import Wanda
from compresslab.prune.ziplm import refit
from compresslab.quantize.gptq import round_with_feedback
from compresslab.scoring import asking, find_masks
from compresslab.search.allocation import Option, allocate
from compresslab.teachers import MEAN, mixed

ROOT = Path(__file__).resolve().parent.parent.parent
CHAPTERS = theory.chapters()
MAKE = runpy.run_path(str(ROOT / "theory" / "make.py"))
FORMULAS = {
    "3.1": ("σ^2", "s^2/12", "U_jk/U_kk"),
    "3.3": ("T^2 KL(q ‖ p) ≈ 1/2", "log (q_i/q) ≤ log (1/a_i)", "(εn^2)/2"),
    "3.2": ("ΔL = 1/2 w_q^2/[H^-1]_qq", "1 - 0.99^n", "λ[H^-1]_qq = w_q"),
}  # as the terminal shows some of each chapter, the first on a line of its own
FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+?)\$", flags=re.DOTALL)


def twins(number: str) -> tuple[str, str]:
    english = CHAPTERS[number]
    return english.read_text(encoding="utf-8"), english.with_suffix(".zh-TW.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("number", CHAPTERS)
def test_both_languages_have_the_same_formulas_figures_numbers_and_sections(number: str) -> None:
    english, chinese = twins(number)
    for pattern in (MAKE["MEASURED"], re.compile(r"!\[.*?\]\((.*?)\)"), re.compile(r"^(#+) ", flags=re.MULTILINE)):
        assert pattern.findall(english) == pattern.findall(chinese)
    displayed, inline = (
        [[found[i] for found in FORMULA.findall(text) if found[i]] for text in (english, chinese)] for i in (0, 1)
    )
    assert displayed[0] == displayed[1]
    assert sorted(inline[0]) == sorted(inline[1])
    assert len(re.findall(r"[\u4e00-\u9fff]", chinese)) > 1000


@pytest.mark.parametrize("number", CHAPTERS)
def test_numbers_are_what_the_results_say(number: str) -> None:
    for text in twins(number):
        assert len(MAKE["MEASURED"].findall(text)) > 20
        assert MAKE["filled"](text) == text, "run python theory/make.py"


@pytest.mark.parametrize("number", CHAPTERS)
def test_every_figure_is_drawn_by_the_script(number: str) -> None:
    shown = re.findall(r"!\[.*?\]\(figures/(.*?)\.svg\)", twins(number)[0])
    assert sorted(shown) == sorted(MAKE["figures"](number))
    assert all((ROOT / "theory" / "figures" / f"{name}.svg").stat().st_size > 1000 for name in shown)


@pytest.mark.parametrize("language", ["en", "zh-TW"])
@pytest.mark.parametrize("number", CHAPTERS)
def test_the_terminal_shows_formulas_as_text(number: str, language: str) -> None:
    found = theory.read(number, language)
    assert not re.search(r"\\[a-z]|\$|<!--|</?details|[{}]\w", found.replace("{round", "").replace("{1 inside", ""))
    assert all(formula in found for formula in FORMULAS[number])
    shown = CliRunner().invoke(cli.app, ["lab", "theory", number, "--lang", language])
    assert shown.exit_code == 0 and all(formula in shown.output for formula in FORMULAS[number][:1])


@pytest.mark.parametrize(
    ("formula", "text"),
    [
        (r"\frac{2\alpha}{2^b - 1}", "2α/(2^b - 1)"),
        (r"2^{-m-1} |x|", "2^(-m-1) |x|"),
        (r"\sum_{j \ne k} e_j H_{jk}/H_{kk}", "∑_(j ≠ k) e_j H_jk/H_kk"),
        (r"\tfrac12 \Delta y^\top F", "1/2 Δy^⊤F"),
        (r"d_{l,o(l)} \ge q_{\tau(i)}", "d_(l,o(l)) ≥ q_(τ(i))"),
        (r"\alpha = \log p - \log \frac{q_y}{p_y}", "α = log p - log (q_y/p_y)"),
        (r"\begin{pmatrix} 1 & 0.9 \\ 0.9 & 1 \end{pmatrix}", "(1 0.9; 0.9 1)"),
    ],
)
def test_formulas_keep_their_meaning_on_one_line(formula: str, text: str) -> None:
    assert re.sub(" +", " ", theory.as_text(formula)) == text


def test_an_unknown_chapter_is_named() -> None:
    with pytest.raises(CompressLabError, match="chapter"):
        theory.read("9.9", "en")


def test_answers_on_quantisation_are_the_librarys() -> None:
    spec = Grid(bits=4, symmetric=False, granularity="channel")
    scale, zero = fit_minmax(torch.tensor([[-0.9, 2.1]]), spec, torch.float32)
    assert zero is not None
    assert float(scale) == pytest.approx(0.2) and int(zero) - spec.qmin == 4  # exercise 1, its codes from 0
    gram = torch.tensor([[1, 0.9], [0.9, 1]])  # exercise 4
    feedback, _, _ = feedback_factor(gram, torch.arange(2), 0.0)
    one, weight = torch.ones(1, 1), torch.full((1, 2), 0.4)
    codes = round_with_feedback(
        weight, one, None, Grid(bits=4, symmetric=True, granularity="channel"), torch.arange(2), feedback
    )
    assert codes.tolist() == [[0, 1]]
    for q, damage in (([0, 0], 0.608), ([0, 1], 0.088)):
        error = weight - torch.tensor([q])
        assert float(error @ gram @ error.T) == pytest.approx(damage, abs=1e-6)
    assert pytest.approx(139, abs=1) == 10e9 / (135e6 * 4.25 / 8)  # exercise 7


def test_answers_to_the_exercises_of_distillation_are_the_librarys() -> None:
    def row(*numbers: float) -> torch.Tensor:
        return torch.tensor([numbers], dtype=torch.float64)

    label, kl = torch.tensor([0]), SoftLabels(temperature=1.0)
    truth, teacher = row(0.7, 0.2, 0.1), row(0.6, 0.3, 0.1)  # exercise 1: errors as lengths of gradients at the truth
    errors = [HardLabels().rows(truth.log(), None, torch.tensor([y]))[1].square().sum() for y in range(3)]
    noise = float(sum(p * e for p, e in zip(truth[0], errors, strict=True)))
    bias = float(kl.rows(truth.log(), teacher.log(), None)[1].square().sum())
    assert (noise, bias) == pytest.approx((0.46, 0.02)) and noise / bias == pytest.approx(23)
    assert noise / (noise + bias) == pytest.approx(0.958, abs=5e-4)
    z, sure = torch.linspace(-1, 1, 10, dtype=torch.float64)[None], row(4.51, *[0] * 9)  # exercise 2
    assert torch.allclose(kl.rows(z, sure, None)[1], HardLabels(smoothing=0.1).rows(z, None, label)[1], atol=5e-4)
    z, t = row(2, 0, -1, -1), row(4, 1, -2, -3)  # exercise 3
    assert torch.allclose(kl.rows(z, t, None)[1], row(-0.140, 0.062, 0.038, 0.039), atol=6e-4)
    assert torch.allclose(SoftLabels(temperature=100).rows(z, t, None)[1], row(-0.5, -0.25, 0.25, 0.5), atol=0.02)
    p, q = row(0.8, 0.1, 0.1).log(), row(0.9, 0.08, 0.02).log()  # exercise 4
    parts = [float(DKD(temperature=1.0, target=a, others=b).rows(p, q, label)[0]) for a, b in ((1, 0), (0, 1), (0, 8))]
    assert parts == pytest.approx([0.0367, 0.1927, 1.54], abs=2e-3)
    assert parts[0] + 0.1 * parts[1] == pytest.approx(float(kl.rows(p, q, None)[0])) == pytest.approx(0.056, abs=5e-5)
    shares = [part / (part + parts[0]) for part in (0.1 * parts[1], parts[2])]
    assert shares == pytest.approx([0.34, 0.98], abs=0.005)
    x = torch.linspace(-12, 12, 4801, dtype=torch.float64)  # exercise 5

    def gaussian(mean: float, deviation: float) -> torch.Tensor:
        return -(((x - mean) / deviation) ** 2) / 2 - math.log(deviation)

    goal = torch.logaddexp(gaussian(-2, 0.5) + math.log(0.6), gaussian(2, 0.5) + math.log(0.4))[None]
    fits = {
        (m, s): float(kl.rows(gaussian(m, s)[None], goal, None)[0])
        for m in (-0.5, -0.4, -0.3)
        for s in (1.9, 2.02, 2.1)
    }
    assert min(fits, key=lambda fit: fits[fit]) == (-0.4, 2.02)
    modes = [float(ReverseKL().rows(gaussian(m, 0.5)[None], goal, None)[0]) for m in (-2, 2)]
    assert modes == pytest.approx([0.511, 0.916], abs=1e-3)
    its, mine = torch.eye(4, 3) * torch.tensor([5, 3, 1]), torch.eye(4, 2)  # exercise 6
    matrix = Linears([(2, 3)], always=True)
    matrix[0].weight = torch.nn.Parameter((mine.T @ its).T)
    counted = torch.ones(1, 4, dtype=torch.bool)
    features = [[Feature(values=values[None], counted=counted)] for values in (mine, its)]
    out_of_reach = float(hints.Judge(matrix, None)(*features).detach()) * its.numel() / float(its.square().sum())
    assert out_of_reach == pytest.approx(0.029, abs=5e-4)
    values, kept = torch.tensor([4.0, 1.0]), []  # exercise 7
    for share in (1.0, 0.5):
        fit = torch.ones(2)
        kept.append([fit := values / (values + 1) * (share * fit + 1 - share) for _ in range(3 if share == 1 else 60)])
    assert torch.allclose(torch.stack(kept[0]), torch.tensor([[0.8, 0.5], [0.64, 0.25], [0.512, 0.125]]))
    assert torch.allclose(kept[1][-1], values / (values + 2))
    said = torch.tensor([[0.9, 0.1], [0.3, 0.7]])  # exercise 8
    together = mixed(said.log(), MEAN).exp()
    assert float(-together[0].log()) == pytest.approx(0.511, abs=5e-4)
    assert float(-said[:, 0].log().mean()) == pytest.approx(0.655, abs=5e-4)
    squares = [float((one - torch.tensor([1.0, 0])).square().sum()) for one in (*said, together)]
    assert squares == pytest.approx([0.02, 0.98, 0.32])
    assert float((said - together).square().sum(1).mean()) == pytest.approx(0.18)
    assert sum(1 - 0.99**t for t in range(1, 101)) == pytest.approx(37.2, abs=0.05)  # exercise 9
    p = row(0.7, 0.2, 0.1).log()  # exercise 10
    for other in (row(0.1, 0.6, 0.2, 0.1), row(0.6, 0.2, 0.1, 0.1)):
        assert float(
            ULD().rows(torch.nn.functional.pad(p, (0, 1), value=-40.0), other.log(), None)[0]
        ) == pytest.approx(0.2)
    assert (2 * 151936 * 1e8, record_bytes(64) * 1e8) == pytest.approx((30.4e12, 20.8e9), rel=1e-3)  # exercise 11


@dataclass(frozen=True, kw_only=True)
class Neurons:
    """Two layers with a ReLU between, in the place of a contract.Network."""

    weights: Weights
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def losses(self, size: int | None = None, *, temperature: float = 1.0) -> Iterator[tuple[float, Loss]]:
        x = torch.randn(32, 5, generator=torch.Generator().manual_seed(1))

        def loss(weights: Weights) -> Tensor:
            return nn.functional.cross_entropy((x @ weights["in"].T).relu() @ weights["out"].T, torch.arange(32) % 3)

        yield 1.0, loss

    def drawn_losses(self, draw: int) -> Iterator[tuple[float, Loss]]:
        return self.losses()


def test_scores_of_the_loss_do_not_see_how_a_network_is_scaled() -> None:
    """Exercise 1 of chapter 3.2."""
    generator = torch.Generator().manual_seed(0)
    plain = {"in": torch.randn(4, 5, generator=generator), "out": torch.randn(3, 4, generator=generator)}
    factor = torch.tensor([4.0, 1.0, 1.0, 1.0])
    scaled = {"in": plain["in"] * factor[:, None], "out": plain["out"] / factor}
    for method in (SNIP(), OBD()):
        before, after = (method.score(Neurons(weights=asking(weights))).values for weights in (plain, scaled))
        for layer in plain:
            torch.testing.assert_close(before[layer], after[layer])


def test_answers_on_making_up_are_the_librarys() -> None:
    """Exercise 2 of chapter 3.2."""
    weight, matrix, gram = torch.tensor([[1.0, 0.8]]), torch.tensor([[1.0, 0.9], [0.9, 1.0]]), Gram(2)
    gram.add_(torch.linalg.cholesky(matrix).T)
    found = {
        (1.0, 0.0): (Wanda(pattern="1:2").prune(weight, gram).weight, 0.64),
        (1.72, 0.0): (torch.cat([refit(weight, matrix, torch.tensor([0])), torch.zeros(1, 1)], dim=1), 0.1216),
        (0.0, 1.7): (SparseGPT(pattern="1:2", damp_frac=0).prune(weight, gram).weight, 0.19),
    }
    for said, (pruned, damage) in found.items():
        assert pruned[0].tolist() == pytest.approx(said, abs=1e-5)
        assert float((weight - pruned) @ matrix @ (weight - pruned).T) == pytest.approx(damage, abs=1e-5)


@dataclass(frozen=True)
class Drawn:
    """Two layers of standard deviations 1 and 0.5, in the place of contract.Layers."""

    blocks: ClassVar = {"wide": "0", "narrow": "1"}

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        yield "wide", torch.randn(400, 500, generator=generator)
        yield "narrow", torch.randn(400, 500, generator=generator) / 2


def test_answers_on_thresholds_schedules_and_movement_are_the_librarys() -> None:
    lost = Magnitude(scope="global").sparsities(Drawn(), 0.5)  # type: ignore[arg-type]
    assert lost == {"wide": pytest.approx(0.36, abs=0.005), "narrow": pytest.approx(0.64, abs=0.005)}  # exercise 3
    assert math.erf(0.4618 / 2**0.5) + math.erf(2 * 0.4618 / 2**0.5) == pytest.approx(1, abs=1e-3)
    assert cubic(0, 0.9, 0.5) == pytest.approx(0.79, abs=0.005)  # exercise 4
    assert cubic(0, 0.9, 0.21) == pytest.approx(0.45, abs=0.01)
    assert 0.8**10 > 0.1 > 0.8**11  # exercise 6


def test_movement_keeps_what_grew() -> None:
    """Exercise 5 of chapter 3.2: scores are half of what the squares gained, and the order is not that of the magnitudes."""
    weight, target = nn.Parameter(torch.tensor([[1.0, 0.1]])), torch.tensor([[0.6, 0.5]])
    gate = HardGate(weight.detach(), rate=1.0)
    optimiser = torch.optim.SGD([weight, *gate.parameters()], lr=0.02)
    for _ in range(500):
        optimiser.zero_grad()
        ((gate(weight) - target).square().sum() / 2).backward()
        optimiser.step()
    assert gate.scores[0].tolist() == pytest.approx([-0.32, 0.12], abs=0.005)
    gate.sparsity.fill_(0.5)
    assert gate.kept().tolist() == [[False, True]]
    assert (Magnitude().prune(weight.detach(), None).weight != 0).tolist() == [[True, False]]


def test_answers_on_structures_and_patterns_are_the_librarys() -> None:
    config = transformers.LlamaConfig(
        hidden_size=576, num_attention_heads=9, num_key_value_heads=3, head_dim=64, num_hidden_layers=1,
        intermediate_size=8, vocab_size=16,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    found = couplings(model, {"input_ids": torch.zeros(1, 4, dtype=torch.int64)})
    (heads,) = (group for group in found.groups if group.kind == "heads")
    sizes = [
        piece.index.shape[1] * math.prod(found.shapes[piece.tensor]) // found.shapes[piece.tensor][piece.axis]
        for piece in heads.slices
    ]
    assert (heads.count, sum(sizes)) == (3, 294912)  # exercise 7
    orders = torch.tensor([*itertools.permutations([1.0, 2.0, 3.0, 4.0])])
    assert len(keep_n_of_m(orders, torch.ones(4), 2, 4).unique(dim=0)) / 2**4 == 0.375  # exercise 8
    energy = torch.randn(500, 400, generator=torch.Generator().manual_seed(0))
    kept = Magnitude().prune(energy, None).weight.square().sum() / energy.square().sum()
    assert 1 - float(kept) == pytest.approx(0.07, abs=0.005)  # section 8


def test_answers_on_storage_are_what_is_kept() -> None:
    """Exercises 9 and 11 of chapter 3.2."""
    dense = np.zeros((4096, 4096), np.float32)
    dense.flat[: round(0.1 * dense.size)] = 1
    sparse = csr_array(dense)
    assert sparse.indices.dtype == sparse.indptr.dtype == np.int32
    assert len(sparse.data) == 1677722
    held = sparse.data.nbytes + sparse.indices.nbytes + sparse.indptr.nbytes
    assert (held / 1e6, dense.nbytes / 1e6) == (pytest.approx(13.4, abs=0.05), pytest.approx(67.1, abs=0.05))
    assert pytest.approx(0.5, abs=0.005) == 0.958**16


def test_synflow_in_one_shot_empties_the_layer_that_rounds_keep() -> None:
    """Exercise 10 of chapter 3.2."""
    chain: Any = importlib.import_module("drawings.chapter_3_2").Chain
    shapes = {"first": (2, 1), "middle": (2, 2), "last": (1, 2)}
    network = chain(weights={name: torch.ones(shape) for name, shape in shapes.items()})
    scores = (
        SynFlow().score(chain(weights=asking(network.weights))).values
    )  # the largest is 1 in the library, 2 in the text
    assert {name: set((2 * score).flatten().tolist()) for name, score in scores.items()} == {
        "first": {2.0}, "middle": {1.0}, "last": {2.0},
    }  # fmt: skip
    for rounds, left in ((1, [2, 0, 2]), (100, [1, 1, 2])):
        kept = find_masks(SynFlow(sparsity=0.5, rounds=rounds), network).kept
        assert [int(mask.sum()) for mask in kept.values()] == left
        flow = network.flow({name: mask.double() for name, mask in kept.items()})
        assert (float(flow) > 0) == (rounds > 1)


def test_answers_on_search_are_the_librarys() -> None:
    """Exercise 12 of chapter 3.2, and section 11."""
    grid = [round(0.05 * i, 2) for i in range(21)]
    options = {
        layer: [Option(name=f"{s:g}", cost=1 - s, damage=factor * s**2) for s in grid]
        for layer, factor in (("first", 1), ("second", 3))
    }
    found = allocate(options, 1.0 + 1e-9)
    assert {layer: option.name for layer, option in found.chosen.items()} == {"first": "0.75", "second": "0.25"}
    assert found.damage == pytest.approx(0.75)
    assert 1 - 0.99**298 < 0.95 < 1 - 0.99**299

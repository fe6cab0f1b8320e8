"""The chapters: both languages say the same, numbers are those of the results, figures are there, the terminal shows no LaTeX."""

from __future__ import annotations

import math
import re
import runpy
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from compresslab import cli
from compresslab.contract import Feature
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
from compresslab.numerics.grid import Grid, fit_minmax
from compresslab.numerics.linalg import feedback_factor
from compresslab.quantize.gptq import round_with_feedback
from compresslab.teachers import MEAN, mixed

ROOT = Path(__file__).resolve().parent.parent.parent
CHAPTERS = theory.chapters()
MAKE = runpy.run_path(str(ROOT / "theory" / "make.py"))
FORMULAS = {
    "3.1": ("σ^2", "s^2/12", "U_jk/U_kk"),
    "3.3": ("T^2 KL(q ‖ p) ≈ 1/2", "log (q_i/q) ≤ log (1/a_i)", "(εn^2)/2"),
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


def test_answers_to_the_exercises_are_the_librarys() -> None:
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

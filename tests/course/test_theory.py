"""The chapters: both languages say the same, numbers are those of the results, figures are there, the terminal shows no LaTeX."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from compresslab import cli
from compresslab.course import theory
from compresslab.errors import CompressLabError
from compresslab.numerics.grid import Grid, fit_minmax
from compresslab.numerics.linalg import feedback_factor
from compresslab.quantize.gptq import round_with_feedback

ROOT = Path(__file__).resolve().parent.parent.parent
CHAPTERS = theory.chapters()
MAKE = runpy.run_path(str(ROOT / "theory" / "make.py"))
FORMULAS = {
    "3.1": ("σ^2", "s^2/12", "U_jk/U_kk")
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

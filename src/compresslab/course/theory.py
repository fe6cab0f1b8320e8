"""The theory chapters in the terminal: Markdown with its formulas as Unicode text.

theory/NUMBER-Title.md (and .zh-TW.md), which the web renders with its formulas as they are -> comments and folds taken out,
LaTeX turned into text by pylatexenc, pictures into their names -> rich's Markdown.
"""

from __future__ import annotations

import re
from pathlib import Path

from compresslab.errors import CompressLabError, unknown

PACKAGE = Path(__file__).resolve().parent.parent
PLACES = (PACKAGE / "theory", PACKAGE.parent.parent / "theory")  # installed from a wheel, or in place


def chapters() -> dict[str, Path]:
    """The English file of every chapter, by number."""
    found = next((place for place in PLACES if place.is_dir()), None)
    paths = [] if found is None else [path for path in sorted(found.glob("*.md")) if ".zh-TW." not in path.name]
    return {path.name.partition("-")[0]: path for path in paths}


def title(number: str) -> str:
    """Of a chapter; "" where the chapters are not installed."""
    path = chapters().get(number)
    return "" if path is None else path.stem.partition("-")[2].replace("_", " ")


def read(number: str, lang: str) -> str:
    """A chapter as Markdown for a terminal. CompressLabError if there is none, or pylatexenc is not installed."""
    known = chapters()
    if number not in known:
        raise unknown("chapter", number, known)
    path = known[number]
    return for_terminal((path if lang == "en" else path.with_suffix(f".{lang}.md")).read_text(encoding="utf-8"))


def for_terminal(text: str) -> str:
    """Markdown without what only the web shows."""
    text = re.sub(r"<!--.*?-->", "", text)
    text = re.sub(r"</?details>", "", text)
    text = re.sub(r"<summary>(.*?)</summary>", r"**\1**", text)
    text = re.sub(r"!\[(.*?)\]\((.*?)\)", r"*[\1: theory/\2]*", text)
    text = re.sub(r"\$\$(.+?)\$\$", lambda found: f"```\n{as_text(found[1])}\n```", text, flags=re.DOTALL)
    return re.sub(r"\$([^$\n]+?)\$", lambda found: f"`{as_text(found[1])}`", text)


def as_text(formula: str) -> str:
    """LaTeX as a line of Unicode."""
    try:
        from pylatexenc.latex2text import LatexNodes2Text
    except ImportError:
        raise CompressLabError(
            'formulas in the terminal need pylatexenc: pip install -c constraints.txt "compresslab[labs]"'
        ) from None
    formula = re.sub(r"\\begin\{cases\}(.*?)\\end\{cases\}", _cases, formula, flags=re.DOTALL)
    formula = re.sub(r"\\begin\{pmatrix\}(.*?)\\end\{pmatrix\}", _matrix, formula, flags=re.DOTALL)
    formula = re.sub(r"\\(left|right|Big|big|underbrace)(?![a-z])", "", formula)
    formula = re.sub(r"\}_\{\\text\{(\w+)\}\}", r"}\\ [\1]", formula)  # what a brace is labelled
    formula = re.sub(r"\\[lr]Vert\b", "‖", formula)
    formula = re.sub(r"\\hat ?(\w)", lambda found: f"{found[1]}\u0302", formula)
    formula = re.sub(rf"\\({'|'.join(SIGNS)})(?![a-z])", lambda found: f" {SIGNS[found[1]]} ", formula)
    formula = re.sub(r"(\\[A-Za-z]+) +(?=[-+=<>])", r"\1~", formula)  # a space behind a name
    formula = re.sub(r"\\(log|exp) +", r"\1 ", formula)
    formula = re.sub(r"\\[td]?frac *(\w)(\w)", r"\\frac{\1}{\2}", formula)
    formula = re.sub(r"\\ |\\,", "~", formula)
    formula = re.sub(r"([_^])\{([^{}]*)\}", _script, formula)
    for _ in range(3):  # a fraction in a fraction is deep enough
        formula = re.sub(r"(log )?\\frac\{([^{}]*)\}\{([^{}]*)\}", _fraction, formula)
    text = LatexNodes2Text(math_mode="text", keep_comments=False).latex_to_text(formula)
    return " ".join(text.split())


SIGNS = {
    "le": "≤", "ge": "≥", "ne": "≠", "approx": "≈", "cdot": "·", "to": "→", "ll": "≪", "sim": "∼", "Vert": "‖", "mid": "|",
}  # fmt: skip


def _bracketed(text: str) -> str:
    """What would be read otherwise once it is on one line."""
    text = text.strip()
    return f"({text})" if re.search(r"[-+<=≤≠ /]", text.lstrip("-")) and not text.startswith("\\text") else text


def _script(found: re.Match[str]) -> str:
    inside = _bracketed(found[2])
    nested = re.search(r"\w[,_(]", inside) and not inside.startswith(("(", "\\text"))
    return found[1] + "{" + (f"({inside})" if nested else inside) + "}"


def _fraction(found: re.Match[str]) -> str:
    above, below = (_bracketed(part) for part in found.groups()[1:])
    return f"{found[1]}({above}/{below})" if found[1] else f"{above}/{below}"


def _cases(found: re.Match[str]) -> str:
    lines = [line.replace("&", r"\ ").strip() for line in found[1].split(r"\\") if line.strip()]
    return r"\{" + ";\\ ".join(lines) + r"\}"


def _matrix(found: re.Match[str]) -> str:
    return "(" + "; ".join(line.replace("&", " ").strip() for line in found[1].split(r"\\")) + ")"

"""The words and numbers that terminal, Markdown and HTML share, so that they say the same. Pure functions of Report.

Numbers come from the report; only sums, and ratios and differences between before and after, are worked out here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from compresslab.report import sparsity
from compresslab.report.plots import human, number, plain
from compresslab.report.schema import Measurement, Report

LABELS = {
    "disk_bytes": "model folder",
    "weight_bytes": "weights",
    "decode_tokens_per_s": "decode speed",
    "prefill_ms": "prefill",
    "decode_ms_per_token": "decode, per token",
    "load_ms": "load",
    "prefill_transformers_ms": "prefill, plain transformers",
    "decode_transformers_tokens_per_s": "decode, plain transformers",
    "forward_ms": "forward",
    "peak_memory_bytes": "peak memory",
    "top1_accuracy": "top-1 accuracy",
    "top1_agreement": "same top-1 as before",
    "flips": "flipped answers",
    "kl_divergence": "KL from before",
    "f1_macro": "F1, macro",
    "f1_micro": "F1, micro",
    "precision_macro": "precision, macro",
    "recall_macro": "recall, macro",
    "bleu": "BLEU",
    "chrf": "chrF",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "sentence_similarity_spearman": "human similarity, Spearman",
    "sentence_similarity_pearson": "human similarity, Pearson",
    "word_similarity_spearman": "human word similarity, Spearman",
    "word_similarity_pearson": "human word similarity, Pearson",
    "decode_energy_j_per_token": "energy per token",
    "forward_energy_j_per_input": "energy per forward",
    "decode_energy_estimated_j_per_token": "energy per token (estimate)",
    "forward_energy_estimated_j_per_input": "energy per forward (estimate)",
    "macs": "multiply-accumulates",
    "flops": "FLOPs",
    "nonzero_parameters": "parameters that are not zero",
}
_DIFFERENCE = "_difference"  # measure/intervals.py names paired differences so
_BETTER_UP = {
    "top1_accuracy", "accuracy", "f1_macro", "f1_micro", "precision_macro", "recall_macro", "bleu", "chrf", "rouge1", "rouge2",
    "rougeL", "sentence_similarity_spearman", "sentence_similarity_pearson", "word_similarity_spearman",
    "word_similarity_pearson",
}  # fmt: skip
# unit -> (word when it went well, word when not, whether more is better)
_DIRECTIONS = {
    "bytes": ("smaller", "larger", False),
    "ms": ("faster", "slower", False),
    "s": ("faster", "slower", False),
    "tokens/s": ("faster", "slower", True),
}
_COUNTS = ("tokens", "samples", "parameters")


@dataclass(frozen=True)
class Row:
    """One line of the before/after table; a side that was not measured is None. Tone: good, bad, same or ""."""

    label: str
    before: Measurement | None
    after: Measurement | None
    change: str
    tone: str
    difference: Measurement | None = None  # after less before, with its paired interval

    @property
    def one(self) -> Measurement:
        found = self.after or self.before
        assert found is not None
        return found

    @property
    def conditions(self) -> list[str]:
        """How it was measured; both sides where they differ."""
        sides = [(name, m) for name, m in (("before", self.before), ("after", self.after)) if m]
        told = {name: f"{plain(m.conditions)} [{plain(m.device)}]" for name, m in sides}
        return [f"{k}: {v}" for k, v in told.items()] if len(set(told.values())) > 1 else list(told.values())[:1]


def _times(ratio: float) -> str:
    return f"{ratio:,.{0 if ratio >= 9.95 else 1 if ratio >= 1.095 else 2}f}x"


def change_and_tone(before: Measurement, after: Measurement) -> tuple[str, str]:
    """What became of a quantity, in words, and its tone."""
    b, a = before.value, after.value
    if before.unit != after.unit or not (math.isfinite(b) and math.isfinite(a)):
        return "not comparable", ""
    if a == b:
        return "unchanged", "same"
    if b <= 0 or a <= 0:
        return f"{'+' if a > b else '-'}{human(abs(a - b), before.unit)}", ""
    if before.unit not in _DIRECTIONS:
        share = 100 * (a / b - 1)
        up = before.name in _BETTER_UP
        tone = ("good" if (a > b) == up else "bad") if up or before.name == "perplexity" else ""
        return f"{share:+,.1f} %" if abs(share) >= 0.095 else f"{share:+.1g} %", tone
    good, bad, more = _DIRECTIONS[before.unit]
    well, ratio = (a > b) == more, max(a / b, b / a)
    text, tone = f"{_times(ratio)} {good if well else bad}", "good" if well else "bad"
    if ratio < 1.005:
        text, tone = "about the same", "same"
    elif abs(a - b) <= (before.spread or 0) + (after.spread or 0):
        text, tone = f"{text}, within spread", "same"
    return text, tone


def table_rows(report: Report) -> list[Row]:
    """Every measurement, those of both sides first."""
    before, after = ({m.name: m for m in side} for side in (report.before, report.after))
    apart = {x: after.pop(x + _DIFFERENCE) for x in list(after) if x + _DIFFERENCE in after}
    names = sorted(dict.fromkeys([*before, *after]), key=lambda name: not (name in before and name in after))
    rows = []
    for name in names:
        b, a = before.get(name), after.get(name)
        change, tone = change_and_tone(b, a) if b and a else ("", "")
        if change and tone != "same" and _may_be_none(apart.get(name)):
            change, tone = f"{change}, may be chance", "same"
        rows.append(Row(plain(LABELS.get(name, name.replace("_", " "))), b, a, change, tone, apart.get(name)))
    return rows


def _may_be_none(difference: Measurement | None) -> bool:
    """Whether the interval of a difference holds zero."""
    if difference is None or difference.low is None or difference.high is None:
        return False
    return difference.low <= 0 <= difference.high


def interval_rows(report: Report) -> list[tuple[str, str, str, str]]:
    """(label, interval before, interval after, difference with its interval) of what has an interval on some side."""
    found = []
    for row in table_rows(report):
        sides = interval_text(row.before), interval_text(row.after)
        apart = row.difference
        told = "" if apart is None else f"{_signed(apart)} ({interval_text(apart)})".replace(" ()", "")
        if any(sides) or told:
            found.append((row.label, *sides, told))
    return found


def _signed(difference: Measurement) -> str:
    text = (
        _end(difference.value, difference) if difference.low is not None else number(difference.value, difference.unit)
    )
    return plain(text if text.startswith("-") else f"+{text}")


def claims(report: Report) -> list[tuple[str, str]]:
    """The verdict as clauses with their tones; made only of what was measured."""
    pairs = {b.name: (b, a) for b, a in report.pairs()}
    after = {m.name: m for m in report.after}
    made: list[tuple[str, str]] = []
    size = next((name for name in ("disk_bytes", "weight_bytes") if name in pairs), None)
    if size:
        text, tone = change_and_tone(*pairs[size])
        made.append((f"size {text}" if tone == "same" else text, tone))
    if zeros := sparsity.claim(report):
        made.append((zeros, ""))
    speeds = {"decode_tokens_per_s": "decode", "decode_ms_per_token": "decode", "forward_ms": "forward"}
    speed = next((name for name in speeds if name in pairs), None)
    if speed:
        (text, tone), what = change_and_tone(*pairs[speed]), speeds[speed]
        made.append((f"{what} as fast as before, within spread" if "within" in text else f"{what} {text}", tone))
    if "perplexity" in pairs:
        b, a = pairs["perplexity"]
        text, tone = change_and_tone(b, a)
        made.append((f"perplexity {human(b.value, '1')} -> {human(a.value, '1')} ({text})", tone))
    elif "top1_accuracy" in pairs:
        b, a = pairs["top1_accuracy"]
        text = f"top-1 {100 * b.value:.1f} % -> {100 * a.value:.1f} % ({100 * (a.value - b.value):+.1f} points)"
        made.append((text, "same" if a.value == b.value else change_and_tone(b, a)[1]))
    elif "accuracy" in pairs:
        b, a = pairs["accuracy"]
        made.append(
            (f"accuracy {100 * b.value:.1f} % -> {100 * a.value:.1f} %", "bad" if a.value < b.value else "good")
        )
    elif "embedding_cosine" in after:
        made.append((f"embedding cosine {human(after['embedding_cosine'].value, '1')}", ""))
    return made or [("nothing was measured both before and after", "")]


def verdict(report: Report) -> str:
    """One line: '2.4x smaller, decode 1.9x faster, perplexity 25.00 -> 27.50 (+10.0 %)'."""
    return ", ".join(text for text, _ in claims(report))


def value_text(m: Measurement | None, *, unit: bool = True) -> str:
    return "-" if m is None else plain(human(m.value, m.unit) if unit else number(m.value, m.unit))


def spread_text(m: Measurement | None) -> str:
    """Two digits are all that a spread is known to."""
    if m is None or m.spread is None:
        return ""
    digits = max(0, 1 - math.floor(math.log10(m.spread))) if 0 < m.spread < math.inf else 0
    return f"± {number(m.spread, m.unit) if m.unit == 'bytes' else f'{m.spread:,.{digits}f}'}"


def interval_text(m: Measurement | None) -> str:
    """The 95 % interval, as '23.91 to 26.17'; empty where there is none."""
    if m is None or m.low is None or m.high is None:
        return ""
    return plain(f"{_end(m.low, m)} to {_end(m.high, m)}")


def _end(value: float, m: Measurement) -> str:
    """Two digits of the interval's width."""
    width = 0.0 if m.low is None or m.high is None else m.high - m.low
    if m.unit == "bytes" or not 0 < width < math.inf:
        return number(value, m.unit)
    return f"{value:,.{max(0, 1 - math.floor(math.log10(width)))}f}"


def share_text(size: int, total: int) -> str:
    share = 100 * size / total
    return f"{share:.1f} %" if share >= 0.1 else "< 0.1 %"


def notes(report: Report) -> list[tuple[str, list[str]]]:
    """(note, names of the layers that have it)."""
    found: dict[str, list[str]] = {}
    for layer in report.layers:
        if layer.note:
            found.setdefault(plain(layer.note), []).append(plain(layer.name))
    return list(found.items())


def listed(names: Sequence[str], count: int = 3) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def facts(mapping: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A nested mapping as (name, text), flat."""
    found: list[tuple[str, str]] = []
    for key, value in mapping.items():
        name = plain(f"{prefix}{key}".removesuffix("_bytes").replace("_", " "))
        if isinstance(value, Mapping):
            found += facts(value, f"{key}: " if key != "versions" else "")
        elif isinstance(value, int | float) and not isinstance(value, bool) and str(key).endswith("_bytes"):
            found.append((name, human(value, "bytes")))
        elif isinstance(value, int) and not isinstance(value, bool) and key in _COUNTS:
            found.append((name, f"{value:,}"))
        elif value is not None:
            found.append((name, plain(", ".join(map(str, value)) if isinstance(value, list | tuple) else value)))
    return found


def parity_line(report: Report) -> str:
    """What the comparison of the artifact in memory with the artifact on disk found."""
    p = report.parity
    if not p.tensors:
        return f"Not checked: {plain(p.runtime)} compared no weight."
    start = f"Reloaded from disk by {plain(p.runtime)}, {p.tensors:,} weights"
    if p.max_abs_difference == 0:
        return f"{start} are bit-equal to those solved in memory."
    return f"{start} differ from those solved in memory by up to {p.max_abs_difference:.2g}."


def model_name(report: Report) -> str:
    return plain(report.model.get("name") or report.title)


def made_by(report: Report) -> str:
    """The command."""
    return "distill" if (report.data or {}).get("training") and not report.layers else "compress"


def recipe_yaml(report: Report) -> str:
    recipe = report.model_dump(mode="json", include={"recipe"})["recipe"]
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=100).strip()


def limitations(report: Report) -> list[str]:
    """What a user of the artifact must not expect."""
    pairs = {b.name: (b, a) for b, a in report.pairs()}
    found = ["The limits, biases and licence of the base model still hold."]
    if report.search and report.search.notice:
        said = plain(report.search.notice)
        found.insert(0, f"{said[:1].upper()}{said[1:]}.")
    if "perplexity" in pairs:
        b, a = pairs["perplexity"]
        found.append(
            f"Perplexity went from {human(b.value, '1')} to {human(a.value, '1')} ({change_and_tone(b, a)[0]}). "
            "Tasks, languages and lengths that were not measured can lose more than that."
        )
        if (b.conditions, b.n) != (a.conditions, a.n):
            found.append("Perplexity was measured under different conditions before and after (see the table).")
    elif "top1_accuracy" in pairs:
        b, a = pairs["top1_accuracy"]
        found.append(
            f"Top-1 accuracy went from {100 * b.value:.1f} % to {100 * a.value:.1f} % on {a.n:,} pictures, where the standard "
            f"error of one figure is {100 * (a.spread or 0):.1f} points. Pictures of another kind can lose more than that."
        )
    elif cosine := next((m for m in report.after if m.name == "embedding_cosine"), None):
        found.append(
            f"Embeddings of {cosine.n} texts have a mean cosine of {human(cosine.value, '1')} to those of the original. "
            "Other languages, lengths and kinds of text can differ more."
        )
    else:
        found.append("Perplexity was not measured before and after: the table holds all that is known of quality.")
    found += sparsity.limits(report)
    slower = [row.label for row in table_rows(report) if "slower" in row.change and row.tone == "bad"]
    if slower:
        found.append(f"Slower than the original on the machine below: {', '.join(slower)}.")
    larger = [row.label for row in table_rows(report) if "larger" in row.change and row.tone == "bad"]
    if larger:
        found.append(f"Larger than the original: {', '.join(larger)}.")
    found.append("Times and memory hold for the machine below; another machine or runtime can differ either way.")
    if report.data:
        found.append("The calibration data are a small sample; input unlike it may fare worse.")
    if report.skipped:
        found.append(f"Left in float: {listed([plain(name) for name in report.skipped])}.")
    if report.parity.max_abs_difference != 0 or not report.parity.tensors:
        found.append(parity_line(report))
    return found

"""Written text against a reference: BLEU and chrF by sacrebleu, ROUGE-1, -2 and -L by rouge-score.

texts and references -> n-gram statistics of each sentence, by the library -> the score of what was drawn, in one expression.
A corpus score is a function of summed statistics, so a resample adds up statistics and never scores text again.
Oracle: sacrebleu's own corpus score of resampled texts, and rouge-score's own.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from compresslab.errors import CompressLabError
from compresslab.measure.environment import device_label
from compresslab.measure.intervals import Array, Scored, mean

ORDERS = 4  # of BLEU's n-grams


def bleu(hypotheses: Sequence[str], references: Sequence[str], *, conditions: str = "") -> Scored:
    """Corpus BLEU, 0 to 100: sacrebleu's defaults (13a tokens, up to 4-grams, exponential smoothing)."""
    metric = _imported("sacrebleu.metrics", "sacrebleu").BLEU()
    return _corpus("bleu", metric, _bleu, hypotheses, references, conditions)


def chrf(hypotheses: Sequence[str], references: Sequence[str], *, conditions: str = "") -> Scored:
    """Corpus chrF2, 0 to 100: sacrebleu's defaults (up to 6 characters, recall twice as important)."""
    metric = _imported("sacrebleu.metrics", "sacrebleu").CHRF()
    return _corpus("chrf", metric, _chrf, hypotheses, references, conditions)


def rouge(hypotheses: Sequence[str], references: Sequence[str], *, conditions: str = "") -> list[Scored]:
    """Mean F-measures of ROUGE-1, ROUGE-2 and ROUGE-L over the texts, with Porter's stemmer, 0 to 1."""
    _check(hypotheses, references)
    names = ("rouge1", "rouge2", "rougeL")
    scorer = _imported("rouge_score.rouge_scorer", "rouge-score").RougeScorer(names, use_stemmer=True)
    found = [scorer.score(ref, hyp) for hyp, ref in zip(hypotheses, references, strict=True)]
    said = "rouge-score, stemmed, mean F-measure" + (f", {conditions}" if conditions else "")
    return [
        Scored(
            name=name, parts=np.array([[one[name].fmeasure] for one in found]), of=mean, units="texts",
            device=device_label("cpu"), conditions=said,
        )
        for name in names
    ]  # fmt: skip


def check_installed() -> None:
    """CompressLabError if one of the libraries is not there."""
    _imported("sacrebleu.metrics", "sacrebleu")
    _imported("rouge_score.rouge_scorer", "rouge-score")


def _corpus(
    name: str, metric: Any, of: Any, hypotheses: Sequence[str], references: Sequence[str], conditions: str
) -> Scored:
    _check(hypotheses, references)
    # The statistics have no public name; sacrebleu's own significance tests resample them in this way.
    parts = np.array(metric._extract_corpus_statistics(hypotheses, [list(references)]), dtype=np.float64)
    metric.corpus_score(hypotheses[:1], [list(references[:1])])  # or its signature does not know how many references
    said = f"sacrebleu {metric.get_signature()}" + (f", {conditions}" if conditions else "")
    return Scored(name=name, parts=parts, of=of, units="texts", device=device_label("cpu"), conditions=said)


def _bleu(parts: Array, counts: Array) -> Array:
    """After Papineni et al. (2002) with smoothing method 3 of Chen and Cherry (2014).

    Args:
        parts: length, reference length, then matches and n-grams of each order.
    """
    total = counts @ parts
    length, reference = total[:, 0], total[:, 1]
    hits, grams = total[:, 2 : 2 + ORDERS], total[:, 2 + ORDERS :]
    missed = np.cumsum(hits == 0, axis=1)  # each order without a match halves what stands for it
    smoothed = np.where(hits == 0, 0.5**missed, hits)
    precision = smoothed / np.where(grams == 0, np.nan, grams)
    logs = np.log(precision).mean(axis=1)
    with np.errstate(divide="ignore"):
        brevity = np.minimum(0.0, 1 - reference / length)
    score = 100 * np.exp(logs + brevity)
    return np.where((hits == 0).all(axis=1) | np.isnan(score), 0.0, score)


def _chrf(parts: Array, counts: Array) -> Array:
    """After Popović (2015), with beta 2; orders that either side is too short for are left out of the means.

    Args:
        parts: for each order, n-grams of the text, of the reference, and matches.
    """
    total = (counts @ parts).reshape(len(counts), -1, 3)
    given, wanted, hits = np.moveaxis(total, 2, 0)
    there = (given > 0) & (wanted > 0)
    orders = np.maximum(there.sum(axis=1), 1)
    precision = (np.divide(hits, given, out=np.zeros_like(hits), where=there)).sum(axis=1) / orders
    recall = (np.divide(hits, wanted, out=np.zeros_like(hits), where=there)).sum(axis=1) / orders
    below = 4 * precision + recall
    return np.divide(500 * precision * recall, below, out=np.zeros_like(below), where=below > 0)


def _check(hypotheses: Sequence[str], references: Sequence[str]) -> None:
    if len(hypotheses) != len(references) or not hypotheses:
        raise CompressLabError(
            f"{len(hypotheses)} texts for {len(references)} references: there must be as many, and some"
        )


def _imported(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise CompressLabError(f"{package} not installed: pip install 'compresslab[metrics]'") from None

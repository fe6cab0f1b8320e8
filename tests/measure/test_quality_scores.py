"""Scores of classes, of written text, of rated pairs and of language models, against the libraries that define them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import tiny
from compresslab.errors import CompressLabError
from compresslab.measure import agreement, classification, embedding, generation, harness, perplexity


def test_f1_precision_and_recall_are_scikit_learns() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    labels, given = rng.integers(0, 4, 60), rng.integers(0, 5, 60)  # class 4 is predicted and never right
    scores = {s.name: s for s in classification.scores(torch.tensor(given), torch.tensor(labels))}
    assert scores["accuracy"].value == pytest.approx(metrics.accuracy_score(labels, given))
    for name, average in (("f1_macro", "macro"), ("f1_micro", "micro")):
        assert scores[name].value == pytest.approx(metrics.f1_score(labels, given, average=average, zero_division=0))
    settings = {"average": "macro", "zero_division": 0}
    assert scores["precision_macro"].value == pytest.approx(metrics.precision_score(labels, given, **settings))
    assert scores["recall_macro"].value == pytest.approx(metrics.recall_score(labels, given, **settings))
    for row in rng.integers(60, size=(5, 60)):  # and of a resample
        counts = np.bincount(row, minlength=60).astype(float)[None]
        found = scores["f1_macro"].of(scores["f1_macro"].parts, counts)
        assert found == pytest.approx([metrics.f1_score(labels[row], given[row], average="macro", zero_division=0)])
    assert all(s.measurement().low is not None for s in scores.values())
    with pytest.raises(CompressLabError, match="as many"):
        classification.scores(torch.tensor([1]), torch.tensor([1, 2]))


def test_flips_are_answers_right_on_one_side_only() -> None:
    labels, before, after = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 0, 0]), torch.tensor([0, 2, 2, 1])
    found = {s.name: s.value for s in classification.agreement(before, after, labels)}
    assert found == {"top1_agreement": 0.25, "flips": 0.5}  # the last was wrong and is wrong in another way


TEXTS = [
    ("the cat sat on the mat", "the cat is on the mat today"),
    ("a completely different sentence here", "nothing in common with it"),
    ("running dogs bark loudly at night", "the running dog barks loudly at night"),
    ("short", "short one"),
    ("", "an empty answer"),
    ("he said that it would rain tomorrow morning", "he said it would rain tomorrow in the morning"),
]


@pytest.mark.parametrize("name", ["BLEU", "CHRF"])
def test_bleu_and_chrf_of_every_resample_are_sacrebleus(name: str) -> None:
    metric = getattr(pytest.importorskip("sacrebleu.metrics"), name)()
    given, wanted = (list(side) for side in zip(*TEXTS, strict=True))
    scored = {"BLEU": generation.bleu, "CHRF": generation.chrf}[name](given, wanted)
    assert scored.value == pytest.approx(metric.corpus_score(given, [wanted]).score)
    rows = [*np.random.default_rng(0).integers(6, size=(30, 6)), np.full(6, 1), np.full(6, 3), np.full(6, 4)]
    counts = np.stack([np.bincount(row, minlength=6) for row in rows]).astype(float)
    expected = [metric.corpus_score([given[i] for i in row], [[wanted[i] for i in row]]).score for row in rows]
    assert len(set(np.round(expected, 6))) > 10
    with np.errstate(divide="ignore", invalid="ignore"):
        assert scored.of(scored.parts, counts) == pytest.approx(expected, abs=1e-9)
    assert "version" in scored.conditions
    assert scored.measurement().low is not None


def test_rouge_is_rouge_scores() -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(
        ["rouge1", "rouge2", "rougeL"], use_stemmer=True
    )
    given, wanted = (list(side) for side in zip(*TEXTS, strict=True))
    found = {s.name: s.value for s in generation.rouge(given, wanted)}
    for name, value in found.items():
        each = [scorer.score(w, g)[name].fmeasure for g, w in zip(given, wanted, strict=True)]
        assert value == pytest.approx(np.mean(each))
        assert 0 < value < 1
    assert list(found) == ["rouge1", "rouge2", "rougeL"]
    with pytest.raises(CompressLabError, match="as many"):
        generation.rouge(["a"], [])


@pytest.mark.parametrize(
    ("module", "call", "extra"),
    [
        ("sacrebleu.metrics", lambda: generation.bleu(["a"], ["a"]), "metrics"),
        ("rouge_score.rouge_scorer", lambda: generation.rouge(["a"], ["a"]), "metrics"),
        ("lm_eval", lambda: harness.check(["x"]), "harness"),
    ],
)
def test_an_extra_that_is_absent_is_named_with_its_command(
    module: str,
    call,
    extra: str,
    monkeypatch: pytest.MonkeyPatch,  # type: ignore[no-untyped-def]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(CompressLabError, match=rf"pip install 'compresslab\[{extra}\]'"):
        call()


def test_rated_pairs_are_correlated_as_scipy_does() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = (nn.functional.normalize(torch.randn(20, 6, generator=generator), dim=1) for _ in range(2))
    rated = torch.round(3 * (one * other).sum(dim=1) + torch.randn(20, generator=generator))
    found = {s.name: s.value for s in embedding.human_pairs(one, other, rated, name="word_similarity")}
    cosines = (one * other).sum(dim=1).double().numpy()
    assert found["word_similarity_pearson"] == pytest.approx(stats.pearsonr(cosines, rated.numpy()).statistic)
    assert found["word_similarity_spearman"] == pytest.approx(stats.spearmanr(cosines, rated.numpy()).statistic)
    assert embedding.human_pairs(one, other, torch.ones(20)) == []
    with pytest.raises(CompressLabError, match="20 embeddings for 3"):
        embedding.human_pairs(one, other, rated[:3])


# --- language models ------------------------------------------------------------------------------------------------


class Capped(nn.Module):
    """A language model whose logits are more than its head's output, as Gemma 2's."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def get_output_embeddings(self) -> nn.Module:
        return self.inner.get_output_embeddings()  # type: ignore[operator,no-any-return]

    def forward(self, **inputs: object) -> object:
        out = self.inner(**inputs)
        out.logits = torch.tanh(out.logits / 3) * 3
        return out


def pair(capped: bool) -> tuple[nn.Module, nn.Module]:
    before, after = tiny.make("llama"), tiny.make("llama")
    with torch.no_grad():
        for weight in after.parameters():
            weight.add_(0.03 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    return (Capped(before), Capped(after)) if capped else (before, after)


@pytest.mark.parametrize("capped", [False, True])
def test_agreement_is_what_both_models_logits_at_once_say(capped: bool, tmp_path: Path) -> None:
    before, after = pair(capped)
    windows = tiny.token_batches(5, 24)[0]["input_ids"]
    (recorded,) = agreement.read(before, windows, record=tmp_path / "r")
    found = {s.name: s for s in agreement.read(after, windows, against=tmp_path / "r")}
    with torch.inference_mode():
        p, q = (m(input_ids=windows).logits[:, :-1].double().log_softmax(-1) for m in (before, after))
    labels = windows[:, 1:]
    kl = (p.exp() * (p - q)).sum(-1).mean()
    assert found["kl_divergence"].value == pytest.approx(float(kl), rel=1e-4)
    assert found["top1_agreement"].value == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    flips = (p.argmax(-1) == labels) != (q.argmax(-1) == labels)
    assert found["flips"].value == pytest.approx(float(flips.double().mean()))
    assert float(kl) > 0 and 0 < float(flips.double().mean()) < 1
    loss = -q.gather(-1, labels[..., None]).mean()
    assert found["perplexity"].value == pytest.approx(float(loss.exp()), rel=1e-5)
    assert found["perplexity"].value == pytest.approx(perplexity.perplexity(after, windows).value, rel=1e-5)
    apart = found["perplexity"].minus(recorded.parts)
    assert apart.value == pytest.approx(found["perplexity"].value - recorded.value)
    size = sum(path.stat().st_size for path in (tmp_path / "r").glob("[0-9]*"))
    assert size > 5 * 23 * tiny.VOCABULARY * 4 if capped else size < 5 * (24 * (8 + 4 * tiny.HIDDEN) + 400)
    assert ("float32" in found["flips"].conditions) == capped


def test_a_model_agrees_with_itself(tmp_path: Path) -> None:
    model, windows = tiny.make("gpt2"), tiny.token_batches(3, 16)[0]["input_ids"]
    agreement.read(model, windows, record=tmp_path)
    found = {s.name: s.value for s in agreement.read(model, windows, against=tmp_path)}
    assert found["kl_divergence"] == pytest.approx(0, abs=1e-6)
    assert (found["top1_agreement"], found["flips"]) == (1, 0)


def test_a_reference_of_other_windows_or_words_is_refused(tmp_path: Path) -> None:
    model, windows = tiny.make("llama"), tiny.token_batches(2, 16)[0]["input_ids"]
    agreement.read(model, windows, record=tmp_path)
    with pytest.raises(CompressLabError, match="another window"):
        agreement.read(model, windows.flip(0), against=tmp_path)
    with pytest.raises(CompressLabError, match="no window 2"):
        agreement.read(model, torch.cat([windows, windows]), against=tmp_path)
    other = tiny.make("llama", vocab_size=tiny.VOCABULARY + 8)
    with pytest.raises(CompressLabError, match="vocabulary of 208 tokens against one of 200"):
        agreement.read(other, windows, against=tmp_path)


# --- lm-evaluation-harness ------------------------------------------------------------------------------------------

TASK = """task: nonsense
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
  cache_dir: {cache}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def write_task(folder: Path) -> Path:
    words = tiny.words()
    rows = [
        {"q": " ".join(words[i : i + 5]), "choices": [words[i + 6], words[i + 7]], "gold": i % 2} for i in range(20)
    ]
    (folder / "rows.json").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    (folder / "task.yaml").write_text(TASK.format(data=folder / "rows.json", cache=folder / "cache"), encoding="utf-8")
    return folder / "task.yaml"


def test_a_local_task_runs_offline_and_is_right(tmp_path: Path) -> None:
    """The oracle is the log-likelihood of both answers, worked out here."""
    pytest.importorskip("lm_eval")
    task = write_task(tmp_path)
    folder = tiny.save("llama", tmp_path / "model")
    from compresslab import models

    model, tokenizer = models.load(folder), models.load_tokenizer(folder, "tiny")
    (found,) = harness.run(model, tokenizer, [str(task)])

    def likelihood(question: str, answer: str) -> float:
        ids = tokenizer(f"{question} {answer}", return_tensors="pt").input_ids
        with torch.inference_mode():
            logits: Tensor = model(input_ids=ids).logits[0]
        return float(logits.double().log_softmax(-1)[-2, ids[0, -1]])

    rows = [json.loads(line) for line in (tmp_path / "rows.json").read_text().splitlines()]
    right = [
        float(np.argmax([likelihood(row["q"], answer) for answer in row["choices"]]) == row["gold"]) for row in rows
    ]
    assert found.name == "nonsense_acc"
    assert sorted(found.parts[:, 0]) == sorted(right)
    assert found.value == pytest.approx(np.mean(right))
    assert found.measurement().low is not None
    assert len(harness.run(model, tokenizer, [str(task)], limit=6)[0].parts) == 6


def test_tasks_that_are_not_there_are_named(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(CompressLabError, match=r"no task file .*absent\.yaml"):
        harness.check([str(tmp_path / "absent.yaml")])
    (tmp_path / "empty.yaml").write_text("output_type: multiple_choice\n")
    with pytest.raises(CompressLabError, match="has no line 'task: NAME'"):
        harness.check([str(tmp_path / "empty.yaml")])

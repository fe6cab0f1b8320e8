"""`compresslab evaluate` on tables of questions with known answers: what is written, rated and sorted, and what is wrong."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from scipy import stats

import tiny
from compresslab import data, evaluation, models
from compresslab.artifact import Artifact
from compresslab.errors import CompressLabError
from compresslab.measure import classification, embedding, fresh, writing
from compresslab.report import compare
from compresslab.report.schema import Measurement, read_report

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Run]:
    """The command in this process, and what it has a fresh process do as well, for it takes seconds to start one."""
    monkeypatch.setattr(fresh, "measure", fresh._run)
    monkeypatch.setattr(evaluation.fresh, "measure", fresh._run)
    monkeypatch.chdir(tmp_path)
    with tiny.quick():
        yield lambda *arguments: tiny.run_cli(monkeypatch, capsys, *arguments)


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def prompts(path: Path, count: int = 11) -> Path:
    words = tiny.words()
    rows = [
        {"prompt": " ".join(words[i : i + 3 + i % 4]), "reference": " ".join(words[2 * i : 2 * i + 9])}
        for i in range(count)
    ]
    return write_lines(path, rows)


def pairs(path: Path, count: int = 12) -> Path:
    words, draw = tiny.words(), np.random.default_rng(0)
    lines = ["sentence1,sentence2,score"]
    for i in range(count):
        lines.append(f'"{words[i]} {words[i + 5]}",{words[i + 1]} {words[3 * i]},{draw.uniform(0, 5):.2f}')
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def as_json(run: Run, *arguments: object) -> dict[str, dict[str, Any]]:
    code, out, err = run("evaluate", *arguments, "--device", "cpu", "--json")
    assert code == 0, err
    return {m["name"]: m for m in json.loads(out)}


def noisy(kind: str, folder: Path) -> Path:
    """The tiny model of this kind with its weights moved a little."""
    model = tiny.make(kind)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.03 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    model.save_pretrained(folder)
    tiny.save_tokenizer(folder)
    return folder


# --- text that is written ---------------------------------------------------------------------------------------------


def test_what_is_written_in_batches_is_the_likeliest_token_one_after_the_other() -> None:
    """The oracle has no cache, no batch and no filling."""
    model = tiny.make("llama")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.generation_config, "eos_token_id", [2])
        folder_tokenizer = _tokenizer()
        asked = [" ".join(tiny.words()[i : i + 2 + i % 5]) for i in range(11)]
        found = writing.write(model, folder_tokenizer, asked, new_tokens=6)
    for prompt, text in zip(asked, found, strict=True):
        row = folder_tokenizer(prompt)["input_ids"]
        for _ in range(6):
            with torch.inference_mode():
                token = int(model(input_ids=torch.tensor([row])).logits[0, -1].argmax())
            row.append(token)
            if token == 2:
                break
        start = len(folder_tokenizer(prompt)["input_ids"])
        assert text == folder_tokenizer.decode(row[start:], skip_special_tokens=True).strip()
    assert len(set(found)) > 3


def _tokenizer() -> Any:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        tiny.save_tokenizer(Path(folder))
        return models.load_tokenizer(folder, "tiny")


def test_bleu_and_rouge_of_a_compressed_model_with_paired_differences(run: Run, tmp_path: Path) -> None:
    """The oracles are sacrebleu and rouge-score on the text that the model writes here."""
    sacrebleu = pytest.importorskip("sacrebleu")
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=True)
    before, after = tiny.save("llama", tmp_path / "before"), noisy("llama", tmp_path / "after")
    file = prompts(tmp_path / "asked.jsonl")
    # the references are what the uncompressed model writes, cut a little: so that scores are neither 0 nor 100
    asked = [json.loads(line) for line in file.read_text().splitlines()]
    model, tokenizer = models.load(before), models.load_tokenizer(before, "tiny")
    said = writing.write(model, tokenizer, [row["prompt"] for row in asked], new_tokens=8)
    rows = [
        {"prompt": row["prompt"], "reference": " ".join(text.split()[:7])}
        for row, text in zip(asked, said, strict=True)
    ]
    write_lines(file, rows)
    found = as_json(run, after, "--data", file, "--new-tokens", 8, "--against", before)
    ours = writing.write(models.load(after), tokenizer, [row["prompt"] for row in rows], new_tokens=8)
    references = [row["reference"] for row in rows]
    bleu = sacrebleu.corpus_bleu(ours, [references]).score
    assert found["bleu"]["value"] == pytest.approx(bleu) and 1 < bleu < 99
    mean = np.mean([scorer.score(ref, text)["rougeL"].fmeasure for ref, text in zip(references, ours, strict=True)])
    assert found["rougeL"]["value"] == pytest.approx(mean)
    apart = found["bleu_difference"]
    assert apart["value"] == pytest.approx(bleu - sacrebleu.corpus_bleu(said, [references]).score)
    assert apart["low"] <= apart["value"] <= apart["high"] and "paired" in apart["conditions"]
    assert "greedy, at most 8 tokens" in found["bleu"]["conditions"]
    assert found["decode_tokens_per_s"]["value"] > 0 and "perplexity" not in found


def test_a_seq2seq_model_writes_too(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    settings = {"d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 4, "d_kv": 8, "vocab_size": tiny.VOCABULARY,
                "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2}  # fmt: skip
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**settings)).eval()
    model.save_pretrained(tmp_path / "t5")
    tiny.save_tokenizer(tmp_path / "t5")
    file = prompts(tmp_path / "asked.jsonl", 5)
    found = as_json(run, tmp_path / "t5", "--data", file, "--new-tokens", 5)
    assert {"bleu", "chrf", "rouge1", "rouge2", "rougeL", "disk_bytes"} <= found.keys()
    tokenizer = models.load_tokenizer(tmp_path / "t5", "t5")
    alone = [writing.write(model, tokenizer, [p], new_tokens=5)[0] for p in data.questions(str(file)).prompts]  # type: ignore[union-attr]
    assert alone == writing.write(model, tokenizer, data.questions(str(file)).prompts, new_tokens=5)  # type: ignore[union-attr]
    assert found["peak_memory_bytes"]["conditions"].endswith("ran nothing yet")


# --- pairs that people rated ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_correlation_with_human_scores_is_scipys(run: Run, tmp_path: Path, suffix: str) -> None:
    before, after = tiny.save("bert", tmp_path / "before"), noisy("bert", tmp_path / "after")
    file = pairs(tmp_path / "rated.csv")
    asked = data.questions(str(file))
    assert isinstance(asked, data.Rated) and len(asked.first) == 12
    if suffix == "jsonl":
        rows = [
            {"Sentence1": a, "sentence2": b, "score": str(c)}
            for a, b, c in zip(asked.first, asked.second, asked.scores, strict=True)
        ]
        file = write_lines(tmp_path / "rated.jsonl", rows)
    found = as_json(run, after, "--data", file, "--against", before)
    model, tokenizer = models.load(after), models.load_tokenizer(after, "tiny")
    sides = []
    for texts in (asked.first, asked.second):
        batch = data.padded(tokenizer, texts, 64)
        sides.append(embedding.embeddings(model, batch["input_ids"], batch["attention_mask"]))
    cosines = (sides[0] * sides[1]).sum(dim=1).double().numpy()
    assert found["sentence_similarity_spearman"]["value"] == pytest.approx(
        stats.spearmanr(cosines, asked.scores).statistic
    )
    assert found["sentence_similarity_pearson"]["value"] == pytest.approx(
        stats.pearsonr(cosines, asked.scores).statistic
    )
    apart = found["sentence_similarity_spearman_difference"]
    assert apart["low"] <= apart["high"] and apart["n"] == 12
    assert 0.5 < found["embedding_cosine"]["value"] < 1 and found["forward_ms"]["value"] > 0


def test_word_pairs_are_questions_by_their_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        data.offline, "word_pairs", lambda name: [data.WordPair("cat", "dog", 7.0), data.WordPair("a", "b", 1.5)]
    )
    found = data.questions("simlex999")
    assert found == data.Rated(name="word_similarity", first=["cat", "a"], second=["dog", "b"], scores=[7.0, 1.5])
    assert data.questions("wiki") is None


# --- texts that are sorted into classes ---------------------------------------------------------------------------------


def test_accuracy_and_f1_of_a_classifier_of_texts(run: Run, tmp_path: Path) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    torch.manual_seed(0)
    settings = tiny._ENCODER | {"vocab_size": tiny.VOCABULARY, "max_position_embeddings": tiny.LONGEST, "num_labels": 3}
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(**settings, initializer_range=0.5)
    ).eval()
    model.save_pretrained(tmp_path / "sorter")
    tiny.save_tokenizer(tmp_path / "sorter")
    words, draw = tiny.words(), np.random.default_rng(0)
    rows = [f"{' '.join(draw.choice(words, 3 + i % 4))}\t{draw.integers(3)}" for i in range(200)]
    (tmp_path / "rows.tsv").write_text("sentence\tlabel\n" + "\n".join(rows) + "\n", encoding="utf-8")
    found = as_json(run, tmp_path / "sorter", "--data", tmp_path / "rows.tsv")
    texts, labels = zip(*(row.split("\t") for row in rows[180:]), strict=True)
    tokenizer = models.load_tokenizer(tmp_path / "sorter", "sorter")
    given = [
        int(model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits.argmax())
        for text in texts
    ]
    truth = [int(label) for label in labels]
    assert found["accuracy"]["value"] == pytest.approx(metrics.accuracy_score(truth, given))
    for name, average in (("f1_macro", "macro"), ("f1_micro", "micro")):
        assert found[name]["value"] == pytest.approx(metrics.f1_score(truth, given, average=average, zero_division=0))
        assert found[name]["low"] <= found[name]["value"] <= found[name]["high"]
    assert found["accuracy"]["n"] == 20 and "test split" in found["accuracy"]["conditions"]
    assert found["forward_ms"]["value"] > 0 and found["macs"]["value"] > 0


# --- reports and compare ----------------------------------------------------------------------------------------------


def test_what_is_found_goes_into_the_report_and_into_compare(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    folder = tiny.compressed("llama", tmp_path)
    before = read_report(folder)
    asked, common = prompts(tmp_path / "asked.jsonl"), ("--new-tokens", 4, "--against", tmp_path / "model")
    as_json(run, folder, "--data", asked, *common, "--energy", "--grid", 400, "--into-report")
    report = read_report(folder)
    assert {m.name for m in report.before} - {m.name for m in before.before} >= {"bleu", "rougeL"}
    after = {m.name: m for m in report.after}
    assert {"bleu", "bleu_difference", "decode_tokens_per_s"} <= after.keys()
    assert len(report.after) == len(after)
    assert "BLEU" in (folder / "report.html").read_text(encoding="utf-8")
    found = compare.comparison([report], quality="bleu")
    assert found.quality.higher_is_better and {front.name for front in found.fronts} >= {"bytes", "latency", "energy"}
    as_json(run, folder, "--data", asked, *common, "--into-report")  # again: nothing twice
    assert [m.name for m in read_report(folder).after] == [m.name for m in report.after]
    code, _, err = run("evaluate", tmp_path / "model", "--data", asked, "--into-report")
    assert code == 2 and "no report at" in err


def test_a_quantity_of_both_sides_is_not_replaced_on_one(tmp_path: Path) -> None:
    folder = tiny.compressed("llama", tmp_path)
    report = read_report(folder)

    def told(value: float) -> Measurement:
        return Measurement(
            name="perplexity", value=value, unit="1", n=1, device="x", conditions="y", low=0.0, high=99.0
        )

    report = report.model_copy(update={"before": (told(1.0),), "after": (told(2.0),)})
    evaluation._write_report(report, folder, [told(3.0)], [])
    assert [(b.value, a.value) for b, a in read_report(folder).pairs()] == [(1.0, 2.0)]
    evaluation._write_report(report, folder, [told(3.0)], [told(4.0)])
    assert [(b.value, a.value) for b, a in read_report(folder).pairs()] == [(4.0, 3.0)]
    Artifact(folder).verify()  # which has the hashes of the report too


# --- what is wrong ----------------------------------------------------------------------------------------------------

GOOD = '{"prompt": "a", "reference": "b"}\n'
RATED = '{"sentence1": "a", "sentence2": "b", "score": 1}\n'


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("x.jsonl", GOOD + "{oops\n", "row 2 is not JSON"),
        ("x.jsonl", GOOD + "[1, 2]\n", "row 2 is no JSON object"),
        ("x.jsonl", GOOD + '\n{"prompt": "a"}\n', "row 3: 'reference' is null, no text"),
        ("x.jsonl", GOOD + '{"prompt": " ", "reference": "b"}\n', "row 2: 'prompt' is empty"),
        ("x.jsonl", '{"prompt": "a", "refrence": "b"}\n', "has prompt, refrence: give every line prompt and reference"),
        ("x.jsonl", "", "is empty: give every line"),
        ("x.jsonl", RATED * 2, "has 2 pairs: a correlation needs at least 3"),
        ("x.jsonl", RATED * 3, "all 3 scores are 1"),
        ("x.jsonl", RATED + '{"sentence1": "a", "sentence2": "b", "score": "high"}\n', "row 2: 'score' is \"high\""),
        ("x.jsonl", RATED + '{"sentence1": "a", "sentence2": "b", "score": NaN}\n', "row 2: 'score' is NaN"),
        ("x.jsonl", RATED + '{"sentence1": "a", "sentence2": 7, "score": 1}\n', "row 2: 'sentence2' is 7, no text"),
        ("x.csv", "prompt,reference\na,b\nc\n", "row 3: 1 columns where the first row has 2"),
        ("x.csv", 'prompt,reference\n"a,b\n', "is not sound CSV"),
        ("x.tsv", "sentence1\tsentence2\tscore\na\tb\t\n", "row 2: 'score' is \"\", which is no number"),
    ],
)
def test_a_malformed_file_is_named_with_its_row(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(CompressLabError) as caught:
        data.questions(str(tmp_path / name))
    assert said in str(caught.value) and name in str(caught.value)


def test_a_table_of_another_kind_is_left_to_the_readers_of_text(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("text,label\na b,1\n", encoding="utf-8")
    assert data.questions(str(tmp_path / "x.csv")) is None
    assert data.questions(str(tmp_path)) is None
    with pytest.raises(CompressLabError, match="not UTF-8"):
        (tmp_path / "y.jsonl").write_bytes(b"\xff\xfe\xff")
        data.questions(str(tmp_path / "y.jsonl"))


def test_a_model_that_cannot_answer_is_told_before_any_work(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    monkeypatch.setattr(evaluation.fresh, "measure", lambda job: pytest.fail("work was begun"))
    llama, bert = tiny.save("llama", tmp_path / "llama"), tiny.save("bert", tmp_path / "bert")
    code, _, err = run("evaluate", bert, "--data", prompts(tmp_path / "asked.jsonl"))
    assert code == 2 and "cannot write: name a causal or seq2seq language model" in err
    code, _, err = run("evaluate", llama, "--data", pairs(tmp_path / "rated.csv"))
    assert code == 2 and "embeds none: name an encoder" in err
    code, _, err = run("evaluate", llama, "--data", tmp_path / "asked.jsonl", "--new-tokens", 60)
    assert code == 2 and "more than the 64 that the model reads" in err
    code, _, err = run("evaluate", llama, "--data", tmp_path / "asked.jsonl", "--new-tokens", 0)
    assert code == 2 and "--new-tokens 0" in err


def test_scores_of_classes_are_counted_over_every_example() -> None:
    given, truth = torch.tensor([0, 1, 1, 2]), torch.tensor([0, 1, 2, 2])
    found = {s.name: s.value for s in classification.scores(given, truth)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert found["f1_micro"] == found["accuracy"] == 0.75

"""Data sources with small files made here; the offline data sets behind the mark `zoo`."""

from __future__ import annotations

import bz2
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from compresslab import data, zoo
from compresslab.data import wiki
from compresslab.data.catalogue import GENSIM_WHEEL
from compresslab.errors import CompressLabError
from compresslab.wheels import fetch_wheel, file_sha256

SPLITS = ("calibration", "validation", "test")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word w0 to w999, special tokens around a text unless told, and a context of 8."""
    vocabulary = {"<unk>": 0, "<eos>": 1} | {f"w{i}": i + 2 for i in range(1000)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="<eos> $A <eos>", special_tokens=[("<eos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", unk_token="<unk>", bos_token="<eos>", model_max_length=8
    )


def write_words(path: Path, count: int) -> str:
    """A text file with the words w0, w1, ... one a line."""
    path.write_text("".join(f"w{i % 1000}\n" for i in range(count)))
    return str(path)


# --- local files


def test_text_file_is_one_document_cut_by_lines_without_overlap(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "".join(f"line {i} ä\r\n\r\n" for i in range(50)).encode())
    parts = {split: data.texts(str(path), split) for split in (*SPLITS, "all")}
    assert [len(part.documents) for part in parts.values()] == [1, 1, 1, 1]
    whole = parts["all"].documents[0]
    assert whole == "".join(f"line {i} ä\n\n" for i in range(50))
    assert "".join(parts[split].documents[0] for split in SPLITS) == whole
    assert [len(parts[split].documents[0].splitlines()) for split in SPLITS] == [80, 10, 10]
    assert len({part.sha256 for part in parts.values()}) == 4
    assert {part.revision for part in parts.values()} == {f"sha256:{file_sha256(path)[:16]}"}
    assert parts["test"].labels is None
    assert (parts["test"].name, parts["test"].split) == ("a.txt", "test")


def test_long_text_is_cut_at_blank_lines_into_pieces_that_are_the_text(tmp_path: Path) -> None:
    text = "".join(f"paragraph {i} " + "x" * 500 + "\n\n" for i in range(3000))
    (tmp_path / "long.txt").write_text(text)
    pieces = data.texts(str(tmp_path / "long.txt"), "all").documents
    assert "".join(pieces) == text
    assert all(64_000 <= len(piece) < 65_000 for piece in pieces[:-1])
    assert all(piece.startswith("paragraph") for piece in pieces)


def test_tsv_without_header_and_with_quotation_marks(tmp_path: Path) -> None:
    rows = [f"he said \"{i} or '\t{i % 2}" for i in range(20)]
    (tmp_path / "a.tsv").write_text("\n".join(rows) + "\n\n")
    parts = [data.texts(str(tmp_path / "a.tsv"), split) for split in SPLITS]
    assert [len(part.documents) for part in parts] == [16, 2, 2]
    assert [d for part in parts for d in part.documents] == [row.split("\t")[0] for row in rows]
    assert [label for part in parts for label in part.labels or []] == [i % 2 for i in range(20)]


@pytest.mark.parametrize(
    ("text", "documents", "labels"),
    [
        ("label,sentence\n1,good\n0,bad\n", ["good", "bad"], [1, 0]),
        ("id,content,other\n7,good,x\n8,bad,y\n", ["good", "bad"], None),
        ("stars,review\n5,good\n1,bad\n", ["good", "bad"], [5, 1]),
        ("good,pos\nbad,neg\n", ["good", "bad"], ["pos", "neg"]),
        ("good\nbad\n", ["good", "bad"], None),
        ("one\u2028line,1\nbad,0\n", ["one\u2028line", "bad"], [1, 0]),
        ('text,label\n"two\nlines, ""quoted""",1\n  ,0\n', ['two\nlines, "quoted"'], [1]),
        (f"text,label\n{'long ' * 40_000},3\n", ["long " * 40_000], [3]),
    ],
)
def test_csv_columns(tmp_path: Path, text: str, documents: list[str], labels: object) -> None:
    (tmp_path / "a.csv").write_text(text)
    found = data.texts(str(tmp_path / "a.csv"), "all")
    assert (found.documents, found.labels) == (documents, labels)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", b"1,2\n3,4\n", "no column of text"),
        ("a.csv", b"text,label\na,1\nb\n", "row 3: 1 columns where the first row has 2"),
        ("a.csv", b'text,label\n"a"b,1\n', "not sound CSV"),
        ("a.tsv", b"", "holds no text"),
        ("a.txt", b"\n \n", "holds no text"),
        ("a.txt", b"one line", "calibration split of .* holds no text"),
        ("a.txt", b"ok\n\xff\xfe\n", r"not UTF-8 \(byte 3\)"),
        ("a.parquet", b"PAR1 not really", "not sound parquet"),
        ("a.docx", b"x", r"cannot read \.docx"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, name: str, text: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(text)
    with pytest.raises(CompressLabError, match=message) as error:
        data.texts(str(tmp_path / name))
    assert "\n" not in str(error.value)
    assert name in str(error.value)


def test_parquet_as_the_hub_writes_it(tmp_path: Path) -> None:
    features = datasets.Features(
        {
            "idx": datasets.Value("int32"),
            "sentence": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["neg", "pos"]),
        }
    )
    rows = {"idx": [0, 1, 2], "sentence": ["good", "", "bad"], "label": [1, 1, 0]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    found = data.texts(str(tmp_path / "a.parquet"), "all")
    assert (found.documents, found.labels) == (["good", "bad"], [1, 0])
    pq.write_table(pa.table({"n": [1], "review": pa.array(["first"], pa.large_string())}), tmp_path / "b.parquet")
    found = data.texts(str(tmp_path / "b.parquet"), "all")
    assert (found.documents, found.labels) == (["first"], None)
    pq.write_table(pa.table({"n": [1], "label": [2]}), tmp_path / "c.parquet")
    with pytest.raises(CompressLabError, match="no column of strings"):
        data.texts(str(tmp_path / "c.parquet"), "all")


def test_folder_with_a_file_for_each_split(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text("a\t0\nb\t1\n")
    (tmp_path / "dev.tsv").write_text("c\t1\n")
    assert data.texts(str(tmp_path)).documents == ["a", "b"]
    assert data.texts(str(tmp_path), "validation").labels == [1]
    with pytest.raises(CompressLabError, match=r"no file named test .*has dev\.tsv, train\.tsv"):
        data.texts(str(tmp_path), "test")
    with pytest.raises(CompressLabError, match="a file for each split"):
        data.texts(str(tmp_path), "all")
    (tmp_path / "train.csv").write_text("text\nx\n")
    with pytest.raises(CompressLabError, match=r"\.csv and \.tsv"):
        data.texts(str(tmp_path))


def test_folder_with_the_hubs_numbered_files(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for i, rows in enumerate((["a", "b"], ["c"])):
        table = pa.table({"text": rows, "label": list(range(len(rows)))})
        pq.write_table(table, tmp_path / "data" / f"train-{i:05d}-of-00002.parquet")
    found = data.texts(str(tmp_path))
    assert (found.documents, found.labels) == (["a", "b", "c"], [0, 1, 0])


def test_sha256_sees_borders_between_documents(tmp_path: Path) -> None:
    shas = set()
    for i, rows in enumerate((["ab", "c"], ["a", "bc"], ["abc"])):
        pq.write_table(pa.table({"text": rows}), tmp_path / f"{i}.parquet")
        shas.add(data.texts(str(tmp_path / f"{i}.parquet"), "all").sha256)
    assert len(shas) == 3


def test_names_that_lead_nowhere() -> None:
    for source in ("nowhere.txt", "./nowhere", "~/nowhere-at-all"):
        with pytest.raises(CompressLabError, match="no such file"):
            data.texts(source)
    with pytest.raises(CompressLabError, match="did you mean 'wiki'"):
        data.texts("wikki")
    with pytest.raises(CompressLabError, match="unknown split 'train'"):
        data.texts("wiki", "train")
    with pytest.raises(CompressLabError, match="word-pairs, not of text; a text data set is wiki"):
        data.texts("simlex999")
    with pytest.raises(CompressLabError, match="Known: simlex999, wordsim353"):
        data.word_pairs("lee")
    with pytest.raises(CompressLabError, match="unknown offline data set"):
        data.is_cached("squad")


def test_images_of_a_folder_for_each_class(tmp_path: Path) -> None:
    for name in ("dog/2.JPG", "dog/1.png", "cat/x.jpeg", "cat/notes.txt", "loose.png", ".cache/hidden.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = [(path.relative_to(tmp_path).as_posix(), label) for path, label in data.images(tmp_path)]
    assert found == [("cat/x.jpeg", "cat"), ("dog/1.png", "dog"), ("dog/2.JPG", "dog")]
    with pytest.raises(CompressLabError, match="holds no images"):
        data.images(tmp_path / "dog")
    with pytest.raises(CompressLabError, match="no such folder"):
        data.images(tmp_path / "none")


# --- the hub


def test_hub_data_set_with_config(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []
    commit = "0123456789abcdef0123456789abcdef01234567"

    def load_dataset(name: str, config: str | None, *, split: str) -> datasets.Dataset:
        asked.append((name, config, split))
        found = datasets.Dataset.from_dict({"id": ["x", "y"], "text": ["first", " "], "label": [3, 4]})
        found.info.download_checksums = {f"hf://datasets/{name}@{commit}/data.parquet": {}}
        return found

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = data.texts("org/set:small", "validation")
    assert asked == [("org/set", "small", "validation")]
    assert (found.documents, found.labels, found.revision) == (["first"], [3], commit)
    data.texts("org/set")
    assert asked[-1] == ("org/set", None, "train")


@pytest.mark.parametrize("error", [ConnectionError("Couldn't reach\nthe hub"), ValueError("Unknown split")])
def test_hub_out_of_reach_names_what_is_offline(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(CompressLabError, match=r"org/set.*offline there are wiki and any local \.txt") as raised:
        data.texts("org/set", "test")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("library", "use", "extra"),
    [
        ("datasets", lambda folder: data.texts("org/set"), "data"),
        ("pyarrow", lambda folder: data.texts(str(folder / "a.parquet")), "data"),
        ("mwparserfromhell", lambda folder: data.texts("wiki"), "zoo"),
        ("sklearn.datasets", lambda folder: data.digits(), "zoo"),
    ],
)
def test_missing_library_names_the_install_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str, use: Callable[[Path], object], extra: str
) -> None:
    monkeypatch.setenv("COMPRESSLAB_HOME", str(tmp_path / "home"))
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(CompressLabError, match=rf"pip install 'compresslab\[{extra}\]'"):
        use(tmp_path)


# --- tokens


def test_calibration_windows_are_full_distinct_and_from_the_text(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    source = write_words(tmp_path / "a.txt", 1000)  # calibration: w0 to w799, 80 windows of 10
    found = data.calibration(source, tokenizer, samples=30, sequence_length=10, batch_size=8)
    assert [tuple(batch["input_ids"].shape) for batch in found.batches] == [(8, 10), (8, 10), (8, 10), (6, 10)]
    assert {batch["input_ids"].dtype for batch in found.batches} == {torch.int64}
    rows = torch.cat([batch["input_ids"] for batch in found.batches])
    first = rows[:, 0] - 2
    assert torch.equal(rows, first[:, None] + 2 + torch.arange(10))  # unbroken runs of the text, no special tokens
    assert torch.all(first % 10 == 0)
    assert torch.all(first < 800)
    assert len(set(first.tolist())) == 30
    assert first.tolist() != sorted(first.tolist())
    assert (found.tokens, found.samples, found.sequence_length, found.split) == (300, 30, 10, "calibration")


def test_calibration_depends_on_the_seed_and_nothing_else(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = write_words(tmp_path / "a.txt", 1000)

    def sha(seed: int, batch_size: int = 4) -> str:
        torch.rand(3)
        settings = {"samples": 5, "sequence_length": 16, "batch_size": batch_size}
        return data.calibration(source, tokenizer, seed=seed, **settings).sha256

    assert sha(0) == sha(0) == sha(0, batch_size=3)
    assert sha(0) != sha(1)


def test_end_of_text_stands_between_documents(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "a.csv").write_text("text\nw0 w1\nw2\nw3 w4\n")
    assert data.windows(str(tmp_path / "a.csv"), tokenizer, length=7, split="all").tolist() == [[2, 3, 1, 4, 1, 5, 6]]


def test_text_too_short_says_what_would_work(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = write_words(tmp_path / "a.txt", 1000)
    with pytest.raises(CompressLabError, match="has 800 tokens, but 9 samples of 100 need 900") as error:
        data.calibration(source, tokenizer, samples=9, sequence_length=100)
    assert "samples=8 or sequence_length=88," in str(error.value)
    data.calibration(source, tokenizer, samples=8, sequence_length=100)
    data.calibration(source, tokenizer, samples=9, sequence_length=88)
    with pytest.raises(CompressLabError, match="at least 1"):
        data.calibration(source, tokenizer, samples=0)


def test_windows_are_the_first_ones_in_order(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = write_words(tmp_path / "a.txt", 1000)  # test: w900 to w999
    rows = data.windows(source, tokenizer, length=30)
    assert torch.equal(rows, torch.arange(902, 992).view(3, 30))
    assert rows.dtype == torch.int64
    assert torch.equal(data.windows(source, tokenizer, length=30, count=2), rows[:2])
    assert data.windows(source, tokenizer, length=30, count=9).shape == (3, 30)
    with pytest.raises(CompressLabError, match="has 100 tokens, fewer than one window of 101: use at most length=100"):
        data.windows(source, tokenizer, length=101)
    with pytest.raises(CompressLabError, match="count is 0"):
        data.windows(source, tokenizer, count=0)


def test_no_warning_about_long_sequences(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    source = write_words(tmp_path / "a.txt", 100)
    data.windows(source, tokenizer, length=10)
    assert "longer than" not in caplog.text
    tokenizer("w1 " * 20)  # the warning would be seen here
    assert "longer than" in caplog.text


# --- wiki


MARKUP = """{{Infobox|name=x}}'''Apples''' are [[fruit|fruits]]<ref>Smith</ref> (, {{lang|la|x}}) of [[Malus]] trees.
<!-- no -->[[File:apple.jpg|thumb|An [[apple]] on a table]]
{| class="wikitable"
| cell || other
|}
It&nbsp;is ''Anna'''s [http://example.org favourite] with <math>x^2</math> seeds.<br>New line.

== History ==
Old.

=== Detail ===
{{Main|History}}

== See also ==
* [[Pear]]

=== More ===
gone

== Uses ==
Cider.
[[Category:Fruit]]
"""
PLAIN = """Apples are fruits of Malus trees.

It is Anna's favourite with seeds.
New line.

History

Old.

Detail

Uses

Cider."""


def test_markup_becomes_running_text() -> None:
    assert wiki._plain_text(MARKUP) == PLAIN


def test_articles_leave_out_redirects_and_other_namespaces(tmp_path: Path) -> None:
    page = "<page><title>{}</title><ns>{}</ns>{}<revision><text>{} &amp; text</text></revision></page>"
    pages = [("A", 0, "", "a"), ("R", 0, '<redirect title="A"/>', "r"), ("Talk:A", 1, "", "t"), ("B", 0, "", "b")]
    xml = '<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">{}</mediawiki>'
    (tmp_path / "d.bz2").write_bytes(bz2.compress(xml.format("".join(page.format(*p) for p in pages)).encode()))
    assert list(wiki._articles(tmp_path / "d.bz2")) == [("A", "a & text"), ("B", "b & text")]


def test_articles_are_split_by_characters_in_an_order_of_their_own() -> None:
    articles = {f"title {i}": "x" * (100 + i) for i in range(500)}
    splits = wiki._split_articles(articles)
    assert sorted(title for titles in splits.values() for title in titles) == sorted(articles)
    total = sum(map(len, articles.values()))
    shares = {split: sum(len(articles[title]) for title in titles) / total for split, titles in splits.items()}
    assert shares == pytest.approx({"calibration": 0.6, "validation": 0.2, "test": 0.2}, abs=0.005)
    assert splits == wiki._split_articles(dict(reversed(articles.items())))
    assert splits["calibration"] != sorted(splits["calibration"])


@pytest.mark.zoo
def test_wiki_splits_share_no_article_and_have_the_size_written_down() -> None:
    parts = {split: data.texts("wiki", split) for split in SPLITS}
    assert data.is_cached("wiki")
    documents = [document for part in parts.values() for document in part.documents]
    assert len(documents) == len(set(documents)) == data.DATASETS["wiki"].items
    sizes = {split: sum(map(len, part.documents)) for split, part in parts.items()}
    assert sum(sizes.values()) > 2_500_000
    shares = {split: size / sum(sizes.values()) for split, size in sizes.items()}
    assert shares == pytest.approx({"calibration": 0.6, "validation": 0.2, "test": 0.2}, abs=0.02)
    assert data.texts("wiki", "all").documents == documents
    record = json.loads((wiki.extract_folder() / "zoo.json").read_text())
    assert sum(f["bytes"] for f in record["files"].values()) == pytest.approx(
        data.DATASETS["wiki"].size_bytes, rel=0.01
    )
    for scrap in ("{{", "[[", "''", "</", "Category:", "\n\n\n"):
        assert not [document for document in documents if scrap in document], scrap
    anarchism = next(document for document in parts["calibration"].documents if document.startswith("Anarchism is"))
    assert "See also" not in anarchism.splitlines()


@pytest.mark.zoo
def test_wiki_is_made_again_when_a_file_was_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = fetch_wheel(GENSIM_WHEEL)
    monkeypatch.setenv("COMPRESSLAB_HOME", str(tmp_path))
    monkeypatch.setattr(wiki, "fetch_wheel", lambda _: fetched)
    monkeypatch.setattr(wiki, "_articles", lambda _: ((f"T{i}", f"Text of {i}. " * 99) for i in range(20)))
    assert not data.is_cached("wiki")
    before = data.texts("wiki")
    (wiki.extract_folder() / "calibration.jsonl").write_text('{"title": "T", "text": "changed"}\n')
    assert not data.is_cached("wiki")
    assert data.texts("wiki") == before


@pytest.mark.zoo
def test_calibration_of_wiki_with_a_real_tokenizer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(zoo.model_folder("smollm2-135m"))
    found = data.calibration("wiki", tokenizer, samples=128, sequence_length=512)
    assert found.tokens == sum(batch["input_ids"].numel() for batch in found.batches) == 65_536
    assert "the" in tokenizer.decode(found.batches[0]["input_ids"][0])
    assert data.windows("wiki", tokenizer, length=512).shape[0] >= 200


@pytest.mark.zoo
def test_word_pairs_documents_and_digits() -> None:
    for name in ("wordsim353", "simlex999"):
        pairs = data.word_pairs(name)
        assert data.is_cached(name)
        assert len(pairs) == data.DATASETS[name].items
        assert all(0 <= pair.score <= 10 and pair.first and pair.second for pair in pairs)
    assert data.word_pairs("simlex999")[0] == ("old", "new", 1.58)
    lee = data.documents_with_similarity()
    assert lee.similarity.shape == (50, 50)
    assert np.array_equal(lee.similarity, lee.similarity.T)
    assert lee.similarity[0, 1] == 0.3
    assert lee.similarity.min() > 0
    assert data.texts("lee", "all").documents == lee.documents
    assert len(lee.documents) == 50
    digits = data.digits()
    assert (digits.images.shape, digits.images.dtype, digits.images.max()) == ((1797, 8, 8), np.float32, 16)
    assert (digits.labels.shape, set(digits.labels.tolist())) == ((1797,), set(range(10)))

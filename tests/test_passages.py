"""Passages for encoders, and what is measured of embeddings."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tiny
from compresslab import data, models
from compresslab.errors import CompressLabError
from compresslab.measure import embedding


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_text(tmp_path_factory.mktemp("text") / "words.txt")


class Tokenizer:
    """Word lengths as ids, between 101 and 102."""

    def __call__(self, lines: list[str], truncation: bool, max_length: int) -> dict[str, list[list[int]]]:
        assert truncation
        return {"input_ids": [[101, *map(len, line.split()[: max_length - 2]), 102] for line in lines]}


def test_passages_are_whole_lines_between_special_tokens(tmp_path: Path) -> None:
    lines = ["a heading", "one two three four five six seven eight nine", "", "a b c d e f g h"]
    (tmp_path / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    found = data.passages(str(tmp_path / "text.txt"), Tokenizer(), count=9, length=64, split="all")
    assert found["input_ids"].tolist() == [[101, 3, 3, 5, 4, 4, 3, 5, 5, 4, 102], [101, *[1] * 8, 102, 0]]
    assert found["attention_mask"].tolist() == [[1] * 11, [1] * 10 + [0]]
    cut = data.passages(str(tmp_path / "text.txt"), Tokenizer(), count=1, length=5, split="all")
    assert cut["input_ids"].tolist() == [[101, 3, 3, 5, 102]]
    (tmp_path / "short.txt").write_text("too short\n", encoding="utf-8")
    with pytest.raises(CompressLabError, match="no line of 8 words or more"):
        data.passages(str(tmp_path / "short.txt"), Tokenizer(), count=1, split="all")


def test_calibration_passages_hold_the_tokens_that_were_asked_for(text: Path) -> None:
    found = data.calibration_passages(str(text), Tokenizer(), samples=8, sequence_length=16, seed=1, batch_size=4)
    mask = torch.cat([batch["attention_mask"].flatten() for batch in found.batches])
    assert int(mask.sum()) == found.tokens
    assert 8 * 16 <= found.tokens < 8 * 16 + 16
    assert sum(len(batch["input_ids"]) for batch in found.batches) == found.samples == 11  # of 12 tokens each
    assert all(len(batch["input_ids"]) <= 4 for batch in found.batches)
    again = data.calibration_passages(str(text), Tokenizer(), samples=8, sequence_length=16, seed=1, batch_size=2)
    other = data.calibration_passages(str(text), Tokenizer(), samples=8, sequence_length=16, seed=2)
    assert again.sha256 == found.sha256 != other.sha256
    with pytest.raises(CompressLabError, match=r"samples need 16,000,000: use at most samples=\d+, or more text"):
        data.calibration_passages(str(text), Tokenizer(), samples=10**6, sequence_length=16)


class Encoder(nn.Module):
    """Hands out what it was made with as hidden states."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = nn.Parameter(hidden)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.hidden[input_ids[:, 0], : input_ids.shape[1]])


def test_embeddings_are_means_of_real_tokens_of_length_one() -> None:
    hidden = torch.randn(5, 6, 4, generator=torch.Generator().manual_seed(0))
    ids, mask = torch.arange(5)[:, None].repeat(1, 6), torch.ones(5, 6, dtype=torch.long)
    mask[1, 2:], mask[4, 1:] = 0, 0
    for batch_size in (1, 2, 5):
        found = embedding.embeddings(Encoder(hidden), ids, mask, batch_size=batch_size)
        for i in range(5):
            mean = hidden[i, mask[i].bool()].mean(dim=0)
            torch.testing.assert_close(found[i], mean / mean.norm())


def test_agreement_of_embeddings() -> None:
    generator = torch.Generator().manual_seed(1)
    a = nn.functional.normalize(torch.randn(7, 5, generator=generator), dim=1)
    b = nn.functional.normalize(a + 0.1 * torch.randn(7, 5, generator=generator), dim=1)
    found = {m.name: m for m in embedding.agreement(a, b)}
    cosines = [float(x @ y) for x, y in zip(a, b, strict=True)]
    assert found["embedding_cosine"].value == pytest.approx(np.mean(cosines))
    assert found["embedding_cosine_min"].value == pytest.approx(min(cosines))
    upper = np.triu_indices(7, 1)
    expected = np.corrcoef((a @ a.t()).numpy()[upper], (b @ b.t()).numpy()[upper])[0, 1]
    assert found["similarity_correlation"].value == pytest.approx(expected)
    assert found["similarity_correlation"].measurement().n == 21
    assert found["embedding_cosine"].measurement().n == 7
    same = {m.name: m.value for m in embedding.agreement(a, a)}
    assert same == pytest.approx({"embedding_cosine": 1, "embedding_cosine_min": 1, "similarity_correlation": 1})
    turned = nn.functional.normalize(a @ torch.linalg.qr(torch.randn(5, 5, generator=generator))[0], dim=1)
    kept = {m.name: m.value for m in embedding.agreement(a, turned)}
    assert kept["similarity_correlation"] == pytest.approx(1, abs=1e-5)  # a rotation changes no similarity
    assert kept["embedding_cosine"] < 0.9


def test_document_similarity_is_pearsons_with_what_people_said() -> None:
    a = nn.functional.normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(2)), dim=1)
    rated = torch.rand(6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (found,) = embedding.human_documents(a, rated)
    upper = np.triu_indices(6, 1)
    assert found.value == pytest.approx(np.corrcoef((a @ a.t()).numpy()[upper], rated.numpy()[upper])[0, 1])
    assert found.n == 15
    assert embedding.human_documents(a, torch.ones(6, 6)) == []


@pytest.mark.parametrize(("kind", "expected"), [("bert", True), ("llama", False), ("gpt2", False), ("vit", False)])
def test_what_is_an_encoder(kind: str, expected: bool, tmp_path: Path) -> None:
    tiny.save(kind, tmp_path)
    assert models.is_encoder(models.read_config(tmp_path)) == expected

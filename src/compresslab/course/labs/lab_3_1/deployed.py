"""Lab 3.1 on pre-trained encoders and picture classifiers, as ONNX Runtime runs them: bytes, latency, quality.

model, calibration texts of a seed -> an artifact for each way to round (compress) -> model.onnx (export) -> embeddings from ONNX
Runtime: their cosine to the float graph's, and how well they follow human judgement of documents and of words -> latency of one
text of 128 tokens, all graphs in turn, a process each. With labelled pictures: the same of a classifier, by top-1 accuracy.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import compresslab
from compresslab import data, models, recipe
from compresslab.data.questions import Rated
from compresslab.errors import CompressLabError
from compresslab.measure import embedding, rounds, sessions

Rows = dict[str, dict[str, float]]
WEIGHTS = {"method": "gptq", "bits": 8, "group_size": None, "symmetric": True}
DYNAMIC = {"method": "dynamic", "bits": 8, "symmetric": True}
STATIC = {"method": "static", "bits": 8, "symmetric": False}
WAYS: dict[str, list[dict[str, Any]]] = {
    "onnx-dynamic": [DYNAMIC | {"granularity": "token"}, WEIGHTS],
    "onnx-dynamic-tensor": [DYNAMIC | {"granularity": "tensor"}, WEIGHTS],
    "onnx-static-minmax": [STATIC | {"calibrator": "minmax"}, WEIGHTS],
    "onnx-static-percentile": [STATIC | {"calibrator": "percentile"}, WEIGHTS],
    "onnx-static-entropy": [STATIC | {"calibrator": "entropy"}, WEIGHTS],
    "onnx-static-mixed": [
        STATIC | {"calibrator": "minmax", "layers": {"*.output.dense": {"calibrator": "mse"}}},
        WEIGHTS,
    ],
}
WORDS, TIMED_TOKENS = "wordsim353", 128


@dataclass(frozen=True, kw_only=True)
class Deployed:
    """A scale of the lab on pre-trained models.

    Attributes:
        model: an encoder.
        samples, window: calibration texts and their tokens.
        passages: texts whose embeddings are compared.
        rounds: of the latency, for each graph.
        pictures: a folder or .parquet of labelled pictures; None leaves the classifier out.
        classifier: what sorts them.
    """

    model: str
    seeds: int
    samples: int = 128
    window: int = 128
    passages: int = 192
    rounds: int = 9
    threads: int = 2
    pictures: str | None = None
    classifier: str = "efficientnet-lite0"
    pictures_seen: int = 64


def measure(settings: Deployed, seed: int, say: Callable[[str], None]) -> Rows:
    """Rows of one seed."""
    if not models.is_encoder(models.find(settings.model).config):
        raise CompressLabError(
            f"{settings.model} is no encoder of texts: this scale embeds texts. For a language model: --scale micro"
        )
    with tempfile.TemporaryDirectory() as scratch:
        rows = _texts(settings, seed, say, Path(scratch))
        if settings.pictures is None:
            say("without --pictures the classifier is left out")
        else:
            rows |= _pictures(settings, seed, say, Path(scratch))
    return rows


def _texts(settings: Deployed, seed: int, say: Callable[[str], None], scratch: Path) -> Rows:
    tokenizer = models.find(settings.model).tokenizer()
    calibration = data.calibration_passages(
        "wiki", tokenizer, samples=settings.samples, sequence_length=settings.window, seed=seed, batch_size=16
    )
    folders = {"onnx-float": _exported(models.locate(settings.model), scratch / "onnx-float")}
    for name, steps in WAYS.items():
        say(f"seed {seed}: {name}")
        folders[name] = _rounded(settings.model, name, steps, calibration, scratch)
    texts = data.encoder_texts("wiki", tokenizer, count=settings.passages, longest=256)
    asked = data.questions(WORDS)
    assert isinstance(asked, Rated)
    found = {name: _embedded(folder, texts, asked, tokenizer, settings.threads) for name, folder in folders.items()}
    latency = _latency(folders, settings)
    return {
        name: _scores(found["onnx-float"], here, texts["rated.similarity"], torch.tensor(asked.scores))
        | {"latency_ms": latency[name], "bytes": float((folders[name] / "model.onnx").stat().st_size)}
        for name, here in found.items()
    }


def _rounded(model: str, name: str, steps: list[dict[str, Any]], given: Any, scratch: Path) -> Path:
    """The folder of an artifact's export."""
    chosen = recipe.parse({"name": name, "version": 1, "steps": steps, "ignore": ["@outside-blocks"]}, "lab 3.1")
    artifact, _ = compresslab.compress(model, chosen, given, out=scratch / f"{name}-artifact", measure=False)
    return _exported(artifact.folder, scratch / name)


def _exported(folder: Path, out: Path) -> Path:
    compresslab.export(folder, "onnx", out=out)
    return out


def _embedded(folder: Path, texts: dict[str, Tensor], asked: Any, tokenizer: Any, threads: int) -> dict[str, Tensor]:
    session = sessions.OnnxSession(folder / "model.onnx", threads)

    def hidden(ids: Tensor, mask: Tensor) -> Tensor:
        given = {
            "input_ids": ids.numpy(),
            "attention_mask": mask.numpy(),
            "token_type_ids": torch.zeros_like(ids).numpy(),
        }
        return torch.from_numpy(session.forward(given)[0])

    def words(said: list[str]) -> Tensor:
        made = tokenizer(said, padding=True, return_tensors="pt")
        return embedding.pooled(hidden, made["input_ids"], made["attention_mask"])

    kinds = ("passages", "rated")
    found = {k: embedding.pooled(hidden, texts[f"{k}.input_ids"], texts[f"{k}.attention_mask"]) for k in kinds}
    return found | {"first": words(asked.first), "second": words(asked.second)}


def _scores(
    reference: dict[str, Tensor], found: dict[str, Tensor], documents: Tensor, words: Tensor
) -> dict[str, float]:
    near = embedding.agreement(reference["passages"], found["passages"])[0]
    human = embedding.human_documents(found["rated"], documents)[0]
    alike = embedding.human_pairs(found["first"], found["second"], words, name="word_similarity")
    spearman = next(one for one in alike if one.name.endswith("spearman"))
    return {
        "embedding_cosine": near.value, "document_similarity": human.value, "word_similarity": spearman.value
    }  # fmt: skip


def _latency(folders: dict[str, Path], settings: Deployed) -> dict[str, float]:
    """Median milliseconds of one forward, all graphs in turn."""
    entrants = [
        rounds.Entrant(runtime="onnx", folder=folder, threads=settings.threads, prompt=TIMED_TOKENS)
        for folder in folders.values()
    ]
    timed = rounds.run(entrants, settings.rounds)
    said = [next(m.value for m in one.measurements if m.name == "forward_ms") for one in timed]
    return dict(zip(folders, map(float, said), strict=True))


def _pictures(settings: Deployed, seed: int, say: Callable[[str], None], scratch: Path) -> Rows:
    processor = models.find(settings.classifier).image_processor()
    given = data.image_calibration(
        str(settings.pictures), processor, samples=settings.pictures_seen, seed=seed, batch_size=4
    )
    say(f"seed {seed}: {settings.classifier}")
    artifact, _ = compresslab.compress(
        settings.classifier, "w8a8-static-vision", given, out=scratch / "pictures", measure=False
    )
    folders = {
        "pictures-float": _exported(models.locate(settings.classifier), scratch / "pictures-float"),
        "pictures-static": _exported(artifact.folder, scratch / "pictures-static"),
    }
    found = data.pictures(str(settings.pictures), "test")
    batches = list(data.image_batches(found, processor))
    latency = _latency(folders, settings)
    return {
        name: {
            "top1": _top1(folder, batches, torch.tensor(found.labels), settings.threads),
            "latency_ms": latency[name],
            "bytes": float((folder / "model.onnx").stat().st_size),
        }
        for name, folder in folders.items()
    }


def _top1(folder: Path, batches: list[Tensor], labels: Tensor, threads: int) -> float:
    session = sessions.OnnxSession(folder / "model.onnx", threads)
    said = [session.forward({"pixel_values": batch.float().numpy()})[0].argmax(axis=1) for batch in batches]
    return 100 * float((torch.cat([torch.from_numpy(one) for one in said]) == labels).double().mean())

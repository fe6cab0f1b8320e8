"""One forward of an encoder of 128 tokens: torch, ONNX Runtime in float and with its own int8, and our int8 exports, in turn.

    float model -> onnx in float -> onnxruntime.quantization.quantize_dynamic (int8 weights, by tensor and by channel)
    float model -> compress with each recipe -> onnx
      -> measure/rounds.py: a process each, A B C A B C ..., batches of 1 and 16 -> medians and their ratios
      -> embeddings of passages and of rated documents, in the same runtime -> cosine to float, correlation with people -> JSON

What is missing in --work is made there: compressing takes minutes, timing two or three.

    python benchmarks/encoder_latency.py --work DIR --out results/encoder-latency-minilm.json

Oracle: measure/rounds.py's and measure/embedding.py's own (tests/test_runtimes.py, tests/measure).
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import compresslab
from compresslab import data, models
from compresslab.measure import embedding, rounds
from compresslab.measure.environment import cpu_name
from compresslab.measure.rounds import Entrant, Timed

RECIPES = ("w8a8-dynamic", "w8a8-static-bert")
FLOAT, THEIRS, THEIRS_BY_CHANNEL = "onnxruntime-float", "onnxruntime-int8", "onnxruntime-int8-by-channel"
PASSAGES, TOKENS = 192, 128
COSINE = 0.995  # the aim, at no more time than onnxruntime's own int8

Embed = Callable[[Tensor, Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="minilm-l6")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    folders = make(given.model, given.work)
    found: dict[str, Any] = {
        "model": given.model, "threads": given.threads, "rounds": given.rounds, "tokens": TOKENS, "device": cpu_name(),
        "quality": quality(given.model, folders), "forward_ms": {}, "spread_ms": {}, "times_onnxruntime_int8": {},
    }  # fmt: skip
    for batch in given.batches:
        timed = in_turn(folders, batch, given.rounds, given.threads)
        medians = {name: value(one, "forward_ms") for name, one in timed.items()}
        found["forward_ms"][str(batch)] = medians
        found["spread_ms"][str(batch)] = {name: spread(one) for name, one in timed.items()}
        theirs = medians[THEIRS]
        found["times_onnxruntime_int8"][str(batch)] = {name: ms / theirs for name, ms in medians.items()}
    found["aim_met"] = {
        name: found["quality"][name]["embedding_cosine"] >= COSINE
        and all(ratios[name] <= 1 for ratios in found["times_onnxruntime_int8"].values())
        for name in RECIPES
    }
    given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


def make(model: str, work: Path) -> dict[str, Path]:
    """name -> folder of what is timed; "torch-float" is the model's own."""
    work.mkdir(parents=True, exist_ok=True)
    folders = {"torch-float": models.locate(model), FLOAT: work / "float"}
    if not folders[FLOAT].exists():
        compresslab.export(model, "onnx", out=folders[FLOAT])
    for name, by_channel in ((THEIRS, False), (THEIRS_BY_CHANNEL, True)):
        folders[name] = work / name
        if not folders[name].exists():
            quantize(folders[FLOAT], folders[name], by_channel)
    for recipe in RECIPES:
        folders[recipe] = work / f"{recipe}-onnx"
        if not folders[recipe].exists():
            artifact = work / recipe
            if not artifact.exists():
                compresslab.compress(model, recipe, "wiki", out=artifact, measure=False)
            compresslab.export(artifact, "onnx", out=folders[recipe])
    return folders


def quantize(source: Path, target: Path, by_channel: bool) -> None:
    """onnxruntime's own dynamic quantisation. By default it would take Attention too, and write a node (QAttention with the
    attribute is_causal, seen in 1.32) that it does not open itself."""
    import onnx
    from onnxruntime.quantization import QuantType, quant_pre_process, quantize_dynamic

    target.mkdir()
    logging.getLogger().setLevel(logging.ERROR)  # it advises at length
    prepared = target / "prepared.onnx"
    quant_pre_process(str(source / "model.onnx"), str(prepared), skip_symbolic_shape=True)
    model = onnx.load(prepared)
    quantize_dynamic(model, str(target / "model.onnx"), op_types_to_quantize=["MatMul", "Gemm", "Gather"],
                     weight_type=QuantType.QInt8, per_channel=by_channel)  # fmt: skip
    prepared.unlink()
    (target / "config.json").write_text((source / "config.json").read_text(encoding="utf-8"), encoding="utf-8")


def in_turn(folders: dict[str, Path], batch: int, turns: int, threads: int) -> dict[str, Timed]:
    entrants = [
        Entrant(runtime="torch" if name == "torch-float" else "onnx", folder=folder, threads=threads,
                prompt=TOKENS, batch=batch)
        for name, folder in folders.items()
    ]  # fmt: skip
    return dict(zip(folders, rounds.run(entrants, turns), strict=True))


def quality(model: str, folders: dict[str, Path]) -> dict[str, dict[str, float]]:
    """Of every one, in the runtime it is timed in."""
    folder = folders["torch-float"]
    tokenizer = models.load_tokenizer(folder, model)
    texts = data.encoder_texts("wiki", tokenizer, count=PASSAGES, longest=256)
    opened = models.load(folder, dtype=torch.float32)
    embeds: dict[str, Embed] = {"torch-float": lambda ids, mask: embedding.embeddings(opened, ids, mask)}
    embeds |= {name: in_onnxruntime(path) for name, path in folders.items() if name != "torch-float"}
    reference = embeds["torch-float"](texts["passages.input_ids"], texts["passages.attention_mask"])
    found = {}
    for name, embed in embeds.items():
        passages = embed(texts["passages.input_ids"], texts["passages.attention_mask"])
        documents = embed(texts["rated.input_ids"], texts["rated.attention_mask"])
        scores = embedding.agreement(reference, passages)
        scores += embedding.human_documents(documents, texts["rated.similarity"])
        found[name] = {score.name: score.value for score in scores}
    return found


def in_onnxruntime(folder: Path, batch: int = 16) -> Embed:
    """embedding.embeddings, over a graph."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]

    def embed(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        found = []
        for ids, mask in zip(input_ids.split(batch), attention_mask.split(batch), strict=True):
            longest = int(mask.sum(dim=1).max())
            read, kept = ids[:, :longest], mask[:, :longest]
            given = {"input_ids": read, "attention_mask": kept, "token_type_ids": torch.zeros_like(read)}
            hidden = session.run(None, {name: np.ascontiguousarray(given[name].numpy()) for name in names})[0]
            total = (torch.from_numpy(hidden) * kept[..., None]).sum(dim=1) / kept.sum(dim=1, keepdim=True)
            found.append(torch.nn.functional.normalize(total, dim=1))
        return torch.cat(found)

    return embed


def value(timed: Timed, name: str) -> float:
    return next(float(one.value) for one in timed.measurements if one.name == name)


def spread(timed: Timed) -> float:
    """Half of what lies between the deciles at the ends."""
    return next(float(one.spread or 0) for one in timed.measurements if one.name == "forward_ms")


if __name__ == "__main__":
    main()

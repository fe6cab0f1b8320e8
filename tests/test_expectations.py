"""Every shipped recipe on a real small model stays within the band that it promises in its `expect` block.

The bands of recipes for pictures are measured by hand (docs/log.md): no set of labelled photographs may be handed on.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from compresslab import compress, data, models, recipe
from compresslab.measure import fresh

MODEL = "smollm2-135m"

pytestmark = [pytest.mark.zoo, pytest.mark.expectations]


def perplexity(folder: Path, windows: Path) -> float:
    job = fresh.Job(folder=folder, windows=windows, threads=torch.get_num_threads(), speed=False)
    return next(m.value for m in fresh.measure(job).measurements if m.name == "perplexity")


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = models.locate(MODEL)
    ids = data.windows("wiki", models.load_tokenizer(folder, MODEL), length=512, count=8)
    path = tmp_path_factory.mktemp("windows") / "windows.safetensors"
    save_file({"input_ids": ids}, path)
    return path


@pytest.fixture(scope="module")
def uncompressed(windows: Path) -> float:
    return perplexity(models.locate(MODEL), windows)


@pytest.mark.parametrize("name", [name for name in sorted(recipe.shipped()) if MODEL in recipe.read(name).expect])
def test_perplexity_ratio_lies_in_the_recipes_band(
    name: str, windows: Path, uncompressed: float, tmp_path: Path
) -> None:
    chosen = recipe.read(name)
    low, high = chosen.expect[MODEL]["perplexity_ratio"]
    artifact, report = compress(
        MODEL, chosen, out=tmp_path / "out", settings={"calibration.samples": 16}, measure=False
    )
    ratio = perplexity(artifact.folder, windows) / uncompressed
    assert low <= ratio <= high, f"{name}: {ratio:.4f}"
    assert len(report.layers) == 210
    assert report.parity.tensors == 210

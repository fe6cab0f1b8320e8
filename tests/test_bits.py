"""Every bit width of every method that rounds weights, from `--set bits=` to a model opened again."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import tiny
from compresslab import models, pipeline, recipe
from compresslab.contract import Solver
from compresslab.methods import METHODS

BITS = (2, 3, 4, 5, 6, 8)
SOLVERS = [name for name, cls in METHODS.items() if isinstance(cls(), Solver) and "bits" in cls.__dataclass_fields__]
GROUP = 16


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(pipeline.fresh, "measure", tiny.fake_measure)
    with tiny.quick():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_text(tmp_path_factory.mktemp("text") / "words.txt")


@pytest.mark.parametrize("method", SOLVERS)
def test_every_width_comes_back_from_disk(method: str, model: Path, text: Path, tmp_path: Path) -> None:
    """Values of a group lie on at most 2^bits points, more than half as many in some group; more bits, less error."""
    inputs = tiny.token_batches(8)[0]
    original = models.load(model, dtype=torch.float32)
    errors, sizes = [], []
    with torch.no_grad():
        wanted = original(**inputs).logits
        for bits in BITS:
            made = tiny.recipe(method, group_size=GROUP)
            artifact, report = pipeline.compress(
                model, made, str(text), out=tmp_path / str(bits), settings={"bits": bits}, measure=False
            )
            assert recipe.parse(report.recipe, "report").rounding.settings["bits"] == bits
            loaded = artifact.load(dtype=torch.float32)
            models.decompress_(loaded)
            errors.append(float((loaded(**inputs).logits - wanted).square().mean()))
            weight = loaded.get_submodule("model.layers.1.mlp.down_proj").weight
            points = [len(group.unique()) for group in weight.reshape(-1, GROUP)]
            assert max(points) <= 2**bits
            assert max(points) > min(2 ** (bits - 1), GROUP // 2)
            sizes.append(report.layers[0].bits_per_weight)
    assert all(less < more for more, less in pairwise(errors)), errors
    assert all(less < more for less, more in pairwise(sizes)), sizes

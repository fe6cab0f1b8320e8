"""`specialise`, whole: networks opened from disk, what they take counted, and a run that is called again."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import tiny
from compresslab import data, models, once_for_all, specialising, zero_cost
from compresslab.budget import parse_budget
from compresslab.errors import CompressLabError
from compresslab.measure import counts
from compresslab.measure import layers as timing
from tiny import run_cli

SMALL = {
    "widths": [4, 8], "strides": [1, 2], "depths": [1], "expansions": [1, 2], "kernels": [3], "stem_channels": 4,
    "head_channels": 8, "image_size": 12, "epochs": 1.0, "batch": 8, "size": 4, "generations": 1,
}  # fmt: skip


@pytest.fixture
def pictures(tmp_path: Path) -> str:
    """Two classes by name, told apart by their brightness."""
    for split, each in (("train", 24), ("valid", 8), ("test", 8)):
        for name, level in (("dark", 40), ("light", 200)):
            folder = tmp_path / "pictures" / split / name
            folder.mkdir(parents=True)
            for number in range(each):
                shade = level + random.Random(f"{split}{name}{number}").randrange(-30, 30)
                Image.new("RGB", (14, 14), (shade, shade, shade)).save(folder / f"{number}.png")
    return str(tmp_path / "pictures")


def by_weights(network: Any, inputs: Any, repeats: int = 1) -> float:
    """A device that takes a microsecond for each weight."""
    return sum(parameter.numel() for parameter in network.parameters()) / 1e3


def test_a_network_for_each_limit_opens_and_is_what_was_said(
    tmp_path: Path, pictures: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(timing, "time_network_ms", by_weights)
    settings, out = once_for_all.settings_from(SMALL), tmp_path / "out"
    rows = once_for_all.specialise(pictures, ["0.8macs", "0.5ms/forward@4"], out=out, settings=settings)
    assert list(rows) == ["largest", "0.8macs", "0.5ms@4"] and rows == json.loads(
        (out / "specialised.json").read_text()
    )
    whole = rows["largest"]
    assert rows["0.8macs"]["macs_frac"] <= 0.8 < whole["macs_frac"] == 1
    assert rows["0.5ms@4"]["measured_ms"] == pytest.approx(rows["0.5ms@4"]["foretold_ms"]) and (
        rows["0.5ms@4"]["measured_ms"] <= 0.5
    )
    macs = []
    for name in ("0.8macs", "0.5ms@4"):
        network = models.load(out / name)
        assert network.config.id2label == {0: "dark", 1: "light"}
        test, processor = data.pictures(pictures, "test"), models.load_image_processor(out / name, name)
        right = 0
        for i, label in enumerate(test.labels):
            [pixels] = data.image_batches(test, processor, indices=[i])
            with torch.no_grad():
                right += network.config.id2label[int(network(pixels).logits.argmax())] == label
        assert 100 * right / len(test.labels) == rows[name]["accuracy_percent"]
        assert sum(p.numel() for p in network.parameters()) == rows[name]["parameters"]
        found = counts.operations(network, {"pixel_values": torch.zeros(1, 3, 12, 12)})
        macs.append(next(one.value for one in found if one.name == "macs"))
    assert macs[0] / macs[1] == pytest.approx(rows["0.8macs"]["macs_frac"] / rows["0.5ms@4"]["macs_frac"])

    # Called again, with a further limit: what is known is neither trained, judged nor timed again.
    monkeypatch.setattr(specialising.ShapeJudge, "_measured", lambda *given: pytest.fail("judged again"))
    changes = [word for key, value in SMALL.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    code, said, _ = run_cli(
        monkeypatch, capsys, "specialise", pictures, "--out", str(out), "--limit", "0.8macs", "--limit", "0.5ms@4", "--json",
        *changes,
    )  # fmt: skip
    assert code == 0 and json.loads(said) == rows
    # With a proxy, and as another search: what is judged may differ, and the supernet is the same.
    monkeypatch.undo()
    guessed: list[str] = []
    score = zero_cost.score
    monkeypatch.setattr(zero_cost, "score", lambda name, *given: guessed.append(name) or score(name, *given))
    space = dataclasses.replace(settings.space, num_labels=2)
    most = specialising.ShapeCosts(space).bytes(space.largest) - 300
    size = str(parse_budget(f"{most / 1e6:.6f}MB"))
    for limit, more in (("0.8macs", {"proxy": "naswot", "proposals": 3}), (size, {"search_by": "drawn"})):
        rows = once_for_all.specialise(pictures, [limit], out=out, settings=once_for_all.settings_from(SMALL | more))
        assert rows[limit]["macs_frac"] <= (0.8 if limit == "0.8macs" else 0.99)
    assert (out / size / "model.safetensors").stat().st_size <= most
    assert guessed and set(guessed) == {"naswot"}
    with pytest.raises(CompressLabError, match="holds a supernet of other pictures, settings or seed"):
        once_for_all.specialise(pictures, ["0.8macs"], out=out, settings=settings, seed=1)


@pytest.mark.parametrize(
    ("given", "limit", "why"),
    [
        ({"width": 3}, "0.5macs", "no setting 'width'|setting 'width'|unknown setting"),
        ({"epochs": -1}, "0.5macs", "setting epochs: "),
        ({"kernels": [3, 4]}, "0.5macs", "kernels are odd"),
        ({}, "3bits", "limit '3bits': give a share of the operations or a latency"),
        ({}, "3ms/forward@2x8", "give a share of the operations or a latency"),
        ({"proxy": "naswott"}, "0.5macs", "unknown proxy 'naswott': did you mean 'naswot'"),
        ({"search_by": "evolutions"}, "0.5macs", "unknown search 'evolutions': did you mean 'evolution'"),
        ({"search_by": "drawn", "proxy": "snip"}, "0.5macs", "drawn breeds none: leave one of the two out"),
        ({}, "0.01macs", "0.01macs cannot be met: the least possible is 0.[0-9]+macs"),
    ],
)
def test_what_is_refused(tmp_path: Path, pictures: str, given: dict[str, Any], limit: str, why: str) -> None:
    with pytest.raises(CompressLabError, match=why):
        settings = once_for_all.settings_from(SMALL | given)
        once_for_all.specialise(pictures, [limit], out=tmp_path / "out", settings=settings)


def test_classes_that_are_numbers_and_parts_of_one_folder(tmp_path: Path) -> None:
    source = str(tiny.write_pictures(tmp_path / "pictures", classes=4, each=10))
    settings = once_for_all.settings_from(SMALL | {"samples": 5})
    processor = once_for_all._processor(tmp_path / "out", 12)
    found = once_for_all.pictures_of(source, processor, settings.samples)
    assert (found.classes, found.names) == (4, None)
    assert [len(part) for part in (found.shown, found.judged, found.tested)] == [5, 4, 28]
    assert found.shown[0]["pixel_values"].shape == (3, 12, 12)

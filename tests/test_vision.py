"""Pictures from a folder or a table to an artifact of our own layout, opened again and measured."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tiny
from compresslab import compress, data, evaluation, models
from compresslab.deploy import native
from compresslab.errors import CompressLabError
from compresslab.measure import fresh
from compresslab.numerics.grid import Grid, QuantInput
from compresslab.recipe import Recipe, parse
from compresslab.weights import FolderWeights

STATIC = {"method": "static", "calibrator": "minmax"}
RTN = {"method": "rtn", "bits": 8, "group_size": None, "symmetric": True}
FOLD, CORRECT = {"method": "batchnorm-folding"}, {"method": "bias-correction"}
EQUALIZE = {"method": "cross-layer-equalization"}


@pytest.fixture(autouse=True)
def one_thread() -> object:
    with tiny.quick():
        yield


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Artifacts are opened in this process only: that a fresh one finds the same is tested once, with the report."""
    monkeypatch.setattr(fresh, "measure", tiny.fake_measure)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_pictures(tmp_path_factory.mktemp("pictures") / "source")


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_convnet("efficientnet-lite", tmp_path_factory.mktemp("network") / "model")


def recipe(*steps: dict[str, Any], samples: int = 8) -> Recipe:
    raw = {"name": "tiny", "version": 1, "steps": list(steps), "ignore": [], "calibration": {"samples": samples}}
    return parse(raw, "tiny")


# -- pictures --------------------------------------------------------------------------------------------------------


def write_table(path: Path, folder: Path, **columns: Any) -> Path:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    files = sorted(folder.rglob("*.png"))
    rows = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    made = {"image": rows, "label": [int(file.parent.name) for file in files], **columns}
    pq.write_table(pa.table({k: v for k, v in made.items() if v is not None}), path)
    return path


def test_splits_never_overlap_and_make_up_the_whole(pictures: Path, tmp_path: Path) -> None:
    table = write_table(tmp_path / "table.parquet", pictures)
    for source in (pictures, table):
        parts = [data.pictures(str(source), split) for split in ("calibration", "validation", "test")]
        assert [len(part.labels) for part in parts] == [8, 4, 28]
        seen = [part.open(i) for part in parts for i in range(len(part.labels))]
        assert len(set(seen)) == 40
        whole = data.pictures(str(source), "all")
        assert sorted(seen) == sorted(whole.open(i) for i in range(40))
        again = data.pictures(str(source), "test")
        assert [again.open(i) for i in range(28)] == [parts[2].open(i) for i in range(28)]
        assert len({str(label) for label in parts[2].labels}) == 5


def test_folders_named_as_splits_are_the_splits(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "train").symlink_to(pictures)
    (tmp_path / "test").symlink_to(pictures)
    assert len(data.pictures(str(tmp_path), "calibration").labels) == 40
    assert len(data.pictures(str(tmp_path), "test").labels) == 40
    with pytest.raises(CompressLabError, match="has the splits calibration, test: add a folder for validation"):
        data.pictures(str(tmp_path), "validation")


@pytest.mark.parametrize(
    ("names", "classes", "ids"),
    [
        (["dog", "cat", "dog"], 2, [1, 0, 1]),
        (["7", "0", "3"], 10, [7, 0, 3]),
        ([4, 2, 2], 5, [4, 2, 2]),
        (["b", "a", "b"], 2, [1, 0, 1]),
    ],
)
def test_labels_become_the_models_classes(names: list[Any], classes: int, ids: list[int]) -> None:
    found = data.Pictures(name="x", split="all", revision="", labels=names, open=lambda i: b"")
    assert data.label_ids(found, {"cat": 0, "dog": 1}, classes).tolist() == ids


@pytest.mark.parametrize(
    ("names", "said"),
    [(["b", "a"], "2 classes such as 'a', which the model with 5 classes does not name"), ([9], "has the label 9")],
)
def test_labels_that_cannot_be_the_models_are_told(names: list[Any], said: str) -> None:
    found = data.Pictures(name="x", split="all", revision="", labels=names, open=lambda i: b"")
    with pytest.raises(CompressLabError, match=said):
        data.label_ids(found, {}, 5)


def test_what_is_wrong_with_a_source_of_pictures_is_told(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(CompressLabError, match=r"nowhere: no such file or folder; this model reads pictures"):
        data.pictures(str(tmp_path / "nowhere"))
    (tmp_path / "text.txt").write_text("words")
    with pytest.raises(CompressLabError, match="holds no pictures"):
        data.pictures(str(tmp_path / "text.txt"))
    bad = write_table(tmp_path / "bad.parquet", pictures, label=["one"] * 40)
    with pytest.raises(CompressLabError, match="label must hold a whole number"):
        data.pictures(str(bad))
    (tmp_path / "broken" / "0").mkdir(parents=True)
    (tmp_path / "broken" / "0" / "a.png").write_bytes(b"no picture")
    processor = models.load_image_processor(tiny.save_convnet("efficientnet-lite", tmp_path / "model"), "tiny")
    with pytest.raises(CompressLabError, match="picture 0 of the all split of broken"):
        list(data.image_batches(data.pictures(str(tmp_path / "broken"), "all"), processor))
    with pytest.raises(CompressLabError, match="8 pictures: use at most --samples 8"):
        data.image_calibration(str(pictures), processor, samples=9)


def test_pictures_are_prepared_as_the_model_says(pictures: Path, network: Path) -> None:
    from PIL import Image

    found = data.pictures(str(pictures), "all")
    batch = next(data.image_batches(found, models.load_image_processor(network, "tiny"), size=3))
    raw = torch.from_numpy(np.array(Image.open(io.BytesIO(found.open(1)))))[2:18, 2:18] / 255
    torch.testing.assert_close(batch[1], (raw.permute(2, 0, 1) - 0.5) / 0.25)


# -- the whole flow --------------------------------------------------------------------------------------------------


def integer_output(module: nn.Module, x: Tensor, rounding: QuantInput, weight: Any) -> Tensor:
    """What an integer runtime computes for a convolution: exact sums of products of codes, scaled at the end."""
    codes, scale, zero_point = rounding.quantize(x)
    assert isinstance(module, nn.Conv2d)
    assert zero_point is not None
    a = codes.double() - float(zero_point)  # zeros around the picture are the zero point's code
    b = weight.codes.double().view(module.weight.shape)
    total = nn.functional.conv2d(a, b, None, module.stride, module.padding, module.dilation, module.groups)
    assert torch.equal(total, total.round())
    real = total * weight.scale.double().view(1, -1, 1, 1) * float(scale)
    return real if module.bias is None else real + module.bias.double().view(1, -1, 1, 1)


@pytest.mark.usefixtures("no_process")
@pytest.mark.parametrize("steps", [(FOLD, STATIC, RTN, CORRECT), (FOLD, EQUALIZE, STATIC, RTN, CORRECT), (STATIC, RTN)],
                         ids=["fold", "equalize", "norms-stay"])  # fmt: skip
def test_the_artifact_is_what_was_solved_and_computes_in_integers(
    steps: Any, network: Path, pictures: Path, tmp_path: Path
) -> None:
    artifact, report = compress(network, recipe(*steps), str(pictures), out=tmp_path / "out", measure=False)
    layers = [n for n, m in models.load(network).named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert report.parity.runtime == "compresslab"
    assert report.parity.tensors == len(layers) == len(report.layers)
    assert not report.skipped
    assert all(layer.activation_bits == 8 for layer in report.layers)
    weights = FolderWeights(artifact.folder)
    assert all(weights.get(f"{name}.weight").dtype == torch.int8 for name in layers)
    model = artifact.load()
    solved, rounding = dict(native.read_weights(artifact.folder)), dict(native.read_inputs(artifact.folder))
    checked = []

    def check(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            # The hook that rounds ran before: rounding what is rounded already changes nothing.
            expected = integer_output(module, args[0], rounding[name], solved[name])
            torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-4)
            checked.append(name)

        return hook

    for name in layers:
        if isinstance(model.get_submodule(name), nn.Conv2d):
            model.get_submodule(name).register_forward_hook(check(name))
    with torch.inference_mode():
        model(**tiny.picture_batches(3)[0])
    assert sorted(checked) == sorted(name for name in layers if name != "_fc")


def test_accuracy_and_agreement_stand_in_the_report(network: Path, pictures: Path, tmp_path: Path) -> None:
    artifact, report = compress(network, recipe(FOLD, STATIC, RTN, CORRECT), str(pictures), out=tmp_path / "out")
    before, after = ({m.name: m for m in side} for side in (report.before, report.after))
    assert report.parity.tensors == len(report.layers) == 17
    assert before["top1_accuracy"].n == after["top1_accuracy"].n == 28
    assert after["top1_agreement"].value > 0.8
    assert after["weight_bytes"].value < before["weight_bytes"].value
    assert {"forward_ms", "load_ms"} <= set(before) & set(after)
    found = {m.name: m for m in evaluation.evaluate(artifact.folder, str(pictures), device="cpu")}
    assert found["top1_accuracy"].value == after["top1_accuracy"].value
    assert "top-1" in (artifact.folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.usefixtures("no_process")
def test_biases_are_corrected_to_the_float_networks_mean(network: Path, pictures: Path, tmp_path: Path) -> None:
    """The first layer sees the same input in every network, so the mean of its output is exactly what it was."""
    coarse = RTN | {"bits": 3}
    means = {}
    for name, steps in {"float": None, "plain": (FOLD, coarse), "corrected": (FOLD, coarse, CORRECT)}.items():
        folder = network
        if steps is not None:
            folder = compress(network, recipe(*steps), str(pictures), out=tmp_path / name, measure=False)[0].folder
        model, seen = models.load(folder), []
        layer = "_bn0" if steps is None else "_conv_stem"
        model.get_submodule(layer).register_forward_hook(lambda m, args, out, seen=seen: seen.append(out))
        processor = models.load_image_processor(network, "tiny")
        with torch.inference_mode():
            for batch in data.image_calibration(str(pictures), processor, samples=8).batches:
                model(**batch)
        means[name] = torch.cat(seen).mean(dim=(0, 2, 3))
    torch.testing.assert_close(means["corrected"], means["float"], rtol=1e-3, atol=2e-3)
    assert float((means["plain"] - means["float"]).abs().max()) > 0.01


@pytest.mark.usefixtures("no_process")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_artifact_opens_in_any_dtype(dtype: torch.dtype, network: Path, pictures: Path, tmp_path: Path) -> None:
    artifact, _ = compress(network, recipe(FOLD, STATIC, RTN), str(pictures), out=tmp_path / "out", measure=False)
    batch = tiny.picture_batches(4)[0]["pixel_values"]
    with torch.inference_mode():
        exact = models.load(network)(batch).logits
        found = artifact.load(dtype=dtype)(batch.to(dtype)).logits
    assert found.dtype == dtype
    assert float(nn.functional.cosine_similarity(exact, found.float(), dim=1).min()) > 0.98


@pytest.mark.usefixtures("no_process")
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_alone_are_packed(bits: int, network: Path, pictures: Path, tmp_path: Path) -> None:
    gptq = {"method": "gptq", "bits": bits, "group_size": None, "symmetric": False}
    artifact, report = compress(network, recipe(FOLD, gptq), str(pictures), out=tmp_path / "out", measure=False)
    assert report.parity.tensors == len(report.layers)
    assert FolderWeights(artifact.folder).get("_conv_stem.weight_packed").dtype == torch.int32
    assert all(layer.activation_bits is None for layer in report.layers)


@pytest.mark.usefixtures("no_process")
def test_a_model_without_convolutions_in_the_plan_stays_in_compressed_tensors(pictures: Path, tmp_path: Path) -> None:
    artifact, report = compress(tiny.make("vit"), tiny.recipe("rtn"), data=None, out=tmp_path / "out", measure=False)
    config = json.loads((artifact.folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert report.parity.runtime == "transformers"


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        (({"method": "dynamic"}, RTN), r"_depthwise_conv is a convolution, whose sum runs over pixels"),
        ((FOLD, FOLD, RTN), "no batch norm that follows a convolution"),
        ((EQUALIZE, RTN), "fold batch norms first"),
        ((STATIC, FOLD, RTN), "steps static, batchnorm-folding, rtn: it needs one that rounds"),
        ((CORRECT, RTN), "the one that rounds, .*any that correct"),
        ((FOLD, CORRECT), "it needs one that rounds"),
        (({"method": "gptq", "group_size": 16},), "_depthwise_conv, stored as 8 x 9: group size 16 does not divide"),
    ],
)
def test_what_cannot_be_done_is_told(steps: Any, said: str, network: Path, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(CompressLabError, match=said):
        compress(network, recipe(*steps), str(pictures), out=tmp_path / "out", measure=False)
    assert not (tmp_path / "out").exists()


def test_text_is_no_data_for_a_model_that_reads_pictures(network: Path, tmp_path: Path) -> None:
    with pytest.raises(CompressLabError, match="this model reads pictures"):
        compress(network, recipe(FOLD, STATIC, RTN), "wiki", out=tmp_path / "out")


@pytest.mark.usefixtures("no_process")
def test_a_layer_without_a_bias_is_told(network: Path, pictures: Path, tmp_path: Path) -> None:
    _, report = compress(network, recipe(RTN, CORRECT), str(pictures), out=tmp_path / "out", measure=False)
    notes = {layer.name: layer.note for layer in report.layers}
    assert "no bias to correct" in notes["_conv_stem"]
    assert "no bias" not in notes["_fc"]


@pytest.mark.usefixtures("no_process")
def test_linear_layers_of_an_encoder_are_corrected_too(tmp_path: Path) -> None:
    folder = tiny.save("bert", tmp_path / "bert")
    text = tiny.write_text(tmp_path / "words.txt")
    raw = {
        "name": "t",
        "version": 1,
        "steps": [RTN | {"bits": 3}, CORRECT],
        "calibration": {"samples": 4, "sequence_length": 16},
    }
    artifact, report = compress(folder, parse(raw, "t"), str(text), out=tmp_path / "out", measure=False)
    name = report.layers[0].name
    stored, corrected = (FolderWeights(f).get(f"{name}.bias") for f in (folder, artifact.folder))
    assert not torch.equal(stored, corrected)
    assert report.parity.runtime == "transformers"
    opened = artifact.load().state_dict()
    assert torch.equal(opened[f"{name}.bias"], corrected)


def test_rounding_an_input_twice_changes_nothing() -> None:
    grid = Grid(bits=8, symmetric=False, granularity="tensor")
    rounding = QuantInput(grid=grid, scale=torch.tensor([0.03]), zero_point=torch.tensor([-7], dtype=torch.int8))
    once = native.RoundedInput(rounding)(torch.randn(2, 3, 5, 4))
    assert torch.equal(native.RoundedInput(rounding)(once), once)
    assert float(native.RoundedInput(rounding)(torch.zeros(1, 1, 1, 1)).abs().max()) == 0

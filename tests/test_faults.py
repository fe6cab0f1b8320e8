"""Faults a user can mend: one line that says what to do, exit code 2, no traceback, and nothing left at the output.

Every fault goes through the command line in this process. It catches CompressLabError and nothing else, so any other
exception fails the test by itself.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

import tiny
from compresslab import artifact, pipeline
from compresslab.artifact import Artifact
from compresslab.errors import CompressLabError
from compresslab.measure import hardware


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for kind in ("llama", "gpt2", "bert"):
        tiny.save(kind, root / kind)
    tiny.write_text(root / "words.txt")
    (root / "tiny.yaml").write_text(tiny.recipe().to_yaml(), encoding="utf-8")
    (root / "rtn.yaml").write_text(tiny.recipe("rtn").to_yaml(), encoding="utf-8")
    return root


@pytest.fixture
def llama(saved: Path, tmp_path: Path) -> Path:
    """A copy, to be broken."""
    return Path(shutil.copytree(saved / "llama", tmp_path / "llama"))


class Shell:
    """`compresslab compress` with a tiny model, recipe and text unless told otherwise."""

    def __init__(
        self, saved: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.saved, self.out, self._fixtures = saved, out, (monkeypatch, capsys)

    @property
    def partial(self) -> Path:
        return self.out.with_name(self.out.name + ".partial")

    def __call__(
        self, *more: object, model: object = None, recipe: object = None, data: object = None
    ) -> tuple[int, str, str]:
        chosen = {
            "--recipe": recipe or self.saved / "tiny.yaml",
            "--data": data or self.saved / "words.txt",
            "--out": self.out,
        }
        options = [str(part) for pair in chosen.items() for part in pair]
        return tiny.run_cli(*self._fixtures, "compress", model or self.saved / "llama", *options, "--no-measure", *more)

    def fails(self, pattern: str, *more: object, early: bool = True, **named: object) -> str:
        """Run it, and check all that is promised of a fault. `early`: it is seen before anything is written."""
        code, out, err = self(*more, **named)
        assert code == 2, (code, out, err)
        assert out == ""
        assert "Traceback" not in err
        lines = err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        assert re.search(pattern, lines[0]), lines[0]
        assert not self.out.exists()
        if early:
            assert not self.partial.exists()
        return lines[0]


@pytest.fixture
def shell(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Shell]:
    monkeypatch.setattr(pipeline.fresh, "measure", tiny.fake_measure)
    with tiny.quick():
        yield Shell(saved, tmp_path / "out", monkeypatch, capsys)


def test_without_a_fault_all_goes_well(shell: Shell) -> None:
    """Or the tests below could fail for another reason than theirs."""
    code, _, err = shell("--quiet")
    assert (code, err) == (0, "")
    Artifact(shell.out).verify()


# --- recipes and settings ------------------------------------------------------------------------------------------


def test_unknown_recipe(shell: Shell) -> None:
    shell.fails("unknown recipe 'w4a16-gpqt': did you mean 'w4a16-gptq'", recipe="w4a16-gpqt")


def test_recipe_file_not_there(shell: Shell) -> None:
    shell.fails(r"no recipe file .*gone\.yaml; shipped recipes: .*w4a16-gptq", recipe=shell.saved / "gone.yaml")


def written(folder: Path, text: str) -> Path:
    path = folder / "given.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("name: a\nversion: 1\nsteps: [{method: gtpq}]\n", r"unknown method 'gtpq': did you mean 'gptq'"),
        ("name: a\nversion: 1\nsteps: [{method: gptq, bit: 4}]\n", r"unknown setting of gptq 'bit': did you mean 'bits'"),
        ("name: a\nversion: 1\nsteps: [{method: gptq}]\ncalibratoin: {}\n", r"unknown key 'calibratoin': did you mean 'cal"),
        ("name: a\nversion: 1\nsteps: [{method: gptq}]\ncalibration: {sample: 3}\n", r"did you mean 'samples'"),
        ("name: a\nversion: 1\nsteps: [{method: gptq, bits: four}]\n", r"bits must be int, not 'four'"),
        ("name: a\nversion: 1\nsteps: [{method: gptq, bits: 9}]\n", r"bits must be 2 to 8, not 9"),
        ("name: a\nversion: 1\nsteps: [{method: gptq, bits: 4.0}]\n", r"bits must be int, not 4\.0"),
        ("name: a\nversion: 1\nsteps: [{method: gptq, symmetric: 1}]\n", r"symmetric must be bool, not 1"),
        ("name: a\nversion: 1\nsteps: [{method: gptq, group_size: 0}]\n", r"group_size must be at least 1, not 0"),
        ("name: a\nversion: 1\nsteps: [{method: gptq, group_size: true}]\n", r"group_size must be int or None, not True"),
        ("name: a\nversion: 1\nsteps: [{bits: 4}]\n", r"a step needs a 'method' key"),
        ("name: a\nversion: 1\nsteps: [gptq]\n", r"a step needs a 'method' key"),
        ("name: a\nversion: 1\nsteps: []\n", r"steps: .*at least 1 item"),
        ("name: a\nversion: 1\nsteps: [{method: rtn}, {method: gptq}]\n", r"has the steps rtn, gptq: it needs one that rounds"),
        ("name: a\nversion: 1\nsteps: [{method: gptq, layers: {'*': {bit: 4}}}]\n", r"'\*': unknown setting of gptq 'bit'"),
        ("name: a\nversion: 1\nsteps: [{method: gptq, layers: {'*': half}}]\n", r"layers '\*': .* one of float, .* not 'half'"),
        ("name: a\nversion: 1\nsteps: [{method: rtn, layers: {'q*': float}}]\n", r"pattern 'q\*' .* matches no linear layer"),
        ("name: a\nversion: one\nsteps: [{method: rtn}]\n", r"version: .*integer"),
        ("name: a\nsteps: [{method: rtn}]\n", r"version: field required"),
        ("name: a\nversion: 1\nsteps: [{method: rtn}]\ncalibration: {samples: 0}\n", r"calibration\.samples: .*greater"),
        ("- a\n- list\n", r"a recipe is a mapping with the keys name, version"),
        ("", r"a recipe is a mapping"),
        ("a: [1\nb: }", r"is not YAML: "),
        ("name: a\nname\n", r"is not YAML: "),
        ("\x00", r"is not YAML: "),
        ("name: a\nversion: 1\nsteps: [{method: static, granularity: channel}, {method: rtn}]\n", r"integer product sums over"),
        ("name: a\nversion: 1\nsteps: [{method: static}, {method: dynamic}, {method: rtn}]\n", r"at most one for activations"),
        ("name: a\nversion: 1\nsteps: [{method: dynamic}, {method: smoothquant}, {method: rtn}]\n", r"at most one for act"),
        ("name: a\nversion: 1\nsteps: [{method: dynamic, layers: {q: {}}}, {method: rtn}]\n", r"'q' .* matches no linear"),
    ],
)  # fmt: skip
def test_recipe_that_is_wrong(shell: Shell, tmp_path: Path, text: str, pattern: str) -> None:
    shell.fails(pattern, recipe=written(tmp_path, text))


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir [{}]", "!!python/object/new:os.mkdir [{}]"])
def test_recipe_that_constructs_objects(shell: Shell, tmp_path: Path, tag: str) -> None:
    trap = tmp_path / "trap"
    for key in ("name", "steps", "surprise"):
        shell.fails(
            r"a recipe cannot construct objects .*: use plain values",
            recipe=written(tmp_path, f"version: 1\n{key}: {tag.format(trap)}\n"),
        )
    shell.fails("", "--set", f"bits={tag.format(trap)}")
    assert not trap.exists()


def test_recipe_that_is_a_folder(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    shell.fails("folder.yaml", recipe=tmp_path / "folder.yaml")


def test_recipe_that_is_not_text(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00name")
    shell.fails("is not YAML", recipe=tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    ("setting", "pattern"),
    [
        ("bit=3", r"unknown recipe setting 'bit': did you mean 'bits'"),
        ("calibration.sample=3", r"unknown recipe setting 'calibration\.sample': did you mean 'calibration\.samples'"),
        ("nothing.at.all=3", r"unknown recipe setting 'nothing\.at\.all'"),
        ("bits=four", r"bits must be int, not 'four'"),
        ("bits=1", r"bits must be 2 to 8, not 1"),
        ("bits=", r"bits must be int, not None"),
        ("bits", r"--set takes KEY=VALUE, not 'bits'"),
        ("=3", r"--set takes KEY=VALUE"),
        ("bits=[", r"--set bits: '\[' is not a plain value"),
        ("damp_frac=much", r"damp_frac must be float, not 'much'"),
        ("calibration.samples=-1", r"calibration\.samples: .*greater than or equal to 1"),
        ("calibration.samples=x", r"calibration\.samples: .*integer"),
        ("ignore=head", r"ignore: .*tuple"),
        ("name=", r"name: .*string"),
    ],
)  # fmt: skip
def test_set_that_is_wrong(shell: Shell, setting: str, pattern: str) -> None:
    shell.fails(pattern, "--set", setting)


@pytest.mark.parametrize("value", ["-1", ".inf", ".nan"])
def test_damping_out_of_range(shell: Shell, value: str) -> None:
    shell.fails("damp_frac", "--set", f"damp_frac={value}")


def test_samples_and_length_out_of_range(shell: Shell) -> None:
    shell.fails(r"calibration\.samples: .*greater", "--samples", "0")
    shell.fails(r"calibration\.sequence_length: .*greater", "--sequence-length", "1")


def test_ignore_that_matches_nothing(shell: Shell) -> None:
    shell.fails(r"ignore pattern 'nothing\*' matches no linear layer", "--ignore", "nothing*")


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        (
            ("--budget", "20s"),
            r"budget '20s': give average bits per weight, megabytes .*such as 3\.5bits, 80MB or 20ms",
        ),
        (("--budget", "20ms"), r"a budget in ms is measured on torch's packed kernels, which need a CPU that"),
        (("--budget", "1bits"), r"a budget of 1bits cannot be met: the least possible is \d+\.\d+bits"),
        (("--budget", "0.06MB"), r"a budget of 0\.06MB cannot be met: the least possible is 0\.0\d+MB"),
        (("--budget", "40bits"), r"a budget of 40bits leaves no layer to round"),
        (("--budget", "6bits", "--sensitivity", "grma"), r"unknown sensitivity 'grma': did you mean 'gram'"),
        (("--budget", "6bits", "--set", "group_size="), r"no asymmetric grid per output channel beside other grids"),
        (("--set", "layers={nothing*: float}"), r"pattern 'nothing\*' of the recipe's layers matches no linear layer"),
        (("--set", "layers=8"), r"layers is a mapping from patterns to settings, not 8"),
    ],
)
def test_mixed_precision_that_cannot_be(shell: Shell, options: tuple[str, ...], pattern: str) -> None:
    shell.fails(pattern, *options)


def test_all_ignored(shell: Shell) -> None:
    shell.fails("has no linear layer left to compress", "--ignore", "*_proj")


def test_group_size_that_does_not_divide(shell: Shell) -> None:
    shell.fails(
        r"layer model\.layers\.0\.self_attn\.q_proj.*: group size 24 does not divide 32 input channels.*group_size",
        *("--set", "group_size=24"),
    )


def test_activations_of_a_conv1d(shell: Shell) -> None:
    shell.fails(
        r"layer transformer\.h\.0\.attn\.c_attn is a Conv1D.*take a weight-only recipe such as w8a16, or .*--ignore",
        model=shell.saved / "gpt2", recipe="w8a8-dynamic",
    )  # fmt: skip


# --- models --------------------------------------------------------------------------------------------------------


def test_model_not_there(shell: Shell, tmp_path: Path) -> None:
    shell.fails(r"no model .*gone': not a folder, not a hub id .*smollm2-135m", model=tmp_path / "gone")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight"])
@pytest.mark.parametrize("recipe", ["tiny.yaml", "rtn.yaml"])
def test_weight_that_is_not_finite(shell: Shell, llama: Path, name: str, value: float, recipe: str) -> None:
    def poison(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[5] = value

    tiny.change_tensors(llama, poison)
    index = r"\[0, 5\]" if "mlp" in name else r"\[5\]"
    shell.fails(
        rf"tensor {name} of .*llama holds a NaN or an infinity at {index}",
        model=llama, recipe=shell.saved / recipe, early=False,
    )  # fmt: skip


def test_weight_whose_sum_alone_overflows(shell: Shell, llama: Path) -> None:
    """Large but finite weights are no fault."""

    def grow(tensors: dict[str, Tensor]) -> None:
        tensors["model.embed_tokens.weight"].fill_(3e38)

    tiny.change_tensors(llama, grow)
    assert shell("--quiet", model=llama, recipe=shell.saved / "rtn.yaml")[0] == 0


def test_activations_that_overflow(shell: Shell, llama: Path) -> None:
    def grow(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.input_layernorm.weight"].fill_(3e38)

    tiny.change_tensors(llama, grow)
    shell.fails(
        r"layer model\.layers\.1\.self_attn\.q_proj, batch 0: NaN or infinity in input channel \d+ of the calibration",
        model=llama, early=False,
    )  # fmt: skip


def test_activations_that_are_all_zero(shell: Shell, llama: Path) -> None:
    """A dead layer is no reason to stop: no token tells its weights apart, so they are rounded to nearest."""

    def silence(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.input_layernorm.weight"].zero_()

    tiny.change_tensors(llama, silence)
    code, _, err = shell("--quiet", model=llama)
    assert (code, err) == (0, "")


def test_truncated_weights(shell: Shell, llama: Path) -> None:
    path = llama / "model.safetensors"
    whole = path.read_bytes()
    for keep in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:keep])
        shell.fails(r"model\.safetensors is damaged \(.*\): fetch the model again", model=llama)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"shape":[32]', b'"shape":[64]'),
        (b'"dtype":"F32"', b'"dtype":"F64"'),
        (b'"data_offsets":[0,', b'"data_offsets":[4,'),
        (b'"dtype":"F32"', b'"dtype":"X99"'),
        (b'{"', b'["'),
    ],
)
def test_header_that_lies(shell: Shell, llama: Path, old: bytes, new: bytes) -> None:
    path = llama / "model.safetensors"
    content = path.read_bytes()
    assert old in content and len(old) == len(new)
    path.write_bytes(content.replace(old, new, 1))
    shell.fails(r"model\.safetensors is damaged \(.*\): fetch the model again", model=llama)


@pytest.mark.parametrize("length", [2**63, 2**40, 10**8 + 1, 2])
def test_header_length_that_lies(shell: Shell, llama: Path, length: int) -> None:
    path = llama / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    shell.fails(r"model\.safetensors is damaged", model=llama)


UNREAD = "models.load_tokenizer catches OSError and ValueError only; transformers raises KeyError and TypeError too"


def test_no_tokenizer(shell: Shell, llama: Path) -> None:
    for path in llama.glob("tokenizer*"):
        path.unlink()
    shell.fails("tokenizer", model=llama)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        *(c for c in ("{}", "[]", '{"version": 1}')),
    ],
)
def test_tokenizer_that_is_damaged(shell: Shell, llama: Path, content: str) -> None:
    (llama / "tokenizer.json").write_text(content, encoding="utf-8")
    shell.fails("tokenizer", model=llama)


def test_tokens_that_the_model_does_not_have(shell: Shell, tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path / "small", vocab_size=50)
    shell.fails("vocabulary|tokens", model=model, early=False)


def test_windows_longer_than_the_positions_of_the_model(shell: Shell) -> None:
    shell.fails("128", "--sequence-length", 128, model=shell.saved / "gpt2", early=False)


# --- data ----------------------------------------------------------------------------------------------------------


def test_empty_text(shell: Shell, tmp_path: Path) -> None:
    for content in ("", "\n \n\t\n"):
        (tmp_path / "empty.txt").write_text(content, encoding="utf-8")
        shell.fails(r"the calibration split of .*empty\.txt holds no text: choose another", data=tmp_path / "empty.txt")


def test_too_short_a_text(shell: Shell, tmp_path: Path) -> None:
    path = tiny.write_text(tmp_path / "short.txt", 100)
    said = shell.fails(
        r"has 80 tokens, but 8 samples of 16 need 128: use at most samples=5 or sequence_length=10", data=path
    )
    assert "more text" in said


def test_text_that_is_not_there(shell: Shell, tmp_path: Path) -> None:
    shell.fails(r"gone\.txt: no such file or folder; check the path", data=tmp_path / "gone.txt")


def test_misspelt_data_set(shell: Shell) -> None:
    shell.fails("unknown data set 'wikki': did you mean 'wiki'", data="wikki")


def test_text_that_is_not_utf8(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("naïve\n".encode("latin-1") * 100)
    shell.fails(r"is not UTF-8 .*save it as UTF-8", data=tmp_path / "latin.txt")


def no_windows(shell: Shell, pattern: str, *more: object, **named: Any) -> None:
    """A fault of the evaluation data, which must be seen before the work and not after it."""
    shell.fails(pattern, "--measure", *more, **named)


LATE = "the evaluation text is first opened after all layers are solved (pipeline._measure)"


def test_evaluation_text_that_is_not_there_without_calibration(shell: Shell, tmp_path: Path) -> None:
    no_windows(shell, "no such file", data=tmp_path / "gone.txt", recipe=shell.saved / "rtn.yaml")


def test_too_short_an_evaluation_text(shell: Shell, tmp_path: Path) -> None:
    no_windows(shell, "fewer than one window of 64", data=tiny.write_text(tmp_path / "short.txt", 600))


def test_no_evaluation_windows(shell: Shell) -> None:
    no_windows(shell, "at least 1", "--windows", 0)


# --- the machine ---------------------------------------------------------------------------------------------------


def test_too_little_memory(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10**8, total=10**8))
    shell.fails(r"needs about 0\.\d GB of memory, 0\.1 GB are free: take a machine with 0\.\d\dGB free$")


def test_a_control_group_has_too_little_memory(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a small container on a large machine."""
    monkeypatch.setattr(hardware, "cgroup_memory", lambda groups: (3 * 10**8, 2 * 10**8))
    shell.fails(r"needs about 0\.\d GB of memory, 0\.1 GB are free")


def test_too_little_disk(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**9, used=10**9, free=10))
    shell.fails(r"needs about .* GB of disk in .*, 0\.0 GB are free: free 0\.01GB there, or choose another --out$")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_device_that_is_not_there(shell: Shell) -> None:
    shell.fails("device 'cuda' cannot be used here", "--device", "cuda")


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "cpu:x", ""])
def test_device_that_does_not_exist(shell: Shell, device: str) -> None:
    shell.fails(f"device '{device}' cannot be used here", "--device", device)


def test_device_that_computes_nothing(shell: Shell) -> None:
    shell.fails("device 'meta' cannot be used here", "--device", "meta")


def full_disk(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_disk_full_while_a_unit_is_written(shell: Shell, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    assert shell("--quiet")[0] == 0
    whole = (shell.out / "model.safetensors").read_bytes()
    shutil.rmtree(shell.out)
    save, count = artifact.write_safetensors, 0

    def fills_up(path: Path, specs: Any, get: Any, **more: Any) -> None:
        nonlocal count
        count += 1
        save(path, specs, full_disk if count == call else get, **more)

    with monkeypatch.context() as patch:
        patch.setattr(artifact, "write_safetensors", fills_up)
        shell.fails(
            r"cannot write .* \(.*No space left on device\): free some disk and run the same command again", early=False
        )
    assert not list(shell.partial.rglob("*.tmp"))
    assert shell("--quiet")[0] == 0
    assert (shell.out / "model.safetensors").read_bytes() == whole


NOT_MENDED = "an OSError outside artifact._save is not turned into a CompressLabError"


@pytest.mark.parametrize("where", ["os.fsync", "shutil.copyfile"])
def test_disk_full_elsewhere(shell: Shell, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    module, name = {"os.fsync": (artifact.os, "fsync"), "shutil.copyfile": (artifact.shutil, "copyfile")}[where]
    monkeypatch.setattr(module, name, full_disk)
    shell.fails("No space left on device", early=False)


@pytest.mark.parametrize("name", ["report.json", "README.md", "report.html"])
def test_disk_full_while_the_report_is_written(shell: Shell, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    write = Path.write_text

    def fills_up(self: Path, *args: Any, **more: Any) -> int:
        if self.name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
        return write(self, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", fills_up)
        shell.fails(rf"cannot write .*{name} \(No space left on device\): free some disk and run the same", early=False)
    assert shell("--quiet")[0] == 0
    Artifact(shell.out).verify()


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file may grow beyond this many bytes: what is written through C++ and Rust breaks off too, as on a full disk."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    ("size", "told"),
    [(20_000, r"\(File too large\)"), (250_000, r"\(a file broke off\)")],
    ids=["weights", "optimizer"],
)
def test_disk_full_while_a_training_is_kept(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, told: str
) -> None:
    """By safetensors, which is Rust, and by torch.save."""
    recipe = tmp_path / "aware.yaml"
    steps = [{"method": "lsq", "bits": 4}]
    raw = tiny.recipe().model_dump(mode="json") | {"steps": steps, "training": {"steps": 4, "batch": 4, "checks": 2}}
    recipe.write_text(tiny.parse(raw, "aware").to_yaml(), encoding="utf-8")
    with largest_file(size):
        shell.fails(
            rf"cannot write .*out\.partial {told}: free some disk and run the same command again",
            recipe=recipe,
            early=False,
        )
    assert shell("--quiet", recipe=recipe)[0] == 0


def test_disk_full_where_nothing_is_being_made(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command says it in one line."""
    monkeypatch.setattr(pipeline, "plan_only", full_disk)
    shell.fails(r"cannot write to the disk \(No space left on device\): free some disk", "--dry-run")


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_output_that_is_not_ours(shell: Shell, force: tuple[str, ...]) -> None:
    shell.out.mkdir()
    (shell.out / "precious.txt").write_text("mine", encoding="utf-8")
    code, out, err = shell(*force)
    assert (code, out) == (2, "")
    assert re.fullmatch(
        r"error: .*out is not empty and holds no artifact .* not even --force .*choose another --out\n", err
    )
    assert [path.name for path in shell.out.iterdir()] == ["precious.txt"]


def test_fresh_process_that_fails(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(job: Any) -> None:
        raise CompressLabError("measuring in a fresh process failed: killed")

    monkeypatch.setattr(pipeline.fresh, "measure", fail)
    shell.fails("fresh process failed: killed", early=False)


def test_artifact_that_reloads_otherwise_is_not_published(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def differs(job: Any) -> Any:
        return tiny.fake_measure(job).model_copy(update={"weights_differing": ("model.layers.0.mlp.up_proj",)})

    monkeypatch.setattr(pipeline.fresh, "measure", differs)
    shell.fails(
        r"1 layers came back .* first model\.layers\.0\.mlp\.up_proj: the artifact was not published", early=False
    )


def test_ctrl_c(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(artifact.Writer, "assemble", stop)
    code, out, err = shell("--quiet")
    assert (code, out) == (130, "")
    assert "Run the same command again" in err and "Traceback" not in err
    assert not shell.out.exists()


def test_a_real_process_says_one_line_and_exits_with_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "compresslab.cli", "compress", "nothing-here", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no model 'nothing-here'") and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())

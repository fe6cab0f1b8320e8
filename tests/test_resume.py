"""A run that is cut off at any moment goes on where it stopped, with the same bits; and nothing is ever half there."""

from __future__ import annotations

import datetime
import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from compresslab import artifact, pipeline
from compresslab.artifact import Artifact, Writer
from compresslab.errors import CompressLabError
from compresslab.plan import Unit

BLOCKS = 3
UNITS = BLOCKS + 1  # and what lies outside the blocks, here with the head
EVERYTHING = tiny.recipe(ignore=())
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("model") / "llama", num_hidden_layers=BLOCKS)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_text(tmp_path_factory.mktemp("text") / "words.txt")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(pipeline.fresh, "measure", tiny.fake_measure)
    with tiny.quick():
        yield


def compress(model: Path, text: Path, out: Path, **more: Any) -> Artifact:
    settings = {"recipe": EVERYTHING, "data": str(text), "measure": False, **more}
    return pipeline.compress(model, out=out, **settings)[0]


@pytest.fixture(scope="module")
def undisturbed(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights that a run in one go gives."""
    with pytest.MonkeyPatch.context() as patch, tiny.quick():
        patch.setattr(pipeline.fresh, "measure", tiny.fake_measure)
        out = tmp_path_factory.mktemp("undisturbed") / "out"
        return (compress(model, text, out).folder / WEIGHTS).read_bytes()


def partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def finished_units(out: Path) -> list[str]:
    return list(json.loads((partial(out) / "progress.json").read_text(encoding="utf-8"))["units"])


def stop_after_unit(monkeypatch: pytest.MonkeyPatch, k: int) -> None:
    """Ctrl-C right after the k-th unit was written."""
    write, count = Writer.write, 0

    def counted(self: Writer, *args: Any) -> None:
        nonlocal count
        write(self, *args)
        count += 1
        if count == k:
            raise KeyboardInterrupt

    monkeypatch.setattr(Writer, "write", counted)


def test_two_undisturbed_runs_give_the_same_bytes(model: Path, text: Path, undisturbed: bytes, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert (compress(model, text, out).folder / WEIGHTS).read_bytes() == undisturbed
    assert not partial(out).exists()
    Artifact(out).verify()


@pytest.mark.parametrize("k", range(1, UNITS + 1))
def test_interrupted_after_a_unit(
    k: int, model: Path, text: Path, undisturbed: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after_unit(patch, k)
        compress(model, text, out)
    assert not out.exists()
    done = finished_units(out)
    assert len(done) == k
    solved: list[str] = []
    progress = pipeline.Progress(step=solved.append)
    written: list[str] = []
    write = Writer.write

    def noted(self: Writer, unit: Unit, *args: Any) -> None:
        written.append(unit.name)
        write(self, unit, *args)

    monkeypatch.setattr(Writer, "write", noted)
    found = compress(model, text, out, progress=progress)
    assert (found.folder / WEIGHTS).read_bytes() == undisturbed
    assert len(written) == UNITS - k and not set(written) & set(done)
    assert len([name for name in solved if name.startswith(("model.", "lm_head"))]) == 7 * BLOCKS + 1
    assert len(found.report().layers) == 7 * BLOCKS + 1
    assert not partial(out).exists()
    found.verify()


def test_interrupted_after_every_single_unit(
    model: Path, text: Path, undisturbed: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    for number in range(1, UNITS + 1):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop_after_unit(patch, 1)
            compress(model, text, out)
        assert len(finished_units(out)) == number
    assert (compress(model, text, out).folder / WEIGHTS).read_bytes() == undisturbed


@pytest.mark.parametrize("k", [1, 2, UNITS, UNITS + 1])  # the last is the note that it will be published
def test_interrupted_between_the_files_of_a_unit_and_the_note_of_it(
    k: int, model: Path, text: Path, undisturbed: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, write, count = tmp_path / "out", artifact.atomic_write, 0

    def cut_off(path: Path, content: bytes) -> None:
        nonlocal count
        count += path.name == "progress.json"
        if count == k:
            path.with_name("progress.json.tmp").write_bytes(content[:100])
            raise KeyboardInterrupt
        write(path, content)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(artifact, "atomic_write", cut_off)
        compress(model, text, out)
    assert not out.exists()
    assert (compress(model, text, out).folder / WEIGHTS).read_bytes() == undisturbed


@pytest.mark.parametrize("stage", ["assemble", "publish", "weight_hashes"])
def test_interrupted_after_the_last_unit(
    stage: str, model: Path, text: Path, undisturbed: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Writer, stage, stop)
        compress(model, text, out)
    assert not out.exists()
    assert len(finished_units(out)) == UNITS
    assert (compress(model, text, out).folder / WEIGHTS).read_bytes() == undisturbed


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama-tied"])
def test_other_architectures_resume_too(kind: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.save(kind, tmp_path / kind)
    whole = compress(model, text, tmp_path / "whole")
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after_unit(patch, 1)
        compress(model, text, out)
    assert (compress(model, text, out).folder / WEIGHTS).read_bytes() == (whole.folder / WEIGHTS).read_bytes()


def test_a_method_without_data_resumes(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"recipe": tiny.recipe("rtn"), "data": None, "measure": False}
    whole, _ = pipeline.compress(model, out=tmp_path / "whole", **settings)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after_unit(patch, 2)
        pipeline.compress(model, out=tmp_path / "out", **settings)
    found, _ = pipeline.compress(model, out=tmp_path / "out", **settings)
    assert (found.folder / WEIGHTS).read_bytes() == (whole.folder / WEIGHTS).read_bytes()


def test_only_the_last_states_are_kept(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after_unit(patch, 2)
        compress(model, text, out)
    assert [path.name for path in (partial(out) / "states").iterdir()] == ["model.layers.1.safetensors"]


def test_a_unit_that_was_damaged_in_between_is_not_published(
    model: Path, text: Path, undisturbed: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a power cut leaves it: the note is on disk, the data of the file are not."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after_unit(patch, 2)
        compress(model, text, out)

    def zero(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.input_layernorm.weight"].zero_()

    unit = partial(out) / "units" / "00000.safetensors"
    unit.rename(unit.with_name(WEIGHTS))
    tiny.change_tensors(unit.parent, zero)
    unit.with_name(WEIGHTS).rename(unit)
    try:
        found = compress(model, text, out)
    except CompressLabError as error:
        assert "--force" in str(error)
        found = compress(model, text, out, force=True)
    assert (found.folder / WEIGHTS).read_bytes() == undisturbed


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("at", ["rename", "remove"])
def test_killed_when_all_but_the_tidying_up_was_done(
    at: str, force: bool, model: Path, text: Path, undisturbed: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command finds what it has made, and leaves nothing beside it; another command is refused."""
    out = tmp_path / "out"
    if force:
        compress(model, text, out, seed=1)

    def stop(self: Writer) -> None:
        if at == "remove":
            (self.partial / "progress.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Writer, "_remove", stop)
        compress(model, text, out, force=force)
    assert (out / WEIGHTS).read_bytes() == undisturbed and partial(out).exists()
    made = (out / "report.json").stat().st_mtime_ns
    with pytest.raises(CompressLabError, match=r"out is not empty: choose another --out, or replace"):
        compress(model, text, out, seed=2)
    if at == "remove" and force:  # no note is left that it was this run which published, so it is done again
        assert (compress(model, text, out, force=True).folder / WEIGHTS).read_bytes() == undisturbed
    else:
        steps: list[str] = []
        found = compress(model, text, out, force=force, progress=pipeline.Progress(step=steps.append))
        assert not steps and found.folder == out
        assert (out / "report.json").stat().st_mtime_ns == made
    Artifact(out).verify()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(CompressLabError, match=r"out is not empty: choose another --out, or replace"):
        compress(model, text, out)


def test_what_another_version_left_behind_is_started_over(
    model: Path, text: Path, undisturbed: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its units have other hashes."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after_unit(patch, 2)
        compress(model, text, out)
    note = partial(out) / "progress.json"
    note.write_text(note.read_text(encoding="utf-8").replace('"xxh3"', '"sha256"'), encoding="utf-8")
    with pytest.raises(CompressLabError, match="was damaged since it was written: start over with --force"):
        compress(model, text, out)
    assert (compress(model, text, out, force=True).folder / WEIGHTS).read_bytes() == undisturbed


@pytest.mark.parametrize("how", ["changed", "cut off", "gone"])
def test_a_state_that_was_damaged_in_between_is_not_gone_on_from(
    how: str, model: Path, text: Path, undisturbed: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after_unit(patch, 2)
        compress(model, text, out)
    (state,) = (partial(out) / "states").iterdir()
    content = state.read_bytes()
    state.write_bytes(content[:-4] + b"\0\0\0\0" if how == "changed" else content[:-4])
    if how == "gone":
        state.unlink()
    with pytest.raises(CompressLabError, match=r"states/.*safetensors was damaged .*: start over with --force"):
        compress(model, text, out)
    assert (compress(model, text, out, force=True).folder / WEIGHTS).read_bytes() == undisturbed


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="what is synced is told by its number alone")
def test_files_are_on_the_disk_before_they_are_noted(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a power cut would leave a note of what is not there."""
    done: list[str] = []
    sync, replace = os.fsync, os.replace

    def synced(handle: int) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{handle}")).stem)
        sync(handle)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(f"-> {Path(b).stem}"), replace(a, b)))
    compress(model, text, tmp_path / "out")
    renamed = [i for i, what in enumerate(done) if what.startswith("-> ")]
    assert len(renamed) > 2 * UNITS
    for i in renamed:
        name = done[i].removeprefix("-> ")
        assert name in ("model",) or name in done[i - 1], done[max(0, i - 3) : i + 1]
    assert {"model", "config", "report"} <= set(done)


def test_another_network_by_the_same_command_is_not_mixed_in(
    half_done: Path, model: Path, text: Path, undisturbed: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a removal may choose others on a device that adds up in another order."""
    settle = Writer.settle
    with monkeypatch.context() as patch:
        patch.setattr(Writer, "settle", lambda self, what, digest: settle(self, what, digest[::-1]))
        with pytest.raises(
            CompressLabError, match="unfinished run with another network, though the command is the same"
        ):
            compress(model, text, half_done)
    assert (compress(model, text, half_done).folder / WEIGHTS).read_bytes() == undisturbed


# --- another run on the same folder --------------------------------------------------------------------------------


@pytest.fixture
def half_done(model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The output folder of a run that was stopped after one unit."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after_unit(patch, 1)
        compress(model, text, out)
    return out


def test_another_recipe_is_refused(half_done: Path, model: Path, text: Path) -> None:
    with pytest.raises(
        CompressLabError, match=r"unfinished run with another recipe: .*--force to start over"
    ) as caught:
        compress(model, text, half_done, settings={"bits": 3})
    assert "\n" not in str(caught.value)
    assert len(finished_units(half_done)) == 1


def test_another_seed_is_refused(half_done: Path, model: Path, text: Path) -> None:
    with pytest.raises(CompressLabError, match="unfinished run with another .*seed"):
        compress(model, text, half_done, seed=1)


def test_other_data_are_refused(half_done: Path, model: Path, tmp_path: Path) -> None:
    other = tiny.write_text(tmp_path / "other.txt", seed=5)
    with pytest.raises(CompressLabError, match="unfinished run with another data:"):
        compress(model, other, half_done)


def test_another_model_is_refused(half_done: Path, text: Path, tmp_path: Path) -> None:
    other = tiny.save("llama", tmp_path / "other", seed=1, num_hidden_layers=BLOCKS)
    with pytest.raises(CompressLabError, match="unfinished run with another model:"):
        compress(other, text, half_done)


def test_another_version_is_refused(half_done: Path, model: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.environment, "version", lambda: "0.0.0")
    with pytest.raises(CompressLabError, match="unfinished run with another version:"):
        compress(model, text, half_done)


def test_another_config_of_the_same_weights_is_refused(
    half_done: Path, model: Path, text: Path, tmp_path: Path
) -> None:
    other = tiny.save("llama", tmp_path / "other", num_hidden_layers=BLOCKS)
    tiny.change_config(other, rms_norm_eps=0.1)
    with pytest.raises(CompressLabError, match="unfinished run with another"):
        compress(other, text, half_done)


def test_force_starts_over(half_done: Path, model: Path, text: Path, tmp_path: Path) -> None:
    whole = compress(model, text, tmp_path / "whole", seed=1)
    found = compress(model, text, half_done, seed=1, force=True)
    assert (found.folder / WEIGHTS).read_bytes() == (whole.folder / WEIGHTS).read_bytes()
    assert not partial(half_done).exists()


def test_the_same_command_goes_on_after_another_was_refused(
    half_done: Path, model: Path, text: Path, undisturbed: bytes
) -> None:
    with pytest.raises(CompressLabError):
        compress(model, text, half_done, seed=1)
    assert (compress(model, text, half_done).folder / WEIGHTS).read_bytes() == undisturbed


def test_two_runs_at_once(model: Path, text: Path, tmp_path: Path, undisturbed: bytes) -> None:
    """The second one is refused in the midst of the first, which is not disturbed by it."""
    out = tmp_path / "out"
    refusals: list[str] = []

    def second(name: str) -> None:
        if not refusals:
            with pytest.raises(CompressLabError, match=r"another run is writing to .*partial \(process ") as caught:
                compress(model, text, out)
            with pytest.raises(CompressLabError, match="another run is writing to"):
                compress(model, text, out, seed=1, force=True)
            refusals.append(str(caught.value))

    found = compress(model, text, out, progress=pipeline.Progress(step=second))
    assert len(refusals) == 1 and "\n" not in refusals[0]
    assert (
        f"process {os.getpid()} on " in refusals[0]
        and f", since {datetime.datetime.now(datetime.UTC):%Y}-" in refusals[0]
    )
    assert not (found.folder / "owner.json").exists()
    assert (found.folder / WEIGHTS).read_bytes() == undisturbed


@pytest.mark.parametrize("stage", ["survey", "take out"])
def test_the_lock_is_there_before_any_work(stage: str, model: Path, text: Path, tmp_path: Path) -> None:
    out, refusals = tmp_path / "out", list[str]()
    remove = {"method": "block-influence", "layer_frac": 0.34}
    raw = EVERYTHING.model_dump(mode="json")
    recipe = tiny.parse(raw | {"steps": [remove, *raw["steps"]]}, "tiny")

    def second(name: str, steps: int) -> None:
        if name == stage:
            with pytest.raises(CompressLabError, match="another run is writing to") as caught:
                compress(model, text, out, seed=1, force=True)
            refusals.append(str(caught.value))

    more: dict[str, Any] = {"budget": "5bits"} if stage == "survey" else {"recipe": recipe}
    compress(model, text, out, progress=pipeline.Progress(stage=second), **more)
    assert len(refusals) == 1


HOLDS = """
import sys, time
from pathlib import Path
from compresslab.artifact import Writer
with Writer(Path(sys.argv[1]), {}):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_processes_on_one_folder(model: Path, text: Path, undisturbed: bytes, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(CompressLabError, match=rf"another run is writing to .*\(process {other.pid} on "):
            compress(model, text, out, force=True)
        other.kill()
        other.wait()
        assert (partial(out) / "lock").exists(), "what holds it is the process, and no file"
    assert (compress(model, text, out).folder / WEIGHTS).read_bytes() == undisturbed


# --- the output folder ---------------------------------------------------------------------------------------------


def test_an_output_that_is_not_empty_is_refused_and_left_alone(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine", encoding="utf-8")
    for force in (False, True):
        with pytest.raises(CompressLabError, match="is not empty and holds no artifact of ours"):
            compress(model, text, out, force=force)
    assert [path.name for path in out.iterdir()] == ["precious.txt"]
    assert not partial(out).exists()


def test_an_empty_output_is_fine(model: Path, text: Path, tmp_path: Path, undisturbed: bytes) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert (compress(model, text, out).folder / WEIGHTS).read_bytes() == undisturbed


def test_force_replaces_an_artifact_only_when_the_new_one_is_whole(
    model: Path, text: Path, tmp_path: Path, undisturbed: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    compress(model, text, out)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after_unit(patch, 1)
        compress(model, text, out, seed=1, force=True)
    assert (out / WEIGHTS).read_bytes() == undisturbed
    Artifact(out).verify()
    compress(model, text, out, seed=1, force=True)
    assert (out / WEIGHTS).read_bytes() != undisturbed
    Artifact(out).verify()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_file_as_output(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("mine", encoding="utf-8")
    for force in (False, True):
        with pytest.raises(CompressLabError, match="out is a file: choose another --out"):
            compress(model, text, out, force=force)
    assert out.read_text(encoding="utf-8") == "mine"


def test_an_output_below_a_file(model: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(CompressLabError, match=r"cannot write to .*out\.partial .*: choose another --out"):
        compress(model, text, tmp_path / "file" / "out")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_parent(model: Path, text: Path, tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    parent.mkdir(mode=0o500)
    with pytest.raises(CompressLabError, match=r"cannot write to .*out\.partial \(Permission denied\): choose another"):
        compress(model, text, parent / "out")


def test_a_parent_that_may_not_be_written_to(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same for those who may write anywhere."""
    make = Path.mkdir

    def refuse(self: Path, *args: Any, **kwargs: Any) -> None:
        if ".partial" in str(self):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        make(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(CompressLabError, match=r"cannot write to .*out\.partial \(Permission denied\): choose another"):
        compress(model, text, tmp_path / "out")


@pytest.mark.parametrize("name", [".", "..", "inner/.."])
def test_an_output_that_cannot_be_renamed_is_refused_before_the_work(
    name: str, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "parent" / "here" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "parent" / "here")
    steps: list[str] = []
    with pytest.raises(CompressLabError, match="--out"):
        compress(model, text, Path(name), force=True, progress=pipeline.Progress(step=steps.append))
    assert not steps


@pytest.mark.parametrize("where", ["model", "."])
def test_the_model_itself_is_never_replaced(where: str, text: Path, tmp_path: Path) -> None:
    (tmp_path / "all").mkdir()
    model = tiny.save("llama", tmp_path / "all" / "model")
    before = (model / WEIGHTS).read_bytes()
    with pytest.raises(CompressLabError, match="--out"):
        compress(model, text, tmp_path / "all" / where, force=True)
    assert (model / WEIGHTS).read_bytes() == before


def test_a_parent_that_does_not_exist_is_made(model: Path, text: Path, tmp_path: Path, undisturbed: bytes) -> None:
    assert (compress(model, text, tmp_path / "a" / "b" / "out").folder / WEIGHTS).read_bytes() == undisturbed


# --- a real process, killed ----------------------------------------------------------------------------------------


def test_a_killed_process_goes_on(text: Path, tmp_path: Path) -> None:
    """SIGKILL as soon as the first progress is there, the same command again, and the same bytes as in one go."""
    blocks = 24
    model = tiny.save("llama", tmp_path / "model", num_hidden_layers=blocks)
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(tiny.recipe(samples=32, length=64).to_yaml(), encoding="utf-8")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "compresslab.cli", "compress", str(model), "--recipe", str(recipe),
               "--data", str(text), "--out", str(out), "--no-measure"]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "NUMBA_NUM_THREADS": "1"}
    progress = partial(out) / "progress.json"
    running = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (progress.exists() and finished_units(out)) and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    assert not out.exists()
    done = finished_units(out)
    assert 0 < len(done) < blocks
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    found = Artifact(out)
    found.verify()
    assert not partial(out).exists()
    assert found.report().parity.tensors == 7 * blocks
    settings: dict[str, Any] = {"recipe": recipe, "data": str(text), "measure": False}
    whole, _ = pipeline.compress(model, out=tmp_path / "whole", **settings)
    assert (found.folder / WEIGHTS).read_bytes() == (whole.folder / WEIGHTS).read_bytes()
    assert found.manifest()["weights_xxh3"] == whole.manifest()["weights_xxh3"]

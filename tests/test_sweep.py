"""Many runs of one model: each once, and again only where it failed."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import tiny
from compresslab import sweep as sweeps
from compresslab.errors import CompressLabError
from compresslab.sweep import Sweep, Trial, trials


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    return Sweep(model="model", data="text", out=tmp_path / "out", threads=1)


class Processes:
    """In the place of subprocess.run: what each trial's process does, attempt by attempt."""

    def __init__(self, ends: dict[str, list[tuple[int, str]]]) -> None:
        self.ends, self.started, self.threads = ends, [], set()  # type: ignore[var-annotated]

    def __call__(self, command: list[str], env: dict[str, str], **more: Any) -> subprocess.CompletedProcess[str]:
        folder = Path(command[command.index("--out") + 1])
        self.started.append(folder.name)
        self.threads.add(env["OMP_NUM_THREADS"])
        code, said = self.ends[folder.name].pop(0)
        if code == 0:
            folder.mkdir(parents=True)
            (folder / "compresslab.json").write_text("{}", encoding="utf-8")
        return subprocess.CompletedProcess(command, code, "", said)


def test_all_combinations_have_folders_of_their_own(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(tiny.recipe("rtn").to_yaml(), encoding="utf-8")
    found = trials(["w4a16-rtn", str(mine)], [None, "3.5bits"], [0, 7])
    assert [trial.name for trial in found] == [
        "w4a16-rtn-seed0", "w4a16-rtn-seed7", "w4a16-rtn-3.5bits-seed0", "w4a16-rtn-3.5bits-seed7",
        "mine-seed0", "mine-seed7", "mine-3.5bits-seed0", "mine-3.5bits-seed7",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ((["w4a16-rtn"] * 2,), "two trials would be called w4a16-rtn-seed0"),
        ((["no-such"],), "no-such"),
        ((["w4a16-rtn"], ["much"]), "budget 'much'"),
    ],
)
def test_what_cannot_be_swept(arguments: tuple[Any, ...], why: str) -> None:
    with pytest.raises(CompressLabError, match=why):
        trials(*arguments)


def test_the_dead_are_restarted_the_refused_are_not_and_the_finished_never_run_again(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, dies, refused = (Trial(recipe="w4a16-rtn", budget=None, seed=seed) for seed in range(3))
    ends = {
        good.name: [(0, "")],
        dies.name: [(-9, ""), (1, "a\nTraceback: b\n\n"), (0, "")],
        refused.name: [(2, "warning\nerror: no such data\n"), (0, "")],
    }
    processes = Processes(ends)
    monkeypatch.setattr(sweeps.subprocess, "run", processes)
    told: list[str] = []
    found = sweeps.run(sweep, [good, dies, refused], on_end=lambda outcome: told.append(outcome.trial.name))
    assert [(o.state, o.attempts, o.why) for o in found] == [
        ("finished", 1, ""), ("finished", 3, ""), ("failed", 1, "no such data"),
    ]  # fmt: skip
    assert sorted(told) == [good.name, dies.name, refused.name]
    processes.started.clear()
    again = sweeps.run(sweep, [good, dies, refused])
    assert [outcome.state for outcome in again] == ["kept", "kept", "finished"]
    assert processes.started == [refused.name]


def test_one_that_always_dies_is_given_up_with_its_last_words(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = Trial(recipe="w4a16-rtn", budget=None, seed=0)
    monkeypatch.setattr(sweeps.subprocess, "run", Processes({trial.name: [(-9, "")] * 3}))
    (found,) = sweeps.run(sweep, [trial])
    assert (found.state, found.attempts, found.why) == ("failed", 3, "ended with exit code -9")


def test_another_sweep_is_not_mixed_in_and_threads_stay(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = Trial(recipe="w4a16-rtn", budget=None, seed=0)
    processes = Processes({trial.name: [(1, ""), (1, ""), (1, ""), (0, "")]})
    monkeypatch.setattr(sweeps.subprocess, "run", processes)
    sweeps.run(sweep, [trial])
    with pytest.raises(CompressLabError, match=r"a sweep with other data \(text\): choose another --out"):
        sweeps.run(Sweep(**vars(sweep) | {"data": "other"}), [trial])
    sweeps.run(Sweep(**vars(sweep) | {"threads": 5}), [trial])
    assert processes.threads == {"1"}, "an unfinished trial goes on with the threads that it began with"


def test_a_recipe_that_changed_is_not_taken_for_finished(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(tiny.recipe("rtn").to_yaml(), encoding="utf-8")
    trial = Trial(recipe=str(mine), budget=None, seed=0)
    monkeypatch.setattr(sweeps.subprocess, "run", Processes({trial.name: [(0, "")]}))
    assert sweeps.run(sweep, [trial])[0].state == "finished"
    assert sweeps.run(sweep, [trial])[0].state == "kept"
    mine.write_text(tiny.recipe("rtn", bits=3).to_yaml(), encoding="utf-8")
    with pytest.raises(CompressLabError, match="another recipe called mine"):
        sweeps.run(sweep, [trial])


@pytest.mark.parametrize("what", ["model", "data"])
def test_contents_that_changed_are_not_taken_for_the_same(
    what: str, sweep: Sweep, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of one name and path."""
    (tmp_path / "model" / "inner").mkdir(parents=True)
    paths = {"model": tmp_path / "model" / "inner" / "weights", "data": tmp_path / "text.txt"}
    for path in paths.values():
        path.write_text("before", encoding="utf-8")
    given = Sweep(**vars(sweep) | {"model": str(tmp_path / "model"), "data": str(paths["data"])})
    trial = Trial(recipe="w4a16-rtn", budget=None, seed=0)
    monkeypatch.setattr(sweeps.subprocess, "run", Processes({trial.name: [(0, "")]}))
    assert sweeps.run(given, [trial])[0].state == "finished"
    assert sweeps.run(given, [trial])[0].state == "kept"
    paths[what].write_text("after", encoding="utf-8")
    with pytest.raises(CompressLabError, match=rf"other contents of {getattr(given, what)}"):
        sweeps.run(given, [trial])


def test_one_that_was_killed_at_its_very_end_is_called_once_more(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    """It finds what it has made, and tidies up."""
    trial = Trial(recipe="w4a16-rtn", budget=None, seed=0)
    (sweep.out / f"{trial.name}.partial").mkdir(parents=True)
    (sweep.out / trial.name).mkdir()
    (sweep.out / trial.name / "compresslab.json").write_text("{}", encoding="utf-8")

    def ends(command: list[str], **more: Any) -> subprocess.CompletedProcess[str]:
        (sweep.out / f"{trial.name}.partial").rmdir()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(sweeps.subprocess, "run", ends)
    assert [sweeps.run(sweep, [trial])[0].state for _ in range(2)] == ["finished", "kept"]


def test_every_run_gets_the_options_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: list[list[str]] = []

    def noted(command: list[str], **more: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 2, "", "no")

    monkeypatch.setattr(sweeps.subprocess, "run", noted)
    options = ("--memory", "2GB", "--device", "cpu", "--sensitivity", "gram", "--ignore", "*a", "--ignore", "*b")
    tiny.run_cli(monkeypatch, capsys, "sweep", "m", "--recipes", "w4a16-rtn", "--out", tmp_path / "out", *options)
    (command,) = commands
    assert {(options[i], options[i + 1]) for i in range(0, len(options), 2)} <= set(itertools.pairwise(command))
    code, _, err = tiny.run_cli(
        monkeypatch, capsys, "sweep", "m", "--recipes", "w4a16-rtn", "--out", tmp_path / "no", "--memory", "much"
    )
    assert code == 2 and "size 'much'" in err and len(commands) == 1


def test_workers_run_beside_each_other(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once: list[int] = []
    running = [0]

    def process(command: list[str], **more: Any) -> subprocess.CompletedProcess[str]:
        running[0] += 1
        at_once.append(running[0])
        time.sleep(0.2)
        running[0] -= 1
        return subprocess.CompletedProcess(command, 2, "", "no")

    monkeypatch.setattr(sweeps.subprocess, "run", process)
    sweeps.run(sweep, trials(["w4a16-rtn"], [None], range(4)), workers=2)
    assert max(at_once) == 2


def test_the_command_compresses_and_compares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real processes; one of three trials cannot be."""
    model = tiny.save("llama", tmp_path / "model")
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(tiny.recipe("rtn", bits=8).to_yaml(), encoding="utf-8")
    text = tiny.write_text(tmp_path / "text.txt")
    command = ("sweep", model, "--recipes", f"{recipe},w4a4-dorefa", "--data", text, "--out", tmp_path / "out",
               "--no-measure", "--threads", 1, "--json")  # fmt: skip
    code, out, err = tiny.run_cli(monkeypatch, capsys, *command)
    rows = json.loads(out)
    assert [row["state"] for row in rows] == ["finished", "failed"] and rows[1]["why"]
    assert code == 2 and "1 of 2 runs failed" in err
    assert (tmp_path / "out" / "tiny-seed0" / "model.safetensors").exists()
    more = (*command[:3], str(recipe), *command[4:-1], "--seeds", "0,1")
    code, out, err = tiny.run_cli(monkeypatch, capsys, *more)
    assert code == 0 and "kept      tiny-seed0" in err and "finished  tiny-seed1" in err and "tiny" in out
    code, _, err = tiny.run_cli(monkeypatch, capsys, *command[:3], str(recipe), *command[4:-1], "--seeds", "x")
    assert code == 2 and "--seeds takes whole numbers" in err


@dataclass(frozen=True, kw_only=True)
class Dying(Sweep):
    """The process that is to run seed 1 ends as if its machine had."""

    def command(self, trial: Trial) -> list[str]:
        if trial.seed == 1:
            os._exit(1)
        return super().command(trial)


def test_on_ray(sweep: Sweep, tmp_path: Path) -> None:
    """One that dies however often it is started leaves the others alone."""
    ray = pytest.importorskip("ray")
    model, recipe = tiny.save("llama", tmp_path / "model"), tmp_path / "tiny.yaml"
    recipe.write_text(tiny.recipe("rtn", bits=8).to_yaml(), encoding="utf-8")
    real = Dying(**vars(sweep) | {
        "model": str(model), "data": str(tiny.write_text(tmp_path / "text.txt")), "arguments": ("--no-measure",),
        "attempts": 1,
    })  # fmt: skip
    try:
        found = sweeps.run(real, trials([str(recipe)], [None], [0, 1, 2]), on_ray=True)
    finally:
        ray.shutdown()
    assert [outcome.state for outcome in found] == ["finished", "failed", "finished"]
    assert "Ray gave it up" in found[1].why

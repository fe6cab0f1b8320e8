"""Several ranks do what one process does, bit for bit; and where one of them fails, the run ends and can be gone on with."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

import ranks_cases
import tiny
from compresslab import pipeline, ranks, training
from compresslab.artifact import Artifact
from compresslab.errors import CompressLabError
from compresslab.recipe import Training

HERE = Path(__file__).parent
WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    with tiny.quick():
        yield


def torchrun(count: int, *command: object) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "--standalone",
            *map(str, command)]  # fmt: skip


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.fixture(scope="module", params=[3])
def together(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, small: Path, text: Path
) -> dict[str, dict[str, Any]]:
    """What so many ranks have written, by case."""
    out = tmp_path_factory.mktemp("ranks") / "found.pt"
    done = subprocess.run(
        torchrun(request.param, HERE / "ranks_cases.py", out, small, text),
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results: dict[str, dict[str, Any]] = torch.load(out)
    return results


@pytest.mark.parametrize("case", ranks_cases.CASES)
def test_several_ranks_write_the_same_bits_as_one(case: str, together: dict[str, dict[str, Any]]) -> None:
    alone = ranks_cases.found(case, ranks.ALONE)
    assert alone
    assert together[case].keys() == alone.keys()
    differing = [name for name in alone if not torch.equal(alone[name], together[case][name])]
    assert not differing


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("small") / "llama")


@pytest.mark.parametrize("case", ranks_cases.TRAININGS)
def test_a_training_is_shared_out_by_examples(
    case: str, together: dict[str, dict[str, Any]], small: Path, text: Path, tmp_path: Path
) -> None:
    """Each of three ranks takes a third of every batch: the same sum of gradients, but for the order of adding."""
    alone, found = ranks_cases.trained(case, small, text, tmp_path / "out"), together[case]
    assert found.keys() == alone.keys()
    untrained = {name: tensor.float() for name, tensor in load_file(small / WEIGHTS).items()}
    moved = sum(float((alone[name] - untrained[name]).square().sum()) for name in alone)
    apart = sum(float((alone[name] - found[name]).square().sum()) for name in alone)
    assert moved > 0
    # Adam makes as much of a gradient that is mere noise as of any other: here, where much is rounded, those of queries and keys.
    assert apart < (1e-2 if case == "rounded, sharded" else 1e-4) * moved


def test_what_looks_at_whole_weights_is_not_sharded(
    small: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "started", lambda: ranks.Ranks(0, 2))
    rows = tiny.token_batches(4, 8, size=1)
    examples = [{"input_ids": row["input_ids"][0], "labels": row["input_ids"][0]} for row in rows]
    with pytest.raises(CompressLabError, match="leave training.shard out"):
        training.train_(
            tiny.models.load(small), examples, Training(batch=2, shard=True), tmp_path, after_step=lambda: None
        )


@pytest.mark.parametrize(("size", "count"), [(1, 5), (2, 5), (3, 5), (4, 3), (7, 64)])
def test_every_batch_is_walked_once_and_the_shares_are_even(size: int, count: int) -> None:
    shares = [list(ranks.Ranks(rank, size).share(count)) for rank in range(size)]
    assert [batch for share in shares for batch in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


# -- the whole command ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("model") / "llama", num_hidden_layers=12)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_text(tmp_path_factory.mktemp("text") / "words.txt")


def command(model: Path, text: Path, out: Path, *more: object) -> list[object]:
    return ["-m", "compresslab.cli", "compress", model, "--recipe", "w4a16-gptq", "--set", "group_size=16", "--data", text,
            "--out", out, "--no-measure", "--samples", 16, "--sequence-length", 16, *more]  # fmt: skip


def compress(model: Path, text: Path, out: Path, **more: Any) -> bytes:
    """The weights that one process writes, here."""
    settings = {"group_size": 16, "calibration.samples": 16, "calibration.sequence_length": 16}
    artifact, _ = pipeline.compress(model, "w4a16-gptq", str(text), out=out, settings=settings, measure=False, **more)
    return (artifact.folder / WEIGHTS).read_bytes()


@pytest.fixture(autouse=True)
def _not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.fresh, "measure", tiny.fake_measure)


@pytest.fixture
def undisturbed(model: Path, text: Path, tmp_path: Path) -> bytes:
    return compress(model, text, tmp_path / "undisturbed")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_is_killed_and_one_process_goes_on(
    rank: int, model: Path, text: Path, tmp_path: Path, undisturbed: bytes
) -> None:
    """The leader, which holds the lock, or another."""
    out, progress = tmp_path / "out", tmp_path / "out.partial" / "progress.json"
    running = subprocess.Popen(
        torchrun(2, *command(model, text, out)), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 300
    while not progress.exists() and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    workers = [p for p in psutil.Process(running.pid).children(recursive=True) if "compresslab.cli" in p.cmdline()]
    next(p for p in workers if p.environ()["RANK"] == str(rank)).send_signal(signal.SIGKILL)
    _, said = running.communicate(timeout=120)
    assert running.returncode != 0, said
    assert not out.exists()
    assert not [p for p in workers if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert compress(model, text, out) == undisturbed


def on_two_machines(tmp_path: Path, model: Path, text: Path, *asked: object) -> list[tuple[int, str]]:
    """Exit codes and what is said; each in a folder of its own, with its own copies of model and text under the same names."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    machines = []
    for number in range(2):
        folder = tmp_path / str(number)
        shutil.copytree(model, folder / "model")
        if not (folder / "words.txt").exists():
            shutil.copy(text, folder / "words.txt")
        start = ["--nnodes", "2", "--node-rank", str(number), "--master-addr", "127.0.0.1", "--master-port", str(port)]
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1", *start, *map(str, asked)]
        own = environment() | {"XDG_CACHE_HOME": str(folder / "cache")}
        machines.append(
            subprocess.Popen(launch, cwd=folder, env=own, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        )
    try:
        said = [machine.communicate(timeout=300)[1].decode() for machine in machines]
    finally:
        for machine in machines:
            machine.kill()
    return [(machine.returncode, words) for machine, words in zip(machines, said, strict=True)]


def test_two_machines_need_nothing_in_common(model: Path, text: Path, tmp_path: Path, undisturbed: bytes) -> None:
    found = on_two_machines(tmp_path, model, text, *command(Path("model"), Path("words.txt"), Path("out")))
    assert [code for code, _ in found] == [0, 0], found
    assert (tmp_path / "0" / "out" / WEIGHTS).read_bytes() == undisturbed
    assert not list((tmp_path / "1").glob("out*"))


def test_two_machines_with_other_texts_are_refused(small: Path, text: Path, tmp_path: Path) -> None:
    tiny.write_text(tmp_path / "words.txt", seed=7)
    (tmp_path / "1").mkdir()
    (tmp_path / "words.txt").rename(tmp_path / "1" / "words.txt")
    found = on_two_machines(tmp_path, small, text, *command(Path("model"), Path("words.txt"), Path("out")))
    for code, said in found:
        assert code != 0
        assert "the ranks have another data: give every machine the same" in " ".join(said.split())


@pytest.mark.parametrize(("rank", "others_see"), [(0, True), (0, False), (1, True)])
def test_a_training_needs_an_output_that_all_see(
    rank: int, others_see: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 finds what it has written; rank 1, in a folder of its own, finds nothing."""

    class Team(ranks.Ranks):
        def told(self, value: Any) -> Any:
            return value if self.leads else "what rank 0 has written"

        def gathered(self, values: Any) -> Any:
            return [*values, others_see]

    monkeypatch.setattr(ranks, "NOTICED_S", 0.0)
    folder = tmp_path / "training"
    if rank == 0 and others_see:
        Team(rank, 2).check_sees(folder)
    else:
        with pytest.raises(CompressLabError, match="is not seen by all ranks: on several machines"):
            Team(rank, 2).check_sees(folder)
    assert not list(tmp_path.rglob("seen"))


def test_ranks_go_on_with_what_one_process_began(model: Path, text: Path, tmp_path: Path, undisturbed: bytes) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        compress(model, text, out, progress=pipeline.Progress(step=_raise_at("model.layers.5")))
    done = subprocess.run(
        torchrun(2, *command(model, text, out)), env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report.html") == 1  # only the leader speaks
    Artifact(out).verify()
    assert (out / WEIGHTS).read_bytes() == undisturbed


def _raise_at(layer: str) -> Any:
    def step(what: str) -> None:
        if what.startswith(layer):
            raise KeyboardInterrupt

    return step


def test_a_budget_of_channels_is_refused(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "started", lambda: ranks.Ranks(0, 2))
    with pytest.raises(CompressLabError, match="start it without torchrun"):
        pipeline.compress(model, "prune-channels-25", str(text), out=tmp_path / "out", budget="0.5macs")

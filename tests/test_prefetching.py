"""What is read ahead is what would have been read; one block is ahead and no more; and faults are told by who asks."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

import ranks_cases
import tiny
from compresslab import layerwise, prefetching
from compresslab.errors import CompressLabError
from compresslab.prefetching import Ahead
from compresslab.ranks import ALONE

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    with tiny.quick():
        yield


def read(name: str) -> Tensor:
    if name == "bad":
        raise CompressLabError("tensor bad holds a NaN")
    return torch.full((2,), float(name))


def test_what_was_started_and_what_was_not() -> None:
    where: dict[str, str] = {}

    def noted(name: str) -> Tensor:
        where[name] = threading.current_thread().name
        return read(name)

    ahead = Ahead(noted, CPU)
    ahead.start(["1", "2"])
    assert [ahead.take(name).tolist() for name in ("2", "1", "3")] == [[2, 2], [1, 1], [3, 3]]
    assert where["1"].startswith("ahead") and where["2"].startswith("ahead")
    assert where["3"] == threading.current_thread().name
    ahead.close()


def test_a_fault_is_raised_where_the_tensor_is_taken() -> None:
    ahead = Ahead(read, CPU)
    ahead.start(["bad", "1"])
    assert ahead.take("1").tolist() == [1, 1]
    with pytest.raises(CompressLabError, match="holds a NaN"):
        ahead.take("bad")
    ahead.close()


def test_what_nobody_took_is_forgotten() -> None:
    ahead = Ahead(read, CPU)
    ahead.start(["bad"])
    ahead.start(["1"])
    assert list(ahead._on_the_way) == ["1"]
    ahead.close()
    assert not ahead._on_the_way and not [t for t in threading.enumerate() if t.name.startswith("ahead")]


@pytest.mark.parametrize("case", [name for name in ranks_cases.CASES if name != "no data"])
def test_a_run_that_reads_ahead_writes_the_same_bits(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = ranks_cases.found(case, ALONE)
    started: list[list[str]] = []

    class Watched(Ahead):
        def start(self, names: Sequence[str]) -> None:
            assert not self._on_the_way, "one block is ahead, and all of it was taken"
            started.append(list(names))
            super().start(names)

    monkeypatch.setattr(layerwise, "READ_AHEAD_FOR", ("cpu",))
    monkeypatch.setattr(layerwise, "Ahead", Watched)
    found = ranks_cases.found(case, ALONE)
    assert started and all(started)
    assert found.keys() == plain.keys()
    assert not [name for name in plain if not torch.equal(plain[name], found[name])]


def test_a_run_that_fails_leaves_no_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.save("llama", tmp_path / "model")
    name = "model.layers.1.mlp.up_proj.weight"
    tiny.change_tensors(folder, lambda tensors: tensors[name].fill_(float("nan")))
    monkeypatch.setattr(layerwise, "READ_AHEAD_FOR", ("cpu",))
    with pytest.raises(CompressLabError, match=r"layers\.1\.mlp\.up_proj"):
        tiny.solve(folder, tiny.token_batches(4))
    assert not [t for t in threading.enumerate() if t.name.startswith("ahead")]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_what_arrives_is_what_was_read() -> None:
    tensors = {str(i): torch.randn(512, 512, generator=torch.Generator().manual_seed(i)) for i in range(20)}
    ahead = prefetching.Ahead(tensors.__getitem__, torch.device("cuda"))
    ahead.start(list(tensors))
    for name, tensor in tensors.items():
        assert torch.equal((ahead.take(name) * 1).cpu(), tensor)
    ahead.close()

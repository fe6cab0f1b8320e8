"""Walks that wait on disk go on with the same bits; and what is not theirs is left alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

import ranks_cases
import tiny
from compresslab import layerwise, learning, pipeline, preflight, spilling
from compresslab.errors import CompressLabError
from compresslab.ranks import ALONE
from compresslab.solving import Pass
from compresslab.spilling import Spill
from compresslab.weights import parse_bytes


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(spilling, "SMALLEST_BYTES", 1)
    with tiny.quick():
        yield


def spilled(
    monkeypatch: pytest.MonkeyPatch, folder: Path, allowance: int, run: Callable[[], Any]
) -> tuple[Any, list[Spill]]:
    """What a run gives whose walks may keep so much in memory, and its spills."""
    made: list[Spill] = []

    def build(model: nn.Module, *_: Any) -> Spill:
        made.append(Spill(model, folder, allowance))
        return made[-1]

    with monkeypatch.context() as patch:
        patch.setattr(layerwise, "Spill", build)
        return run(), made


# A refiner looks at whole blocks, so that nothing of its run waits on disk.
WITH_DATA = [name for name in ranks_cases.CASES if name != "no data" and not name.startswith("refined")]


@pytest.mark.parametrize("case", WITH_DATA)
def test_what_waits_on_disk_goes_on_with_the_same_bits(
    case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kept = ranks_cases.found(case, ALONE)
    found, (spill,) = spilled(monkeypatch, tmp_path, 0, lambda: ranks_cases.found(case, ALONE))
    assert spill.written_bytes > 0
    assert found.keys() == kept.keys()
    assert not [name for name in kept if not torch.equal(kept[name], found[name])]
    assert not list(tmp_path.iterdir())


def test_as_much_stays_in_memory_as_may(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run() -> Any:
        return ranks_cases.found("gptq", ALONE)

    most: list[int] = []
    put_away = Spill.put_away

    def watched(self: Spill, *arguments: Any, **more: Any) -> None:
        put_away(self, *arguments, **more)
        most.append(sum(self.in_memory.values()))

    monkeypatch.setattr(Spill, "put_away", watched)
    _, (everything,) = spilled(monkeypatch, tmp_path, 0, run)
    most.clear()
    _, (some,) = spilled(monkeypatch, tmp_path, 200_000, run)
    assert 0 < some.written_bytes < everything.written_bytes
    assert 100_000 < max(most) <= 200_000


@pytest.mark.parametrize("look", [layerwise.survey, layerwise.watch_blocks])
def test_passes_that_only_look_spill_too(look: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = tiny.models.find(tiny.make("llama"))
    plan = layerwise_plan(source)

    def run() -> list[Any]:
        seen: list[Any] = []

        def see(name: str, *values: Any) -> None:
            tensors = [v.matrix if hasattr(v, "matrix") else v for v in values if v is not None]
            seen.append((name, [tensor.clone() for tensor in tensors]))

        look(Pass(source=source, plan=plan, batches=ranks_cases._batches()), see)
        return seen

    kept, (found, (spill,)) = run(), spilled(monkeypatch, tmp_path, 0, run)
    assert spill.written_bytes > 0
    assert len(found) == len(kept) > 0
    for (name, tensors), (other, others) in zip(kept, found, strict=True):
        assert name == other
        assert all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))


def layerwise_plan(source: Any) -> Any:
    from compresslab.plan import make_plan

    return make_plan(source, ("@outside-blocks",))


def test_a_survey_that_keeps_calls_keeps_them_in_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = tiny.models.find(tiny.make("llama"))
    calls: dict[str, list[Any]] = {"model.layers.0.self_attn": []}

    def run() -> None:
        given = Pass(source=source, plan=layerwise_plan(source), batches=ranks_cases._batches())
        layerwise.survey(given, lambda name, gram: None, calls)

    _, (spill,) = spilled(monkeypatch, tmp_path, 0, run)
    assert spill.written_bytes == 0
    assert all(kwargs["hidden_states"].abs().sum() > 0 for _, _, kwargs in calls["model.layers.0.self_attn"])


class _Keeps(nn.Module):
    """Keeps a tensor that it has made, as some architectures keep masks."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(50, 50))
        self.register_buffer("table", torch.randn(50, 50))
        self.made: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.made is None:
            self.made = torch.ones(40, 50)
        weight, table, made, hidden = self.weight.t(), self.table, self.made, x @ self.weight
        parts = {"a": [hidden + made, table[1:]]}
        getcurrent().parent.switch()
        return parts["a"][0] @ weight + hidden[:, :1].clone()


def test_a_walk_is_emptied_of_its_own_tensors_alone(tmp_path: Path) -> None:
    module, x = _Keeps(), torch.randn(40, 50)
    with torch.inference_mode():
        expected_walk = greenlet(module)
        expected_walk.switch(x)
        expected = expected_walk.switch()
        walk = greenlet(module)
        walk.switch(x)
        spill = Spill(module, tmp_path, 0)
        spill.put_away("0", walk, keep=({"x": x},))
        assert [s.nbytes() for s in spill.on_disk["0"]] == [0, 0]  # hidden, and hidden + made
        assert (tmp_path / "0.bin").stat().st_size == 2 * 40 * 50 * 4
        for own in (module.weight, module.table, module.made, x):
            assert isinstance(own, Tensor)
            assert own.abs().sum() > 0
        with spill.opened("0"):
            assert all(storage.nbytes() == 40 * 50 * 4 for storage in spill.on_disk["0"])
        spill.bring_back("0")
        assert torch.equal(walk.switch(), expected)


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    module = _Keeps()
    walk = greenlet(module)
    walk.switch(torch.randn(40, 50))
    with pytest.raises(CompressLabError, match="cannot write what waits.*raise --memory"):
        Spill(module, tmp_path / "file" / "inside", 0).put_away("0", walk, keep=())


def test_variables_are_not_kept_alive_by_looking(tmp_path: Path) -> None:
    """A look at a function's variables must not hold what the function gives up afterwards."""
    import gc
    import weakref

    alive: list[Any] = []

    def forward() -> None:
        big = torch.ones(1000)
        alive.append(weakref.ref(big))
        getcurrent().parent.switch()
        del big
        getcurrent().parent.switch()

    walk = greenlet(forward)
    walk.switch()
    spill = Spill(nn.Module(), tmp_path, 0)
    spill.put_away("0", walk, keep=())
    spill.bring_back("0")
    walk.switch()
    gc.collect()
    assert alive[0]() is None
    assert not list(itertools.chain(spill.on_disk, spill.in_memory))


# -- the whole command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def _not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.fresh, "measure", tiny.fake_measure)


def estimate(model: Path, **more: Any) -> preflight.Estimate:
    return pipeline.plan_only(model, tiny.recipe(), **more)[1]


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.9f}GB"


@pytest.mark.usefixtures("_not_measured")
def test_a_run_under_a_ceiling_writes_the_same_bytes_also_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text = tiny.save("llama", tmp_path / "model", num_hidden_layers=3), tiny.write_text(tmp_path / "words.txt")
    made: list[Spill] = []

    def build(*arguments: Any) -> Spill:
        made.append(Spill(*arguments))
        return made[-1]

    monkeypatch.setattr(layerwise, "Spill", build)

    def weights(out: Path, **more: Any) -> bytes:
        artifact, _ = pipeline.compress(model, tiny.recipe(), str(text), out=out, measure=False, **more)
        return (artifact.folder / "model.safetensors").read_bytes()

    whole = weights(tmp_path / "whole")
    monkeypatch.setattr(preflight, "batch_size", lambda length: 1)
    monkeypatch.setattr(learning, "batch_size", lambda length: 1)
    apart = weights(tmp_path / "apart")
    assert len(apart) == len(whole)
    found = estimate(model)
    ceiling = gigabytes(preflight._least(found) + 1)
    made.clear()
    assert weights(tmp_path / "ceiling", memory=ceiling) == apart
    assert made[-1].written_bytes > 0

    def stop(layer: str) -> None:
        if layer == "model.layers.2.self_attn.o_proj":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        weights(tmp_path / "killed", memory=ceiling, progress=pipeline.Progress(step=stop))
    (tmp_path / "killed.partial" / "waiting-1").mkdir()  # as a kill by the system would have left one
    assert weights(tmp_path / "killed", memory=ceiling) == apart


def test_a_ceiling_costs_time_and_disk_and_too_low_a_one_names_the_least_that_works(tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    free = estimate(model)
    least = preflight._least(free)
    tight, allowance = preflight.within(free, int(least) + 1)
    assert allowance <= 1
    assert tight.memory_bytes == int(least) + 1
    on_disk = free.waiting_bytes - allowance
    assert tight.disk_bytes == free.disk_bytes + on_disk
    assert tight.seconds == pytest.approx(free.seconds + 2 * on_disk * free.waits / preflight.BYTES_PER_SECOND)
    roomy, allowance = preflight.within(free, int(2 * least))
    assert roomy == free
    assert allowance >= free.waiting_bytes
    for low in (
        estimate,
        lambda model, memory: pipeline.compress(model, tiny.recipe(), out=tmp_path / "out", memory=memory),
    ):
        with pytest.raises(CompressLabError, match=r"--memory \S+ is the least that works") as refused:
            low(model, memory="1MB")
        told = parse_bytes(str(refused.value).split("--memory ")[1].split()[0])
        assert least <= told < least + 1e7, "what is named is enough"
    assert not (tmp_path / "out.partial").exists()


def test_what_cannot_wait_on_disk_says_so_before_any_work(tmp_path: Path) -> None:
    model, text = tiny.save("llama", tmp_path / "model"), tiny.write_text(tmp_path / "words.txt")
    settings = {"group_size": 16, "calibration.samples": 8, "calibration.sequence_length": 16}
    for call in (
        lambda: pipeline.plan_only(model, "w4a16-autoround", settings=settings, memory="1MB"),
        lambda: pipeline.compress(
            model, "w4a16-autoround", str(text), out=tmp_path / "out", settings=settings, memory="1MB"
        ),
    ):
        with pytest.raises(
            CompressLabError,
            match=r"recipe 'w4a16-autoround' can leave nothing on disk here: allow --memory 0\.\d\dGB$",
        ):
            call()

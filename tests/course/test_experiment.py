"""Verdicts from rows: a direction holds only beyond two standard deviations over the seeds."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest

from compresslab.course import catalogue, experiment, showing
from compresslab.errors import CompressLabError

LAB = catalogue.lab("3.3")
KEPT = sorted((Path(__file__).resolve().parents[2] / "results").glob("lab-*.json"))


def _verdict(better: list[float], worse: list[float]) -> str:
    rows = {"gptq-2": {"perplexity": better}, "rtn-2": {"perplexity": worse}}
    (found,) = experiment.judge(LAB, rows)
    assert found.key == "gptq-2"
    return found.verdict


def test_a_direction_must_exceed_two_standard_deviations() -> None:
    assert _verdict([5.0, 5.1, 5.2], [6.0, 6.1, 6.3]) == "holds"
    assert _verdict([5.0, 5.1, 5.2], [5.0, 5.9, 5.3]) == "direction only"
    assert _verdict([6.0, 6.1], [5.0, 5.0]) == "does not hold"
    assert _verdict([5.0], [6.0]) == "direction only"  # one seed has no spread
    assert _verdict([float("nan"), 5.0], [6.0, 6.0]) == "does not hold"


def test_a_run_keeps_all_seeds_and_is_read_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Settings:
        model: str = "none"
        seeds: int = 3

    def measure(settings: Any, seed: int, say: Any) -> Any:
        say("x")
        return {
            "rtn-2": {"perplexity": 9.0 + seed, "bytes": 10.0},
            "gptq-2": {"perplexity": 6.0 + 1.1 * seed, "bytes": 10.0},
        }

    fake = ModuleType("experiment")
    fake.SETTINGS, fake.measure = {"micro": Settings()}, measure  # type: ignore[attr-defined]
    monkeypatch.setattr(catalogue.Lab, "module", lambda self, name: fake)
    result = experiment.run("3.3")
    assert result.rows["rtn-2"]["perplexity"] == [9.0, 10.0, 11.0] and result.holds
    result.save(tmp_path / "result.json")
    assert experiment.read(tmp_path / "result.json") == result
    assert len(experiment.run("3.3", seeds=1).seeds) == 1
    data = re.search(
        r'src="data:image/svg\+xml;base64,([^"]+)"', showing.pareto(result, "perplexity", "perplexity", "en")
    )
    assert data is not None
    drawn = ElementTree.fromstring(base64.b64decode(data[1]))  # well-formed, with a style of its own
    assert drawn.tag.endswith("}svg") and ".trace { fill: none" in "".join(drawn.itertext())
    assert len([one for one in drawn.iter() if "dot" in one.get("class", "").split()]) == len(result.rows)
    table = showing.markdown(showing.measured(result, "zh-TW"))
    assert "GPTQ，2 位元" in table and "7.1" in table
    assert showing.verdicts(result, "en", {"gptq-2": False})[1][-2:] == ["holds", "no"]
    with pytest.raises(CompressLabError, match="no scale 'real' yet"):
        experiment.run("3.3", scale="real")
    with pytest.raises(CompressLabError, match="unknown scale"):
        experiment.run("3.3", scale="huge")


def test_parts_are_measured_apart_and_joined(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Settings:
        model: str = "none"
        seeds: int = 2
        parts: Any = ("rtn", "gptq")
        small_pictures: str | None = None

    def measure(settings: Any, seed: int, say: Any) -> Any:
        found = {"rtn-2": {"perplexity": 9.0 + seed}, "gptq-2": {"perplexity": 6.0 + 1.1 * seed}}
        return {row: metrics for row, metrics in found.items() if row.removesuffix("-2") in settings.parts}

    fake = ModuleType("experiment")
    fake.SETTINGS, fake.measure = {"micro": Settings()}, measure  # type: ignore[attr-defined]
    monkeypatch.setattr(catalogue.Lab, "module", lambda self, name: fake)
    first = experiment.run("3.3", parts=["rtn"])
    assert list(first.rows) == ["rtn-2"] and not first.verdicts and not first.runs
    both = experiment.run("3.3", parts=["gptq"], small_pictures="some", into=first)
    assert list(both.rows) == ["rtn-2", "gptq-2"] and [found.key for found in both.verdicts] == ["gptq-2"]
    assert [(run.rows, run.settings["small_pictures"]) for run in both.runs] == [
        (["rtn-2"], None),
        (["gptq-2"], "some"),
    ]
    assert both.seconds > first.seconds
    both.save(tmp_path / "result.json")
    assert experiment.read(tmp_path / "result.json") == both
    again = experiment.run("3.3", parts=["rtn"], into=both)  # measured anew, in the place that it had
    assert list(again.rows) == ["rtn-2", "gptq-2"]
    assert [run.rows for run in again.runs] == [["gptq-2"], ["rtn-2"]]
    for wrong, said in (
        ({"seeds": 1}, "of seeds"),
        ({"parts": ["x"]}, "unknown part 'x'"),
        ({"pictures": "a"}, "no use for pictures"),
    ):
        with pytest.raises(CompressLabError, match=said):
            experiment.run("3.3", into=first, **wrong)  # type: ignore[arg-type]
    fake.SETTINGS = {"micro": SimpleNamespace(model="none", seeds=1)}  # type: ignore[attr-defined]
    with pytest.raises(CompressLabError, match="no use for parts"):
        experiment.run("3.3", parts=["rtn"])


@pytest.mark.parametrize("lang", ["en", "zh-TW"])
@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_every_kept_result_is_shown_whole(path: Path, lang: str) -> None:
    result = experiment.read(path)
    table = showing.measured(result, lang)
    assert len(table) == len(result.rows) + 1 and len({len(line) for line in table}) == 1
    tables = showing.tables(result, lang)
    assert sum(len(part) - 1 for part in tables) == len(result.rows)
    for part in tables:  # no column that is empty, and none that is left out
        assert len({len(line) for line in part}) == 1
        assert all(any(line[column] for line in part[1:]) for column in range(len(part[0])))
    assert len(showing.verdicts(result, lang)) == len(result.verdicts) + 1
    beside = showing.peers(result, lang)
    ours = {found.ours for found in result.peers.values()}
    assert sum(len(table) - 1 for table in beside) == len(ours) + len(result.peers)
    assert all(len({len(line) for line in table}) == 1 for table in beside)
    assert showing.papers(result, lang)

"""Latency tables: sums by hand, the correction, and what a table refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from compresslab.errors import CompressLabError
from compresslab.search import latency
from compresslab.search.latency import Conditions, LatencyTable, corrected
from compresslab.search.widths import Widths

HERE = Conditions(batch=4, threads=1, machine="a processor", torch="2.8")


def layers(widths: Widths) -> list[str]:
    return [f"first {widths[0]}", f"second {widths[0]} {widths[1]}", "head"]


def table() -> LatencyTable:
    return LatencyTable(
        conditions=HERE,
        ms={"first 8": 1.0, "first 4": 0.7, "second 8 6": 2.0, "second 4 6": 1.25, "second 4 3": 0.5, "head": 0.25},
    )


def test_the_sum_of_layers_is_corrected_by_two_whole_networks() -> None:
    """Their layers add up to 3.25 and 1.45; what lies between takes 0.5, and everything 1.5 times what it does alone."""
    found = corrected(table(), layers, ((8, 6), 0.5 + 1.5 * 3.25), ((4, 3), 0.5 + 1.5 * 1.45))
    assert (found.offset_ms, found.slope) == (pytest.approx(0.5), pytest.approx(1.5))
    assert found.ms((8, 6)) == pytest.approx(0.5 + 1.5 * 3.25)
    assert found.ms((4, 6)) == pytest.approx(0.5 + 1.5 * (0.7 + 1.25 + 0.25))
    with pytest.raises(CompressLabError, match="no use as a budget here"):
        corrected(table(), layers, ((8, 6), 2.0), ((4, 3), 2.1))


def test_a_layer_that_was_not_measured_is_named() -> None:
    with pytest.raises(CompressLabError, match="no layer 'second 8 3'"):
        corrected(table(), layers, ((8, 6), 4.0), ((4, 3), 2.0)).ms((8, 3))


def test_a_table_comes_back_from_disk(tmp_path: Path) -> None:
    folder = tmp_path / "tables"
    assert latency.kept(folder, HERE).ms == {}
    table().save(folder)
    assert latency.kept(folder, HERE) == latency.read(latency.path_of(folder, HERE), HERE) == table()
    assert list(folder.iterdir()) == [latency.path_of(folder, HERE)]


@pytest.mark.parametrize(("name", "value"), [("batch", 1), ("threads", 2), ("machine", "another"), ("torch", "2.9")])
def test_a_table_of_other_conditions_is_refused(tmp_path: Path, name: str, value: object) -> None:
    table().save(tmp_path)
    path, others = latency.path_of(tmp_path, HERE), Conditions(**vars(HERE) | {name: value})
    assert path != latency.path_of(tmp_path, others)  # so that none is ever read for another
    with pytest.raises(CompressLabError, match=f"is of {name} .*, not {value}"):
        latency.read(path, others)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"ms": {}}', '{"conditions": {"batch": 1}, "ms": {}}', '{"conditions": 3, "ms": 4}']
)
def test_what_is_no_table_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "one.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(CompressLabError, match="no latency table"):
        latency.read(path, HERE)

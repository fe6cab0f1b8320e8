"""Several runs compared: the front against its definition, the pick for a latency, and what must not be mixed."""

from __future__ import annotations

import csv
import io
import random
from pathlib import Path

import pytest
from rich.console import Console

from compresslab.errors import CompressLabError
from compresslab.measure import energy
from compresslab.report import compare, pareto
from compresslab.report.pareto import Axis, Point
from compresslab.report.schema import Measurement, Report
from test_report import AFTER, BEFORE, make, measured
from tiny import run_cli


def told(name: str, value: float, unit: str, conditions: str, device: str = "cpu, 2 threads") -> Measurement:
    return Measurement(name=name, value=value, unit=unit, n=10, device=device, conditions=conditions)


def run(name: str, perplexity: float, ms: float, *, joules: float | None = None, device: str = "cpu, 2 threads",
        how: str = "after 32 tokens, batch 1, bfloat16, transformers", text: str = "wiki") -> Report:  # fmt: skip
    """A run whose float model has perplexity 25 and takes 60 ms, in float32."""
    before = (
        told("perplexity", 25.0, "1", text),
        told("weight_bytes", 270e6, "bytes", "files", "disk"),
        told("decode_tokens_per_s", 1000 / 60, "tokens/s", "after 32 tokens, batch 1, float32, transformers", device),
    )
    after = [
        told("perplexity", perplexity, "1", text),
        told("weight_bytes", 1e6 * ms * 10, "bytes", "files", "disk"),
        told("decode_tokens_per_s", 1000 / ms, "tokens/s", how, device),
    ]
    if joules is not None:
        after.append(told("decode_energy_j_per_token", joules, "J/token", "counter", device))
    return make(title=name, recipe={"name": name}, before=before, after=tuple(after))


def point(i: int, cost: float, quality: float, group: int = 0) -> Point:
    return Point(run=i, mark=str(i), label=str(i), cost=cost, quality=quality, group=group, baseline=False)


@pytest.mark.parametrize("more", [True, False])
def test_the_front_is_what_nothing_of_its_group_beats(more: bool) -> None:
    draw = random.Random(0)
    points = [point(i, draw.randrange(6), draw.randrange(6), draw.randrange(2)) for i in range(60)]
    sign = 1 if more else -1
    for p in points:
        for q in points:
            better = q.group == p.group and (
                (q.cost < p.cost and sign * q.quality >= sign * p.quality)
                or (q.cost <= p.cost and sign * q.quality > sign * p.quality)
            )
            assert pareto.beats(q, p, more) == better


def test_runs_fronts_and_one_baseline() -> None:
    runs = [run("a", 26.0, 20.0), run("b", 27.0, 10.0), run("c", 28.0, 15.0)]
    found = compare.comparison(runs)
    assert [row[0] for row in found.rows] == ["o", "1", "2", "3"]
    assert [r.baseline for r in found.runs] == [True, False, False, False]
    assert [front.name for front in found.fronts] == ["bytes", "latency"]
    for front in found.fronts:
        assert {p.mark for p in front.points if p.front} == {"o", "1", "2"}  # b beats c in both
        plot = pareto.text(front.points, found.quality, front.axis)
        assert max(map(len, plot.splitlines())) <= 58 and all(mark in plot for mark in "o123")
    page = compare.compare_html(found)
    assert page.count('class="dot float') == 4  # two plots, each wide and narrow
    assert page.count("<polyline") == 4
    latencies = {p.mark: p.cost for p in found.fronts[1].points}
    assert latencies == pytest.approx({"o": 60, "1": 20, "2": 10, "3": 15})
    with pytest.raises(CompressLabError, match="nothing to compare"):
        compare.comparison([])


def test_more_is_better_turns_front_and_pick_around() -> None:
    def classifier(name: str, share: float, ms: float) -> Report:
        return make(title=name, recipe={"name": name}, before=(), after=(
            told("top1_accuracy", share, "1", "digits"), told("forward_ms", ms, "ms", "batch 1"),
        ))  # fmt: skip

    found = compare.comparison(
        [classifier("a", 0.9, 5.0), classifier("b", 0.8, 9.0), classifier("c", 0.7, 1.0)], target_ms=6
    )
    assert found.quality.higher_is_better and found.quality.label == "top-1 accuracy"
    assert {p.mark for p in found.fronts[0].points if p.front} == {"1", "3"}
    assert found.pick.startswith("For 6 ms: 1 (a), 5.00 ms, top-1 accuracy 0.9, the best of the 2 of 3 runs")


def test_the_best_within_a_latency_and_why() -> None:
    runs = [run("a", 26.0, 20.0), run("b", 27.0, 10.0), run("c", 28.0, 5.0)]
    pick = compare.comparison(runs, target_ms=12).pick
    assert pick.startswith("For 12 ms: 2 (b), 10.0 ms, perplexity 27.00, the best of the 2 of 4 runs within it")
    assert "1 (a) has 26.00 and takes 20.0 ms" in pick  # what a slower target would buy
    assert compare.comparison(runs, target_ms=100).pick.startswith("For 100 ms: o (float, as it was)")
    assert "perplexity 28.00, the only one of 4 runs within it" in compare.comparison(runs, target_ms=6).pick
    none = compare.comparison(runs, target_ms=1).pick
    assert none == "No run takes at most 1 ms: the fastest, 3 (c), takes 5.00 ms."
    assert "nothing can be picked" in compare.comparison([make(before=(), after=())], target_ms=1).pick


@pytest.mark.parametrize(
    "change",
    [{"device": "cpu, 1 threads"}, {"device": "another cpu, 2 threads"}, {"text": "news"},
     {"how": "after 512 tokens, batch 1, bfloat16, transformers"}],
)  # fmt: skip
def test_what_was_measured_otherwise_is_neither_on_the_front_nor_picked(change: dict[str, str]) -> None:
    fastest = run("odd", 25.5, 1.0, **change)  # type: ignore[arg-type]
    found = compare.comparison([run("a", 26.0, 20.0), run("b", 27.0, 10.0), fastest], target_ms=15)
    assert found.pick.startswith("For 15 ms: 2 (b)")
    assert "Left out, measured under other conditions:" in found.pick and "3 (odd)" in found.pick
    assert any("not comparable" in caveat for caveat in found.caveats)
    latency = next(front for front in found.fronts if front.name == "latency")
    groups = {p.mark: p.group for p in latency.points}
    assert groups["1"] == groups["2"] != groups["3"] and len(latency.groups) == 2
    assert {p.mark for p in latency.points if p.front} >= {"1", "2", "3"}  # the odd one beats nobody


def test_dtype_and_runtime_belong_to_the_run() -> None:
    packed = "after 32 tokens, batch 1, bfloat16, Artifact.load_packed, packed weights on torch's kernels"
    found = compare.comparison([run("a", 26.0, 20.0), run("b", 27.0, 10.0, how=packed)])
    assert not found.caveats
    assert {p.group for front in found.fronts for p in front.points} == {0}


def test_energy_is_shown_where_it_was_measured() -> None:
    found = compare.comparison([run("a", 26.0, 20.0, joules=0.5), run("b", 27.0, 10.0)])
    assert [front.name for front in found.fronts] == ["bytes", "latency", "energy"]
    assert [p.mark for p in found.fronts[2].points] == ["1"]
    only = compare.comparison([run("a", 26.0, 20.0, joules=0.5)], by="energy")
    assert [front.name for front in only.fronts] == ["energy"]
    with pytest.raises(CompressLabError, match="--by speed: there are bytes, latency, energy"):
        compare.comparison([run("a", 26.0, 20.0)], by="speed")


def test_energy_as_it_is_measured_is_found_and_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs of the real loop differ in what they came to, and are comparable all the same."""
    monkeypatch.setattr(energy, "rapl", lambda: None)
    made = []
    for i, name in enumerate(("decode", "decode", "forward")):
        item = "token" if name == "decode" else "input"
        settings = energy.Settings(seconds=0.01 * (i + 1), grid=400)
        found = energy.of(
            lambda: sum(range(20_000)) and 7, name=name, item=item, settings=settings, conditions="batch 1"
        )
        made.append(make(title=str(i), before=measured(BEFORE), after=(*measured(AFTER), *found)))
    found = compare.comparison(made[:2])
    (front,) = (front for front in found.fronts if front.name == "energy")
    assert len(front.points) == 2 and {p.group for p in front.points} == {0}
    assert not [caveat for caveat in found.caveats if "Energy" in caveat]
    assert all(row[7].endswith(" J") for row in found.rows[1:])
    assert [front.name for front in compare.comparison(made[2:]).fronts][-1] == "energy"
    caveats = compare.comparison(made).caveats  # a token is no forward
    assert [caveat for caveat in caveats if "Energy was measured under different conditions" in caveat]


def test_another_quality_can_be_asked_for() -> None:
    report = make(after=(*measured(AFTER), told("kl", 0.02, "1", "wiki")), before=measured(BEFORE))
    found = compare.comparison([report], quality="kl")
    assert found.quality == Axis(label="kl", unit="1", higher_is_better=False)
    assert found.rows[1][5] == "0.02"
    with pytest.raises(CompressLabError, match="no run has a measurement 'bleu': there are perplexity"):
        compare.comparison([report], quality="bleu")


def test_the_heading_says_what_was_measured() -> None:
    """A score keeps its capitals; and where nothing was measured, no name of a measure stands there as if it had been."""

    def one(name: str) -> Report:
        return make(title=name, recipe={"name": name}, before=(), after=(told("rougeL", 0.2, "1", "prompts"),))

    assert '<p class="lead">ROUGE-L (higher is better). Bits' in compare.compare_html(
        compare.comparison([one("a"), one("b")])
    )
    bare = compare.comparison([make(before=(), after=()), make(before=(), after=())])
    assert bare.head[5] == "quality" and all(row[5] == "-" for row in bare.rows)
    page = compare.compare_html(bare)
    assert "perplexity" not in page.lower()
    assert "No run has its quality measured" in page


def test_many_runs_and_many_baselines_stay_apart() -> None:
    runs = [run(f"r{i}", 26.0 + i, 10.0 + i) for i in range(40)]
    others = [make(model={"name": f"m{i}"}, before=measured(BEFORE), after=measured(AFTER)) for i in range(8)]
    found = compare.comparison([*runs, *others], target_ms=10.5)
    assert len(found.rows) == 40 + 1 + 8 + 8
    assert found.pick.startswith("For 10.5 ms: 1 (r0)")
    names = [row["recipe"] for row in csv.DictReader(io.StringIO(compare.compare_csv(found))) if row["cost"] == "bytes"]
    assert {f"r{i}" for i in range(40)} <= set(names)
    for front in found.fronts:
        assert max(map(len, pareto.text(front.points, found.quality, front.axis).splitlines())) <= 58


def test_csv_has_exact_numbers_and_their_group() -> None:
    found = compare.comparison([run("a, b", 26.123456, 20.0), run("c", 27.0, 10.0, device="x, 1 threads")])
    lines = list(csv.DictReader(io.StringIO(compare.compare_csv(found))))
    row = next(line for line in lines if line["recipe"] == "a, b" and line["cost"] == "latency")
    assert float(row["quality_value"]) == 26.123456 and float(row["cost_value"]) == pytest.approx(20.0)
    assert row["cost_unit"] == "ms" and row["on_front"] == "True"
    assert len({line["group"] for line in lines if line["cost"] == "latency"}) == 2


def test_the_command_writes_all_forms_and_fits_60_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    folders = []
    for name, perplexity, ms in (("a", 26.0, 20.0), ("b", 27.0, 10.0)):
        folders.append(tmp_path / name)
        folders[-1].mkdir()
        run(name, perplexity, ms, joules=ms).save(folders[-1])
    code, out, err = run_cli(monkeypatch, capsys, "compare", *folders, "--target-ms", "15")
    assert (code, err) == (0, "") and "For 15 ms: 2 (b)" in out
    assert max(map(len, out.splitlines())) <= 60
    page, table = tmp_path / "page.html", tmp_path / "table.csv"
    code, out, _ = run_cli(monkeypatch, capsys, "compare", *folders, "--html", page, "--csv", table, "--by", "latency")
    assert code == 0 and out.count("wrote") == 2
    assert page.read_text(encoding="utf-8").count("<h2>Perplexity against") == 1
    assert table.read_text(encoding="utf-8").count("\n") == 4  # a head, the float model, two runs
    code, _, err = run_cli(monkeypatch, capsys, "compare", *folders, "--html", tmp_path / "no" / "page.html")
    assert code == 2 and err.startswith("error: cannot write")


def test_a_terminal_shows_the_plots() -> None:
    console = Console(width=60, record=True, file=io.StringIO())
    console.print(compare.compare_terminal(compare.comparison([run("a", 26.0, 20.0), run("b", 27.0, 10.0)])))
    text = console.export_text()
    assert "perplexity (down and left is better)" in text and "on the front: 2, 1, o" in text

"""The plot of a search: every point where it belongs."""

from __future__ import annotations

import re

import pytest

from compresslab.report.curve import curve_plot
from compresslab.report.front import front_plot
from compresslab.report.schema import Search


def search(**more: object) -> Search:
    fields = {
        "budget": "3.5bits", "unit": "bits", "sensitivity": "fisher", "chosen": (3.5, 0.01),
        "front": ((2.0, 1.0), (3.5, 0.01), (5.0, 0.0001), (16.0, 0.0)),
        "uniform": {"2": (2.0, 1.0), "4": (4.5, 0.002), "float": (16.0, 0.0)},
    }  # fmt: skip
    return Search.model_validate(fields | more)


def test_equal_factors_of_damage_are_equal_heights() -> None:
    line = re.search(r'<polyline class="trace k0" points="([^"]+)"', front_plot(search()))
    assert line is not None
    points = [tuple(map(float, pair.split(","))) for pair in line[1].split()]
    assert len(points) == 3  # without damage there is no height
    assert points[1][1] - points[0][1] == pytest.approx(points[2][1] - points[1][1], abs=0.2)
    assert points[1][0] - points[0][0] == pytest.approx(points[2][0] - points[1][0], abs=0.2)


def test_what_was_chosen_and_the_uniform_choices_are_named() -> None:
    drawn = str(front_plot(search()))
    assert "chosen: 3.5 bits, damage 0.01" in drawn
    assert ">4 bits everywhere<" in drawn and "in float" not in drawn
    assert "MB of weight files" in front_plot(search(unit="MB"))


def test_nothing_is_drawn_without_a_search_or_damage() -> None:
    assert front_plot(None) == ""
    assert front_plot(search(chosen=(16.0, 0.0))) == ""


def test_the_curve_of_a_training_goes_through_its_checks() -> None:
    training = {"losses": ["4.0", "2.0", "3.0"], "checked_at": [10, 20, 30], "best_step": 20, "loss_before": "6.0"}
    drawn = str(curve_plot({"training": training}))
    line = re.search(r'points="([^"]+)"', drawn)
    assert line is not None
    heights = [float(pair.split(",")[1]) for pair in line[1].split()]
    assert len(heights) == 4
    assert heights[0] < heights[1] < heights[3] < heights[2]  # lower losses further down
    assert drawn.count("the network that left") == 1 and "in training" not in drawn
    own = {"training_losses": ["5.0", "2.5", "1.0"]}
    both = str(curve_plot({"training": training | own}))
    lines = re.findall(r'class="trace k(\d)" points="([^"]+)"', both)
    assert [(colour, len(points.split())) for colour, points in lines] == [("1", 3), ("0", 4)]
    first, last = (float(pair.split(",")[1]) for pair in (lines[0][1].split()[0], lines[0][1].split()[-1]))
    assert first < last and last == max(float(pair.split(",")[1]) for _, points in lines for pair in points.split())
    assert "step 20: 2.5 (in training, since the check before)" in both and ">in training<" in both
    assert curve_plot(None) == curve_plot({"training": training | {"losses": ["nan"], "loss_before": "1"}}) == ""

"""Lab 3.10's own pieces: which block's hint each row gets, and shuffled hints."""

from __future__ import annotations

import torch

from compresslab.contract import Feature
from compresslab.course.labs.lab_3_10 import experiment
from compresslab.distill.hints import Hints


def test_the_rows_differ_in_whose_hints_they_get() -> None:
    rows = experiment.taught_by(experiment.SETTINGS["micro"], 4, 0)
    mine, its = ["s0", "s1"], ["t0", "t1", "t2", "t3"]
    pairs = {name: found.on_features[0].places(mine, its)[1] for name, found in rows.items() if found.on_features}
    assert pairs["hints"] == pairs["shuffled"] == pairs["alone"] == ["t1", "t3"]
    assert pairs["scratch-hints"] == pairs["hints"] and pairs["last"] == ["t3", "t3"]
    assert not rows["alone"].on_logits and not rows["labels"].on_features and not rows["logits"].on_features
    for seed in range(20):
        drawn = (
            experiment.taught_by(experiment.SETTINGS["micro"], 4, seed)["random"].on_features[0].places(mine, its)[1]
        )
        assert drawn[0] != "t1" and drawn[1] != "t3" and drawn[0] != drawn[1]
    assert rows["hints"].on_logits == rows["shuffled"].on_logits == rows["logits"].on_logits


def test_shuffled_hints_are_the_same_states_at_other_places() -> None:
    counted = torch.ones(4, 8, dtype=torch.bool)
    teacher = Feature(values=torch.arange(32.0).view(4, 8, 1).expand(4, 8, 3), counted=counted)
    plain, shuffled = (
        made(project="needed").judge([teacher], [teacher], 4) for made in (Hints, experiment.ShuffledHints)
    )
    assert float(plain([teacher], [teacher])) == 0
    first, second = (float(shuffled([teacher], [teacher])) for _ in range(2))
    assert first > 0 and second > 0 and first != second
    even = Feature(values=torch.full((4, 8, 3), 2.0), counted=counted)
    assert float(shuffled([even], [even])) == 0  # nothing to shuffle where all states are alike

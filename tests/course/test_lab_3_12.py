"""Lab 3.12's own pieces: rows that start alike and see the same batches, batches of one size, and weights of peers by row."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from compresslab.course.labs.lab_3_12 import experiment
from compresslab.mutual import mutual_loss

SETTINGS = dataclasses.replace(experiment.SETTINGS["micro"], labelled=40, unlabelled=20, test=20, steps=3, batch=16)


def test_batches_are_of_one_size_and_go_round_again() -> None:
    found = experiment.batches(10, 4, 5, torch.Generator().manual_seed(0))
    assert [len(at) for at in found] == [4] * 5
    assert len(set(torch.cat(found[:2]).tolist())) == 8


def test_rows_start_from_the_same_networks_unless_they_are_fresh() -> None:
    school = experiment.School(SETTINGS, 1)
    first, again, fresh = (next(school.untaught(anew)[0].parameters()) for anew in (False, False, True))
    assert torch.equal(first, again) and not torch.equal(first, fresh)


def test_every_row_is_measured() -> None:
    rows = experiment.measure(SETTINGS, 0, lambda what: None)
    assert rows["together"]["bytes"] == SETTINGS.networks * rows["alone"]["bytes"] == 3 * rows["exits"]["bytes"]
    assert all(0 <= row["accuracy"] <= 100 for row in rows.values())


def test_a_peer_who_is_sure_of_a_row_counts_for_more_there() -> None:
    """Worked out: of two peers of one student in one row, shares are exp(-H) over their sum."""
    said = [torch.tensor([[0.3, -0.2]]), torch.tensor([[3.0, 0.0]]), torch.zeros(1, 2)]
    labels, total = torch.tensor([0]), 0.0
    p = [z.double().softmax(1)[0] for z in said]
    sure = [float((x * x.log()).sum().exp()) for x in p]
    for k in range(3):
        others = [i for i in range(3) if i != k]
        apart = [sure[i] * float((p[i] * (p[i] / p[k]).log()).sum()) for i in others]
        total += sum(apart) / sum(sure[i] for i in others) - float(p[k][0].log())
    assert float(mutual_loss(said, labels, weights="adaptive")) == pytest.approx(total, rel=1e-5)

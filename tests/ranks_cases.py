"""Runs that test_ranks.py makes twice: here in one process, and as a program under torchrun in several."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from compresslab import distilling, pipeline, ranks, streamed, training
from compresslab.activations.static import Static
from compresslab.contract import Solver
from compresslab.plan import make_plan
from compresslab.quantize.autoround import AutoRound
from compresslab.quantize.gptq import GPTQ
from compresslab.quantize.kv_cache import KVCache
from compresslab.quantize.qep import QEP
from compresslab.quantize.rtn import RTN
from compresslab.recipe import Training
from compresslab.students import Shape

BATCHES, LONG = 5, 24


def _batches() -> list[dict[str, Any]]:
    """Some with padding, and of two lengths."""
    found = tiny.token_batches(2 * BATCHES, LONG, size=2)
    found[1]["attention_mask"] = torch.ones_like(found[1]["input_ids"])
    found[1]["attention_mask"][:, 17:] = 0
    found[3] = {"input_ids": found[3]["input_ids"][:, :9]}
    return found


def _language_model(kind: str, solver: Solver | None = None, batches: Any = ..., **more: Any) -> tiny.MemorySink:
    # Wide enough for several stripes, with an outlier channel and biases where the architecture has them.
    wide = {"hidden_size": 320, "num_attention_heads": 4} if kind != "gpt2" else {}
    model = tiny.make(kind, **wide)
    return tiny.solve(model, _batches() if batches is ... else batches, solver=solver, **more)


def _static(team: ranks.Ranks) -> tiny.MemorySink:
    model = tiny.make("llama")
    layers = make_plan(tiny.models.find(model), ("@outside-blocks",)).layers
    quantizer = Static(bits=8, calibrator="moving-average")
    return tiny.solve(
        model, _batches(), activations=dict.fromkeys(layers, quantizer), cache=KVCache(scales="tensor"), ranks=team
    )


CASES: dict[str, Callable[[ranks.Ranks], tiny.MemorySink]] = {
    "gptq": lambda team: _language_model("llama", ranks=team),
    "int8 statistic": lambda team: _language_model("llama", gram_precision="int8", ranks=team),
    "transposed layers": lambda team: _language_model("gpt2", ranks=team),
    "the head too": lambda team: _language_model("qwen2", ignore=(), ranks=team),
    "fewer batches than ranks": lambda team: _language_model("llama", batches=_batches()[:1], ranks=team),
    "a reference": lambda team: _language_model("llama", QEP(group_size=16), ranks=team),
    "static ranges": _static,
    "grouped convolutions": lambda team: tiny.solve(
        tiny.make_convnet("mobilenet"), tiny.picture_batches(10, size=8), solver=GPTQ(group_size=None), ranks=team
    ),
    "refined by blocks": lambda team: _language_model("llama", refiner=AutoRound(steps=4, batches=3), ranks=team),
    "refined with fewer batches than ranks": lambda team: _language_model(
        "llama", batches=_batches()[:1], refiner=AutoRound(steps=2), ranks=team
    ),
    "no data": lambda team: _language_model("llama", RTN(group_size=16), batches=None, ranks=team),
}


def found(name: str, team: ranks.Ranks) -> dict[str, Any]:
    """All that a run writes, by name."""
    sink = CASES[name](team)
    tensors = {f"{layer}.{leaf}": t for layer, solved in sink.solved.items() for leaf, t in solved.tensors.items()}
    return {name: tensor.clone() for name, tensor in (tensors | sink.floats).items()}


# -- trainings, which are shared out by examples and so differ by rounding ---------------------------------------------------

SIZES = {
    "calibration.samples": 13, "calibration.sequence_length": 16, "training.batch": 6, "training.epochs": 2.0,
    "training.learning_rate": 1e-3, "training.held_back": 0.08,
}  # fmt: skip


def _compressed(recipe: str, model: Path, text: Path, out: Path, **settings: Any) -> Path:
    return pipeline.compress(model, recipe, str(text), out=out, settings=SIZES | settings, measure=False)[0].folder


def _taught(model: Path, text: Path, out: Path, recipe: str, **settings: Any) -> Path:
    shape, settings = Shape(layers=1), SIZES | settings
    return distilling.distill(model, shape, recipe, str(text), out=out, settings=settings, measure=False)[0].folder


def _stopped_and_gone_on(model: Path, text: Path, out: Path) -> Path:
    """A training whose ranks keep parts of the network, stopped after more than half of it."""
    team, folder = ranks.started(), out.with_name(f"{out.name} checkpoints")
    settings = Training(
        batch=6, epochs=3, learning_rate=1e-3, checks=6, shard=True
    )  # six steps, a checkpoint after each
    rows = tiny.token_batches(13, 12, size=1)
    examples = [{"input_ids": row["input_ids"][0], "labels": row["input_ids"][0]} for row in rows]

    def stop(progress: float) -> None:
        if progress > 0.6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.train_(tiny.models.load(model).requires_grad_(), examples, settings, folder, on_step=stop)
    network = tiny.models.load(model).requires_grad_()
    training.train_(network, examples, settings, folder)
    if team.leads:
        network.save_pretrained(out)
    team.told(None)
    return out


TRAININGS: dict[str, Callable[[Path, Path, Path], Path]] = {
    "pruned before": lambda *paths: _compressed("prune-magnitude-50-recovered", *paths),
    "pruned by activations before": lambda *paths: _compressed("prune-wanda-50-recovered-w4a16", *paths, group_size=16),
    "pruned in the course": lambda *paths: _compressed("prune-gradual-80", *paths),
    "scales tuned": lambda *paths: _compressed("w3a16-e2e-qp", *paths, group_size=16),
    "rounded": lambda *paths: _compressed("w4a4-lsq", *paths),
    "rounded, sharded": lambda *paths: _compressed("w4a4-lsq", *paths, **{"training.shard": True}),
    "scales tuned, sharded": lambda *paths: _compressed(
        "w3a16-e2e-qp", *paths, group_size=16, **{"training.shard": True}
    ),
    "stopped and gone on with, sharded": _stopped_and_gone_on,
    "taught by hidden states, sharded": lambda *paths: _taught(*paths, "distill-hints", **{"training.shard": True}),
    "taught by logits": lambda *paths: _taught(*paths, "distill-soft-labels"),
    "taught by hidden states": lambda *paths: _taught(*paths, "distill-hints"),
}


def trained(name: str, folder: Path, text: Path, out: Path) -> dict[str, torch.Tensor]:
    """What a training writes, multiplied out."""
    made = TRAININGS[name](folder, text, out)
    weights = streamed.source_of(made).weights
    return {tensor: weights.get(tensor).float() for tensor in weights.names()}


def main() -> None:
    out, model, text = map(Path, sys.argv[1:4])
    torch.set_num_threads(1)
    team = ranks.started()
    results: dict[str, Any] = {name: found(name, team) for name in CASES}
    with tiny.quick(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.fresh, "measure", tiny.fake_measure)
        for name in TRAININGS:
            results[name] = trained(name, model, text, out.parent / "shared out" / name)
    if team.leads:
        torch.save(results, out)


if __name__ == "__main__":
    main()

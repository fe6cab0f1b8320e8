"""A decoder lowered by one block of each kind: the copies compute, by ExecuTorch's own runtime, what their blocks do in torch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from compresslab.exporters import executorch as exporter
from compresslab.exporters import executorch_blocks as blocks
from compresslab.exporters import executorch_lowering as lowering
from compresslab.exporters.contract import Given
from test_export_executorch import IDS, W4, as_xnnpack_computes, check_codes, near, one_thread, opened, run

pytest.importorskip("executorch")
__all__ = ["one_thread"]  # a fixture


def decoder(layers: int) -> Any:
    return tiny.make("llama", num_hidden_layers=layers)


# -- in the file -----------------------------------------------------------------------------------------------------


def test_copies_of_two_kinds_compute_what_their_blocks_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks 1 and 3 are left in float: two kinds in turn, and the second block of each is a copy."""
    ignore = ("@outside-blocks", "*layers.1.*", "*layers.3.*")
    model = tiny.save("llama", tmp_path / "model", num_hidden_layers=4)
    artifact = tiny.steps_taken(model, tmp_path, W4, ignore=ignore)
    monkeypatch.setattr(lowering, "_whole", lambda *given: pytest.fail("all of it was lowered"))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    lowered = lowering.lower(Given(artifact), 24, scratch)
    inner = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
             "mlp.down_proj")  # fmt: skip
    assert set(lowered.in_float) == {"lm_head", *(f"model.layers.{n}.{name}" for n in (1, 3) for name in inner)}
    products = {node.layer for node in lowered.nodes() if node.macs}
    assert products >= {f"model.layers.{n}.{name}" for n in range(4) for name in inner}
    assert lowered.cache_bytes == 4 * 2 * 2 * 8 * 24 * 4  # blocks, keys and values, heads, width, places, bytes
    exporter.write_program(lowered, tmp_path / exporter.MODEL)
    check_codes(artifact, tmp_path / exporter.MODEL, 4)
    session, in_torch = opened(tmp_path / exporter.MODEL), as_xnnpack_computes(artifact)
    for ids in (IDS, IDS.flip(1)):
        with torch.inference_mode():
            wanted = in_torch(input_ids=ids).logits
        found = [run(session, ids[:, :5].contiguous(), torch.arange(5))]
        found += [run(session, ids[:, n : n + 1].contiguous(), torch.tensor([n])) for n in range(5, ids.shape[1])]
        near(torch.stack(found, 1), wanted[:, 4:], 1e-2)


# -- kinds -----------------------------------------------------------------------------------------------------------


def test_blocks_are_alike_that_differ_in_their_numbers_alone() -> None:
    model = decoder(4)
    found = blocks.kinds(model, model)
    assert found is not None and (found.parent, found.of, found.firsts) == ("model.layers", (0, 0, 0, 0), (0,))
    model.model.layers[1].input_layernorm.variance_epsilon = 0.5
    model.model.layers[2].self_attn.k_proj.bias = nn.Parameter(torch.zeros(16))
    found = blocks.kinds(model, model)
    assert found is not None and (found.of, found.firsts) == ((0, 1, 2, 0), (0, 1, 2))
    model.model.layers[3].self_attn.scaling = 2.0
    assert blocks.kinds(model, model) is None
    assert blocks.kinds(decoder(1), decoder(1)) is None


def test_a_shortened_network_is_as_it_was_afterwards() -> None:
    model = decoder(3)
    model.model.layers[1].input_layernorm.variance_epsilon = 0.5
    found = blocks.kinds(model, model)
    before, state = copy.deepcopy(model.config.to_dict()), list(model.state_dict())
    assert found is not None
    with blocks.shortened(model, found):
        assert len(model.model.layers) == model.config.num_hidden_layers == 2
        assert [block.self_attn.layer_idx for block in model.model.layers] == [0, 1]
    assert model.config.to_dict() == before and list(model.state_dict()) == state
    assert [block.self_attn.layer_idx for block in model.model.layers] == [0, 1, 2]


# -- where blocks are ------------------------------------------------------------------------------------------------


class Chain(nn.Module):
    """Blocks and what lies between them, by a rule."""

    def __init__(self, rule: str) -> None:
        super().__init__()
        self.rule = rule
        self.before, self.behind = nn.Linear(4, 4), nn.Linear(4, 2)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        first = x = self.before(x).relu()
        for layer in self.layers:
            x = layer(x)
            if self.rule == "between":
                x = x * 2
            if self.rule == "skipping":
                first = first + x
        return self.behind(first if self.rule == "skipping" else x)


def traced(rule: str) -> torch.fx.Graph:
    with torch.no_grad():
        return torch.export.export(nn.Sequential(Chain(rule)).eval(), (torch.ones(1, 4),)).graph


def test_a_graph_falls_into_what_is_before_in_and_behind_the_blocks() -> None:
    graph, places = traced("plain"), ["0.layers.0", "0.layers.1"]
    at = blocks.regions(graph, places)
    assert [at[n] for n in graph.nodes if n.op == "call_function"] == [0, 0, 1, 2, 3]
    assert [n.name for n in blocks.carried(graph, at, 2)] == ["relu", "linear_1", "linear_2"]


@pytest.mark.parametrize("rule", ["between", "skipping"])
def test_a_graph_with_computing_between_its_blocks_is_irregular(rule: str) -> None:
    graph, places = traced(rule), ["0.layers.0", "0.layers.1"]
    with pytest.raises(blocks.Irregular):
        blocks.carried(graph, blocks.regions(graph, places), 2)

"""Neurons, heads and blocks taken out for good: the same network as the masked one, opened by plain transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import tiny
from compresslab import groups, models, pipeline, removing
from compresslab.errors import CompressLabError
from compresslab.numerics.gram import Gram
from compresslab.plan import make_plan
from compresslab.prune.block_influence import BlockInfluence
from compresslab.prune.filter_norm import FilterNorm
from compresslab.prune.ziplm import ZipLM
from compresslab.recipe import Recipe, parse
from compresslab.solving import Pass
from oracles import removal as oracle

WITH_HEADS = ("llama", "llama-tied", "mistral", "qwen2", "vit", "bert")
SMALL = {"multiple": 1, "damp_frac": 1e-9}


def inputs(kind: str, samples: int = 8) -> list[dict[str, Tensor]]:
    if kind == "vit":
        pixels = torch.randn(samples, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        return [{"pixel_values": part} for part in pixels.split(4)]
    return tiny.token_batches(samples, size=4)


def made(kind: str) -> Any:
    """A tiny model whose biases have a say too."""
    model = tiny.make(kind)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3, generator=generator)
    return model


def a_pass(model: Any, batches: list[dict[str, Tensor]]) -> Pass:
    source = models.find(model)
    return Pass(source=source, plan=make_plan(source, ("@outside-blocks",)), batches=batches)


def said(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        out = model(**batch)
    return out.logits if "logits" in out else out.last_hidden_state


@pytest.mark.parametrize("method", [ZipLM, FilterNorm])
@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
def test_what_is_left_is_the_masked_network(kind: str, method: type) -> None:
    """Units set to zero in the whole network, with the readers' new weights: the smaller network computes the same."""
    model, batches = made(kind), inputs(kind)
    more = {"damp_frac": 0.01} if method is ZipLM else {}
    heads = 0.5 if kind in WITH_HEADS else 0.0
    chosen = method(neuron_frac=0.4, head_frac=heads, multiple=1, **more)
    calibration = a_pass(model, batches)
    source, told = removing.removed(calibration, [chosen])
    smaller = models.materialise(source).eval()
    shares = {"neurons": 0.4} | ({"heads": 0.5} if heads else {})
    everything = [g for k in shares for g in groups.groups_of(calibration.source, k)]
    keep = {k: chosen.kept_of(k, next(g.count for g in everything if g.kind == k)) for k in shares}
    picked = removing._choose(calibration, chosen, everything, keep)
    with torch.no_grad():
        for group in everything:
            columns = torch.tensor(oracle.spread(picked[group.reader].kept.tolist(), group.width))
            reader = model.get_submodule(group.reader)
            transposed = models.is_transposed(reader)
            whole = torch.zeros_like(reader.weight.t() if transposed else reader.weight)
            whole[:, columns] = picked[group.reader].weight
            reader.weight.copy_(whole.t() if transposed else whole)
            if picked[group.reader].bias_change is not None:
                reader.bias.add_(picked[group.reader].bias_change)
    assert (
        (source.edits != ()) == (removing.NOT_PLAIN in told) == (kind == "bert")
    )  # its config ties heads to the width
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in model.parameters())
    assert torch.allclose(said(smaller, batches[0]), said(model, batches[0]), rtol=1e-3, atol=1e-4)
    assert f"of {everything[0].count} {everything[0].kind}" in told or len(shares) > 1


@pytest.mark.parametrize("kept", [[0], [1]])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_kept_entries_leave_what_the_attention_with_silent_heads_says(kind: str, kept: list[int]) -> None:
    """Every tensor cut by its name alone, the reader's with them, and opened by a plain smaller model."""
    model, batch = made(kind), inputs(kind)[0]
    assert model.config.num_attention_heads > model.config.num_key_value_heads == 2  # grouped queries
    tensors = model.state_dict()
    for name in {tensor.rpartition(".self_attn.")[0] for tensor in tensors if ".self_attn." in tensor}:
        prefix = f"{name}.self_attn."
        own = {tensor.removeprefix(prefix): tensor for tensor in tensors if tensor.startswith(prefix)}
        shapes = {short: list(tensors[tensor].shape) for short, tensor in own.items()}
        found = groups.kept_entries(shapes, "o_proj", 2, torch.tensor(kept))
        assert set(found) == set(own) - {"o_proj.bias"}
        for short, (axis, entries) in found.items():
            tensors[own[short]] = tensors[own[short]].index_select(axis, entries)
        reader = model.get_submodule(f"{prefix}o_proj").weight
        gone = oracle.spread([1 - kept[0]], reader.shape[1] // 2)
        with torch.no_grad():
            reader[:, gone] = 0
    smaller = type(model)(groups.with_units(models.reread(model.config), "heads", 2, 1))
    smaller.load_state_dict(tensors)
    assert torch.allclose(said(smaller.eval(), batch), said(model, batch), rtol=1e-3, atol=1e-4)


def layer(out: int = 6, units: int = 5, width: int = 1, tokens: int = 60, seed: int = 0) -> tuple[Tensor, Tensor, Gram]:
    """A weight, an input whose channels say much of each other and have means, and its Gram matrix."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(units * width, units * width, generator=generator)
    x = torch.randn(tokens, units * width, generator=generator) @ mixing + torch.randn(
        units * width, generator=generator
    )
    gram = Gram(units * width)
    gram.add_(x)
    return torch.randn(out, units * width, generator=generator), x, gram


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("seed", range(6))
def test_ziplm_is_a_refit_after_every_unit(seed: int, width: int, with_bias: bool) -> None:
    weight, x, gram = layer(units=6, width=width, seed=seed)
    producers = [torch.ones(6, 1, 2)]
    found = ZipLM(neuron_frac=0.5, **SMALL).remove(weight, producers, gram, keep=3, has_bias=with_bias)
    kept = oracle.greedy(weight, x, 6, 3, with_bias=with_bias)
    assert found.kept.tolist() == kept
    expected, change, _ = oracle.refitted(weight, x, oracle.spread(kept, width), with_bias=with_bias)
    assert torch.allclose(found.weight.double(), expected, rtol=1e-3, atol=1e-4)
    assert (found.bias_change is not None) == with_bias
    if found.bias_change is not None:
        assert torch.allclose(found.bias_change.double(), change, rtol=1e-3, atol=1e-3)


def test_the_greedy_choice_is_close_to_the_best_of_all() -> None:
    ratios = []
    for seed in range(10):
        weight, x, _ = layer(units=7, seed=seed)
        least = oracle.best(weight, x, 7, 4)[1]
        left = oracle.greedy(weight, x, 7, 4, with_bias=False)
        ratios.append(oracle.refitted(weight, x, left, with_bias=False)[2] / least)
    assert min(ratios) == pytest.approx(1.0) and sum(ratios) / len(ratios) < 1.5


def test_with_unrelated_inputs_the_weakest_unit_goes() -> None:
    """H = I: nothing can make up for anything, and what stays is as it was."""
    gram = Gram(8)
    gram.add_(torch.eye(8))
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(2))
    found = ZipLM(neuron_frac=0.5, **SMALL).remove(weight, [torch.ones(8, 1, 1)], gram, keep=4, has_bias=False)
    assert found.kept.tolist() == sorted(weight.square().sum(0).topk(4).indices.tolist())
    assert torch.allclose(found.weight, weight[:, found.kept], atol=1e-5)


def test_a_channel_that_another_one_repeats_goes_without_loss() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(50, 4, generator=generator)
    x = torch.cat([x, 2 * x[:, 1:2]], dim=1)
    gram, weight = Gram(5), torch.randn(3, 5, generator=generator)
    gram.add_(x)
    found = ZipLM(neuron_frac=0.2, multiple=1, damp_frac=1e-6).remove(
        weight, [torch.ones(5, 1, 1)], gram, keep=4, has_bias=False
    )
    assert len({1, 4} & set(found.kept.tolist())) == 1
    assert torch.allclose(x[:, found.kept] @ found.weight.t(), x @ weight.t(), atol=1e-2)


def test_filter_norm_counts_every_row() -> None:
    generator = torch.Generator().manual_seed(5)
    producers = [torch.randn(9, 2, 4, generator=generator), torch.randn(9, 1, 4, generator=generator)]
    reader = torch.randn(3, 18, generator=generator)
    found = FilterNorm(neuron_frac=0.5, multiple=1).remove(reader, producers, None, keep=4, has_bias=True)
    assert found.kept.tolist() == oracle.by_norm(producers, 4)
    assert torch.equal(found.weight, reader[:, oracle.spread(found.kept.tolist(), 2)])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_block_influence_is_that_of_plain_transformers(kind: str) -> None:
    count = {"n_layer": 4} if kind == "gpt2" else {"num_hidden_layers": 4}
    model = tiny.make(kind, **count)
    batches = tiny.token_batches(6, size=3)
    if kind == "bert":
        for batch in batches:
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            batch["attention_mask"][1, 9:] = 0
    calibration = a_pass(model, batches)
    names = list(models.blocks(model))
    found = removing.block_influence(calibration, names)
    outs: list[list[Tensor]] = [[] for _ in range(5)]
    hooks = []
    for i, name in enumerate(names):
        block = model.get_submodule(name)
        hooks.append(block.register_forward_pre_hook(
            lambda m, args, kwargs, i=i: outs[i].append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        ))  # fmt: skip
        if i == 3:
            hooks.append(block.register_forward_hook(
                lambda m, args, out: outs[4].append(out if isinstance(out, Tensor) else out[0])
            ))  # fmt: skip
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    masks = [batch["attention_mask"] for batch in batches] if kind == "bert" else None
    expected = oracle.influence([torch.cat(x) for x in outs], None if masks is None else torch.cat(masks))
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", ["llama-tied", "qwen2", "gpt2", "bert", "vit"])
def test_blocks_are_taken_out_and_the_rest_runs_as_it_did(kind: str) -> None:
    count = {"n_layer": 5} if kind == "gpt2" else {"num_hidden_layers": 5}
    model, batches = tiny.make(kind, **count), inputs(kind)
    calibration = a_pass(model, batches)
    influence = removing.block_influence(calibration, list(models.blocks(model)))
    source, told = removing.removed(calibration, [BlockInfluence(layer_frac=0.4)])
    gone = sorted(range(5), key=lambda i: influence[i])[:2]
    assert source.config.num_hidden_layers == 3 and all(f".{i}" in told for i in gone)
    for i in sorted(gone, reverse=True):
        parent, _, _ = next(iter(models.blocks(model))).rpartition(".")
        del model.get_submodule(parent)[i]
    kept = getattr(model.config, "layer_types", None)
    if kept:
        assert source.config.layer_types == [t for i, t in enumerate(kept) if i not in gone]
    assert torch.allclose(said(models.materialise(source).eval(), batches[0]), said(model, batches[0]), atol=1e-4)


def recipe(*steps: dict[str, Any]) -> Recipe:
    calibration = {"samples": 8, "sequence_length": 16}
    return parse({"name": "smaller", "version": 1, "steps": list(steps), "calibration": calibration}, "smaller")


UNITS = {"method": "ziplm", "neuron_frac": 0.25, "head_frac": 0.5}
DEPTH = {"method": "block-influence", "layer_frac": 0.5}


@pytest.mark.parametrize(
    "steps", [[UNITS], [DEPTH, UNITS], [UNITS, {"method": "gptq", "bits": 4, "group_size": 16, "symmetric": True}]]
)
def test_a_run_ends_in_a_plain_smaller_model(steps: list[dict[str, Any]], tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path / "model", num_hidden_layers=4)
    text = str(tiny.write_text(tmp_path / "text.txt"))
    with tiny.quick():
        _, report = pipeline.compress(model, recipe(*steps), text, out=tmp_path / "out", measure=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert (config["intermediate_size"], config["num_key_value_heads"], config["num_attention_heads"]) == (48, 1, 2)
    assert config["num_hidden_layers"] == (2 if DEPTH in steps else 4) and config["head_dim"] == 8
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert opened.get_submodule("model.layers.0.mlp").intermediate_size == 48
    assert report.model["changed"].count("taken out") == (3 if DEPTH in steps else 2)
    sizes = {m.name: m.value for m in report.before}, {m.name: m.value for m in report.after}
    assert sizes[1]["weight_bytes"] < sizes[0]["weight_bytes"]


def test_what_cannot_be_cut_is_said_before_any_work() -> None:
    packed = a_pass(tiny.make("gpt2"), inputs("gpt2"))
    with pytest.raises(CompressLabError, match=r"block transformer.h.0 of GPT2LMHeadModel .* has no places with heads"):
        removing.removed(packed, [ZipLM(head_frac=0.5)])
    llama = a_pass(tiny.make("llama"), inputs("llama"))
    with pytest.raises(CompressLabError, match=r"0.9 of 2 heads would leave none"):
        removing.removed(llama, [ZipLM(head_frac=0.9)])
    with pytest.raises(CompressLabError, match=r"0.01 of 64 neurons, left in multiples of 8, would take out none"):
        removing.removed(llama, [ZipLM(neuron_frac=0.01)])
    with pytest.raises(CompressLabError, match=r"0.9 of 2 blocks would take out 2: between 1 and 1 can go"):
        removing.removed(llama, [BlockInfluence(layer_frac=0.9)])


def test_heads_that_do_not_divide_are_named() -> None:
    """Three heads of keys for four of queries: no group of heads could leave as one."""
    source = models.find(tiny.make("llama"))
    source.config.num_key_value_heads = 3
    wanted = (
        r"block model.layers.0 of .* has heads that cannot be told apart: the 3 heads that have keys do not divide the 32 "
        r"channels of model.layers.0.self_attn.o_proj; leave heads out"
    )
    with pytest.raises(CompressLabError, match=wanted):
        groups.groups_of(source, "heads")
    assert groups.groups_of(source, "neurons")


def test_a_dead_layer_is_named() -> None:
    model = tiny.make("llama")
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.up_proj").weight.zero_()
    with pytest.raises(
        CompressLabError, match=r"neurons that model.layers.1.mlp.down_proj reads: no calibration token"
    ):
        removing.removed(a_pass(model, inputs("llama")), [ZipLM()])


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="nothing to take out"):
        ZipLM(neuron_frac=0.0)
    with pytest.raises(ValueError, match="1 would leave nothing"):
        FilterNorm(neuron_frac=1.0)
    with pytest.raises(ValueError, match="damp_frac"):
        ZipLM(damp_frac=0.0)
    with pytest.raises(ValueError, match="layer_frac"):
        BlockInfluence(layer_frac=1.0)

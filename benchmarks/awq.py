"""AWQ's search from Gram matrices against the search by replaying, on the same blocks, inputs and core.

    python benchmarks/awq.py      # offline: SmolLM2-135M, the Wikipedia extract that ships in a wheel

All sides walk through the float network block by block and get the same inputs of every layer. The replaying side does what
the paper's published code does: 20 exponents, each judged by running the attention, the MLP or the layer on its inputs
again, m the mean magnitude, no scale from v_proj to o_proj where their widths differ; then ranges clipped to no less than half,
judged by each group's outputs on 512 tokens, queries and keys left out. Ours is compresslab's AWQ: int8 Gram matrices, gathered
twice as in a real run, `AWQ.smooth`, `AWQ.solve`; `block` is the same with `search: block`, which judges by replaying where
several layers read one input. No side is charged for the forward. Seconds of processor time on one
thread, by block; the medians count. Perplexity is that of the float network with every layer's rounded weight in its place.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = os.environ["NUMBA_NUM_THREADS"] = "1"  # idle threads that spin would count as work

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from compresslab import data, models
from compresslab.measure import environment
from compresslab.numerics.gram import Gram, best_precision
from compresslab.numerics.grid import fit_minmax, quantize
from compresslab.quantize.awq import AWQ, rounded
from compresslab.quantize.rtn import RTN

RESULT = Path(__file__).resolve().parent.parent / "results" / "awq-search.json"
METHOD = AWQ(bits=4, group_size=64, symmetric=False)
GRID = METHOD.grid()
RATIOS, CLIPS, CLIP_TOKENS = 20, 10, 512
# What reads one input: its layers, the module that is replayed for them, and the layer that takes 1/s (None: the norm).
PLACES = (
    (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn", None),
    (("self_attn.o_proj",), "self_attn.o_proj", "self_attn.v_proj"),
    (("mlp.gate_proj", "mlp.up_proj"), "mlp", None),
    (("mlp.down_proj",), "mlp.down_proj", "mlp.up_proj"),
)
LAYERS = tuple(layer for layers, _, _ in PLACES for layer in layers)
Calls = dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]]  # module -> its arguments, batch by batch
Solved = dict[str, Tensor]  # layer -> the weight that stands for it, with the scales taken back


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--samples", type=int, default=16, help="samples of 512 tokens, for all blocks")
    arguments.add_argument(
        "--more-samples", type=int, default=64, help="samples of 512 tokens, for a few blocks' times"
    )
    arguments.add_argument("--blocks", type=int, default=3, help="how many blocks are timed with these")
    arguments.add_argument("--windows", type=int, default=12, help="test windows of 512 tokens")
    arguments.add_argument("--every", type=int, default=1, help="round every n-th block only")
    arguments.add_argument("--name", default=RESULT.stem, help="name of the result file")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    folder = models.locate("smollm2-135m")
    tokenizer = models.load_tokenizer(folder, "smollm2-135m")
    load = transformers.AutoModelForCausalLM.from_pretrained
    network = load(folder, dtype=torch.bfloat16, attn_implementation=models.CALIBRATION_ATTENTION).eval()
    windows = data.windows("wiki", tokenizer, length=512, count=options.windows)

    def calibration(samples: int) -> list[Tensor]:
        found = data.calibration("wiki", tokenizer, samples=samples, sequence_length=512, seed=0, batch_size=4)
        return [batch["input_ids"] for batch in found.batches]

    sides = {"gram": by_gram, "block": by_block, "replay": by_replay}
    with torch.inference_mode():
        seconds, solved = search(network, calibration(options.samples), sides, every=options.every)
        solved["rtn"] = round_to_nearest(network, list(solved["gram"]))
        judge = load(folder, dtype=torch.float32, attn_implementation=models.CALIBRATION_ATTENTION).eval()
        perplexities = {"float": perplexity(judge, windows)}
        for side, weights in solved.items():
            for name, weight in weights.items():
                judge.get_submodule(name).weight.copy_(weight)
            perplexities[side] = perplexity(judge, windows)
            print(f"{side:8s} perplexity {perplexities[side]:.4f}", flush=True)
        result: dict[str, Any] = {
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "what": "AWQ on SmolLM2-135M, 4 bits, groups of 64: median processor seconds of the search per block, one thread",
            "environment": environment.describe(torch.device("cpu")),
            "test_windows": len(windows),
            "blocks_rounded": len(seconds["gram"]),
            "perplexity": perplexities,
            "our perplexity / the replaying search's": round(perplexities["gram"] / perplexities["replay"], 4),
            "perplexity of search: block / of search: gram": round(perplexities["block"] / perplexities["gram"], 4),
            "searches": [times_of(options.samples, seconds)],
        }
        path = RESULT.with_stem(options.name)
        write(result, path)
        few, _ = search(network, calibration(options.more_samples), sides, blocks=options.blocks)
        result["searches"].append(times_of(options.more_samples, few))
        write(result, path)
    print(json.dumps({key: result[key] for key in result if key != "environment"}, indent=1))


def write(result: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def times_of(samples: int, seconds: dict[str, list[float]]) -> dict[str, Any]:
    medians = {side: statistics.median(times) for side, times in seconds.items()}
    return {
        "samples of 512 tokens": samples,
        "blocks": len(seconds["gram"]),
        "median seconds": medians,
        "all seconds": {side: [round(t, 3) for t in times] for side, times in seconds.items()},
        "replaying search's time / ours": round(medians["replay"] / medians["gram"], 2),
        "time of search: block / of search: gram": round(medians["block"] / medians["gram"], 2),
    }


def search(
    network: Any,
    batches: list[Tensor],
    sides: dict[str, Callable[..., Solved]],
    *,
    blocks: int | None = None,
    every: int = 1,
) -> tuple[dict[str, list[float]], dict[str, Solved]]:
    """Both searches on every block in turn: processor seconds by side and block, and what came of them."""
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    solved: dict[str, Solved] = {side: {} for side in sides}
    inputs = first_inputs(network, batches)
    for index, block in enumerate(network.model.layers[:blocks]):
        calls, inputs = run_block(block, inputs)
        if index % every:
            continue
        for side, solve in sides.items():
            started = time.process_time()
            found = solve(block, calls)
            seconds[side].append(time.process_time() - started)
            solved[side] |= {f"model.layers.{index}.{name}": weight for name, weight in found.items()}
        print(f"block {index}:", {side: round(times[-1], 2) for side, times in seconds.items()}, flush=True)
    return seconds, solved


def first_inputs(network: Any, batches: list[Tensor]) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """What the first block is given."""
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    class Enough(Exception):
        pass

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args, kwargs))
        raise Enough

    handle = network.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for ids in batches:
        try:
            network(input_ids=ids, use_cache=False)
        except Enough:
            continue
    handle.remove()
    return found


def run_block(block: nn.Module, inputs: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> tuple[Calls, Any]:
    """What every layer and replayed module of a block is given, and the next block's inputs."""
    calls: Calls = {name: [] for name in {*LAYERS, *(module for _, module, _ in PLACES)}}
    handles = [
        block.get_submodule(name).register_forward_pre_hook(
            lambda module, args, kwargs, mine=mine: mine.append((args, kwargs)), with_kwargs=True
        )
        for name, mine in calls.items()
    ]
    outputs = [first(block(*args, **kwargs)) for args, kwargs in inputs]
    for handle in handles:
        handle.remove()
    return calls, [((output, *args[1:]), kwargs) for output, (args, kwargs) in zip(outputs, inputs, strict=True)]


def first(output: Any) -> Tensor:
    found = output if isinstance(output, Tensor) else output[0]
    assert isinstance(found, Tensor)
    return found


def input_of(calls: Calls, layer: str) -> Tensor:
    """X, bfloat16 [tokens, in]."""
    return torch.cat([args[0].flatten(0, -2) for args, _ in calls[layer]])


def taken_back(weight: Tensor, columns: Tensor, rows: Tensor) -> Tensor:
    return weight * rows[:, None] / columns


# -- ours ------------------------------------------------------------------------------------------------------------


def by_gram(block: nn.Module, calls: Calls, judged_by_block: bool = False) -> Solved:
    weights = {name: block.get_submodule(name).weight.float() for name in LAYERS}
    columns = {name: torch.ones(weight.shape[1]) for name, weight in weights.items()}
    rows = {name: torch.ones(weight.shape[0]) for name, weight in weights.items()}
    for layers, module, producer in PLACES:
        gram = gram_of(calls, layers[0])
        channels = None if producer is None else channels_of(len(rows[producer]), gram.features)
        same_as = None if channels is None else first_of(channels)
        error = output_error(block, calls, layers, module) if judged_by_block and len(layers) > 1 else None
        s = METHOD.smooth(
            [weights[n] for n in layers], gram, grid=GRID, activation_grid=None, same_as=same_as, output_error=error
        )
        columns |= dict.fromkeys(layers, s)
        if producer is not None:
            rows[producer] = rows[producer].index_put((channels,), s)  # type: ignore[arg-type]
    solved = {}
    for layers, _, _ in PLACES:
        gram = gram_of(calls, layers[0], divisor=columns[layers[0]])  # a real run gathers it again, of x / s
        for name in layers:
            scaled = (weights[name] * columns[name] / rows[name][:, None]).contiguous()
            found = METHOD.solve(scaled, gram, scale_dtype=torch.bfloat16).weight
            solved[name] = taken_back(found.dequantize(), columns[name], rows[name])
    return solved


def by_block(block: nn.Module, calls: Calls) -> Solved:
    return by_gram(block, calls, judged_by_block=True)


def output_error(
    block: nn.Module, calls: Calls, layers: tuple[str, ...], module: str
) -> Callable[[Sequence[Tensor]], float]:
    """What the product's replaying.Replays is: weights -> the squared error of the module's output."""
    linears = [block.get_submodule(name) for name in layers]
    originals = [linear.weight.data for linear in linears]  # type: ignore[union-attr]
    replayed = block.get_submodule(module)
    wanted = [first(replayed(*args, **kwargs)) for args, kwargs in calls[module]]

    def error(given: Sequence[Tensor]) -> float:
        for linear, weight in zip(linears, given, strict=True):
            linear.weight.data = weight.bfloat16()  # type: ignore[union-attr]
        outputs = [first(replayed(*args, **kwargs)) for args, kwargs in calls[module]]
        for linear, weight in zip(linears, originals, strict=True):
            linear.weight.data = weight  # type: ignore[union-attr]
        pairs = zip(outputs, wanted, strict=True)
        return sum(float((here - there).float().square().sum()) for here, there in pairs)

    return error


def gram_of(calls: Calls, layer: str, divisor: Tensor | None = None) -> Gram:
    gram = Gram(calls[layer][0][0][0].shape[-1], precision=best_precision())
    for (x, *_), _ in calls[layer]:
        gram.add_(x if divisor is None else x / divisor.bfloat16())
    return gram


def channels_of(width: int, features: int, head: int = 64) -> Tensor:
    """The producer's channel behind each input channel, where neighbouring query heads of 64 share a value head."""
    return torch.arange(width).view(-1, head).repeat_interleave(features // width, dim=0).flatten()


def first_of(channels: Tensor) -> Tensor:
    """The first input channel with the same producer's channel as this one."""
    return (channels[:, None] == channels).int().argmax(dim=1)


# -- as published ----------------------------------------------------------------------------------------------------


def by_replay(block: nn.Module, calls: Calls) -> Solved:
    weights = {name: block.get_submodule(name).weight.float() for name in LAYERS}
    columns = {name: torch.ones(weight.shape[1]) for name, weight in weights.items()}
    rows = {name: torch.ones(weight.shape[0]) for name, weight in weights.items()}
    for layers, module, producer in PLACES:
        if producer is not None and len(rows[producer]) != columns[layers[0]].numel():
            continue
        s = replayed_scales(block, calls, layers, module)
        columns |= dict.fromkeys(layers, s)
        if producer is not None:
            rows[producer] = s
    solved = {}
    for name, weight in weights.items():
        scaled = weight * columns[name] / rows[name][:, None]
        if not name.endswith(("q_proj", "k_proj")):
            scaled = clipped(scaled, (input_of(calls, name) / columns[name].bfloat16()))
        found = quantize(scaled, *fit_minmax(scaled, GRID, torch.bfloat16), GRID).dequantize()
        solved[name] = taken_back(found, columns[name], rows[name])
    return solved


def replayed_scales(block: nn.Module, calls: Calls, layers: tuple[str, ...], module: str) -> Tensor:
    """The scales of the exponent with the least error of the module's output."""
    linears = [block.get_submodule(name) for name in layers]
    originals = [linear.weight.data for linear in linears]  # type: ignore[union-attr]
    loudness = input_of(calls, layers[0]).abs().float().mean(dim=0)
    replayed = block.get_submodule(module)
    wanted = [first(replayed(*args, **kwargs)) for args, kwargs in calls[module]]
    best, least = torch.ones_like(loudness), float("inf")
    for step in range(RATIOS):
        scales = (loudness ** (step / RATIOS)).clamp(min=1e-4)
        scales = scales / (scales.max() * scales.min()).sqrt()
        for linear, weight in zip(linears, originals, strict=True):
            linear.weight.data = rounded(weight.float(), scales, GRID).bfloat16()  # type: ignore[union-attr]
        loss = 0.0
        for (args, kwargs), there in zip(calls[module], wanted, strict=True):
            loss += float((first(replayed(*args, **kwargs)) - there).float().square().sum())
        if loss < least:
            best, least = scales, loss
    for linear, weight in zip(linears, originals, strict=True):
        linear.weight.data = weight  # type: ignore[union-attr]
    return best


def clipped(weight: Tensor, x: Tensor) -> Tensor:
    """W [out, in] with every group clipped where that lowers the error of the group's own output on some of x [tokens, in]."""
    size = 64
    x = x[:: max(1, len(x) // CLIP_TOKENS)].unflatten(1, (-1, size)).transpose(0, 1).contiguous()  # [G, tokens, n]
    grouped = weight.unflatten(1, (-1, size)).transpose(0, 1)  # [G, out, n]
    largest = grouped.abs().amax(dim=2, keepdim=True)
    best, least = largest.clone(), torch.full_like(largest, torch.inf)
    for step in range(CLIPS):
        limit = largest * (1 - step / (2 * CLIPS))
        cut = torch.maximum(torch.minimum(grouped, limit), -limit)
        flat = cut.transpose(0, 1).flatten(1)
        nearest = quantize(flat, *fit_minmax(flat, GRID, torch.float32), GRID).dequantize()
        error = (nearest.unflatten(1, (-1, size)).transpose(0, 1) - grouped).bfloat16()
        loss = torch.bmm(x, error.transpose(1, 2)).float().square().mean(dim=1).unsqueeze(2)
        better = loss < least
        best, least = torch.where(better, limit, best), torch.where(better, loss, least)
    return torch.maximum(torch.minimum(grouped, best), -best).transpose(0, 1).flatten(1)


# -- quality ---------------------------------------------------------------------------------------------------------


def round_to_nearest(network: Any, names: list[str]) -> Solved:
    method = RTN(bits=4, group_size=64, symmetric=False)
    found = {name: network.get_submodule(name).weight.float() for name in names}
    return {n: method.solve(w, None, scale_dtype=torch.bfloat16).weight.dequantize() for n, w in found.items()}


def perplexity(network: Any, windows: Tensor) -> float:
    losses = [float(network(ids[None], labels=ids[None], use_cache=False).loss) for ids in windows]
    return float(torch.tensor(losses, dtype=torch.float64).mean().exp())


if __name__ == "__main__":
    main()

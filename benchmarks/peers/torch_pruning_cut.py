"""Torch-Pruning on networks that transformers opens; run by the Python of its environment, one job at a time.

    python torch_pruning_cut.py JOB.json ANSWER.json

JOB: "folder", "do" ("group" or "halve"), "inputs" (safetensors, by the names of the forward's arguments; those whose names begin
with "shown." are what the halved network's logits, or last hidden states, are written for), "outputs", "batches", "rounds",
"repeats" (of grouping or halving, whose median is told), "threads".

"group": the dependency graph of the network and all groups of its linear layers. "halve": of every attention half of the heads,
and of every feed-forward half of the neurons, by the sum of |w| over all that is coupled, as our group-magnitude with power 1.
Query, key and value are told to the pruner as heads, as its own examples do; the numbers of heads in the modules are mended
afterwards. The network is timed before and after, in turn.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch_pruning
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def opened(folder: Path) -> nn.Module:
    config = transformers.AutoConfig.from_pretrained(folder)
    cls = getattr(transformers, config.architectures[0])
    model = cls.from_pretrained(folder, dtype=torch.float32).eval()
    # With keys and values among what is returned, 30 blocks were not grouped in ten minutes.
    model.config.use_cache = False
    return model


def said(found: Any) -> Tensor:
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


def group(model: nn.Module, inputs: Mapping[str, Tensor]) -> int:
    graph = torch_pruning.DependencyGraph().build_dependency(model, dict(inputs), output_transform=said)
    return sum(1 for _ in graph.get_all_groups(root_module_types=[nn.Linear, nn.Conv2d]))


def halve_(model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    kinds, neurons = ("query", "key", "value", "q_proj", "k_proj", "v_proj"), ("intermediate.dense", "mlp.fc1")
    count = model.config.num_attention_heads
    heads = {module: count for name, module in linear.items() if name.rpartition(".")[2] in kinds}
    cut = [*heads, *(module for name, module in linear.items() if name.endswith(neurons))]
    pruner = torch_pruning.pruner.BasePruner(
        model, dict(inputs), pruning_ratio=0.5, num_heads=heads, prune_num_heads=True, prune_head_dims=False,
        head_pruning_ratio=0.5,
        importance=torch_pruning.importance.MagnitudeImportance(p=1, group_reduction="sum", normalizer=None, bias=True),
        ignored_layers=[module for module in linear.values() if module not in cut], output_transform=said,
    )  # fmt: skip
    pruner.step()
    for module in model.modules():
        of_it = [child for child in module.children() if child in heads]
        if of_it:
            left = pruner.num_heads[of_it[0]]
            for name in ("num_attention_heads", "num_heads"):
                if hasattr(module, name):
                    setattr(module, name, left)
            if hasattr(module, "all_head_size"):
                module.all_head_size = of_it[0].out_features


@torch.inference_mode()
def timed_ms(networks: Mapping[str, nn.Module], inputs: Mapping[str, Tensor], rounds: int) -> dict[str, float]:
    taken: dict[str, list[float]] = {name: [] for name in networks}
    for turn in range(rounds + 2):
        for name, network in networks.items():
            started = time.perf_counter()
            network(**inputs)
            if turn >= 2:
                taken[name].append(1000 * (time.perf_counter() - started))
    return {name: statistics.median(times) for name, times in taken.items()}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    given = load_file(job["inputs"])
    inputs = {name: tensor for name, tensor in given.items() if not name.startswith("shown.")}
    shown = {name.removeprefix("shown."): tensor for name, tensor in given.items() if name.startswith("shown.")}
    model, taken = opened(Path(job["folder"])), []
    answer: dict[str, Any] = {name: version(name) for name in ("torch-pruning", "torch", "transformers")}
    if job["do"] == "group":
        for _ in range(job["repeats"]):
            started = time.perf_counter()
            answer["groups"] = group(model, inputs)
            taken.append(time.perf_counter() - started)
        answer["seconds"] = statistics.median(taken)
    else:
        whole = model
        for _ in range(job["repeats"]):
            model = copy.deepcopy(whole)
            started = time.perf_counter()
            halve_(model, inputs)
            taken.append(time.perf_counter() - started)
        answer["seconds"] = statistics.median(taken)
        answer["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        for batch in job["batches"]:
            some = {name: tensor[:1].expand(batch, *tensor.shape[1:]).contiguous() for name, tensor in inputs.items()}
            answer[f"ms_{batch}"] = timed_ms({"before": whole, "after": model}, some, job["rounds"])
        if shown:
            rows = range(0, len(next(iter(shown.values()))), 32)
            with torch.inference_mode():
                parts = [said(model(**{name: tensor[i : i + 32] for name, tensor in shown.items()})) for i in rows]
            save_file({"found": torch.cat(parts).contiguous()}, job["outputs"])
    Path(sys.argv[2]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Structured pruning beside Torch-Pruning: how fast a graph is grouped and cut, and whether the same is left.

    compresslab peers install torch-pruning
    python benchmarks/structured_peer.py                # results/structured-peer.json; two minutes
    python benchmarks/structured_peer.py --only llama

    llama     30 blocks of SmolLM2-135M's shapes, random weights: seconds until all coupled groups are known
    vit       6 blocks of 192, random weights: half of the heads and of the neurons by the sum of |w| over all that is coupled
    minilm    MiniLM-L6 of the offline zoo, likewise, and the embeddings of passages: their cosine with the whole network's

Both run in processes of their own, one after the other: theirs in the peer's environment (peers/torch_pruning_cut.py), ours here.
Seconds are medians of --repeats; of a forward, the whole and the halved network in turn. Ours copies the network, runs what is
left beside the masked network and compares them, within its seconds; theirs cuts in place, and groups the Llama without its cache
of keys and values.

By the same importance (theirs is told to count biases) the same units go; so what both are left with must say the same of the
same inputs, and `largest_difference` is how far they are apart, as a share of what is said at most: an oracle for both.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import structured
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compresslab import data, models
from compresslab.channels import take_out_
from compresslab.coupling import couplings
from compresslab.cutting import said
from compresslab.measure import environment
from compresslab.peers import environments
from compresslab.peers.registry import peer
from compresslab.prune.group_magnitude import GroupMagnitude

RESULT = Path(__file__).resolve().parent.parent / "results" / "structured-peer.json"
SCRIPT = Path(__file__).parent / "peers" / "torch_pruning_cut.py"
HALF = GroupMagnitude(channel_frac=0.5, head_frac=0.5, power=1)
Inputs = dict[str, Tensor]


def llama(folder: Path) -> tuple[Path, Inputs, Inputs]:
    with models.quiet_transformers():
        models.initialised(structured.llama_config(), 0).save_pretrained(folder)
    return folder, {"input_ids": torch.zeros(1, 8, dtype=torch.long)}, {}


def vit(folder: Path) -> tuple[Path, Inputs, Inputs]:
    torch.manual_seed(0)
    with models.quiet_transformers():
        structured.small_vit().save_pretrained(folder)
    return folder, {"pixel_values": torch.zeros(1, 3, 32, 32)}, {"pixel_values": torch.randn(64, 3, 32, 32)}


def minilm(folder: Path) -> tuple[Path, Inputs, Inputs]:
    found = models.locate("minilm-l6")
    texts = data.encoder_texts("wiki", models.load_tokenizer(found, "minilm-l6"), count=128, longest=128)
    shown = {name: texts[f"passages.{name}"] for name in ("input_ids", "attention_mask")}
    one = torch.ones(1, 128, dtype=torch.long)
    return found, {"input_ids": one, "attention_mask": one}, shown


def theirs(
    told: Mapping[str, Any], inputs: Inputs, shown: Inputs, scratch: Path
) -> tuple[dict[str, Any], Tensor | None]:
    job = dict(told) | {"inputs": str(scratch / "inputs.safetensors"), "outputs": str(scratch / "outputs.safetensors")}
    save_file({k: v.clone() for k, v in (inputs | {f"shown.{k}": v for k, v in shown.items()}).items()}, job["inputs"])
    (scratch / "job.json").write_text(json.dumps(job), encoding="utf-8")
    python = environments.python(peer("torch-pruning"))
    command = [str(part) for part in (python, SCRIPT, scratch / "job.json", scratch / "answer.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    if done.returncode:
        raise SystemExit(f"Torch-Pruning failed:\n{done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads((scratch / "answer.json").read_text(encoding="utf-8"))
    return answer, load_file(job["outputs"])["found"] if shown else None


def ours(told: Mapping[str, Any], inputs: Inputs, shown: Inputs) -> tuple[dict[str, Any], Tensor | None, Tensor | None]:
    """As theirs; and what the whole network says of what is shown."""
    whole, taken = models.load(told["folder"], dtype=torch.float32), []
    if told["do"] == "group":
        for _ in range(told["repeats"]):
            started = time.perf_counter()
            groups = len(couplings(whole, inputs).groups)
            taken.append(time.perf_counter() - started)
        return {"groups": groups, "seconds": statistics.median(taken)}, None, None
    for _ in range(told["repeats"]):
        model = copy.deepcopy(whole)
        started = time.perf_counter()
        take_out_(model, inputs, HALF)
        taken.append(time.perf_counter() - started)
    answer: dict[str, Any] = {"seconds": statistics.median(taken)}
    answer["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    timed = structured.in_turn(whole, model, lambda n: _repeated(inputs, n), told["rounds"])
    for batch in told["batches"]:
        answer[f"ms_{batch}"] = {"before": timed[str(batch)]["before_ms"], "after": timed[str(batch)]["after_ms"]}
    return answer, _outputs(model, shown), _outputs(whole, shown)


def _repeated(inputs: Inputs, batch: int) -> Inputs:
    return {name: tensor[:1].expand(batch, *tensor.shape[1:]).contiguous() for name, tensor in inputs.items()}


@torch.inference_mode()
def _outputs(model: nn.Module, shown: Inputs) -> Tensor | None:
    if not shown:
        return None
    rows = range(0, len(next(iter(shown.values()))), 32)
    return torch.cat([said(model, {name: tensor[i : i + 32] for name, tensor in shown.items()}) for i in rows])


def cosine(found: Tensor, whole: Tensor, shown: Inputs) -> float:
    """Of what each says, as a vector of each example; of texts the mean over their tokens."""
    if "attention_mask" in shown:
        mask = shown["attention_mask"][..., None].float()
        found, whole = ((x * mask).sum(1) / mask.sum(1) for x in (found, whole))
    return float(nn.functional.cosine_similarity(found, whole, dim=-1).mean())


NETWORKS: dict[str, Callable[[Path], tuple[Path, Inputs, Inputs]]] = {"llama": llama, "vit": vit, "minilm": minilm}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    if not environments.is_installed(peer("torch-pruning")):
        parser.error("Torch-Pruning is not there: compresslab peers install torch-pruning")
    torch.set_num_threads(given.threads)
    kept = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {"networks": {}}
    for name in given.only:
        with tempfile.TemporaryDirectory() as scratch:
            folder, inputs, shown = NETWORKS[name](Path(scratch) / "network")
            told = {"folder": str(folder), "do": "halve" if shown else "group", "batches": structured.BATCHES,
                    "rounds": given.rounds, "repeats": given.repeats, "threads": given.threads}  # fmt: skip
            mine, found, whole = ours(told, inputs, shown)
            other, their_found = theirs(told, inputs, shown, Path(scratch))
        row: dict[str, Any] = {"ours": mine, "torch-pruning": other, "times_faster": other["seconds"] / mine["seconds"]}
        if found is not None and their_found is not None and whole is not None:
            row["largest_difference"] = float((found - their_found).abs().max() / found.abs().max())
            row["cosine"] = {"ours": cosine(found, whole, shown), "torch-pruning": cosine(their_found, whole, shown)}
        kept["networks"][name] = row | {"threads": given.threads, "repeats": given.repeats, "rounds": given.rounds}
        kept["environment"] = environment.describe(torch.device("cpu"))
        given.out.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        print(name, json.dumps(row, indent=1), flush=True)


if __name__ == "__main__":
    main()

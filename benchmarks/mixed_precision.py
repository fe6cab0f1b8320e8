"""Bits shared out by a budget against the same bits everywhere, against chance, and a budget in milliseconds kept.

    python benchmarks/mixed_precision.py --text valid.txt              # the rows that the result file does not have yet
    python benchmarks/mixed_precision.py --text valid.txt --latency    # the budget in milliseconds; alone on the machine

SmolLM2-135M, GPTQ in groups of 64, calibrated on the first 16 x 512 tokens of the text, tested on 24 windows of 512 from
token 100,000 on. One survey says what every width does to every layer; what it chooses is solved as any recipe with `layers`
is, and so are the assignments by chance, which take no more bytes:

    3 bits              every layer
    3.5 bits            what `--budget 3.5bits` chooses
    chance of 3 and 4   3 bits everywhere, then layers drawn by a seed raised to 4 until no other fits
    chance, shuffled    the chosen widths, dealt out anew by a seed among the layers of one shape: the same bytes to the last
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from compresslab import mixed, models, pipeline, recipe, solving
from compresslab.artifact import Artifact
from compresslab.budget import parse_budget
from compresslab.data import Calibration
from compresslab.measure import environment, fresh
from compresslab.numerics.gram import best_precision
from compresslab.recipe import Recipe
from compresslab.search.allocation import Allocation, allocate
from compresslab.solving import best_compute_dtype
from compresslab.stages import planned

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "results" / "mixed-smollm2.json"
MODEL, RECIPE, BUDGET = "smollm2-135m", "w4a16-gptq", "3.5bits"
SAMPLES, LENGTH, TEST_FROM, TEST_WINDOWS = 16, 512, 100_000, 24
SEEDS = (0, 1, 2)
LATENCY_SHARE = 0.65  # of a decoding step of the uncompressed model


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--text", type=Path, required=True, help="wikitext-2's validation file, or another text")
    arguments.add_argument("--latency", action="store_true", help="only the budget in milliseconds")
    arguments.add_argument("--name", default=RESULT.stem, help="name of the result file")
    options = arguments.parse_args()
    path = RESULT.with_stem(options.name)
    tokenizer = models.load_tokenizer(models.locate(MODEL), MODEL)
    tokens = tokenizer(options.text.read_text(encoding="utf-8"), verbose=False)["input_ids"]
    calibration = calibration_of(windows(tokens, 0, SAMPLES), options.text.name)
    test = windows(tokens, TEST_FROM, TEST_WINDOWS)
    result = read(path, options.text.name)
    with tempfile.TemporaryDirectory(dir=ROOT) as scratch:
        if options.latency:
            result["latency"] = latency(calibration, Path(scratch))
        else:
            measure_rows(result, path, calibration, test, Path(scratch))
            result["verdict"] = verdict(result["rows"])
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result.get("latency" if options.latency else "verdict"), indent=1))


def windows(tokens: list[int], start: int, count: int) -> torch.Tensor:
    return torch.tensor(tokens[start : start + count * LENGTH]).view(count, LENGTH)


def calibration_of(ids: torch.Tensor, source: str) -> Calibration:
    return Calibration(
        source=source, revision="", split="calibration", samples=len(ids), sequence_length=LENGTH, tokens=ids.numel(), seed=0,
        sha256=hashlib.sha256(ids.numpy().tobytes()).hexdigest(), batches=[{"input_ids": part} for part in ids.split(4)],
    )  # fmt: skip


def read(path: Path, text: str) -> dict[str, Any]:
    what = (
        f"SmolLM2-135M, GPTQ g64, {SAMPLES} x {LENGTH} calibration tokens, {TEST_WINDOWS} test windows from {TEST_FROM}"
    )
    if path.exists() and (found := json.loads(path.read_text(encoding="utf-8"))).get("what") == what:
        return dict(found)
    described = environment.describe(torch.device("cpu"))
    return {"what": what, "text": text, "environment": described, "rows": {}}


def measure_rows(
    result: dict[str, Any], path: Path, calibration: Calibration, test: torch.Tensor, scratch: Path
) -> None:
    """Every row that the file lacks; the file is written after each."""
    rows: dict[str, Any] = result["rows"]
    if "survey" not in result:
        result["survey"] = survey(calibration)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    chosen, costs = result["survey"]["layers"], result["survey"]["costs"]
    budget = result["survey"]["cost of the budget"]
    plain = recipe.read(RECIPE)
    asked: dict[str, dict[str, str] | None] = {"float": None, "3 bits": dict.fromkeys(chosen, "3"), "3.5 bits": chosen}
    for seed in SEEDS:
        asked[f"chance of 3 and 4, seed {seed}"] = chance(costs, budget, seed)
        asked[f"chance, shuffled, seed {seed}"] = shuffled(chosen, costs, seed)
    for name, widths in asked.items():
        if name in rows:
            continue
        started = time.perf_counter()
        if widths is None:
            row: dict[str, Any] = {}
            network = models.load(models.locate(MODEL), dtype=torch.float32)
        else:
            filled = plain.override({"layers": {layer: as_setting(width) for layer, width in widths.items()}})
            artifact, row = compressed(filled, calibration, scratch / "out")
            row["bits"] = sum(costs[layer][width] for layer, width in widths.items()) / result["survey"]["weights"]
            row["layers of each width"] = {str(w): list(widths.values()).count(w) for w in sorted(set(widths.values()))}
            network = artifact.load(dtype=torch.float32)
        rows[name] = row | {"perplexity": perplexity(network, test)}
        print(f"{name:28s} {rows[name]} {time.perf_counter() - started:.0f} s", flush=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def as_setting(width: str) -> Any:
    return {"bits": int(width)} if width.isdigit() else width


def survey(calibration: Calibration) -> dict[str, Any]:
    """What the product chooses for the budget, and what every width of every layer costs it."""
    source, plain = models.find(MODEL), recipe.read(RECIPE)
    plan, methods, _ = planned(source, plain)
    device = torch.device("cpu")
    passing = solving.Pass(
        source=source, plan=plan, batches=calibration.batches, device=device, compute_dtype=best_compute_dtype(device),
        gram_precision=best_precision(device),
    )  # fmt: skip
    started, budget = time.perf_counter(), parse_budget(BUDGET)
    found = mixed.survey_of(passing, plain, methods.solvers, budget)
    limit = found.books.left(budget)
    chosen = allocate(found.options, limit)
    uniform = {
        str(bits): Allocation(chosen={x: o for x, mine in found.options.items() for o in mine if o.name == str(bits)})
        for bits in mixed.WIDTHS
    }
    return {
        "seconds on shared cores": round(time.perf_counter() - started, 1),
        "sensitivity": found.sensitivity,
        "chosen [bits, damage]": [found.books.amount(chosen.cost), chosen.damage],
        "uniform [bits, damage]": {width: [found.books.amount(a.cost), a.damage] for width, a in uniform.items()},
        "weights": limit / budget.amount,
        "cost of the budget": limit,
        "layers": {layer: option.name for layer, option in chosen.chosen.items()},
        "costs": {layer: {o.name: o.cost for o in mine} for layer, mine in found.options.items()},
    }


def chance(costs: Mapping[str, Mapping[str, float]], budget: float, seed: int) -> dict[str, str]:
    """3 bits, and 4 for layers that are drawn until no other fits into the budget."""
    widths = dict.fromkeys(costs, "3")
    left = budget - sum(mine["3"] for mine in costs.values())
    order = list(costs)
    random.Random(seed).shuffle(order)
    for layer in order:
        more = costs[layer]["4"] - costs[layer]["3"]
        if more <= left:
            widths[layer], left = "4", left - more
    return widths


def shuffled(chosen: Mapping[str, str], costs: Mapping[str, Mapping[str, float]], seed: int) -> dict[str, str]:
    """The chosen widths, dealt out anew among layers that cost alike."""
    draw = random.Random(seed)
    alike: dict[tuple[float, ...], list[str]] = {}
    for layer in chosen:
        alike.setdefault(tuple(costs[layer].values()), []).append(layer)
    found: dict[str, str] = {}
    for layers in alike.values():
        widths = [chosen[layer] for layer in layers]
        draw.shuffle(widths)
        found |= dict(zip(layers, widths, strict=True))
    return {layer: found[layer] for layer in chosen}


def compressed(filled: Recipe, calibration: Calibration, out: Path) -> tuple[Artifact, dict[str, Any]]:
    artifact, report = pipeline.compress(MODEL, filled, calibration, out=out, measure=False, force=True)
    weights = next(m for m in report.after if m.name == "weight_bytes")
    return artifact, {"weight_bytes": int(weights.value)}


def perplexity(network: Any, test: torch.Tensor) -> float:
    with torch.inference_mode():
        losses = [float(network(ids[None], labels=ids[None], use_cache=False).loss) for ids in test]
    return float(torch.tensor(losses, dtype=torch.float64).mean().exp())


def verdict(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """How far ahead the chosen widths are, and how far chance spreads."""
    found: dict[str, Any] = {
        "3 bits / chosen": rows["3 bits"]["perplexity"] / rows["3.5 bits"]["perplexity"],
    }
    for kind in ("chance of 3 and 4", "chance, shuffled"):
        values = [row["perplexity"] for name, row in rows.items() if name.startswith(kind)]
        found[kind] = {
            "perplexities": values,
            "spread (largest - smallest)": max(values) - min(values),
            "least - chosen": min(values) - rows["3.5 bits"]["perplexity"],
            "ahead by more than the spread": min(values) - rows["3.5 bits"]["perplexity"] > max(values) - min(values),
        }
    return found


def latency(calibration: Calibration, scratch: Path) -> dict[str, Any]:
    """A budget of LATENCY_SHARE of the float step: what was promised, and what the reopened artifact takes."""
    folder = models.locate(MODEL)
    ids = scratch / "windows.safetensors"
    save_file({"input_ids": calibration.batches[0]["input_ids"][:1]}, ids)
    job = fresh.Job(folder=folder, windows=ids, threads=torch.get_num_threads())
    before = statistics.median(decoding_ms(job) for _ in range(3))
    budget = f"{LATENCY_SHARE * before:.1f}ms"
    artifact, report = pipeline.compress(
        MODEL, RECIPE, calibration, out=scratch / "fast", budget=budget, measure=False, force=True
    )
    after = [decoding_ms(job.model_copy(update={"folder": artifact.folder, "packed": True})) for _ in range(3)]
    assert report.search is not None
    layers = report.recipe["steps"][0]["layers"]
    return {
        "threads": torch.get_num_threads(),
        "budget": budget,
        "predicted ms": report.search.chosen[0],
        "uncompressed ms": before,
        "measured ms, three processes": after,
        "measured / budget": statistics.median(after) / float(budget.removesuffix("ms")),
        "layers changed by the search": len(layers),
        "left in float": sum(value == "float" for value in layers.values()),
        "stages": report.seconds,
    }


def decoding_ms(job: fresh.Job) -> float:
    """Milliseconds of a decoded token in a fresh process."""
    found = next(m for m in fresh.measure(job).measurements if m.name == "decode_tokens_per_s")
    return 1000 / found.value


if __name__ == "__main__":
    main()

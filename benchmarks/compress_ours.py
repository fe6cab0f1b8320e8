"""Our side of the benchmark, a process of its own: MODEL TOKENS.safetensors OUT [RECIPE [KEY=VALUE...]] -> a line of JSON."""

import time

started = time.perf_counter()

import hashlib  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from compresslab import pipeline  # noqa: E402
from compresslab.data import Calibration  # noqa: E402
from compresslab.learning import BATCH_TOKENS  # noqa: E402
from compresslab.measure.environment import peak_memory_bytes  # noqa: E402
from compresslab.recipe import plain_value  # noqa: E402


def main() -> None:
    model, tokens_file, out = sys.argv[1:4]
    recipe = sys.argv[4] if len(sys.argv) > 4 else "w4a16-gptq"
    settings = {key: plain_value(value) for key, value in (pair.split("=", 1) for pair in sys.argv[5:])}
    budget = settings.pop("budget", None)
    ids = load_file(tokens_file)["input_ids"]
    calibration = Calibration(
        source=tokens_file, revision="", split="calibration", samples=ids.shape[0], sequence_length=ids.shape[1],
        tokens=ids.numel(), seed=0, sha256=hashlib.sha256(ids.numpy().tobytes()).hexdigest(),
        batches=[{"input_ids": batch} for batch in ids.split(max(1, BATCH_TOKENS // ids.shape[1]))],
    )  # fmt: skip
    torch.set_num_threads(2)
    at_written: list[float] = []
    progress = pipeline.Progress(
        # The stage that reloads the artifact in a fresh process begins when everything is on disk.
        stage=lambda name, steps: at_written.append(time.perf_counter() - started) if name == "measure" else None
    )
    _, report = pipeline.compress(
        model, recipe, calibration, out=out, settings=settings, budget=budget, measure=False, progress=progress
    )
    print(json.dumps({
        "seconds_total": at_written[0],
        "seconds_with_reload_check": time.perf_counter() - started,
        "seconds_compress": sum(report.seconds[stage] for stage in ("read", "calibrate and solve", "write")),
        "stages": report.seconds,
        "peak_rss_bytes": peak_memory_bytes(),
    }))  # fmt: skip


if __name__ == "__main__":
    main()

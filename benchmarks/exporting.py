"""What an export takes: seconds and memory of every format, each in a process of its own, against the float model.

    artifact -> `compresslab export` for each of `compresslab formats`, one after the other -> seconds, peak memory -> JSON

Memory is what the process and all its children have resident together, looked at every 20 ms, or the high-water mark that the
system keeps of one of them, if that is higher. It counts pages of memory-mapped files that are in use. Beside it stands what
`import compresslab.exporters` and the format's own library take before any work.

    python benchmarks/exporting.py ARTIFACT --model smollm2-135m --out results/exports-smollm2.json
    python benchmarks/exporting.py SYMMETRIC --formats executorch --add --out results/exports-smollm2.json

With --add the other rows stay, and the new ones say which artifact was theirs (ExecuTorch holds symmetric codes alone).

Oracle: a process that holds a known number of bytes (tests/measure/test_watched.py).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from compresslab import models
from compresslab.exporters import FORMATS, exporter
from compresslab.measure.environment import cpu_name
from compresslab.measure.watched import Watched, watch

SECONDS, TIMES_FLOAT = 60.0, 1.5  # the aim
# Formats of other networks, which say so before writing.
REST = "refused"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--model", default="smollm2-135m", help="the float model it was made of")
    parser.add_argument("--formats", nargs="*", default=sorted(FORMATS))
    parser.add_argument("--timeout", type=float, default=600, help="seconds after which an export is ended")
    parser.add_argument("--add", action="store_true", help="keep the rows of other formats")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    stored = float_bytes(models.locate(given.model))
    found: dict[str, Any] = {
        "artifact": recipe(given.artifact),
        "float_model_bytes": {"bfloat16": stored, "float32": 2 * stored},
        "aim": {"seconds": SECONDS, "peak_memory_bytes": TIMES_FLOAT * 2 * stored},
        "device": f"{cpu_name()}, {os.environ.get('OMP_NUM_THREADS', 'all')} threads",
        "exports": {},
    }
    own: dict[str, Any] = {}
    if given.add:
        own = {key: found[key] for key in ("artifact", "device")}
        found = json.loads(given.out.read_text(encoding="utf-8"))
    for name in given.formats:
        found["exports"][name] = own | one(given.artifact, name, given.timeout, 2 * stored)
        print(name, json.dumps(found["exports"][name]), flush=True)
        given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def one(artifact: Path, name: str, timeout: float, float32: int) -> dict[str, Any]:
    """An export, as a user starts it."""
    needs = "".join(f"import {package};" for package in exporter(name).packages)
    # As the export does it: with its telemetry, openvino would start a second process and send word of itself.
    quiet = "import sys; sys.modules['openvino_telemetry'] = None;"
    base = watch([sys.executable, "-c", f"{quiet}import compresslab.exporters;{needs}"], timeout)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, "out")
        done = watch([sys.executable, "-m", "compresslab.cli", "export", str(artifact), "--to", name, "--out", str(out)],
                     timeout)  # fmt: skip
        written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) if out.exists() else None
        shutil.rmtree(out, ignore_errors=True)
    return {
        **outcome(done),
        "seconds": round(done.seconds, 2),
        "peak_memory_bytes": done.peak_bytes,
        "largest_process_bytes": done.largest_bytes,
        "of_imports_bytes": base.peak_bytes,
        "times_the_float32_model": round(done.peak_bytes / float32, 3),
        "disk_bytes": written,
    }


def outcome(done: Watched) -> dict[str, str]:
    if done.timed_out:
        return {"outcome": "not ended in time"}
    if done.code == 0:
        return {"outcome": "written"}
    said = [line for line in done.said.splitlines() if line.strip()]
    return {"outcome": REST, "reason": " ".join(said)[-400:]}


def float_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def recipe(artifact: Path) -> str:
    found: dict[str, Any] = json.loads((artifact / "compresslab.json").read_text(encoding="utf-8"))
    return str(found.get("recipe", {}).get("name", artifact.name))


if __name__ == "__main__":
    main()

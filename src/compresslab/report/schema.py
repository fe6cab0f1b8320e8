"""What a report holds. It is data: terminal, Markdown and HTML are pure functions of it (render.py).

Every number stands in a Measurement, which cannot be built without a unit and the number of observations behind it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from compresslab.errors import CompressLabError

SCHEMA_VERSION = 1


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Measurement(Frozen):
    """One measured quantity.

    Attributes:
        name: what was measured, e.g. "perplexity", "disk_bytes", "decode_tokens_per_s"; see measure/ for the list.
        value: the median where n > 1 and the thing is a time, the value otherwise.
        unit: e.g. "bytes", "ms", "tokens/s", "1" for a pure number.
        n: observations behind the value (timed runs, tokens, files).
        spread: half the 10-90 % range of the observations in the same unit, or a standard error; None if n is 1.
        low, high: ends of the 95 % interval of the value, where there is one (measure/intervals.py).
        device: where it ran, e.g. "cpu, 2 threads".
        conditions: everything needed to measure it again, in words.
    """

    name: str = Field(min_length=1)
    value: float
    unit: str = Field(min_length=1)
    n: int = Field(ge=1)
    spread: float | None = None
    device: str
    conditions: str
    low: float | None = None
    high: float | None = None

    @model_validator(mode="after")
    def _interval(self) -> Self:
        if (self.low is None) != (self.high is None) or (
            self.low is not None and self.high is not None and self.low > self.high
        ):
            raise ValueError(f"{self.name}: an interval needs a low and a high end, in this order")
        return self


class Layer(Frozen):
    """contract.LayerRecord as it stands in a report."""

    name: str
    method: str
    shape: tuple[int, ...]
    bits_per_weight: float
    nonzero_frac: float
    bytes_before: int
    bytes_after: int
    sqnr_db: float
    sqnr_of: str
    seconds: float
    note: str = ""
    activation_bits: int | None = None
    sparsity: float | None = None
    pattern: str | None = None


class Bytes(Frozen):
    """Where the bytes of the weight files went, before and after. Kinds add up to the files' size exactly."""

    kind: str  # "codes", "scales", "zero points", "shapes", "embeddings", "norms and biases", "other weights", "file headers"
    before_bytes: int
    after_bytes: int


class Parity(Frozen):
    """The artifact as solved in memory against the artifact as reloaded from disk by the runtime that will serve it."""

    runtime: str
    tensors: int  # weights compared
    max_abs_difference: float  # over de-quantised weights, in-memory against reloaded; 0 means bit-equal


class Search(Frozen):
    """How a budget was shared out. A point is (what the whole takes in `unit`, damage predicted by `sensitivity`)."""

    budget: str  # as asked for, e.g. "3.5bits"
    unit: str  # "bits" per weight, "MB", "ms" per decoded token, share of "macs", "ms/forward"
    sensitivity: str
    chosen: tuple[float, float]
    front: tuple[tuple[float, float], ...]  # every allocation on the lower convex hull, from the cheapest
    uniform: dict[str, tuple[float, float]]  # the same choice for every layer, where each has it
    measured: float | None = (
        None  # of "ms/forward": what the chosen network was measured at, where `chosen` is foretold
    )
    by: str = ""  # of widths: what searched for them, e.g. "evolution"
    notice: str = ""  # what a user must know of it, such as that the budget was not met


class Report(Frozen):
    """One run: what was compressed, how, on what, and what changed."""

    schema_version: int = SCHEMA_VERSION
    created: str  # ISO 8601, UTC
    title: str  # e.g. "smollm2-135m, w4a16-gptq"
    recipe: dict[str, Any]  # the whole recipe with every setting, as it ran
    model: dict[str, Any]  # name, architecture, parameters, dtype, licence, sha256
    data: dict[str, Any] | None  # calibration: source, revision, split, samples, sequence_length, tokens, seed, sha256
    environment: dict[str, Any]  # cpu, cores, threads, memory_bytes, os, python, versions{torch, ...}
    seconds: dict[str, float]  # stage -> wall time: "read", "calibrate and solve", "write", "measure", ...
    before: tuple[Measurement, ...]
    after: tuple[Measurement, ...]
    layers: tuple[Layer, ...]
    skipped: dict[str, str]  # what is left in float, and why
    bytes: tuple[Bytes, ...]
    parity: Parity
    search: Search | None = None

    @model_validator(mode="after")
    def _version(self) -> Self:
        if self.schema_version != SCHEMA_VERSION:
            raise ValueError(f"report schema version {self.schema_version}, this program reads {SCHEMA_VERSION}")
        return self

    def pairs(self) -> list[tuple[Measurement, Measurement]]:
        """(before, after) of every quantity that was measured on both."""
        after = {m.name: m for m in self.after}
        return [(m, after[m.name]) for m in self.before if m.name in after]

    def to_json(self) -> str:
        return self.model_dump_json(indent=1) + "\n"

    def save(self, folder: Path) -> None:
        (folder / "report.json").write_text(self.to_json(), encoding="utf-8")


def read_report(folder: Path) -> Report:
    """The report of an artifact folder, or of a report.json itself. CompressLabError if there is none or it is broken."""
    path = folder if folder.suffix == ".json" else folder / "report.json"
    try:
        return Report.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CompressLabError(f"no report at {path}: is {folder} a folder made by 'compresslab compress'?") from None
    except ValueError as error:
        raise CompressLabError(f"{path} is not a report this version can read: {str(error).splitlines()[0]}") from None

"""A budget, and what each choice for a layer takes of it: bytes, bits or measured milliseconds.

    3.5bits    on average per weight of the layers that the recipe would compress, scales and zero points included
    80MB       10^6 bytes of all weight files together
    20ms       one step of decoding on this machine, on the kernels that the report measures (deploy/torch_packed.py)

One is for recipes that prune, and is kept by thinning.py:

    0.5nonzero    of the weights of the layers that the recipe would prune

Two more are for recipes that take out channels, and are kept by narrowing.py; so is 80MB where such a recipe rounds nothing:

    0.5macs    of the multiply-accumulates that the whole network takes
    5ms/forward         one example through the network on this machine, in the dtype that it is stored in
    5ms/forward@8x128   eight examples of 128 tokens each at a time

Milliseconds are taken before anything is chosen: every kind of layer at every choice runs on one row of input, on as many
copies as do not fit into the processor's caches, since in decoding every layer finds them full of the others. What a step takes
beside the planned layers (attention, norms, the head) is the difference to a step of the uncompressed model.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from compresslab.deploy import torch_packed
from compresslab.errors import CompressLabError
from compresslab.measure import size, speed
from compresslab.models import Source
from compresslab.numerics.grid import QuantWeight
from compresslab.search.widths import CountedCosts, Limit, Widths
from compresslab.solving import Pass

FILE_BYTES = 128  # of a weight file's header, beside its entries
CACHE_BYTES = 64_000_000  # of copies of one layer: more than the last cache of most processors holds for one program
TIMED_PASSES = 9
PROMPT_TOKENS = 32  # before the timed steps, as in measure/speed.py
STEPS = 24

Unit = Literal["bits", "MB", "ms", "nonzero", "macs", "ms/forward"]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a model may take, and of what.

    Attributes:
        batch: of "ms/forward", how many examples run at a time.
        tokens: of each; None for as many as a calibration window has, and for pictures.
    """

    amount: float
    unit: Unit
    batch: int = 1
    tokens: int | None = None

    def __str__(self) -> str:
        length = "" if self.tokens is None else f"x{self.tokens}"
        return f"{self.amount:g}{self.unit}" + (f"@{self.batch}{length}" if self.batch > 1 or length else "")


def rounded_up(amount: float) -> str:
    """To four digits, as a budget is written, so that what a message names can be had. Of amounts above 0.

    >>> rounded_up(0.07), rounded_up(1.23401), rounded_up(1234567.8), rounded_up(1e-5)
    ('0.07', '1.235', '1235000', '0.00001')
    """
    digits = 3 - math.floor(math.log10(amount))
    whole = round(amount * 10.0**digits, 6)  # 0.07 is a little more than it says
    most = math.ceil(whole) / 10.0**digits
    text = f"{most:.{max(digits, 0)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def taken(costs: CountedCosts, budget: Budget, widths: Widths) -> float:
    """What a configuration takes, in the unit of a budget of macs, megabytes or time of a forward."""
    if budget.unit == "ms/forward":
        return costs.latency_ms(widths, budget.batch)
    return costs.bytes(widths) / 1e6 if budget.unit == "MB" else costs.macs_frac(widths)


def limit_of(costs: CountedCosts, budget: Budget, least: Widths) -> Limit:
    """Such a budget as a share of what the dense network takes.

    Args:
        least: the configuration that takes least.

    Raises:
        CompressLabError: if even that one is over the budget, naming what it takes.
    """
    if (most := taken(costs, budget, least)) > budget.amount:
        raise CompressLabError(
            f"a budget of {budget} cannot be met: the least possible is {rounded_up(most)}{budget.unit}"
        )
    frac = budget.amount / taken(costs, budget, costs.dense)
    if budget.unit == "ms/forward":
        return Limit(frac=frac, of="latency", batch=budget.batch)
    return Limit(frac=frac, of="bytes" if budget.unit == "MB" else "macs")


def parse_budget(text: str) -> Budget:
    """A budget from "3.5bits", "80MB", "20ms", "0.5nonzero", "0.5macs", "5ms/forward" or "5ms/forward@8x128".

    >>> str(parse_budget("3.50 bits"))
    '3.5bits'
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z/]*)\s*(?:@\s*([1-9]\d*)(?:x([1-9]\d*))?)?\s*", text)
    units: dict[str, Unit] = {
        "bits": "bits",
        "bit": "bits",
        "mb": "MB",
        "ms": "ms",
        "nonzero": "nonzero",
        "macs": "macs",
        "ms/forward": "ms/forward",
    }
    if found is not None and found[3] and found[2].lower() != "ms/forward":
        raise CompressLabError(f"budget '{text}': a batch such as @8 belongs to a latency, --latency 5ms@8")
    if found is None or found[2].lower() not in units or float(found[1]) == 0:
        raise CompressLabError(
            f"budget '{text}': give average bits per weight, megabytes of weight files, or milliseconds per decoded token, "
            "such as 3.5bits, 80MB or 20ms; where weights are set to zero, the share that stays such as 0.5nonzero; where "
            "channels are taken out, a share of the multiply-accumulates such as 0.5macs"
        )
    return Budget(
        amount=float(found[1]),
        unit=units[found[2].lower()],
        batch=int(found[3] or 1),
        tokens=int(found[4]) if found[4] else None,
    )


class Books(Protocol):
    """What choices cost, and how much there is to spend."""

    unit: Unit

    def cost(self, name: str, tensors: Mapping[str, Tensor], solved: QuantWeight | None) -> float:
        """Of one layer.

        Args:
            tensors: what is written for it, by suffix.
            solved: its codes, or None where it stays in float.
        """
        ...

    def amount(self, cost: float) -> float:
        """What the planned layers, at `cost` together, and all else come to in the budget's unit."""
        ...

    def left(self, budget: Budget) -> float:
        """What the planned layers may cost together."""
        ...


def books_of(budget: Budget, calibration: Pass) -> Books:
    """The books that this budget is kept in. CompressLabError for milliseconds where they cannot be taken."""
    kinds: dict[Unit, Callable[[Pass], Books]] = {"bits": Bits, "MB": Megabytes, "ms": Milliseconds}
    return kinds[budget.unit](calibration)


class Bits:
    unit: Unit = "bits"

    def __init__(self, calibration: Pass) -> None:
        shapes = (calibration.source.weights.shape(f"{name}.weight") for name in calibration.plan.layers)
        self.weights = sum(math.prod(shape) for shape in shapes)

    def cost(self, name: str, tensors: Mapping[str, Tensor], solved: QuantWeight | None) -> float:
        return 8 * sum(tensor.nbytes for tensor in tensors.values())

    def amount(self, cost: float) -> float:
        return cost / self.weights

    def left(self, budget: Budget) -> float:
        return budget.amount * self.weights


class Megabytes:
    unit: Unit = "MB"

    def __init__(self, calibration: Pass) -> None:
        weights, plan = calibration.source.weights, calibration.plan
        planned = {f"{name}.weight" for name in plan.layers}
        others = [(name, weights.get(name)) for unit in plan.units for name in unit.tensors if name not in planned]
        self.other_bytes = sum(tensor.nbytes + entry_bytes(name, tensor.shape) for name, tensor in others)
        self.other_bytes += FILE_BYTES * len(plan.units)

    def cost(self, name: str, tensors: Mapping[str, Tensor], solved: QuantWeight | None) -> float:
        return sum(tensor.nbytes + entry_bytes(f"{name}.{suffix}", tensor.shape) for suffix, tensor in tensors.items())

    def amount(self, cost: float) -> float:
        return (cost + self.other_bytes) / 1e6

    def left(self, budget: Budget) -> float:
        return budget.amount * 1e6 - self.other_bytes


def entry_bytes(name: str, shape: Sequence[int]) -> int:
    """What a safetensors header takes for one tensor, at most: offsets are taken to be long."""
    entry = {"dtype": "BF16", "shape": list(shape), "data_offsets": [10**12, 10**12]}
    return len(json.dumps({name: entry}, separators=(",", ":")))


class Milliseconds:
    unit: Unit = "ms"

    def __init__(self, calibration: Pass) -> None:
        source = calibration.source
        if not (torch_packed.is_fast_here() and calibration.device.type == "cpu" and source.dtype == torch.bfloat16):
            raise CompressLabError(
                "a budget in ms is measured on torch's packed kernels, which need a CPU that multiplies bfloat16 and a model in "
                "bfloat16: give a budget in bits or MB"
            )
        self._of_kind: dict[tuple[object, ...], float] = {}
        self._shapes = {name: source.weights.shape(f"{name}.weight") for name in calibration.plan.layers}
        floats = math.fsum(self._time(self._shapes[name], None) for name in calibration.plan.layers)
        self.step_ms = _decoding_step_ms(source)
        self.other_ms = max(self.step_ms - floats, 0.0)

    def cost(self, name: str, tensors: Mapping[str, Tensor], solved: QuantWeight | None) -> float:
        return self._time(self._shapes[name], solved)

    def amount(self, cost: float) -> float:
        return cost + self.other_ms

    def left(self, budget: Budget) -> float:
        return budget.amount - self.other_ms

    def _time(self, shape: tuple[int, ...], solved: QuantWeight | None) -> float:
        packed = solved is not None and torch_packed.can_pack(solved)
        kind = (shape, solved.grid if packed and solved is not None else None)
        if kind not in self._of_kind:
            self._of_kind[kind] = _layer_ms(shape, solved if packed else None)
        return self._of_kind[kind]


def _layer_ms(shape: Sequence[int], solved: QuantWeight | None) -> float:
    """Median time of one row through a layer: packed, or dense in bfloat16 where there are no codes that a kernel takes."""
    rows, columns = shape
    first: nn.Module = torch_packed.PackedLinear(solved, None) if solved is not None else _dense(rows, columns)
    one_bytes = sum(t.nbytes for t in (*first.parameters(), *first.buffers()))
    copies = [first]
    for _ in range(min(math.ceil(CACHE_BYTES / one_bytes), 400) - 1):
        copies.append(torch_packed.PackedLinear(_copy(solved), None) if solved is not None else _dense(rows, columns))
    x = torch.randn(1, columns, dtype=torch.bfloat16)
    medians = []
    with torch.inference_mode():
        for _ in range(TIMED_PASSES):
            started = time.perf_counter()
            for layer in copies:
                layer(x)
            medians.append((time.perf_counter() - started) * 1000 / len(copies))
    return statistics.median(medians)


def _dense(rows: int, columns: int) -> nn.Module:
    return nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16)


def _copy(solved: QuantWeight) -> QuantWeight:
    zero_point = None if solved.zero_point is None else solved.zero_point.clone()
    return QuantWeight(codes=solved.codes.clone(), scale=solved.scale.clone(), zero_point=zero_point, grid=solved.grid)


def _decoding_step_ms(source: Source) -> float:
    """Median time of one decoded token of the uncompressed model, opened as its users do."""
    from compresslab import models

    if source.folder is None:
        raise CompressLabError("a budget in ms measures the model as it lies on disk: save it, and name the folder")
    model = models.load(source.folder)
    if not models.is_language_model(model):
        raise CompressLabError(
            f"a budget in ms is one of decoding, and {source.architecture} does not decode: give one in bits or MB"
        )
    decoder = speed.Decoder(model, torch.ones(1, PROMPT_TOKENS, dtype=torch.long))
    return statistics.median(speed.time_ms(decoder.step, STEPS, warm_up=4))


def check(folder: Path, budget: Budget, source: Source, layers: Sequence[str]) -> None:
    """That a finished folder keeps to its budget, by its files; milliseconds and shares are in its report.

    Args:
        layers: those that the budget in bits is about.

    Raises:
        CompressLabError: if it does not.
    """
    files = size.weight_files(folder)
    if budget.unit not in ("bits", "MB"):
        return
    if budget.unit == "MB":
        found = sum(path.stat().st_size for path in files) / 1e6
    else:
        ours = set(layers)
        entries = [(name, e) for path in files for name, e in size.read_header(path)[1].items()]
        used = sum(
            entry["data_offsets"][1] - entry["data_offsets"][0]
            for name, entry in entries
            if name.rpartition(".")[0] in ours and name.rpartition(".")[2].startswith("weight")
        )
        found = 8 * used / sum(math.prod(source.weights.shape(f"{name}.weight")) for name in layers)
    if found > budget.amount * (1 + 1e-9):
        raise CompressLabError(f"the artifact takes {found:.4g}{budget.unit}, more than {budget}: please report this")

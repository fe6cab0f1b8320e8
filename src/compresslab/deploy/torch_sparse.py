"""A pruned network on torch's sparse kernels, layer by layer where they are faster than the dense product on this machine.

    folder -> its linear layers that have zeros -> one of each shape and share of zeros: y = x W^T dense, as compressed sparse
    rows and in blocks, in turn -> a `Timing` each -> SparseLinear in the place of those that gain

Zeros anywhere cost a dense product nothing less. Compressed rows read 4 + 8 bytes for every number that is left and jump about
in x, so they gain only where few numbers are left, and whether they do depends on shape, rows and machine: it is measured and
not assumed. The kernels take float32; the dense product that they are held against is the one in the network's own dtype. Of
SmolLM2 at 90 % zeros all products together became at most 1.2 times faster than in bfloat16, and 1.4 times than in float32
(results/sparse-smollm2.json).

Law (tests/deploy/test_torch_sparse.py): the network computes what it computed.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from compresslab import models
from compresslab.deploy.sparse_storage import to_bitmask, to_csr

FEWEST_ZEROS = 0.5  # below that no kernel was ever seen to gain
BLOCKS = (32, 16)
GAIN = 1.1  # how much faster a kernel must be to be taken
TURNS = 9


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What one product takes, for layers of one shape with as many zeros.

    Attributes:
        layers: their names.
        zeros: share of zeros in the first of them, which was timed.
        rows: of x.
        ms: median milliseconds by kernel: "dense", "csr", "blocks of 16" and so on where whole blocks are zero.
        nbytes: of the weights of all of these layers: "dense", "bitmask" and "csr".
    """

    layers: tuple[str, ...]
    shape: tuple[int, int]
    zeros: float
    rows: int
    ms: dict[str, float]
    nbytes: dict[str, int]

    @property
    def best(self) -> str:
        """The kernel to take."""
        fastest = min(self.ms, key=lambda kind: self.ms[kind])
        return fastest if GAIN * self.ms[fastest] <= self.ms["dense"] else "dense"


class SparseLinear(nn.Module):
    """y = x W^T + b with W stored without its zeros; x [..., in] of any float dtype, computed in float32."""

    def __init__(self, weight: Tensor, bias: Tensor | None, kind: str) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self.kind = kind
        self.register_buffer("weight", _stored(weight.float(), kind))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        y = _product(self.get_buffer("weight"), rows.float())
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)


def load(folder: Path | str, rows: int = 16) -> tuple[nn.Module, list[Timing]]:
    """A folder opened by transformers, with sparse kernels for the layers that gain by them at so many rows of input.

    Returns:
        The model, and what was timed; nothing of it where no layer has FEWEST_ZEROS.
    """
    model = models.load(Path(folder))
    models.decompress_(model)
    timings = measure(model, [rows])
    for timing in timings:
        if timing.best == "dense":
            continue
        for name in timing.layers:
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            model.set_submodule(name, SparseLinear(linear.weight.detach(), linear.bias, timing.best))
    return models.as_opened_(model), timings


@torch.inference_mode()
def measure(model: nn.Module, rows: Iterable[int]) -> list[Timing]:
    """Time the products of an opened network whose weights have zeros, one of each shape and share of them."""
    alike: dict[tuple[tuple[int, ...], int], list[tuple[str, nn.Linear]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (share := _zeros(module.weight)) >= FEWEST_ZEROS:
            alike.setdefault((tuple(module.weight.shape), round(20 * share)), []).append((name, module))
    found = []
    for layers in alike.values():
        weight = layers[0][1].weight
        forms: dict[str, Callable[[Tensor], dict[str, Tensor]]] = {"bitmask": to_bitmask, "csr": to_csr}
        nbytes = {"dense": sum(module.weight.nbytes for _, module in layers)}
        nbytes |= {
            kind: sum(sum(t.nbytes for t in form(module.weight).values()) for _, module in layers)
            for kind, form in forms.items()
        }
        for count in rows:
            found.append(
                Timing(
                    layers=tuple(name for name, _ in layers), shape=(weight.shape[0], weight.shape[1]),
                    zeros=_zeros(weight), rows=count, ms=_times(weight, count), nbytes=nbytes,
                )
            )  # fmt: skip
    return found


def _zeros(weight: Tensor) -> float:
    return float((weight == 0).double().mean())


def _times(weight: Tensor, rows: int) -> dict[str, float]:
    """Median milliseconds of y = x W^T by kernel, taken in turn."""
    x = torch.randn(rows, weight.shape[1], generator=torch.Generator().manual_seed(0))
    given = x.to(weight.dtype)
    calls: dict[str, Callable[[], Tensor]] = {"dense": lambda: nn.functional.linear(given, weight)}
    for kind in ("csr", *_blocks(weight)):
        stored = _stored(weight.float(), kind)
        calls[kind] = lambda stored=stored: _product(stored, given.float()).to(given.dtype)  # type: ignore[misc]
    taken: dict[str, list[float]] = {kind: [] for kind in calls}
    for turn in range(TURNS + 1):
        for kind, call in calls.items():
            started = time.perf_counter()
            call()
            if turn:  # the first one warms up
                taken[kind].append(1000 * (time.perf_counter() - started))
    return {kind: statistics.median(times) for kind, times in taken.items()}


def _blocks(weight: Tensor) -> list[str]:
    """Kernels in blocks that are worth a try: whose blocks fit, and are zero as a whole as often as FEWEST_ZEROS."""
    found = []
    for size in BLOCKS:
        if weight.shape[0] % size or weight.shape[1] % size:
            continue
        blocks = weight.view(weight.shape[0] // size, size, -1, size)
        if float((blocks == 0).all(dim=3).all(dim=1).double().mean()) >= FEWEST_ZEROS:
            found.append(f"blocks of {size}")
    return found


def _stored(weight: Tensor, kind: str) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse .* tensor support is in beta state")
        if kind == "csr":
            return weight.to_sparse_csr()
        size = int(kind.rpartition(" ")[2])
        return weight.to_sparse_bsr((size, size))


def _product(stored: Tensor, x: Tensor) -> Tensor:
    return (stored @ x.t()).t()

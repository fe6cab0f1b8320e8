"""One layer: its weight read, handed to a solver, and what came of it; and where finished layers go."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from compresslab.contract import (
    ActivationQuantizer,
    Along,
    Batches,
    CacheRounding,
    Corrector,
    FloatWeight,
    InputSolution,
    LayerRecord,
    Pruner,
    Refiner,
    Solution,
    Solver,
)
from compresslab.errors import CompressLabError
from compresslab.masks import as_codes, prune_parts, said_of_groups, with_zeros
from compresslab.models import Source, is_transposed, weight_of
from compresslab.numerics import streams
from compresslab.numerics.gram import Gram, Precision, Statistic
from compresslab.numerics.grid import QuantInput, QuantWeight, stacked
from compresslab.numerics.linalg import quadratic_error
from compresslab.plan import Plan, Unit
from compresslab.ranks import ALONE, Ranks

BATCH_PICTURES = 2  # patches of more pictures no longer fit the caches, nor what the allocator keeps
BATCH_TOKENS = 2048  # calibration tokens in one walk: small enough for the caches, large enough for the matrix units
CACHE_SCALES = ("k_scale", "v_scale")  # the names under which runtimes look for the static scales of an attention


@dataclass(frozen=True, kw_only=True)
class Solved:
    """One finished layer: its codes, the tensors that will be written for it, and its record."""

    weight: QuantWeight | FloatWeight
    transposed: bool  # the module keeps its weight as [in, out]
    tensors: dict[str, Tensor]
    record: LayerRecord
    bias: Tensor | None = None  # in place of the one that was read; None if that stays


def _in_memory(place: int, is_reference: bool) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass(frozen=True, kw_only=True)
class BlockState:
    """What is needed to go on after a block: what it returned for every calibration batch.

    Attributes:
        outputs: of the compressed block, for every batch.
        references: what the uncompressed network's block returned (its first tensor), where a method compares with it.
        opened: has the output (False) or the reference (True) of a batch in memory for a while, if it waits on disk.
    """

    outputs: Sequence[Any]
    references: Sequence[Tensor] = ()
    opened: Callable[[int, bool], AbstractContextManager[None]] = _in_memory


class Sink(Protocol):
    """Where finished units go (artifact.Writer)."""

    def is_done(self, unit: str) -> bool: ...

    def write(self, unit: Unit, solved: dict[str, Solved], floats: dict[str, Tensor], state: BlockState | None) -> None:
        """Store a unit for good: after this returns, a kill no longer costs it."""
        ...

    def last_state(self, units: Sequence[str]) -> BlockState:
        """The stored outputs of the last finished unit among these."""
        ...


# The weight is of the kind that the layout holds: codes, or plain numbers.
Encode = Callable[[str, Any, nn.Module, QuantInput | None], dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Pass:
    """The calibration batches on their way through a model.

    Attributes:
        compute_dtype: dtype of the forward.
        waiting_bytes: how much of what walks hold while they wait may be in memory at a time; None for all of it.
        scratch: a folder for the rest.
    """

    source: Source
    plan: Plan
    batches: Batches | None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    compute_dtype: torch.dtype = torch.float32
    gram_precision: Precision = "float32"
    waiting_bytes: int | None = None
    scratch: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Job(Pass):
    """A pass that compresses.

    Attributes:
        method: the solver's name.
        solvers: the solver of every planned layer, by the layer's name; one method with settings that may differ.
        encode: layer, QuantWeight (or FloatWeight), module, QuantInput -> the tensors that stand for these on disk, by the
            suffix of their names.
        pruners: what sets weights to zero before the solver sees them, by the layer's name; none for those left whole.
        activations: how the runtime shall round the input of a layer, by the layer's name; none for those left in float.
        correctors: what changes the biases of rounded layers, in this order.
        cache: how keys and values will be stored; if its scales are static they are learned on the way.
        refiner: what improves the layers of each solved block together.
        ranks: the processes that share the batches and the solving.
        on_layer: told of every finished layer, for progress bars.
    """

    method: str
    solvers: Mapping[str, Solver]
    sink: Sink
    encode: Encode
    pruners: Mapping[str, Pruner] = field(default_factory=dict)
    activations: Mapping[str, ActivationQuantizer] = field(default_factory=dict)
    correctors: Sequence[Corrector] = ()
    cache: CacheRounding | None = None
    refiner: Refiner | None = None
    ranks: Ranks = ALONE
    on_layer: Callable[[LayerRecord], None] = lambda record: None

    @property
    def needs_references(self) -> bool:
        """Whether each batch also walks through the uncompressed network, for a method to compare with."""
        return self.refiner is not None or want_references(self.solvers)


def batch_size(sequence_length: int | None) -> int:
    """Of the calibration batches: windows of text, or pictures where there is no length."""
    return BATCH_PICTURES if sequence_length is None else max(1, BATCH_TOKENS // sequence_length)


def want_references(solvers: Mapping[str, Solver]) -> bool:
    return any(getattr(solver, "needs_references", False) for solver in solvers.values())


def best_compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the processor multiplies it natively (three times the speed of float32), float32 elsewhere."""
    if device.type == "cpu":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if native else torch.float32
    return torch.bfloat16


def float_tensors(job: Job, unit: Unit) -> dict[str, Tensor]:
    """The tensors of a unit that stay as they are."""
    replaced = {f"{layer}.weight" for layer in unit.layers}
    kept = {name: read_finite(job.source, name) for name in unit.tensors if name not in replaced}
    return {name: in_dtype(tensor, name, job.plan.stored_as.get(name)) for name, tensor in kept.items()}


def in_dtype(tensor: Tensor, name: str, dtype: torch.dtype | None) -> Tensor:
    """A tensor in a dtype of 16 bits, or as it is. CompressLabError if that dtype ends below its numbers."""
    if dtype is None:
        return tensor
    cast = tensor.to(dtype)
    if not torch.isfinite(cast).all():
        raise CompressLabError(
            f"tensor {name} has numbers up to {float(tensor.abs().max()):.3g}, and fp16 ends at {torch.finfo(dtype).max:.0f}: "
            "store this layer in bf16"
        )
    return cast


def read_finite(source: Source, name: str) -> Tensor:
    """A tensor as stored. CompressLabError if it holds a NaN or an infinity."""
    tensor = source.weights.get(name)
    if tensor.is_floating_point() and not is_finite(tensor):
        where = (~torch.isfinite(tensor)).nonzero()[0].tolist()
        raise CompressLabError(
            f"tensor {name} of {source.name} holds a NaN or an infinity at {where}: nothing to save here"
        )
    return tensor


def read_weight(source: Source, name: str, module: nn.Module) -> Tensor:
    """The weight of a linear layer as stored, but always [out, in]."""
    stored = read_finite(source, f"{name}.weight").flatten(1)
    return stored.t() if is_transposed(module) else stored


def solve_layer(job: Job, name: str, module: nn.Module, gram: Statistic | None) -> Solved:
    """Read one weight, hand it to the solver, and say what came of it."""
    stored = read_weight(job.source, name, module)
    weight = original = stored.to(job.device, torch.float32).contiguous()
    started = time.perf_counter()
    try:
        along: Along = "out" if is_transposed(module) else "in"
        pruner, kept, note = job.pruners.get(name), None, ""
        if pruner is not None:
            pruned = prune_parts(pruner, weight, None if gram is None else gram.parts)
            # As it will be stored: what is rounded to zero there is zero for the solver too.
            weight, note = pruned.weight.to(stored.dtype).float(), pruned.note
            kept = weight != 0
        solution = solve_parts(job.solvers[name], weight, gram, kept, scale_dtype=stored.dtype, groups_along=along)
        solution = dataclasses.replace(solution, note=joined_notes(note, solution.note))
        rounding = solve_input(job, name, gram, stored.dtype)
    except ValueError as error:
        raise CompressLabError(f"layer {name}, {list(weight.shape)}: {error}") from error
    return finish_layer(job, name, module, original, stored, solution, rounding, gram, time.perf_counter() - started)


def finish_layer(
    job: Job, name: str, module: nn.Module, weight: Tensor, stored: Tensor, solution: Solution, rounding: InputSolution,
    gram: Statistic | None, seconds: float,
) -> Solved:  # fmt: skip
    """A rounded layer with its bias corrected, its tensors on disk and its record.

    Args:
        weight: as it was before anything was done to it, float32 [out, in].
        stored: the same as it was read.
    """
    bias, note = corrected_bias(job, name, weight, solution.weight, gram)
    solution = dataclasses.replace(solution, note=joined_notes(solution.note, note))
    solved = describe(job, name, module, weight, stored, solution, rounding, gram, seconds)
    return solved if bias is None else dataclasses.replace(solved, bias=bias, tensors=solved.tensors | {"bias": bias})


def corrected_bias(
    job: Job, name: str, weight: Tensor, solved: QuantWeight | FloatWeight, gram: Statistic | None
) -> tuple[Tensor | None, str]:
    """A layer's new bias, in the dtype it is stored in, or None with a note where it cannot have one."""
    if not job.correctors:
        return None, ""
    if f"{name}.bias" not in job.source.weights.names():
        return None, "no bias to correct"
    if gram is None:
        return None, "no calibration token reached this layer: bias not corrected"
    stored = read_finite(job.source, f"{name}.bias")
    bias, rounded = stored.to(job.device, torch.float32), solved.dequantize()
    for corrector in job.correctors:
        rows = (matrix.chunk(len(gram.parts)) for matrix in (weight, rounded))
        bias = bias + torch.cat([corrector.correct(w, q, part) for w, q, part in zip(*rows, gram.parts, strict=True)])
    return bias.to(stored.dtype), ""


def solve_parts(
    solver: Solver, weight: Tensor, gram: Statistic | None, kept: Tensor | None = None, *, scale_dtype: torch.dtype,
    groups_along: Along = "in",
) -> Solution:  # fmt: skip
    """`solver.solve` of a weight [out, in], or of the rows of each group with the group's own Gram matrix.

    Args:
        kept: bool [out, in], False where the weight must come out as zero; None where nothing was pruned.
    """
    if gram is None or isinstance(gram, Gram) or not solver.needs_data:
        one = gram if isinstance(gram, Gram) else None
        return _solve_part(solver, weight, one, kept, scale_dtype=scale_dtype, groups_along=groups_along)
    count = len(gram.parts)
    masks = [None] * count if kept is None else kept.chunk(count)
    found = [
        _solve_part(solver, rows, part, mask, scale_dtype=scale_dtype, groups_along=groups_along)
        for rows, part, mask in zip(weight.chunk(count), gram.parts, masks, strict=True)
    ]
    notes = Counter(solution.note for solution in found if solution.note)
    said = said_of_groups(notes, len(found))
    return Solution(weight=stacked([as_codes(solution.weight) for solution in found]), note="; ".join(said))


def _solve_part(solver: Solver, weight: Tensor, gram: Gram | None, kept: Tensor | None, **more: Any) -> Solution:
    if kept is None:
        return solver.solve(weight, gram, **more)
    if getattr(solver, "knows_zeros", False):
        more["kept"] = kept
    solution = solver.solve(weight, gram, **more)
    return dataclasses.replace(solution, weight=with_zeros(solution.weight, kept))


def solve_input(job: Job, name: str, gram: Statistic | None, scale_dtype: torch.dtype) -> InputSolution:
    """How the runtime shall round a layer's input."""
    quantizer = job.activations.get(name)
    if quantizer is None:
        return InputSolution(input=None)
    return quantizer.fit(None if gram is None else gram.observers.get(quantizer), scale_dtype=scale_dtype)


def describe(
    job: Job, name: str, module: nn.Module, weight: Tensor, stored: Tensor, solution: Solution, rounding: InputSolution,
    gram: Statistic | None, seconds: float,
) -> Solved:  # fmt: skip
    """A solution with its tensors on disk and its record; of the weight [out, in] in float32, and as it was read."""
    tensors = job.encode(name, solution.weight, module, rounding.input)
    bytes_after = sum(t.numel() * t.element_size() for t in tensors.values())
    transposed = is_transposed(module)
    pruner = job.pruners.get(name)
    sqnr, nonzeros = noise_of(weight, solution.weight, gram)
    return Solved(
        weight=solution.weight,
        transposed=transposed,
        tensors=tensors,
        record=LayerRecord(
            name=name,
            method=job.method,
            shape=tuple(weight_of(module).shape),
            bits_per_weight=8 * bytes_after / stored.numel(),
            nonzero_frac=nonzeros,
            bytes_before=stored.numel() * stored.element_size(),
            bytes_after=bytes_after,
            sqnr_db=sqnr,
            sqnr_of="weight" if gram is None else "output",
            seconds=seconds,
            note=joined_notes(solution.note, rounding.note),
            activation_bits=None if rounding.input is None else rounding.input.grid.bits,
            sparsity=None if pruner is None else pruner.sparsity,
            pattern=None if pruner is None else pruner.pattern,
        ),
    )


def joined_notes(*notes: str) -> str:
    """Remarks of several methods on one layer, each one once."""
    remarks = [remark for note in notes for remark in note.split("; ") if remark]
    return "; ".join(dict.fromkeys(remarks))


def is_finite(tensor: Tensor) -> bool:
    """Whether a float tensor holds no NaN and no infinity."""
    if tensor.device.type != "cpu" or tensor.dtype not in _EXPONENTS or tensor.numel() == 0:
        return bool(torch.isfinite(tensor).all())
    whole, exponent = _EXPONENTS[tensor.dtype]
    patterns = tensor.detach().contiguous().view(-1).view(whole).numpy()
    parts = math.gcd(len(patterns), 64)
    unsigned = patterns.view(exponent.dtype).reshape(parts, -1)
    return int(streams.count_not_finite(unsigned, exponent)) == 0


_EXPONENTS: dict[torch.dtype, tuple[torch.dtype, Any]] = {
    torch.bfloat16: (torch.int16, np.uint16(0x7F80)),
    torch.float16: (torch.int16, np.uint16(0x7C00)),
    torch.float32: (torch.int32, np.uint32(0x7F800000)),
}


def nonzero_frac(weight: QuantWeight | FloatWeight) -> float:
    """Share of weights that are not exactly zero."""
    if isinstance(weight, QuantWeight) and weight.zero_point is None:
        return float(weight.codes.count_nonzero()) / weight.codes.numel()
    real = weight.dequantize()
    return float(real.count_nonzero()) / real.numel()


def noise_of(weight: Tensor, solved: QuantWeight | FloatWeight, gram: Statistic | None) -> tuple[float, float]:
    """sqnr_db and nonzero_frac; in one pass over an integer weight without data."""
    if gram is not None or not isinstance(solved, QuantWeight) or not solved.in_rows or weight.device.type != "cpu":
        return sqnr_db(weight, solved, gram), nonzero_frac(solved)
    rows = len(solved.codes)
    signal, noise, nonzeros = np.empty(rows), np.empty(rows), np.empty(rows, np.int64)
    scale = solved.scale.float().contiguous()
    zero = torch.zeros_like(scale) if solved.zero_point is None else solved.zero_point.float().contiguous()
    grid = solved.codes.contiguous().numpy(), scale.numpy(), zero.numpy()
    streams.errors(weight.contiguous().numpy(), *grid, signal, noise, nonzeros)
    return _decibels(float(signal.sum()), float(noise.sum())), int(nonzeros.sum()) / solved.codes.numel()


def sqnr_db(weight: Tensor, solved: QuantWeight | FloatWeight, gram: Statistic | None) -> float:
    """10 log10(signal / noise) of the layer's output over the calibration tokens, or of the weight without data."""
    difference = weight - solved.dequantize()
    if gram is None:
        signal, noise = weight.square().sum(dtype=torch.float64), difference.square().sum(dtype=torch.float64)
    else:
        signal = noise = torch.zeros((), dtype=torch.float64, device=weight.device)
        rows = (matrix.chunk(len(gram.parts)) for matrix in (weight, difference))
        for part, whole, error in zip(gram.parts, *rows, strict=True):
            # The signal needs no more than bfloat16 (0.01 dB); the noise is a small difference and does.
            low = part.cached("bfloat16", part.matrix.bfloat16)
            signal = signal + quadratic_error(whole.bfloat16(), low)
            noise = noise + quadratic_error(error, part.matrix)
    return _decibels(float(signal), float(noise))


def _decibels(signal: float, noise: float) -> float:
    return math.inf if noise <= 0 else 10 * math.log10(max(signal / noise, 1e-30))

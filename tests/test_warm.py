"""What is compiled at installation is what a compression needs."""

from __future__ import annotations

import pytest
import torch

import tiny
from compresslab import warm
from compresslab.activations.static import Static
from compresslab.numerics import kernels, streams
from compresslab.numerics.gram import best_precision
from compresslab.quantize.gptq import GPTQ
from compresslab.quantize.qep import QEP
from compresslab.quantize.rtn import RTN

KERNELS = [
    "round_block_with_feedback",
    "shrink_ranges",
    "choose_scales",
    "add_scaled",
    "quantize_columns_bf16",
    "count",
]
STREAMS = ["errors", "count_not_finite"]
LAYERS = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")


@pytest.mark.skipif(
    best_precision() != "int8", reason="this CPU has no 8-bit dot products, so two kernels are never used"
)
def test_a_run_compiles_nothing_that_was_not_compiled_before() -> None:
    warm.compile_kernels()
    before = {name: list(getattr(kernels, name).signatures) for name in KERNELS}
    streamed = {name: list(getattr(streams, name).signatures) for name in STREAMS}
    assert all(before.values()) and all(streamed.values())
    formats = (
        GPTQ(group_size=16, symmetric=True, format="nvfp4"),
        GPTQ(bits=8, group_size=None, symmetric=True, format="fp8-e4m3"),
    )
    for solver in (GPTQ(group_size=16), QEP(group_size=16, symmetric=True), *formats):
        tiny.solve(
            tiny.make("llama"),
            tiny.token_batches(2),
            solver=solver,
            compute_dtype=torch.bfloat16,
            gram_precision="int8",
            activations=dict.fromkeys(LAYERS, Static(calibrator="percentile")),
        )
    assert {name: list(getattr(kernels, name).signatures) for name in KERNELS} == before
    tiny.solve(tiny.make("llama"), None, solver=RTN(group_size=16))
    assert {name: list(getattr(streams, name).signatures) for name in STREAMS} == streamed

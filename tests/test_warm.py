"""What is compiled at installation is what a compression needs."""

from __future__ import annotations

import pytest
import torch

import tiny
from compresslab import warm
from compresslab.activations.static import Static
from compresslab.numerics import kernels
from compresslab.numerics.gram import best_precision
from compresslab.quantize.gptq import GPTQ
from compresslab.quantize.qep import QEP

KERNELS = ["round_block_with_feedback", "shrink_ranges", "add_scaled", "quantize_columns_bf16", "count"]
LAYERS = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")


@pytest.mark.skipif(
    best_precision() != "int8", reason="this CPU has no 8-bit dot products, so two kernels are never used"
)
def test_a_run_compiles_nothing_that_was_not_compiled_before() -> None:
    warm.compile_kernels()
    before = {name: list(getattr(kernels, name).signatures) for name in KERNELS}
    assert all(before.values())
    for solver in (GPTQ(group_size=16), QEP(group_size=16, symmetric=True)):
        tiny.solve(
            tiny.make("llama"),
            tiny.token_batches(2),
            solver=solver,
            compute_dtype=torch.bfloat16,
            gram_precision="int8",
            activations=dict.fromkeys(LAYERS, Static(calibrator="percentile")),
        )
    assert {name: list(getattr(kernels, name).signatures) for name in KERNELS} == before

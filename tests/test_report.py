"""The report: its data, and the three ways to show one run or several."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from rich.console import Console, RenderableType

from compresslab.errors import CompressLabError
from compresslab.report import plots, render
from compresslab.report.schema import Bytes, Layer, Measurement, Parity, Report, read_report

ROLES = {
    "self_attn.q_proj": (576, 576, 27.0),
    "self_attn.k_proj": (192, 576, 28.5),
    "self_attn.v_proj": (192, 576, 23.0),
    "self_attn.o_proj": (576, 576, 21.0),
    "mlp.gate_proj": (1536, 576, 22.5),
    "mlp.up_proj": (1536, 576, 21.7),
    "mlp.down_proj": (576, 1536, 19.5),
}
UNITS = {
    "disk_bytes": "bytes",
    "weight_bytes": "bytes",
    "peak_memory_bytes": "bytes",
    "decode_tokens_per_s": "tokens/s",
    "prefill_ms": "ms",
    "decode_ms_per_token": "ms",
    "load_ms": "ms",
}
BEFORE = {
    "disk_bytes": 271_200_000.0,
    "weight_bytes": 269_060_552.0,
    "perplexity": 25.0,
    "decode_tokens_per_s": 63.7,
    "prefill_ms": 412.0,
    "decode_ms_per_token": 15.7,
    "load_ms": 880.0,
    "peak_memory_bytes": 612_000_000.0,
    "parameters": 134_515_008.0,
}
AFTER = {
    "disk_bytes": 113_900_000.0,
    "weight_bytes": 111_760_552.0,
    "perplexity": 27.52,
    "decode_tokens_per_s": 121.0,
    "prefill_ms": 655.0,
    "decode_ms_per_token": 8.26,
    "load_ms": 884.0,
    "peak_memory_bytes": 401_000_000.0,
    "parameters": 134_515_008.0,
}
WIKI = "WikiText-2 raw, test split, windows of 1024 tokens, stride 1024, mean over all tokens"


def measured(values: dict[str, float], conditions: str = WIKI) -> tuple[Measurement, ...]:
    def one(name: str, value: float) -> Measurement:
        unit = UNITS.get(name, "1")
        timed = unit in ("ms", "tokens/s")
        spread = abs(value) * 0.021 if timed else 0.31 if name == "perplexity" else None
        told = "median of runs of 64 new tokens after a prompt of 128, batch 1, float32" if timed else f"{name} as told"
        return Measurement(
            name=name,
            value=value,
            unit=unit,
            n=15 if timed else 284_672 if name == "perplexity" else 1,
            spread=spread,
            device="cpu, 2 threads",
            conditions=conditions if name == "perplexity" else told,
        )

    return tuple(one(name, value) for name, value in values.items())


def linear(name: str, shape: tuple[int, ...], db: float, **changes: Any) -> Layer:
    weights = math.prod(shape)
    settings: dict[str, Any] = dict(
        name=name,
        method="gptq",
        shape=shape,
        bits_per_weight=4.13,
        nonzero_frac=0.913,
        bytes_before=weights * 2,
        bytes_after=round(weights * 4.13 / 8),
        sqnr_db=db,
        sqnr_of="output",
        seconds=0.41,
    )
    return Layer(**settings | changes)


def network(blocks: int = 30) -> tuple[Layer, ...]:
    return tuple(
        linear(
            f"model.layers.{block}.{name}",
            (out, width),
            db + 2.2 * math.sin(block * 1.7 + out) - 5.5 * (name.endswith("down_proj") and block in (1, blocks - 1)),
            note="damping raised to 0.1" if name.endswith("down_proj") and block == 1 else "",
        )
        for block in range(blocks)
        for name, (out, width, db) in ROLES.items()
    )


def make(**changes: Any) -> Report:
    """A made-up run; any field can be replaced."""
    settings: dict[str, Any] = dict(
        created="2025-03-01T12:00:00Z",
        title="smollm2-135m, w4a16-gptq",
        recipe={
            "name": "w4a16-gptq",
            "steps": [{"method": "gptq", "settings": {"bits": 4, "group_size": 128, "damping": 0.01, "order": True}}],
            "calibration": {"samples": 128, "sequence_length": 512, "seed": 0},
        },
        model={
            "name": "HuggingFaceTB/SmolLM2-135M",
            "architecture": "LlamaForCausalLM",
            "parameters": 134_515_008,
            "dtype": "bfloat16",
            "licence": "apache-2.0",
            "sha256": "9f" * 32,
        },
        data={
            "source": "wikitext-2-raw-v1",
            "revision": "b08601e",
            "split": "train",
            "samples": 128,
            "sequence_length": 512,
            "tokens": 65_536,
            "seed": 0,
            "sha256": "c4" * 32,
        },
        environment={
            "cpu": "AMD EPYC 7B13",
            "cores": 2,
            "threads": 2,
            "memory_bytes": 8_300_000_000,
            "os": "Linux 6.1",
            "python": "3.11.7",
            "versions": {"torch": "2.8.0", "transformers": "5.1.0", "compressed-tensors": "0.13.0"},
        },
        seconds={"read": 1.2, "calibrate and solve": 141.5, "write": 0.84, "measure": 188.0},
        before=measured(BEFORE),
        after=measured(AFTER),
        layers=network(),
        skipped={"lm_head": "its weight is tied to the embedding"},
        bytes=(
            Bytes(kind="codes", before_bytes=0, after_bytes=53_084_160),
            Bytes(kind="scales", before_bytes=0, after_bytes=1_658_880),
            Bytes(kind="other weights", before_bytes=212_336_640, after_bytes=0),
            Bytes(kind="embeddings", before_bytes=56_623_104, after_bytes=56_623_104),
            Bytes(kind="norms and biases", before_bytes=70_272, after_bytes=70_272),
            Bytes(kind="file headers", before_bytes=30_536, after_bytes=324_136),
        ),
        parity=Parity(runtime="transformers 5.1.0 with compressed-tensors 0.13.0", tensors=210, max_abs_difference=0.0),
    )
    return Report(**settings | changes)


def shown(renderable: RenderableType, width: int) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))
    with console.file:
        console.print(renderable)
        return console.export_text()

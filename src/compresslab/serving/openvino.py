"""Answers by OpenVINO from an IR whose KV cache is state within the graph, as our export and optimum-intel write it.

    ids -> infer (inputs by name: input_ids, attention_mask, position_ids, beam_idx) -> logits of the last token -> choose

Source: OpenVINO's stateful models (query_state, reset_state).
Oracle: greedy tokens are torch's where the graph is compiled to compute exactly (tests/serving/test_openvino_serving.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compresslab.errors import CompressLabError
from compresslab.exporters.openvino import library
from compresslab.serving.runtime import Sampling
from compresslab.serving.sampling import choose, generator_of
from compresslab.serving.tokenizer import TokenizerRuntime

UNKNOWN_CONTEXT = 2048  # for models whose config names no longest sequence
FAST = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1"}


class OpenVinoRuntime(TokenizerRuntime):
    name = "openvino"

    def __init__(self, file: Path, settings: Mapping[str, Any] | None = None) -> None:
        core = library().Core()
        self.request = core.compile_model(
            core.read_model(file), "CPU", {**FAST, **(settings or {})}
        ).create_infer_request()
        self.inputs = {name for port in self.request.model_inputs for name in port.get_names()}
        if not self.request.query_state() or "input_ids" not in self.inputs:
            raise CompressLabError(f"{file} is no decoder with its KV cache as a state, so it generates no text")
        super().__init__(file.parent)
        config = json.loads((file.parent / "config.json").read_text(encoding="utf-8"))
        text = config.get("text_config") or config
        self.context_length = int(text.get("max_position_embeddings") or UNKNOWN_CONTEXT)
        said = file.parent / "generation_config.json"
        ends = json.loads(said.read_text(encoding="utf-8")) if said.exists() else config
        self.ends = self.ends_with(ends.get("eos_token_id"))

    def stream(self, ids: Sequence[int], sampling: Sampling) -> Iterator[int]:
        self.request.reset_state()
        generator, new, read = generator_of(sampling), list(ids), 0
        for _ in range(sampling.max_tokens):
            token = choose(self._logits(new, read), sampling, generator)
            if token in self.ends:
                return
            yield token
            new, read = [token], read + len(new)

    def _logits(self, new: list[int], read: int) -> Tensor:
        """Of the last of these tokens, after the `read` ones that the state holds."""
        end = read + len(new)
        given = {
            "input_ids": np.array([new], dtype=np.int64),
            "attention_mask": np.ones((1, end), dtype=np.int64),
            "position_ids": np.arange(read, end, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, dtype=np.int32),
        }
        out = self.request.infer({name: x for name, x in given.items() if name in self.inputs})
        return torch.from_numpy(out[0][0, -1].copy()).float()

"""Answers by onnxruntime-genai from a folder with genai_config.json; the next token is chosen here, from its logits.

Oracle: greedy tokens are those that the library makes by itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from compresslab.serving.runtime import Sampling
from compresslab.serving.sampling import choose, generator_of
from compresslab.serving.tokenizer import TokenizerRuntime

LONGEST = 8192  # the library takes the memory of the whole context for every request


class OnnxGenaiRuntime(TokenizerRuntime):
    name = "onnx-genai"

    def __init__(self, folder: Path) -> None:
        import onnxruntime_genai

        super().__init__(folder)
        self.library = onnxruntime_genai
        self.model = onnxruntime_genai.Model(str(folder))
        said = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]
        self.context_length = min(LONGEST, int(said["context_length"]))
        self.ends = self.ends_with(said.get("eos_token_id"))

    def stream(self, ids: Sequence[int], sampling: Sampling) -> Iterator[int]:
        params = self.library.GeneratorParams(self.model)
        params.set_search_options(max_length=self.context_length, batch_size=1)
        running = self.library.Generator(self.model, params)
        generator, new = generator_of(sampling), list(ids)
        for _ in range(sampling.max_tokens):
            running.append_tokens(new)
            token = choose(torch.as_tensor(running.get_logits())[0, -1].float(), sampling, generator)
            if token in self.ends:
                return
            yield token
            new = [token]

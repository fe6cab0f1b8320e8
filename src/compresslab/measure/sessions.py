"""An opened model of each runtime: a prompt and one token after another, or one forward over named inputs.

A language model reads a prompt into an empty cache and then makes one token after another, always the likeliest; any other
network runs one forward over inputs of its own shape. Libraries are imported as a model is opened, for one process runs one.
Oracle: a tiny network in ONNX, OpenVINO IR and transformers returns the same numbers through each class.
"""

from __future__ import annotations

import json
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from compresslab.errors import CompressLabError

_TEXT = ("input_ids", "attention_mask")


class Session(ABC):
    """An opened model. Attributes: decodes (a language model with a cache), vocabulary (how many token ids there are)."""

    decodes: bool = False
    vocabulary: int = 0

    def prefill(self, ids: Sequence[int]) -> None:
        """Read a prompt into an empty cache, and choose the next token."""
        raise NotImplementedError

    def step(self) -> int:
        """One more token, which is returned."""
        raise NotImplementedError

    @abstractmethod
    def forward(self, inputs: Mapping[str, Any]) -> list[Any]:
        """One forward over numpy arrays by input name: the outputs, as numpy arrays."""

    @abstractmethod
    def inputs(self, batch: int, tokens: int) -> dict[str, Any]:
        """Something to run a forward on: random token ids with a full mask, or a random picture."""


class TorchSession(Session):
    def __init__(self, model: Any) -> None:
        from compresslab import models

        self.model, self.decodes = models.as_opened_(model), models.is_language_model(model)
        self.vocabulary = models.vocabulary_size(model) if self.decodes else getattr(model.config, "vocab_size", 0)

    def prefill(self, ids: Sequence[int]) -> None:
        import torch

        from compresslab.measure.speed import Decoder

        self.decoder = Decoder(self.model, torch.tensor([ids]))

    def step(self) -> int:
        self.decoder.step()
        return int(self.decoder._next)

    def forward(self, inputs: Mapping[str, Any]) -> list[Any]:
        import torch

        dtype = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        given = {name: torch.from_numpy(value) for name, value in inputs.items()}
        given = {name: x.to(dtype) if x.is_floating_point() else x for name, x in given.items()}
        with torch.inference_mode():
            out = self.model(**given)
        return [value.float().numpy() for value in out.to_tuple() if isinstance(value, torch.Tensor)]

    def inputs(self, batch: int, tokens: int) -> dict[str, Any]:
        from compresslab import models

        if self.vocabulary:
            shapes: dict[str, tuple[Any, str]] = {name: ((batch, tokens), "int64") for name in _TEXT}
        else:
            shapes = {"pixel_values": ((batch, *models.picture_shape(self.model.config)), "float32")}
        return random_inputs(shapes, self.vocabulary)


class OnnxSession(Session):
    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.declared = {x.name: (tuple(x.shape), x.type) for x in self.session.get_inputs()}
        cached = [name for name in self.declared if name.startswith(("past_key_values", "past_"))]
        if cached:
            raise CompressLabError(
                f"{path} is a decoder with a KV cache (input {cached[0]}): runtime onnx-genai opens it with genai_config.json"
            )
        self.vocabulary = vocabulary_beside(path.parent)

    def forward(self, inputs: Mapping[str, Any]) -> list[Any]:
        return list(self.session.run(None, {name: inputs[name] for name in self.declared}))

    def inputs(self, batch: int, tokens: int) -> dict[str, Any]:
        types = {"tensor(float)": "float32", "tensor(int64)": "int64", "tensor(int32)": "int32"}
        return _graph_inputs({k: (s, types.get(t, t)) for k, (s, t) in self.declared.items()}, batch, tokens,
                             self.vocabulary)  # fmt: skip


class OpenVinoSession(Session):
    """A forward; a language model whose cache is state within the graph (inputs as optimum-intel names them) also decodes."""

    def __init__(self, path: Path, threads: int) -> None:
        import openvino

        core = openvino.Core()
        settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1"}
        self.compiled = core.compile_model(core.read_model(path), "CPU", settings)
        self.request = self.compiled.create_infer_request()
        kinds = {"i64": "int64", "i32": "int32", "f32": "float32"}
        self.declared = {}
        for port in self.compiled.inputs:
            shape = tuple(d.get_length() if d.is_static else d.to_string() for d in port.get_partial_shape())
            type_ = port.get_element_type().get_type_name()
            self.declared[port.get_any_name()] = (shape, kinds.get(type_, type_))
        self.decodes = bool(self.request.query_state()) and "input_ids" in self.declared
        self.vocabulary = vocabulary_beside(path.parent)

    def prefill(self, ids: Sequence[int]) -> None:
        self.request.reset_state()
        self.read = 0
        self._feed(ids)

    def step(self) -> int:
        return self._feed([self.next])

    def _feed(self, ids: Sequence[int]) -> int:
        import numpy as np

        start, self.read = self.read, self.read + len(ids)
        given = {
            "input_ids": np.array([ids], dtype=np.int64),
            "attention_mask": np.ones((1, self.read), dtype=np.int64),
            "position_ids": np.arange(start, self.read, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, dtype=np.int32),
        }
        out = self.request.infer({name: x for name, x in given.items() if name in self.declared})
        self.next = int(out[0][0, -1].argmax())
        return self.next

    def forward(self, inputs: Mapping[str, Any]) -> list[Any]:
        out = self.request.infer({name: inputs[name] for name in self.declared})
        return [out[port] for port in self.compiled.outputs]

    def inputs(self, batch: int, tokens: int) -> dict[str, Any]:
        return _graph_inputs(self.declared, batch, tokens, self.vocabulary)


class Generating(Session):
    """A library that generates text and has no forward of its own."""

    decodes = True

    def forward(self, inputs: Mapping[str, Any]) -> list[Any]:
        raise NotImplementedError

    def inputs(self, batch: int, tokens: int) -> dict[str, Any]:
        raise NotImplementedError


class GenAiSession(Generating):
    def __init__(self, folder: Path, threads: int) -> None:
        import onnxruntime_genai as genai

        config = genai.Config(str(folder))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self.model = genai.Model(config)
        said = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
        self.vocabulary = int(said["model"]["vocab_size"])
        self.longest = min(int(said["model"]["context_length"]), 4096)
        self.start = partial(genai.Generator, self.model)
        self.params = genai.GeneratorParams(self.model)
        # An end token must not end the measurement: the shortest text is the longest one.
        self.params.set_search_options(max_length=self.longest, min_length=self.longest, do_sample=False, batch_size=1)

    def prefill(self, ids: Sequence[int]) -> None:
        import numpy as np

        self.generator = self.start(self.params)
        self.generator.append_tokens(np.array(ids, dtype=np.int32))
        self.generator.generate_next_token()

    def step(self) -> int:
        self.generator.generate_next_token()
        return int(self.generator.get_next_tokens()[0])


class LlamaCppSession(Generating):
    def __init__(self, path: Path, threads: int) -> None:
        import llama_cpp

        self.llama = llama_cpp.Llama(str(path), n_ctx=4096, n_threads=threads, n_threads_batch=threads, verbose=False)
        self.vocabulary = self.llama.n_vocab()

    def prefill(self, ids: Sequence[int]) -> None:
        self.llama.reset()
        self.llama.eval(list(ids))
        self.next = self.llama.sample(temp=0.0)

    def step(self) -> int:
        self.llama.eval([self.next])
        self.next = self.llama.sample(temp=0.0)
        return int(self.next)


def random_ids(count: int, vocabulary: int) -> list[int]:
    """The same token ids in every process, without any library."""
    draw = random.Random(0)
    return [draw.randrange(vocabulary) for _ in range(count)]


def vocabulary_beside(folder: Path) -> int:
    """From the config.json beside a graph; 0 where there is none, or the network reads no text."""
    path = folder / "config.json"
    return int(json.loads(path.read_text(encoding="utf-8")).get("vocab_size", 0)) if path.exists() else 0


def _graph_inputs(
    declared: Mapping[str, tuple[tuple[Any, ...], str]], batch: int, tokens: int, vocabulary: int
) -> dict[str, Any]:
    """Inputs of the declared shapes; a free first dimension is the batch, a free second one the tokens."""
    free = (batch, tokens, 224, 224)
    shapes = {
        name: (tuple(d if isinstance(d, int) and d > 0 else free[i] for i, d in enumerate(shape)), type_)
        for name, (shape, type_) in declared.items()
    }
    return random_inputs(shapes, vocabulary)


def random_inputs(shapes: Mapping[str, tuple[tuple[int, ...], str]], vocabulary: int) -> dict[str, Any]:
    """The same arrays every time, by name, shape and dtype: full masks, random ids, random pictures."""
    import numpy as np

    made: dict[str, Any] = {}
    for name, (shape, type_) in shapes.items():
        if name == "attention_mask":
            made[name] = np.ones(shape, dtype=type_)
        elif name == "position_ids":
            made[name] = np.broadcast_to(np.arange(shape[1], dtype=type_), shape).copy()
        elif name == "input_ids":
            count = int(np.prod(shape))
            made[name] = np.array(random_ids(count, vocabulary or 100), dtype=type_).reshape(shape)
        elif type_.startswith("int"):
            made[name] = np.zeros(shape, dtype=type_)
        else:
            made[name] = np.random.default_rng(0).standard_normal(shape).astype(type_)
    return made

"""A .pte opened by ExecuTorch's own runtime: a decoder whose cache lies inside (exporters/executorch.py), or one forward.

As a program, `python -m compresslab.measure.executorch_session PTE TOKENS` prints the memory that a model takes.

Oracle: tests/test_export_executorch.py compares its outputs and tokens with torch's.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from compresslab.measure.environment import peak_memory_bytes
from compresslab.measure.sessions import Session, random_ids, random_inputs, vocabulary_beside

DECODER = "get_max_seq_len"  # a constant method that decoders have


def library() -> tuple[Any, Any]:
    """The bindings, and the runtime."""
    logging.getLogger("torchao").setLevel(logging.ERROR)  # it tells of kernels for other machines
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the whole Python API says that it is experimental
        from executorch.extension.pybindings import portable_lib
        from executorch.runtime import Runtime

    return portable_lib, Runtime.get()


class ExecuTorchSession(Session):
    def __init__(self, path: Path, threads: int) -> None:
        portable_lib, runtime = library()
        portable_lib._unsafe_reset_threadpool(threads)
        self.program = runtime.load_program(path)
        self.decodes = DECODER in self.program.method_names
        self.vocabulary = vocabulary_beside(path.parent)
        self.method: Any = self.program.load_method("forward")

    def prefill(self, ids: Sequence[int]) -> None:
        self.read = 0
        self._feed(ids)

    def step(self) -> int:
        return self._feed([self.next])

    def _feed(self, ids: Sequence[int]) -> int:
        import torch

        positions = torch.arange(self.read, self.read + len(ids))
        self.read += len(ids)
        logits = self.method.execute((torch.tensor([list(ids)]), positions))[0]
        self.next = int(logits[0].argmax())
        return self.next

    def forward(self, inputs: Mapping[str, Any]) -> list[Any]:
        import torch

        given = tuple(torch.from_numpy(x) for x in inputs.values())
        return [x.clone().numpy() for x in self.method.execute(given)]

    def inputs(self, batch: int, tokens: int) -> dict[str, Any]:
        """Its inputs have no names in the file: one of floats is a picture, others are ids, mask and types, in this order."""
        told = self.method.metadata
        tensors = [told.input_tensor_meta(i) for i in range(told.num_inputs())]
        if len(tensors) == 1 and len(tensors[0].sizes()) == 4:
            return random_inputs({"pixel_values": (tuple(tensors[0].sizes()), "float32")}, 0)
        names = ("input_ids", "attention_mask", "token_type_ids")[: len(tensors)]
        tokens = min(tokens, tensors[0].sizes()[1])
        return random_inputs({name: ((1, tokens), "int64") for name in names}, self.vocabulary)


def memory_of(path: Path, tokens: int) -> int:
    """How much more memory this process holds at most with a model opened and run; one model for each process."""
    library()
    before, peak_before = psutil.Process().memory_info().rss, peak_memory_bytes()
    session = ExecuTorchSession(path, 1)
    if session.decodes:
        session.prefill(random_ids(tokens, session.vocabulary))
    else:
        session.forward(session.inputs(1, tokens))
    after, peak = psutil.Process().memory_info().rss, peak_memory_bytes()
    return max(after, peak if peak > peak_before else 0) - before


if __name__ == "__main__":
    print(memory_of(Path(sys.argv[1]), int(sys.argv[2])))  # noqa: T201

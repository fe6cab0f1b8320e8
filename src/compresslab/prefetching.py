"""The next block's weights on their way to a GPU while the walks are in this one.

    start(names) -> a thread reads them from disk into page-locked memory -> a stream of its own copies them to the device
    take(name)   -> the tensor there, once its copy has come; what was not started is read and copied now

A copy from page-locked memory on a stream of its own runs beside the kernels of the walks, so a block costs the longer of the two
and not their sum. One block is ahead at a time: the device holds two. Nothing is gained where weights stay in main memory, so
layerwise.py asks for it on GPUs only; the thread itself works on any device, as the tests do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor


class Ahead:
    """Reads tensors before they are asked for.

    Args:
        read: a tensor by its name, in main memory.
        device: where they are wanted.
    """

    def __init__(self, read: Callable[[str], Tensor], device: torch.device) -> None:
        self._read, self._device = read, device
        self._on_the_way: dict[str, Future[tuple[Tensor, Any]]] = {}
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ahead")
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, names: Sequence[str]) -> None:
        """Begin to read these. What an earlier call began and nobody took is forgotten."""
        for future in self._on_the_way.values():
            future.cancel()
        self._on_the_way = {name: self._reader.submit(self._bring, name) for name in names}

    def take(self, name: str) -> Tensor:
        """A tensor on the device. What went wrong while it was read is raised here."""
        future = self._on_the_way.pop(name, None)
        if future is None:
            return self._read(name).to(self._device)
        tensor, arrived = future.result()
        if arrived is not None:
            here = torch.cuda.current_stream(self._device)
            here.wait_event(arrived)
            tensor.record_stream(
                here
            )  # made on the other stream, which must not use its memory again while it is read here
        return tensor

    def close(self) -> None:
        self._reader.shutdown(wait=True, cancel_futures=True)
        self._on_the_way.clear()

    def _bring(self, name: str) -> tuple[Tensor, Any]:
        with torch.inference_mode():
            tensor = self._read(name)
            if self._stream is None:
                return tensor.to(self._device), None
            with torch.cuda.stream(self._stream):
                tensor = tensor.pin_memory().to(self._device, non_blocking=True)
                arrived = torch.cuda.Event()
                arrived.record(self._stream)
            return tensor, arrived

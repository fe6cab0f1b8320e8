"""Runtimes that open a folder and run the model in it: one short class each, told apart by the kind of file they read.

    name -> RUNTIMES[name].file(folder) (the file it reads, or None) -> open(folder, threads) -> prefill and step, or forward

Nothing of a runtime is imported before a model is opened in it (measure/sessions.py).
Oracle: each finds its own kind of file among those of the others; tests/test_runtimes.py opens all of them.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from compresslab.errors import CompressLabError
from compresslab.measure import sessions
from compresslab.measure.sessions import Session


class Runtime(ABC):
    """One runtime.

    Attributes:
        package: the distribution it comes in; module, its import name; extra, ours that installs it, or "".
        reads: what it opens, in words.
    """

    package: ClassVar[str]
    module: ClassVar[str]
    extra: ClassVar[str] = ""
    reads: ClassVar[str]

    @abstractmethod
    def file(self, folder: Path) -> Path | None:
        """What in a folder it would open, if anything."""

    @abstractmethod
    def open(self, folder: Path, threads: int) -> Session: ...

    def require(self) -> None:
        """CompressLabError with the command that installs what is missing."""
        if importlib.util.find_spec(self.module) is None:
            raise CompressLabError(f"{self.package} not installed: pip install 'compresslab[{self.extra}]'")

    def said(self) -> str:
        return f"{self.package} {importlib.metadata.version(self.package)}"


class Torch(Runtime):
    """Plain transformers, in the dtype that the folder asks for."""

    package, module, reads = "torch", "torch", "a transformers folder"

    def file(self, folder: Path) -> Path | None:
        return _first(folder, "*.safetensors") if (folder / "config.json").exists() else None

    def open(self, folder: Path, threads: int) -> Session:
        return sessions.TorchSession(self._load(folder, threads))

    def _load(self, folder: Path, threads: int) -> Any:
        import torch

        from compresslab import models

        torch.set_num_threads(threads)
        return models.load(folder)


class Packed(Torch):
    """An artifact on torch's packed CPU kernels."""

    reads = "an artifact of `compresslab compress`"

    def file(self, folder: Path) -> Path | None:
        return super().file(folder) if (folder / "compresslab.json").exists() else None

    def _load(self, folder: Path, threads: int) -> Any:
        import torch

        from compresslab.deploy import torch_packed

        torch.set_num_threads(threads)
        model, count = torch_packed.load(folder)
        if not count:
            raise CompressLabError(
                f"no layer of {folder} has a packed kernel on this CPU (it takes int4 in groups of 32 to 256 or int8 by row, "
                "and bfloat16 in hardware): leave 'packed' out of --runtimes"
            )
        return model


class OnnxRuntime(Runtime):
    package, module, extra, reads = "onnxruntime", "onnxruntime", "onnx", "one .onnx file"

    def file(self, folder: Path) -> Path | None:
        return None if (folder / "genai_config.json").exists() else _first(folder, "*.onnx")

    def open(self, folder: Path, threads: int) -> Session:
        return sessions.OnnxSession(_needed(self.file(folder), folder, self), threads)


class OpenVino(Runtime):
    package, module, extra, reads = "openvino", "openvino", "openvino", "an IR: one .xml file, with its .bin"

    def file(self, folder: Path) -> Path | None:
        return next(
            (x for x in sorted(folder.glob("*.xml")) if x.with_suffix(".bin").exists() and "token" not in x.stem), None
        )

    def open(self, folder: Path, threads: int) -> Session:
        return sessions.OpenVinoSession(_needed(self.file(folder), folder, self), threads)


class GenAi(Runtime):
    package, module, extra = "onnxruntime-genai", "onnxruntime_genai", "genai"
    reads = "genai_config.json and its graph"

    def file(self, folder: Path) -> Path | None:
        return _first(folder, "genai_config.json")

    def open(self, folder: Path, threads: int) -> Session:
        return sessions.GenAiSession(_needed(self.file(folder), folder, self).parent, threads)


class ExecuTorch(Runtime):
    package, module, extra, reads = "executorch", "executorch", "executorch", "a .pte file"

    def file(self, folder: Path) -> Path | None:
        return _first(folder, "*.pte")

    def open(self, folder: Path, threads: int) -> Session:
        from compresslab.measure.executorch_session import ExecuTorchSession

        return ExecuTorchSession(_needed(self.file(folder), folder, self), threads)


class LlamaCpp(Runtime):
    package, module, extra, reads = "llama-cpp-python", "llama_cpp", "llama-cpp", "a .gguf file"

    def file(self, folder: Path) -> Path | None:
        return _first(folder, "*.gguf")

    def open(self, folder: Path, threads: int) -> Session:
        return sessions.LlamaCppSession(_needed(self.file(folder), folder, self), threads)


RUNTIMES: dict[str, Runtime] = {
    "torch": Torch(),
    "packed": Packed(),
    "onnx": OnnxRuntime(),
    "onnx-genai": GenAi(),
    "openvino": OpenVino(),
    "executorch": ExecuTorch(),
    "llama.cpp": LlamaCpp(),
}


def runtime(name: str) -> Runtime:
    if name not in RUNTIMES:
        raise CompressLabError(f"no runtime '{name}': there are {', '.join(RUNTIMES)}")
    return RUNTIMES[name]


def _first(folder: Path, pattern: str) -> Path | None:
    return next(iter(sorted(folder.glob(pattern))), None)


def _needed(file: Path | None, folder: Path, runtime_: Runtime) -> Path:
    if file is None:
        raise CompressLabError(f"{runtime_.package} finds nothing to open in {folder}: it reads {runtime_.reads}")
    return file

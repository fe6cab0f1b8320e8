"""One function that picks the runtime by what lies in a folder, or by name."""

from __future__ import annotations

from pathlib import Path

from compresslab.errors import CompressLabError, unknown
from compresslab.measure.runtimes import RUNTIMES
from compresslab.serving.runtime import Runtime

NAMES = ("packed", "torch", "llama.cpp", "onnx-genai", "openvino")


def open_runtime(folder: Path, name: str = "auto") -> Runtime:
    """Open a folder's model.

    Raises:
        CompressLabError: if nothing in the folder can be opened, the runtime is not installed, or the model generates no text.
    """
    if name not in ("auto", *NAMES):
        raise unknown("runtime", name, ("auto", *NAMES))
    if not folder.is_dir():
        raise CompressLabError(f"{folder} is no folder: give an artifact, a model's folder or an export")
    chosen = pick(folder) if name == "auto" else name
    known = RUNTIMES[chosen]
    file = known.file(folder)
    if file is None:
        raise CompressLabError(f"runtime {chosen} finds nothing to open in {folder}: it reads {known.reads}")
    known.require()
    if chosen == "llama.cpp":
        from compresslab.serving.llama_cpp import LlamaCppRuntime

        return LlamaCppRuntime(file)
    if chosen == "onnx-genai":
        from compresslab.serving.onnx_genai import OnnxGenaiRuntime

        return OnnxGenaiRuntime(folder)
    if chosen == "openvino":
        from compresslab.serving.openvino import OpenVinoRuntime

        return OpenVinoRuntime(file)
    from compresslab.serving.torch_runtime import TorchRuntime

    return TorchRuntime(folder, packed=chosen == "packed")


def pick(folder: Path) -> str:
    """The fastest runtime for what lies in a folder."""
    found = [name for name in NAMES if RUNTIMES[name].file(folder) is not None]
    if "packed" in found:
        from compresslab.serving.torch_runtime import can_pack

        if not can_pack(folder):
            found.remove("packed")
    if not found:
        reads = "; ".join(RUNTIMES[name].reads for name in NAMES)
        raise CompressLabError(f"nothing in {folder} that chat and serve can open: they read {reads}")
    return found[0]

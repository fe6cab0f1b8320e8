"""The runtime of a folder: picked by what lies in it, or by name; and why.

A folder holds one kind of model. Where that is an artifact, torch's packed kernels are the only ones that need no export, and
onnxruntime-genai decoded faster where both were timed (results/decoding-smollm2.json): `reason` says so; ask `bench` for others.
"""

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


def reason(folder: Path, name: str) -> str:
    """Why a runtime is the one for what lies in a folder, and what would be faster."""
    if name not in ("packed", "torch"):
        return f"the folder holds {RUNTIMES[name].reads}"
    if RUNTIMES["packed"].file(folder) is None:
        return "a model in float, multiplied as it is"
    from compresslab.serving.torch_runtime import can_pack

    faster = f"ONNX Runtime decoded SmolLM2 faster: compresslab export {folder} --to onnx-genai --out DIR"
    if name == "packed":
        return f"int4 and int8 layers stay packed in memory; {faster}"
    if can_pack(folder):
        return f"weights are multiplied out; --runtime packed keeps them packed, and {faster}"
    return f"weights are multiplied out, as no layer has a packed kernel that is fast on this CPU; {faster}"


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

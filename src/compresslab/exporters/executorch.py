"""ExecuTorch: a .pte that runs on phones, its products on XNNPACK with the codes that were solved.

    network of CodedLayers -> lowered to XNNPACK (executorch_lowering.py) -> model.pte, beside config.json and tokenizer

Encoders read one text of up to `length` tokens, vision models one picture. A decoder reads tokens and their positions, keeps
keys and values of `length` tokens inside and returns the logits of the last token: the names, shapes and constant methods
are those that ExecuTorch's LLM runner for Android and iOS looks for.

Source: ExecuTorch's XNNPACK backend; see xnnpack_layers.py for the grids that it holds.
Oracle: run by ExecuTorch's own runtime it gives torch's outputs and greedy tokens, and the delegate's bytes are our codes.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from compresslab import models
from compresslab.deploy import coded_layers, graphs, xnnpack_layers
from compresslab.deploy.xnnpack_layers import DYNAMIC, FLOAT
from compresslab.errors import CompressLabError
from compresslab.exporters import executorch_lowering as lowering
from compresslab.exporters.contract import Exporter, Given
from compresslab.report.plots import human

MODEL = "model.pte"


class ExecuTorch(Exporter):
    """model.pte for XNNPACK."""

    summary: ClassVar[str] = "phones: a .pte for ExecuTorch with XNNPACK; symmetric int8 and int4 as solved"
    extra: ClassVar[str] = "executorch"
    packages: ClassVar[tuple[str, ...]] = ("executorch", "torchao")
    options: ClassVar[Mapping[str, str]] = {
        "length": f"tokens a text may have, or a decoder's cache holds; {lowering.LENGTH} unless the model has fewer"
    }

    def check_options(self, options: Mapping[str, Any]) -> None:
        super().check_options(options)
        length = options.get("length", 1)
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise CompressLabError(f"length={length}: give a number of tokens, 1 or more")

    def refuses(self, given: Given) -> Sequence[str]:
        skeleton: Any = given.skeleton()
        found = [said for name, weight in given.weights()
                 if (said := xnnpack_layers.misfit(name, weight, skeleton.get_submodule(name)))]  # fmt: skip
        if found:
            return found
        if given.is_compressed:
            inputs = coded_layers.read_inputs(given.folder)
            found = [said for name, rounding in inputs if (said := xnnpack_layers.input_misfit(name, rounding))]
        if models.is_language_model(skeleton) and not graphs.keeps_all_tokens(skeleton.config):
            found.append("not all of its layers cache the keys and values of every token (sliding windows, recurrent states): "
                         "export it to gguf")  # fmt: skip
        length, most = given.options.get("length"), getattr(skeleton.config, "max_position_embeddings", None)
        if length and most and length > most:
            found.append(f"length={length}, and the network has positions for {most} tokens")
        return found

    def write(self, given: Given, folder: Path) -> Sequence[str]:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            lowered = lowering.lower(given, given.options.get("length"), Path(scratch))
            notes = _notes(given, lowered)
            write_program(lowered, folder / MODEL)
        config = {key: value for key, value in given.config.items() if key != "quantization_config"}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for path in given.companions():
            shutil.copyfile(path, folder / path.name)
        return notes


def write_program(lowered: lowering.Lowered, path: Path) -> None:
    """The .pte file. Its graph is no longer what it was after that."""
    with lowering.quiet():
        from executorch.exir import ExecutorchBackendConfig

        # A decoder's cache is written in place: otherwise each step would copy all of it twice.
        program = lowered.edge.to_executorch(ExecutorchBackendConfig(run_reinplace_pass=True))
        with path.open("wb") as file:
            program.write_to_file(file)


def _notes(given: Given, lowered: lowering.Lowered) -> list[str]:
    notes = []
    inputs = dict(coded_layers.read_inputs(given.folder)) if given.is_compressed else {}
    unlike = [name for name, way in lowered.ways.items() if way == DYNAMIC]
    if unlike:
        fixed = sum(name in inputs and inputs[name].scale is not None for name in unlike)
        notes.append(
            f"XNNPACK rounds the inputs of {len(unlike)} of {len(lowered.ways)} compressed layers to 8 bits as the model runs "
            "(asymmetric, per token or picture), for it has no kernels with float inputs, and none with fixed ranges unless the "
            f"output's is fixed: {fixed} of them had a fixed range, {sum(name not in inputs for name in unlike)} float inputs"
        )
    if multiplied := sorted(name for name, way in lowered.ways.items() if way == FLOAT):
        notes.append(
            f"XNNPACK has no integer kernel for {len(multiplied)} compressed layers, first {multiplied[0]} (a grouped "
            "convolution needs fixed ranges on both sides): their codes are multiplied out to float32"
        )
    if given.is_compressed and lowered.in_float:
        most = max(lowered.in_float, key=lambda name: lowered.in_float[name])
        notes.append(
            f"layers that were not compressed ({len(lowered.in_float)}) take {human(sum(lowered.in_float.values()), 'bytes')} in "
            f"float32, most of all {most}: a smaller --ignore compresses them, too"
        )
    rounded = max((xnnpack_layers.scale_error(weight) for _, weight in given.weights()), default=0.0)
    if rounded:
        notes.append(f"XNNPACK keeps the scales of groups in bfloat16: theirs changed by up to {rounded:.2%}")
    lowest = sum(bool((weight.codes == xnnpack_layers.QMIN).any()) for _, weight in given.weights())
    if lowest:
        notes.append(
            f"{lowest} layers have codes of -128: on ARM cores without dot product (Cortex-A53, A72, A73) XNNPACK adds two "
            "products in 16 bits, which overflow where such a code meets an input of -128 twice"
        )
    nodes = lowered.nodes()
    taken = sum(node.delegated for node in nodes)
    notes.append(f"XNNPACK runs {taken} of {len(nodes)} operators: `compresslab mobile` names the others")
    if lowered.length:
        held = "its cache holds" if lowered.cache_bytes else "a text may have"
        notes.append(f"{held} {lowered.length} tokens: --set length=N for another number")
    return notes


EXECUTORCH = ExecuTorch()

"""ONNX Runtime: encoders, vision models and classifiers as model.onnx, weights as the codes that were solved.

    skeleton + de-quantised weights, every compressed layer marked by an operator of our own that keeps its name
      -> torch.onnx's dynamo exporter, with a dynamic batch (and sequence) -> a graph in which the marks still stand
      -> each mark becomes the nodes that hold the codes (onnx_nodes.py) -> model.onnx

Inputs with a stored range become QuantizeLinear / DequantizeLinear pairs, which ONNX Runtime fuses to integer kernels; inputs
rounded as the model runs become the same arithmetic in ONNX operators around an integer product; inputs in float leave the
weight behind a DequantizeLinear. No weight is rounded by any quantiser of the runtime.

Source: the ONNX operators' definitions, opset 21 and later (4-bit codes and blocks), onnxruntime's QDQ transformations.
Oracle: on a tiny model the outputs are those of the artifact opened by torch.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from compresslab import models
from compresslab.deploy import graphs
from compresslab.deploy.native import read_inputs
from compresslab.edits import Edit, apply_
from compresslab.errors import CompressLabError
from compresslab.exporters.contract import Exporter, Given
from compresslab.numerics.grid import QuantInput, QuantWeight

OPSET = 23
DOMAIN = "compresslab"


class Onnx(Exporter):
    """model.onnx with quantised weights."""

    summary: ClassVar[str] = "encoders, vision models and classifiers for ONNX Runtime: int8 and int4 as solved"
    extra: ClassVar[str] = "onnx"
    packages: ClassVar[tuple[str, ...]] = ("onnx", "onnxscript", "onnxruntime")

    def refuses(self, given: Given) -> Sequence[str]:
        named = (given.config.get("architectures") or [""])[0]
        if named.endswith(("ForCausalLM", "LMHeadModel")):
            return [f"{named} is a language model, which needs a KV cache: export it to onnx-genai"]
        return [
            f"layer {name} has weights in format {weight.grid.format}, and ONNX has integers here: compress with format=int"
            if weight.grid.format != "int" else f"layer {name} has groups out of order, and ONNX has neighbours only"
            for name, weight in given.weights() if weight.grid.format != "int" or weight.group_index is not None
        ]  # fmt: skip

    def write(self, given: Given, folder: Path) -> Sequence[str]:
        import onnx

        from compresslab.exporters import onnx_nodes

        weights = dict(given.weights())
        inputs = dict(read_rounding(given))
        model = network(given, weights)
        mark_(model, weights, inputs)
        proto = _exported(Outputs(model), *_example(given, model))
        notes = onnx_nodes.fill_(proto, weights, inputs)
        onnx.save(proto, folder / "model.onnx")
        _opens(folder / "model.onnx")
        config = {key: value for key, value in given.config.items() if key != "quantization_config"}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for path in given.companions():
            shutil.copyfile(path, folder / path.name)
        return notes


def read_rounding(given: Given) -> Iterator[tuple[str, QuantInput]]:
    """How the input of each layer is rounded: a group of the config names its layers, or all by "Linear"."""
    if not given.is_compressed:
        return
    config = given.config["quantization_config"]
    groups = config.get("config_groups", {})
    if any("Linear" in group["targets"] for group in groups.values()):
        from compresslab.deploy.compressed_tensors import grid_of
        from compresslab.weights import FolderWeights

        stored = FolderWeights(given.folder)
        args = next(iter(groups.values()))["input_activations"]
        for name in given.grids if args is not None else ():
            grid = grid_of(args)
            scale = None if args["dynamic"] else stored.get(f"{name}.input_scale")
            has_zero = scale is not None and not grid.symmetric
            zero_point = stored.get(f"{name}.input_zero_point") if has_zero else None
            yield name, QuantInput(grid=grid, scale=scale, zero_point=zero_point)
        return
    yield from read_inputs(given.folder)


def network(given: Given, weights: dict[str, QuantWeight]) -> nn.Module:
    """The architecture with de-quantised weights in float32, rounding no input."""
    config = models.read_config(given.folder)
    model = models.build(config)
    edits = (given.config.get("quantization_config") or {}).get("edits", [])
    apply_(model, [Edit(**edit) for edit in edits])
    places = model.state_dict()
    found = {name: tensor for name, tensor in given.floats() if name in places}
    for name, weight in weights.items():
        found[f"{name}.weight"] = weight.dequantize().view(places[f"{name}.weight"].shape)
    tied = getattr(model, "all_tied_weights_keys", {})
    missing = sorted(set(places) - set(found) - set(tied))
    if not all(_optional(name) for name in missing):
        raise CompressLabError(
            f"{given.folder} lacks {len(missing)} tensors, first {missing[0]}: fetch the artifact again"
        )
    model.load_state_dict(found, strict=False, assign=True)
    models.tie_weights(model)
    if hasattr(model, "pooler") and any(name.startswith("pooler.") for name in missing):
        setattr(model, "pooler", None)  # noqa: B010 - a module's place
    return model.float().eval().requires_grad_(False)


def _optional(name: str) -> bool:
    return name.startswith("pooler.")


class Outputs(nn.Module):
    """The logits, or the last hidden state, as a plain tensor; inputs by position."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, first: Tensor, mask: Tensor | None = None, types: Tensor | None = None) -> Tensor:
        if mask is None:
            found = self.model(pixel_values=first)
        elif types is None:
            found = self.model(input_ids=first, attention_mask=mask)
        else:
            found = self.model(input_ids=first, attention_mask=mask, token_type_ids=types)
        return found.logits if hasattr(found, "logits") else found.last_hidden_state


def _example(given: Given, model: nn.Module) -> tuple[tuple[Tensor, ...], list[str], str]:
    """Inputs to trace with, their names, and the name of the output."""
    config: Any = model.config
    output = "logits" if (given.config.get("architectures") or [""])[0].split("For")[1:] else "last_hidden_state"
    if models.main_input(config) == "pixel_values":
        return (torch.zeros(2, *models.picture_shape(config, given.folder)),), ["pixel_values"], output
    ids = torch.ones(2, 9, dtype=torch.long)
    names = ["input_ids", "attention_mask"]
    if getattr(config, "type_vocab_size", 0):
        names.append("token_type_ids")
    return (ids, torch.ones_like(ids), torch.zeros_like(ids))[: len(names)], names, output


def _exported(model: nn.Module, example: tuple[Tensor, ...], names: list[str], output: str) -> Any:
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence")
    axes: dict[int, Any] = {0: batch} if len(names) == 1 else {0: batch, 1: sequence}
    shapes = tuple(dict(axes) for _ in names)
    try:
        with _quiet(), torch.inference_mode(False), torch.no_grad():
            program = torch.onnx.export(
                model, example, dynamo=True, opset_version=OPSET, input_names=names, output_names=[output],
                dynamic_shapes=shapes, optimize=True, verbose=False,
            )  # fmt: skip
    except Exception as error:
        said = _first_line(error)
        free = tuple(dict.fromkeys(axes, torch.export.Dim.AUTO) for _ in names)
        where = graphs.culprit(graphs.export(model, example, free).graph, said)
        raise CompressLabError(f"torch.onnx cannot export the model: {said}{where}") from error
    assert program is not None
    return program.model_proto


def _first_line(error: BaseException) -> str:
    """The most telling line: the cause names the operator and where in the model it stands."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:400] or type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's progress goes to standard output, its versions' quarrels to warnings and logs."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _opens(path: Path) -> None:
    """CompressLabError naming the node, if ONNX Runtime has no kernel for one."""
    import onnxruntime

    try:
        onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:
        raise CompressLabError(f"ONNX Runtime does not open the model: {_first_line(error)}") from error


# --- the marks -----------------------------------------------------------------------------------------------------


def _mark(kind: str, layer: str, inputs: tuple[Tensor, ...], shape: Sequence[int | torch.SymInt]) -> Tensor:
    """A node of our own domain in the exported graph, which keeps the layer's name."""
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{kind}", inputs, {"layer": layer}, dtype=torch.float32, shape=shape, version=1
    )


class MarkedLinear(nn.Module):
    """A linear layer (or transformers' Conv1D) whose product is a mark."""

    def __init__(self, layer: str, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.layer = layer
        self.weight, self.bias = nn.Parameter(weight, requires_grad=False), bias

    def forward(self, x: Tensor) -> Tensor:
        given = (x, self.weight) if self.bias is None else (x, self.weight, self.bias)
        return _mark("linear", self.layer, given, (*x.shape[:-1], self.weight.shape[0]))


class MarkedConv(nn.Conv2d):
    """A convolution whose input and weight are marked; for the rest the one it stands for, whose strides networks read."""

    def __init__(self, layer: str, conv: nn.Conv2d, rounds: bool) -> None:
        self.__dict__ = conv.__dict__.copy()
        self.layer, self.rounds = layer, rounds

    def forward(self, x: Tensor) -> Tensor:
        if self.rounds:
            x = _mark("input", self.layer, (x,), x.shape)
        weight = _mark("weight", self.layer, (self.weight,), self.weight.shape)
        return self._conv_forward(x, weight, self.bias)


def mark_(model: nn.Module, weights: dict[str, QuantWeight], inputs: dict[str, QuantInput]) -> None:
    """Put marks in the places of the compressed layers."""
    for name in weights:
        module: Any = model.get_submodule(name)
        if isinstance(module, nn.Conv2d):
            model.set_submodule(name, MarkedConv(name, module, name in inputs))
        else:
            weight = module.weight.t().contiguous() if models.is_transposed(module) else module.weight
            model.set_submodule(name, MarkedLinear(name, weight.data, module.bias))


ONNX = Onnx()

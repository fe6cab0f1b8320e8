"""onnxruntime-genai: a decoder model with its KV cache as one ONNX graph, weights in MatMulNBits, and genai_config.json.

    codes as solved -> a folder in the GPTQ layout (int32 words of 2, 4 or 8 bits, scales in float32)
      -> onnxruntime-genai's own model builder (onnx_genai_builder.py) -> the graph, its vocabulary a stand-in of few tokens
      -> the real head and embeddings are put in (onnx_genai_head.py: the builder would take a gigabyte for them)
      -> its initialisers are read back and compared with the codes, layer by layer

MatMulNBits holds unsigned codes of 2, 4 or 8 bits in blocks of a power of two of at least 16 inputs (B u8 [out, blocks,
block * bits / 8], low bits first; scales [out, blocks]; zero points of the codes' own width). Codes of other widths go into the
next wider one; groups that are no such power are cut into blocks that are, with the same scale. Neither changes a weight.

The head is no layer of most recipes, and reading it in float would take as long as all layers together. So it is rounded
here to 8 bits (or 4, by the format's name), in blocks of 32; where it is tied, the embeddings are looked up in the same codes.

Source: the operator's definition in onnxruntime (com.microsoft.MatMulNBits), the GPTQ layout as the builder reads it.
Oracle: the initialisers are the artifact's codes to the bit; logits of a tiny model agree with torch, with the head rounded.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from compresslab import models
from compresslab.errors import CompressLabError
from compresslab.exporters import onnx_genai_head
from compresslab.exporters.contract import Exporter, Given
from compresslab.exporters.matmul_nbits import Blocks, blocks_of, read_blocks
from compresslab.exporters.onnx_genai_builder import build
from compresslab.numerics.grid import Grid, QuantWeight, round_to_nearest
from compresslab.numerics.packing import pack_int32

# What the builder reads from a quantised folder by these names of layers, and has been tried here.
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
HEAD, EMBEDDING, HEAD_BLOCK = "lm_head", "model.embed_tokens.weight", 32


def _gptq(found: Blocks) -> dict[str, Tensor]:
    """The tensors of the GPTQ layout: words along the inputs, and zero points less one, along the outputs."""
    middle = 2 ** (found.bits - 1)
    codes = (found.codes.short() - middle).to(torch.int8)
    zeros = ((found.zero_point.short() - 1) % 2**found.bits - middle).to(torch.int8)
    return {
        "qweight": pack_int32(codes.contiguous(), found.bits).t().contiguous(),
        "qzeros": pack_int32(zeros.t().contiguous(), found.bits),
        "scales": found.scale.t().contiguous(),
        "g_idx": torch.arange(found.codes.shape[1], dtype=torch.int32) // found.block,
    }


class OnnxGenai(Exporter):
    """A decoder for onnxruntime-genai."""

    summary: ClassVar[str] = "a language model for onnxruntime-genai: MatMulNBits and KV cache"
    extra: ClassVar[str] = "genai"
    packages: ClassVar[tuple[str, ...]] = ("onnxruntime_genai", "onnx", "onnx_ir")
    options: ClassVar[Mapping[str, str]] = {"head": "bits of a head that is in float: 8, or 4"}

    def refuses(self, given: Given) -> Sequence[str]:
        named = (given.config.get("architectures") or ["nothing"])[0]
        if named not in ARCHITECTURES:
            return [
                f"its architecture is {named}, and this export knows {', '.join(ARCHITECTURES)}: try another format"
            ]
        config = given.config
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        if head_dim % 16:
            return [f"its attention heads have {head_dim} channels, and GroupQueryAttention takes multiples of 16"]
        if not given.is_compressed:
            return ["its weights are in float: compress it first (compresslab compress)"]
        refused = [f"layer {name} {why}" for name, weight in given.weights() if (why := _reason(weight))]
        inside = [
            name.removesuffix(".weight") for name, tensor in given.floats()
            if name.startswith("model.layers.") and name.endswith("_proj.weight") and tensor.dim() == 2
        ]  # fmt: skip
        return refused + [
            f"layer {name} is in float, and the builder reads blocks whose layers are all compressed: compress it in 8 bits"
            for name in inside
        ]

    def write(self, given: Given, folder: Path) -> Sequence[str]:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".genai-") as scratch:
            source, target = Path(scratch, "gptq"), Path(scratch, "out")
            source.mkdir()
            mixed = self._write_gptq(given, source)
            build(source, target, Path(scratch, "cache"), fuse=not mixed, here=given.alone)
            head = _head(given)
            onnx_genai_head.put_(target, head)
            rounded = head.rounded
            del head
            for path in sorted(target.iterdir()):
                path.rename(folder / path.name)
        for path in given.companions():
            shutil.copyfile(path, folder / path.name)
        config = {key: value for key, value in given.config.items() if key != "quantization_config"}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        _shape_scales_(folder / "model.onnx")
        _check(given, folder / "model.onnx")
        notes = [
            "inputs of MatMulNBits are rounded to int8, block by block, as it runs (accuracy_level 4): fast, and not exact"
        ]
        if rounded:
            tied = "; the embeddings are looked up in the same codes" if _is_tied(given) else ""
            notes.insert(
                0, f"the head was in float: rounded to {_head_bits(given)} bits in blocks of {HEAD_BLOCK}{tied}"
            )
        if any(
            group.get("input_activations") for group in given.config["quantization_config"]["config_groups"].values()
        ):
            notes.append("the artifact's own rounding of inputs is left out: MatMulNBits has one of its own")
        return notes

    def _write_gptq(self, given: Given, folder: Path) -> bool:
        """A folder the builder reads, its vocabulary a stand-in; whether layers differ in grid."""
        tensors: dict[str, Tensor] = {}
        shapes: dict[str, tuple[int, int]] = {}
        for name, weight in given.weights():
            found = blocks_of(weight)
            shapes[name] = (found.bits, found.block)
            if name == HEAD:
                found = onnx_genai_head.first_rows(found)
            tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in _gptq(found).items()}
        for name, tensor in given.floats():
            is_outside = name in (EMBEDDING, f"{HEAD}.weight")
            tensors[name] = tensor[: onnx_genai_head.ROWS].clone() if is_outside else tensor
        if HEAD not in shapes:
            own = tensors.pop(f"{HEAD}.weight", tensors[EMBEDDING])
            head = onnx_genai_head.first_rows(rounded_head(own, _head_bits(given)))
            tensors |= {f"{HEAD}.{suffix}": x for suffix, x in _gptq(head).items()}
            shapes[HEAD] = (head.bits, head.block)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        bits, block = max(set(shapes.values()), key=list(shapes.values()).count)
        others = {
            f"{name.replace('.', chr(92) + '.')}\\.": {"bits": b, "group_size": g}
            for name, (b, g) in shapes.items() if (b, g) != (bits, block)
        }  # fmt: skip
        config = dict(given.config)
        config["quantization_config"] = {
            "quant_method": "gptq", "bits": bits, "group_size": block, "desc_act": False, "sym": False, "dynamic": others,
        }  # fmt: skip
        config["vocab_size"] = onnx_genai_head.ROWS
        (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
        for path in given.companions():
            shutil.copyfile(path, folder / path.name)
        return any(HEAD not in pattern for pattern in others)


def _head(given: Given) -> onnx_genai_head.Head:
    """The real head and embeddings; read when the builder is done, so that they are not held while it works."""
    outside = {name: tensor for name, tensor in given.floats() if name in (EMBEDDING, f"{HEAD}.weight")}
    own = next((blocks_of(weight) for name, weight in given.weights() if name == HEAD), None)
    blocks = own or rounded_head(outside.get(f"{HEAD}.weight", outside[EMBEDDING]), _head_bits(given))
    return onnx_genai_head.Head(blocks=blocks, embedding=outside[EMBEDDING], rounded=own is None)


def _head_bits(given: Given) -> int:
    bits = given.options.get("head", 8)
    if bits not in (4, 8):
        raise CompressLabError(f"head={bits}: MatMulNBits knows 4 and 8 bits")
    return int(bits)


def head_codes(head: Tensor, bits: int) -> QuantWeight:
    """The head [vocabulary, hidden] in blocks, rounded to the nearest point of a grid with zero points."""
    block = math.gcd(HEAD_BLOCK, head.shape[1])
    grid = Grid.of_weights(bits, False, block)
    return round_to_nearest(head.float(), grid, torch.float32, "in")


def rounded_head(head: Tensor, bits: int) -> Blocks:
    """The blocks of `head_codes`, some rows at a time: all at once would take eight times what they hold."""
    parts = [blocks_of(head_codes(rows, bits)) for rows in head.split(4096)]
    return Blocks(
        codes=torch.cat([part.codes for part in parts]),
        scale=torch.cat([part.scale for part in parts]),
        zero_point=torch.cat([part.zero_point for part in parts]),
        bits=parts[0].bits,
        block=parts[0].block,
    )


def _reason(weight: QuantWeight) -> str:
    try:
        blocks_of(replace(weight, codes=weight.codes[:1], scale=weight.scale[:1], zero_point=None))
    except CompressLabError as error:
        return str(error)
    return ""


def _is_tied(given: Given) -> bool:
    return bool(given.config.get("tie_word_embeddings"))


def _shape_scales_(path: Path) -> None:
    """Give scales and zero points two dimensions: the builder writes one, which embeddings that share them do not accept."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            rows = next(attribute.i for attribute in node.attribute if attribute.name == "N")
            for name in node.input[2:4]:
                size = math.prod(tensors[name].dims)
                del tensors[name].dims[:]
                tensors[name].dims.extend([rows, size // rows])
    known = {info.name for info in model.graph.value_info} & set(tensors)
    for info in [info for info in model.graph.value_info if info.name in known]:
        model.graph.value_info.remove(info)
    onnx.save(model, path)


def _check(given: Given, path: Path) -> None:
    """CompressLabError if a layer's codes, scales or zero points in the graph are not the artifact's."""
    found, skeleton = read_blocks(path), given.skeleton()
    for name, weight in given.weights():
        node = next((node for node in _node_names(name) if node in found), None)
        if node is None:
            raise CompressLabError(
                f"{path} has no MatMulNBits for layer {name}: this builder names its nodes otherwise"
            )
        before = _before(name) if node.endswith("/qkv_proj/MatMulNBits") else []
        first = sum(models.matrix_shape(skeleton.get_submodule(other))[0] for other in before)
        if not found[node]().holds(blocks_of(weight), first):
            raise CompressLabError(f"{path}: the codes of layer {name} are not the artifact's: report this")


def _before(layer: str) -> list[str]:
    """The layers whose rows come first in a node of queries, keys and values."""
    owner, _, leaf = layer.rpartition(".")
    return [f"{owner}.{kind}_proj" for kind in "qkv"[: "qkv".index(leaf[0])]]


def _node_names(layer: str) -> list[str]:
    """The node the builder makes of a layer, or of queries, keys and values at once."""
    owner, _, leaf = layer.replace(".self_attn.", ".attn.").rpartition(".")
    stem = f"/{owner.replace('.', '/').replace('/layers/', '/layers.')}" if owner else ""
    names = [f"{stem}/{leaf}/MatMulNBits"]
    return [*names, f"{stem}/qkv_proj/MatMulNBits"] if leaf in ("q_proj", "k_proj", "v_proj") else names


GENAI = OnnxGenai()

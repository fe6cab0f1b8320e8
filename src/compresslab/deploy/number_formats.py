"""How compressed-tensors stores the number formats that are no integers (numerics/formats.py).

    fp8-e4m3  float-quantized        weight               float8_e4m3fn [out, in]
                                     weight_scale         [out, G] in the model's dtype
    mxfp4     mxfp4-pack-quantized   weight_packed        uint8 [out, in / 2], the even column in the low four bits
                                     weight_scale         uint8 [out, in / 32], E8M0: the exponent plus 127
    nvfp4     nvfp4-pack-quantized   weight_packed        as above
                                     weight_scale         float8_e4m3fn [out, in / 16]
                                     weight_global_scale  float32 [1], by which the scales are to be divided

A float is stored as its sign and the pattern of its magnitude. Codes have just these, so nothing is rounded here again.

Source: the compressed-tensors library (its compressors are the oracle in tests/deploy).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from compresslab.errors import CompressLabError
from compresslab.numerics.formats import exponents, from_exponents, split_scale
from compresslab.numerics.grid import QuantWeight
from compresslab.numerics.packing import pack_nibbles, to_patterns, to_signed, unpack_nibbles

Read = Callable[[str], Tensor]


@dataclass(frozen=True, kw_only=True)
class Stored:
    """How one number format lies on disk.

    Attributes:
        layout: compressed-tensors' name for it.
        encode: the tensors of a weight, by the suffix of their names.
        decode: from a function that reads these tensors by suffix, codes int8 [out, in] and the scale as in QuantWeight.
        args: what its quantisation arguments say beside the usual.
    """

    layout: str
    encode: Callable[[QuantWeight], dict[str, Tensor]]
    decode: Callable[[Read], tuple[Tensor, Tensor]]
    args: dict[str, Any] = field(default_factory=dict)


def _encode_fp8(weight: QuantWeight) -> dict[str, Tensor]:
    return {"weight": to_patterns(weight.codes, 8).view(torch.float8_e4m3fn), "weight_scale": weight.scale.contiguous()}


def _decode_fp8(read: Read) -> tuple[Tensor, Tensor]:
    return to_signed(read("weight").view(torch.uint8), 8), read("weight_scale")


def _encode_mxfp4(weight: QuantWeight) -> dict[str, Tensor]:
    return {"weight_packed": pack_nibbles(weight.codes), "weight_scale": exponents(weight.scale).contiguous()}


def _decode_mxfp4(read: Read) -> tuple[Tensor, Tensor]:
    return unpack_nibbles(read("weight_packed")), from_exponents(read("weight_scale"))


def _encode_nvfp4(weight: QuantWeight) -> dict[str, Tensor]:
    scale, global_scale = split_scale(weight.scale)
    packed = pack_nibbles(weight.codes)
    return {"weight_packed": packed, "weight_scale": scale.contiguous(), "weight_global_scale": global_scale}


def _decode_nvfp4(read: Read) -> tuple[Tensor, Tensor]:
    return unpack_nibbles(read("weight_packed")), read("weight_scale").float() / read("weight_global_scale")


STORED: dict[str, Stored] = {
    "fp8-e4m3": Stored(layout="float-quantized", encode=_encode_fp8, decode=_decode_fp8),
    "mxfp4": Stored(
        layout="mxfp4-pack-quantized",
        encode=_encode_mxfp4,
        decode=_decode_mxfp4,
        args={"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"},
    ),
    "nvfp4": Stored(
        layout="nvfp4-pack-quantized",
        encode=_encode_nvfp4,
        decode=_decode_nvfp4,
        args={
            "strategy": "tensor_group",
            "scale_dtype": "torch.float8_e4m3fn",
            "zp_dtype": "torch.float8_e4m3fn",
        },
    ),
}


def stored(format: str) -> Stored | None:
    """How a number format is stored; None for integers, which compressed_tensors.py sees to.

    Raises:
        CompressLabError: if compressed-tensors has no such format; it names what can be had instead.
    """
    if format == "int":
        return None
    if format not in STORED:
        raise CompressLabError(f"no weight format of compressed-tensors holds {format}: {INSTEAD[format]}")
    return STORED[format]


INSTEAD = {
    "fp8-e5m2": "its 8-bit floats are e4m3. Set format=fp8-e4m3, which rounds twice as finely; the range that e5m2 has "
    "beyond it is of no use to weights with a scale of their own",
}


def format_of(args: Mapping[str, Any]) -> str:
    """The number format that a group's quantisation arguments mean."""
    if args.get("type", "int") == "int":
        return "int"
    if args["num_bits"] == 8 and "scale_dtype" not in args:
        return "fp8-e4m3"
    found = {32: "mxfp4", 16: "nvfp4"}.get(args.get("group_size") or 0)
    if found is None or args["num_bits"] != 4:
        raise CompressLabError(
            f"weights of {args['num_bits']}-bit floats in groups of {args.get('group_size')} are in no format known here"
        )
    return found

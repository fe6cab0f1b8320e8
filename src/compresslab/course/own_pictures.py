"""Pictures that a user brings to a lab: small ones in ten classes, such as CIFAR-10's.

a folder or .parquet -> every picture at 32 x 32 pixels, its colours at CIFAR-10's mean and deviation, with the number of its
class, in an order that is always the same; and networks that read them, by name.
"""

from __future__ import annotations

import io
import re
from functools import cache

import torch
from torch import nn

from compresslab import data
from compresslab.architectures.resnet_cifar import ResNetCifarConfig, ResNetCifarForImageClassification
from compresslab.data.labelled import Example
from compresslab.errors import CompressLabError

SIDE, CLASSES = 32, 10
MEAN, DEVIATION = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)  # of CIFAR-10's colours


@cache
def opened(source: str | None) -> list[Example]:
    """All pictures of a source. CompressLabError if there is none."""
    from PIL import Image

    if source is None:
        raise CompressLabError(
            "this scale learns pictures of 32 x 32 pixels in ten classes, and there are none: name a folder or a .parquet, "
            "such as CIFAR-10's training split, with --pictures"
        )
    found = data.pictures(source, "all")
    labels = data.label_ids(found, {}, CLASSES)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).tolist()
    mean, deviation = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, DEVIATION))
    examples: list[Example] = []
    for i in order:
        image = Image.open(io.BytesIO(found.open(i))).convert("RGB").resize((SIDE, SIDE))
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(SIDE, SIDE, 3)
        examples.append({"pixel_values": (pixels.permute(2, 0, 1) / 255 - mean) / deviation, "labels": labels[i]})
    return examples


def blocks_of(model: str) -> int:
    """Of each of the three stages of "resnet-N", where N = 6 n + 2."""
    found = re.fullmatch(r"resnet-(\d+)", model)
    if found is None or int(found[1]) < 8 or int(found[1]) % 6 != 2:
        raise CompressLabError(
            f"{model}: this lab takes ResNets of CIFAR's kind: name resnet-8, resnet-20, resnet-32 or so"
        )
    return int(found[1]) // 6


def resnet(model: str, seed: int) -> nn.Module:
    """The untrained network of a seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ResNetCifarForImageClassification(ResNetCifarConfig(blocks=blocks_of(model)))

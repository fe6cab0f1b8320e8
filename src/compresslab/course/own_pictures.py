"""Pictures that a user brings to a lab: small ones in ten classes, such as CIFAR-10's.

a folder or .parquet -> every picture at 32 x 32 pixels, its colours at CIFAR-10's mean and deviation, with the number of its
class, in an order that is always the same, halved where that is enough -> some to test on, some held back, and the rest to learn
from; and networks that read them, by name.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from functools import cache

import torch
from torch import nn

from compresslab import data
from compresslab.architectures.resnet_cifar import ResNetCifarConfig, ResNetCifarForImageClassification
from compresslab.data.labelled import Example
from compresslab.errors import CompressLabError
from compresslab.training import collate

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


def parts(
    source: str | None, *, tested: int, held_back: int, side: int = SIDE
) -> tuple[list[Example], list[Example], list[Example]]:
    """Pictures to test on, some held back and the rest to learn from: always the same.

    Args:
        side: pixels; 32, or 16 or 8, each then the mean of as many as it stands for.
    """
    every = _smaller(opened(source), side)
    return every[:tested], every[tested : tested + held_back], every[tested + held_back :]


def drawn(
    source: str | None, sizes: Sequence[int], *, tested: int, seed: int, side: int = SIDE
) -> tuple[list[list[Example]], list[Example]]:
    """As many pictures as are asked for, drawn by a seed, in parts that share none; and some to test on, which no seed changes.

    Args:
        side: see `parts`.

    Raises:
        CompressLabError: if there are too few.
    """
    every = opened(source)
    wanted = tested + sum(sizes)
    if len(every) < wanted:
        raise CompressLabError(f"{source} has {len(every)} pictures, and this scale needs {wanted}: bring more")
    order = torch.randperm(len(every) - tested, generator=torch.Generator().manual_seed(seed))[: sum(sizes)] + tested
    found = [_smaller([every[place] for place in part.tolist()], side) for part in order.split(list(sizes))]
    return found, _smaller(every[:tested], side)


def _smaller(examples: list[Example], side: int) -> list[Example]:
    if side == SIDE:
        return examples
    return [{**one, "pixel_values": nn.functional.avg_pool2d(one["pixel_values"], SIDE // side)} for one in examples]


@torch.no_grad()
def accuracy(network: nn.Module, examples: Sequence[Example], batch: int = 250) -> float:
    """Of a network in eval mode, in %."""
    right = 0
    for start in range(0, len(examples), batch):
        part = collate(examples[start : start + batch])
        right += int((network(pixel_values=part["pixel_values"]).logits.argmax(dim=1) == part["labels"]).sum())
    return 100 * right / len(examples)


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

"""The pictures of the labs at micro scale: handwritten digits moved and noised, and a small ResNet that reads them.

scikit-learn's 1,797 digits of 8 x 8 pixels (they come with the package, so no network) -> three parts that share no digit ->
drawn onto 12 x 12 pixels at a random place, with noise -> pictures. As in CIFAR, what is shown may stand anywhere; unlike
CIFAR's, a network learns them in seconds.

    train      what networks learn from
    transfer   what a teacher that was trained on `train` has never seen
    test       always the same pictures

Law (tests/course/test_digits.py): no digit is in two parts, and a seed gives the same pictures.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compresslab.architectures.resnet_cifar import ResNetCifarConfig, ResNetCifarForImageClassification
from compresslab.errors import CompressLabError
from compresslab.wheels import cache_home

CLASSES, SIDE = 10, 12
WEIGHT_DECAY = 0.01
SHARES = {"train": 700, "transfer": 500, "test": 597}
Part = Literal["train", "transfer", "test"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Pictures:
    """Attributes: pixels, float32 [n, 1, side, side], about 0 to 1; labels, int64 [n]."""

    pixels: Tensor
    labels: Tensor

    @classmethod
    def of(cls, examples: Sequence[Mapping[str, Any]]) -> Pictures:
        """Examples as training.train_ takes them, of one size."""
        return cls(
            pixels=torch.stack([one["pixel_values"] for one in examples]),
            labels=torch.stack([torch.as_tensor(one["labels"]) for one in examples]),
        )

    def examples(self) -> list[dict[str, Tensor]]:
        """As training.train_ takes them."""
        return [{"pixel_values": p, "labels": y} for p, y in zip(self.pixels, self.labels, strict=True)]


@cache
def _originals(part: Part) -> tuple[Tensor, Tensor]:
    """Pixels [n, 8, 8] from 0 to 1 and classes of the digits of a part."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise CompressLabError(
            'the digits come with scikit-learn: pip install -c constraints.txt "compresslab[labs]"'
        ) from None
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    places = dict(zip(SHARES, order.split([*SHARES.values()]), strict=True))[part]
    return torch.from_numpy(found.images).float()[places] / 16, torch.from_numpy(found.target).long()[places]


def pictures(part: Part, count: int, seed: int = 0, *, noise: float = 0.2, side: int = SIDE) -> Pictures:
    """Pictures of a part, each digit as often as the next.

    Args:
        count: how many; the digits of the part come round again in other places.
        seed: of the places and the noise.
        noise: standard deviation of what is added to every pixel.
        side: pixels of a side, from 8, where a digit has but one place.
    """
    images, labels = _originals(part)
    generator = torch.Generator().manual_seed(1_000_003 * list(SHARES).index(part) + seed)
    rounds = math.ceil(count / len(labels))
    order = torch.cat([torch.randperm(len(labels), generator=generator) for _ in range(rounds)])[:count]
    room = side - images.shape[-1] + 1
    pixels = torch.randn(count, 1, side, side, generator=generator) * noise
    for i, (y, x) in enumerate(torch.randint(0, room, (count, 2), generator=generator).tolist()):
        pixels[i, 0, y : y + 8, x : x + 8] += images[order[i]]
    return Pictures(pixels=pixels, labels=labels[order])


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a network of digits is made."""

    widths: Sequence[int] = (16, 32, 64)
    blocks: int = 1
    pictures: int = 2800
    epochs: int = 8
    batch: int = 64
    learning_rate: float = 1e-2
    noise: float = 0.2
    side: int = SIDE


def build(settings: Training, seed: int) -> nn.Module:
    """The untrained network of a seed."""
    config = ResNetCifarConfig(
        blocks=settings.blocks, widths=settings.widths, num_channels=1, image_size=settings.side, num_labels=CLASSES
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ResNetCifarForImageClassification(config)


def trained(seed: int, settings: Training | None = None) -> nn.Module:
    """The network of this seed, in eval mode: from the cache, or trained now."""
    settings = settings or Training()
    key = json.dumps([asdict(settings), seed, torch.__version__], sort_keys=True)
    path = cache_home() / "labs" / f"digits-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    network = build(settings, seed)
    if path.exists():
        network.load_state_dict(load_file(path))
    else:
        train_(network, seed, settings)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{random.getrandbits(32):08x}")
        save_file(network.state_dict(), partial)
        partial.replace(path)
    return network.eval().requires_grad_(False)


def train_(
    network: nn.Module, seed: int, settings: Training, *, after_step: Callable[[], None] = lambda: None
) -> None:  # fmt: skip
    """AdamW with a cosine to zero, the pictures of the seed in another order in every epoch.

    Args:
        settings: of these, how long and on what; widths and blocks are the network's own.
        after_step: called as soon as the optimiser has changed the weights.
    """
    shown = pictures("train", settings.pictures, seed, noise=settings.noise, side=settings.side)
    steps = settings.epochs * math.ceil(len(shown.labels) / settings.batch)
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings.learning_rate, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    network.train()
    for order in orders(settings, seed):
        for rows in order.split(settings.batch):
            logits = network(pixel_values=shown.pixels[rows]).logits
            loss = nn.functional.cross_entropy(logits, shown.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            after_step()
            schedule.step()


def orders(settings: Training, seed: int) -> Tensor:
    """int64 [epochs, pictures]: in which order `train_` shows the pictures."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(settings.pictures, generator=generator) for _ in range(settings.epochs)])


@torch.no_grad()
def accuracy(network: nn.Module, shown: Pictures) -> float:
    """Share of pictures whose class the network finds, in eval mode; its mode is put back."""
    was_training = network.training
    network.eval()
    found = torch.cat([network(pixel_values=rows).logits.argmax(dim=-1) for rows in shown.pixels.split(512)])
    network.train(was_training)
    return float((found == shown.labels).float().mean())

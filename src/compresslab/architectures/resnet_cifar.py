"""ResNet for pictures of 32 x 32 pixels: the small ones of CIFAR-10, 20 layers by default.

Paper. He et al., "Deep Residual Learning for Image Recognition", arXiv 1512.03385, section 4.2. transformers' ResNet has the
stem of ImageNet, which would leave 8 x 8 of 32 x 32 pixels before the first block.

One 3 x 3 convolution to 16 channels; three stages of n blocks of two 3 x 3 convolutions, 16, 32 and 64 channels wide, the first
block of the second and third at stride 2; the mean over all pixels; one linear layer: 6 n + 2 layers. Where a block changes the
shape its shortcut takes every second pixel and fills the new channels with zeros (option A), so it has no weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention


class ResNetCifarConfig(PreTrainedConfig):
    """Settings of a ResNet of CIFAR's kind; the defaults make ResNet-20.

    Args:
        blocks: in each stage.
        widths: channels of the stages.
    """

    model_type = "resnet_cifar"

    def __init__(
        self, *, blocks: int = 3, widths: Sequence[int] = (16, 32, 64), num_channels: int = 3, image_size: int = 32,
        num_labels: int | None = None, **more: Any,
    ) -> None:  # fmt: skip
        self.blocks, self.widths = blocks, list(widths)
        self.num_channels, self.image_size = num_channels, image_size
        if num_labels is not None:
            more["num_labels"] = num_labels
        elif "id2label" not in more:
            more["num_labels"] = 10
        super().__init__(**more)


class ResidualBlock(nn.Module):
    """ReLU(x + f(x)), f two convolutions with their batch norms; see the top of this file."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU()
        self.stride, self.added = stride, out - width

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1 or self.added:
            before = self.added // 2
            x = x[:, :, :: self.stride, :: self.stride]
            x = nn.functional.pad(x, (0, 0, 0, 0, before, self.added - before))
        found: Tensor = self.relu(x + y)
        return found


class ResNetCifarForImageClassification(PreTrainedModel):
    """Logits [n, labels] of images [n, channels, h, w]."""

    config_class = ResNetCifarConfig
    main_input_name = "pixel_values"
    _no_split_modules = ["ResidualBlock"]  # noqa: RUF012 - as transformers has it

    def __init__(self, config: ResNetCifarConfig) -> None:
        super().__init__(config)
        width, blocks = config.widths[0], []
        self.conv = nn.Conv2d(config.num_channels, width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        for stage, out in enumerate(config.widths):
            for number in range(config.blocks):
                blocks.append(ResidualBlock(width, out, 2 if stage and not number else 1))
                width = out
        self.layers = nn.ModuleList(blocks)
        self.classifier = nn.Linear(width, len(config.id2label or ()))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, return_dict: bool | None = None, **more: Any
    ) -> ImageClassifierOutputWithNoAttention | tuple[Tensor, ...]:
        x = self.relu(self.bn(self.conv(pixel_values)))
        for block in self.layers:
            x = block(x)
        logits = self.classifier(x.mean(dim=(2, 3)))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)

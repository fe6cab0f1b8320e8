"""EfficientNet-Lite: a stack of inverted bottlenecks with ReLU6, made for 8-bit processors.

Paper. Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", arXiv 1905.11946, with the
block of Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", arXiv 1801.04381. The Lite variants leave
out squeeze-and-excitation, take ReLU6 for swish, and keep the widths of stem and head.

A block is: 1x1 convolution to `expansion` times the channels, depthwise k x k convolution, 1x1 convolution to the block's
width; a batch norm after each, ReLU6 after the first two; the input is added where shapes allow. Padding is TensorFlow's
SAME, which at stride 2 adds one more row below and one more column to the right than above and to the left.

The names of the parameters are those of the published PyTorch checkpoints (hence the leading underscores).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

# Of each stage: blocks, kernel, stride of the first block, expansion, output channels.
LITE0 = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
         (1, 3, 1, 6, 320))  # fmt: skip


class EfficientNetLiteConfig(PreTrainedConfig):
    """Settings of an EfficientNet-Lite; the defaults make Lite0.

    Args:
        stages: (blocks, kernel, stride, expansion, channels) of every stage.
        stem_channels, head_channels: of the first and the last convolution.
    """

    model_type = "efficientnet_lite"

    def __init__(
        self, *, stages: Sequence[Sequence[int]] = LITE0, stem_channels: int = 32, head_channels: int = 1280,
        num_channels: int = 3, image_size: int = 224, batch_norm_eps: float = 1e-3, batch_norm_momentum: float = 0.01,
        dropout: float = 0.2, initializer_range: float = 0.02, num_labels: int | None = None, **more: Any,
    ) -> None:  # fmt: skip
        self.stages = [list(stage) for stage in stages]
        self.stem_channels, self.head_channels = stem_channels, head_channels
        self.num_channels, self.image_size = num_channels, image_size
        self.batch_norm_eps, self.batch_norm_momentum = batch_norm_eps, batch_norm_momentum
        self.dropout, self.initializer_range = dropout, initializer_range
        if num_labels is not None:
            more["num_labels"] = num_labels
        elif "id2label" not in more:
            more["num_labels"] = 1000
        super().__init__(**more)


class SamePadding(nn.Module):
    """Zeros around x [n, c, h, w], so that a convolution of this kernel and stride gives ceil(h / stride) rows."""

    def __init__(self, kernel: int, stride: int) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        down, across = (max((-(-n // self.stride) - 1) * self.stride + self.kernel - n, 0) for n in x.shape[-2:])
        return nn.functional.pad(x, (across // 2, across - across // 2, down // 2, down - down // 2))


def _padding(kernel: int, stride: int) -> tuple[nn.Module, int]:
    """What pads before a convolution, and the padding that it does itself: at stride 1 SAME is symmetric."""
    return (nn.Identity(), kernel // 2) if stride == 1 else (SamePadding(kernel, stride), 0)


class InvertedBottleneck(nn.Module):
    """One block; see the top of this file."""

    def __init__(self, config: EfficientNetLiteConfig, kernel: int, stride: int, expansion: int, width: int, out: int):
        super().__init__()
        inside = width * expansion
        if expansion != 1:
            self._expand_conv = nn.Conv2d(width, inside, 1, bias=False)
            self._bn0 = _norm(config, inside)
            self._relu0 = nn.ReLU6()
        self._pad, padding = _padding(kernel, stride)
        self._depthwise_conv = nn.Conv2d(inside, inside, kernel, stride, padding, groups=inside, bias=False)
        self._bn1 = _norm(config, inside)
        self._relu1 = nn.ReLU6()
        self._project_conv = nn.Conv2d(inside, out, 1, bias=False)
        self._bn2 = _norm(config, out)
        self.expands, self.adds_input = expansion != 1, stride == 1 and width == out

    def forward(self, x: Tensor) -> Tensor:
        y = self._relu0(self._bn0(self._expand_conv(x))) if self.expands else x
        y = self._relu1(self._bn1(self._depthwise_conv(self._pad(y))))
        y = self._bn2(self._project_conv(y))
        return x + y if self.adds_input else y


def _norm(config: EfficientNetLiteConfig, channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=config.batch_norm_eps, momentum=config.batch_norm_momentum)


class EfficientNetLiteForImageClassification(PreTrainedModel):
    """Logits [n, labels] of images [n, 3, h, w]."""

    config_class = EfficientNetLiteConfig
    main_input_name = "pixel_values"
    _no_split_modules = ["InvertedBottleneck"]  # noqa: RUF012 - as transformers has it

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        self._stem_pad, padding = _padding(3, 2)
        self._conv_stem = nn.Conv2d(config.num_channels, config.stem_channels, 3, 2, padding, bias=False)
        self._bn0 = _norm(config, config.stem_channels)
        self._relu0 = nn.ReLU6()
        width, blocks = config.stem_channels, []
        for count, kernel, stride, expansion, out in config.stages:
            for number in range(count):
                blocks.append(InvertedBottleneck(config, kernel, 1 if number else stride, expansion, width, out))
                width = out
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = nn.Conv2d(width, config.head_channels, 1, bias=False)
        self._bn1 = _norm(config, config.head_channels)
        self._relu1 = nn.ReLU6()
        self._pool = nn.AdaptiveAvgPool2d(1)
        self._dropout = nn.Dropout(config.dropout)
        self._fc = nn.Linear(config.head_channels, len(config.id2label or ()))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, return_dict: bool | None = None, **more: Any
    ) -> ImageClassifierOutputWithNoAttention | tuple[Tensor, ...]:
        x = self._relu0(self._bn0(self._conv_stem(self._stem_pad(pixel_values))))
        for block in self._blocks:
            x = block(x)
        x = self._relu1(self._bn1(self._conv_head(x)))
        logits = self._fc(self._dropout(self._pool(x).flatten(1)))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)

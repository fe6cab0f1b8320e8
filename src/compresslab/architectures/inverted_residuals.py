"""A network of inverted residuals in which every block has a width and a kernel of its own: what a search of shapes finds.

Paper. The block of Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", arXiv 1801.04381, in the stages of
Cai et al., "Once for All: Train One Network and Specialize it for Efficient Deployment", arXiv 1908.09791, section 3.

A block is: 1x1 convolution to `inside` channels, depthwise k x k convolution, 1x1 convolution to the stage's width; a batch norm
after each, ReLU6 after the first two; the input is added where shapes allow. The first block of a stage has its stride.
MobileNetV2 of transformers takes one expansion for all blocks, and EfficientNet-Lite one for each stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention


class InvertedResidualsConfig(PreTrainedConfig):
    """Settings of a network of inverted residuals.

    Args:
        stages: the blocks of every stage, [inside, kernel] each.
        widths: channels that the stages hand on.
        strides: of the first block of every stage.
        stem_channels, head_channels: of the first convolution, whose kernel is 3 and whose stride is `stem_stride`, and the last.
    """

    model_type = "inverted_residuals"

    def __init__(
        self, *, stages: Sequence[Sequence[Sequence[int]]] = (((32, 3),), ((64, 3),)), widths: Sequence[int] = (16, 32),
        strides: Sequence[int] = (1, 2), stem_channels: int = 16, stem_stride: int = 1, head_channels: int = 128,
        num_channels: int = 3, image_size: int = 32, num_labels: int | None = None, **more: Any,
    ) -> None:  # fmt: skip
        self.stages = [[list(block) for block in stage] for stage in stages]
        self.widths, self.strides = list(widths), list(strides)
        self.stem_channels, self.stem_stride, self.head_channels = stem_channels, stem_stride, head_channels
        self.num_channels, self.image_size = num_channels, image_size
        if num_labels is not None:
            more["num_labels"] = num_labels
        elif "id2label" not in more:
            more["num_labels"] = 10
        super().__init__(**more)


class InvertedResidual(nn.Module):
    """One block; see the top of this file."""

    def __init__(self, width: int, inside: int, out: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(width, inside, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inside)
        self.depthwise = nn.Conv2d(inside, inside, kernel, stride, kernel // 2, groups=inside, bias=False)
        self.bn2 = nn.BatchNorm2d(inside)
        self.project = nn.Conv2d(inside, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU6()
        self.adds_input = stride == 1 and width == out

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.expand(x)))
        y = self.relu(self.bn2(self.depthwise(y)))
        y = self.bn3(self.project(y))
        return x + y if self.adds_input else y


class InvertedResidualsForImageClassification(PreTrainedModel):
    """Logits [n, labels] of images [n, channels, h, w]."""

    config_class = InvertedResidualsConfig
    main_input_name = "pixel_values"
    _no_split_modules = ["InvertedResidual"]  # noqa: RUF012 - as transformers has it

    def __init__(self, config: InvertedResidualsConfig) -> None:
        super().__init__(config)
        width = config.stem_channels
        self.stem = nn.Conv2d(config.num_channels, width, 3, config.stem_stride, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        stages: list[nn.ModuleList] = []
        for blocks, out, stride in zip(config.stages, config.widths, config.strides, strict=True):
            made = []
            for number, (inside, kernel) in enumerate(blocks):
                made.append(InvertedResidual(width, inside, out, kernel, 1 if number else stride))
                width = out
            stages.append(nn.ModuleList(made))
        self.stages = nn.ModuleList(stages)
        self.head = nn.Conv2d(width, config.head_channels, 1, bias=False)
        self.head_bn = nn.BatchNorm2d(config.head_channels)
        self.relu = nn.ReLU6()
        self.classifier = nn.Linear(config.head_channels, len(config.id2label or ()))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, return_dict: bool | None = None, **more: Any
    ) -> ImageClassifierOutputWithNoAttention | tuple[Tensor, ...]:
        x = self.relu(self.bn(self.stem(pixel_values)))
        for stage in self.stages:
            for block in cast(nn.ModuleList, stage):
                x = block(x)
        x = self.relu(self.head_bn(self.head(x)))
        logits = self.classifier(x.mean(dim=(2, 3)))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)

"""Architectures that transformers does not have, registered with its Auto classes.

One file each. They are ordinary transformers models: a config, a PreTrainedModel, `from_pretrained` and `save_pretrained`.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel

from compresslab.architectures.efficientnet_lite import EfficientNetLiteConfig, EfficientNetLiteForImageClassification
from compresslab.architectures.inverted_residuals import (
    InvertedResidualsConfig,
    InvertedResidualsForImageClassification,
)
from compresslab.architectures.resnet_cifar import ResNetCifarConfig, ResNetCifarForImageClassification

CLASSES: dict[str, type[PreTrainedModel]] = {
    "EfficientNetLiteForImageClassification": EfficientNetLiteForImageClassification,
    "InvertedResidualsForImageClassification": InvertedResidualsForImageClassification,
    "ResNetCifarForImageClassification": ResNetCifarForImageClassification,
}

AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig)
AutoModelForImageClassification.register(EfficientNetLiteConfig, EfficientNetLiteForImageClassification)
AutoConfig.register(InvertedResidualsConfig.model_type, InvertedResidualsConfig)
AutoModelForImageClassification.register(InvertedResidualsConfig, InvertedResidualsForImageClassification)
AutoConfig.register(ResNetCifarConfig.model_type, ResNetCifarConfig)
AutoModelForImageClassification.register(ResNetCifarConfig, ResNetCifarForImageClassification)

"""Floating-point operations of a network."""

import torch
from torch import nn

from distvgg.config import ModelConfig
from distvgg.models.vgg import VGG


def training_flops(config: ModelConfig, num_classes: int) -> int:
    """Returns the floating-point operations of one image's forward and backward.

    Counts convolutions and linear layers, with two operations for a multiply-add. A layer
    multiplies weights and inputs once for its output and once for each gradient. The gradient of
    the images is not computed.
    """
    with torch.device("meta"):
        model = VGG(config, num_classes)
    multiply_adds, side = [], config.image_size
    for module in model.features:
        if isinstance(module, nn.Conv2d):
            multiply_adds.append(module.weight.numel() * side**2)
        elif isinstance(module, nn.MaxPool2d):
            side = max(1, side // 2)
    multiply_adds += [m.weight.numel() for m in model.classifier if isinstance(m, nn.Linear)]
    return 2 * (3 * sum(multiply_adds) - multiply_adds[0])

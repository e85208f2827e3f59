"""Floating-point operations of a network."""

import torch
from torch import nn

from distvgg.config import ModelConfig
from distvgg.models.vgg import VGG


def training_flops(config: ModelConfig, num_classes: int) -> int:
    """Floating-point operations of one image's forward and backward in the convolutions and linear
    layers, two for a multiply-add: each multiplies weights and inputs once for its output and once
    for each gradient, but for the gradient of the images, which nobody needs."""
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

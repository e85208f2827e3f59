"""Floating-point operations of a network."""

import torch
from torch import nn

from distvgg.config import ModelConfig
from distvgg.models.vgg import VGG


def training_flops(config: ModelConfig, num_classes: int) -> int:
    """Returns the floating-point operations of one image's forward and backward.

    Counts convolutions and linear layers, with two operations for a multiply-add. Backward computes
    the gradients of weight and input, except for the input of the first layer. The counts are those
    of torch.utils.flop_counter, whose import would add a second to each start.
    """
    with torch.device("meta"):
        vgg = VGG(config, num_classes)
    side, forward = config.image_size, []
    for layer in vgg.features:
        if isinstance(layer, nn.Conv2d):
            forward.append(2 * layer.weight.numel() * side**2)
        elif isinstance(layer, nn.MaxPool2d):
            side = max(1, side // 2)
    forward += [2 * m.weight.numel() for m in vgg.classifier if isinstance(m, nn.Linear)]
    return 3 * sum(forward) - forward[0]

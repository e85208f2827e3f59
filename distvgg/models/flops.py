"""Floating-point operations of a network."""

import torch

from distvgg.config import ModelConfig
from distvgg.models.vgg import VGG


def training_flops(config: ModelConfig, num_classes: int) -> int:
    """Returns the floating-point operations of one image's forward and backward.

    Counts convolutions and linear layers, with two operations for a multiply-add.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model = VGG(config, num_classes).eval()  # BatchNorm in training rejects one image of 1 x 1
        image = torch.empty(1, 3, config.image_size, config.image_size)
    # train.detect_anomaly reads every gradient, and those on the meta device have no values.
    with FlopCounterMode(display=False) as counter, torch.autograd.set_detect_anomaly(False):
        model(image).sum().backward()
    return int(counter.get_total_flops())

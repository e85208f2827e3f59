"""Floating-point operations of a network."""

from collections.abc import Sequence

import torch

from distvgg.config import ModelConfig
from distvgg.models.freezing import freeze
from distvgg.models.summary import layers_of
from distvgg.models.vgg import VGG


def training_flops(config: ModelConfig, num_classes: int, frozen: Sequence[str] = ()) -> int:
    """Returns the floating-point operations of one image's forward and backward.

    Counts convolutions and linear layers, with two operations for a multiply-add. Backward computes
    the gradients of the weights that are trained, and of the input of each layer behind the first
    trained one. The counts are those of torch.utils.flop_counter.

    Args:
        config: of the network.
        num_classes: number of its outputs.
        frozen: `optim.frozen`.
    """
    with torch.device("meta"):
        vgg = VGG(config, num_classes)
    freeze(vgg, frozen)
    total, is_behind = 0, False
    for layer in layers_of(config, num_classes):
        module = vgg.get_submodule(layer.name)
        if layer.flops:
            learns = module.get_parameter("weight").requires_grad
            total += layer.flops * (1 + is_behind + learns)
        is_behind = is_behind or any(p.requires_grad for p in module.parameters())
    return total

"""Floating-point operations of a network."""

from distvgg.config import ModelConfig
from distvgg.models.summary import layers_of


def training_flops(config: ModelConfig, num_classes: int) -> int:
    """Returns the floating-point operations of one image's forward and backward.

    Counts convolutions and linear layers, with two operations for a multiply-add. Backward computes
    the gradients of weight and input, except for the input of the first layer. The counts are those
    of torch.utils.flop_counter.
    """
    forward = [layer.flops for layer in layers_of(config, num_classes) if layer.flops]
    return 3 * sum(forward) - forward[0]

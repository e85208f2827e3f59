"""The layers of a network with their output shapes, parameters and operations.

Nothing is computed: shapes come from a forward pass on the meta device.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from distvgg.config import ModelConfig
from distvgg.models.vgg import VGG


class Layer(NamedTuple):
    """One layer of a network.

    Attributes:
        name: its key in the network, such as features.0.
        kind: its class in torch.nn.
        shape: of its output for one image: channels and grid, or units.
        parameters: trained numbers.
        flops: floating-point operations of the forward pass of one image, two for a multiply-add.
            As in `training_flops`, only convolutions and linear layers count.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    flops: int


def layers_of(config: ModelConfig, num_classes: int) -> list[Layer]:
    """Returns the layers of a VGG in the order of its forward pass.

    Max-pools that `model.max_pools` drops are omitted.
    """
    with torch.device("meta"):
        vgg = VGG(config, num_classes).eval()  # BatchNorm in training rejects a single pixel
        image = torch.empty(1, 3, config.image_size, config.image_size)
    found: list[Layer] = []

    def note(name: str, module: nn.Module, _: object, output: Tensor) -> None:
        shape = tuple(output.shape[1:])
        parameters = sum(p.numel() for p in module.parameters())
        found.append(Layer(name, _kind(module), shape, parameters, _flops(module, shape)))

    for name, module in vgg.named_modules():
        if not list(module.children()) and not isinstance(module, nn.Identity):
            module.register_forward_hook(partial(note, name))
    with torch.inference_mode():
        vgg(image)
    return found


def training_flops_of(layers: list[Layer]) -> int:
    """Returns the operations of one image's forward and backward, as `training_flops` does."""
    flops = [layer.flops for layer in layers if layer.flops]
    return 3 * sum(flops) - flops[0]  # nothing needs the gradient of the images


def network_name(config: ModelConfig) -> str:
    """Returns the name of a network, such as VGG-16-BN."""
    return f"VGG-{config.depth}{'-BN' if config.batch_norm else ''}"


def _kind(module: nn.Module) -> str:
    """Returns the first class of torch.nn that a module is."""
    return next(c.__name__ for c in type(module).__mro__ if c.__module__.startswith("torch.nn."))


def _flops(module: nn.Module, shape: tuple[int, ...]) -> int:
    if isinstance(module, nn.Conv2d):
        return 2 * module.weight.numel() * shape[1] * shape[2]
    return 2 * module.weight.numel() if isinstance(module, nn.Linear) else 0

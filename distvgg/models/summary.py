"""The layers of a network with their output shapes, parameters and operations.

Nothing is computed. Shapes follow from the layers: a forward pass on the meta device would import
torch.compile's front end, a second at each start.
"""

from typing import NamedTuple

import torch
from torch import nn

from distvgg.config import ModelConfig
from distvgg.layer_table import POOL
from distvgg.models.vgg import VGG, layers_of_table


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
    """Returns the layers of a network in the order of its forward pass.

    Max-pools that `model.max_pools` drops are omitted.
    """
    with torch.device("meta"):
        vgg = VGG(config, num_classes)
    found: list[Layer] = []
    shape: tuple[int, ...] = (3, config.image_size, config.image_size)
    for name, module in vgg.named_modules():
        if list(module.children()) or isinstance(module, nn.Identity):
            continue
        shape = _output_shape(module, shape)
        parameters = sum(p.numel() for p in module.parameters())
        found.append(Layer(name, _kind(module), shape, parameters, _flops(module, shape)))
    return found


def _output_shape(module: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...]:
    if isinstance(module, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d):
        channels = module.out_channels if isinstance(module, nn.Conv2d) else shape[0]
        kernel, stride, padding = (
            size if isinstance(size, int) else int(size[0])
            for size in (module.kernel_size, module.stride, module.padding)
        )
        # `LastPool` keeps a single pixel.
        sides = (max(1, (side + 2 * padding - kernel) // stride + 1) for side in shape[1:])
        return (channels, *sides)
    if isinstance(module, nn.AdaptiveAvgPool2d):
        assert isinstance(module.output_size, int)
        return (shape[0], module.output_size, module.output_size)
    return (module.out_features,) if isinstance(module, nn.Linear) else shape


def network_name(config: ModelConfig) -> str:
    """Returns the name of a network, such as VGG-16-BN, with the number of its weight layers."""
    convolutions = [e for e in layers_of_table(config) if e not in (POOL, None)]
    names = {"vgg": f"VGG-{len(convolutions) + 3}", "alexnet": "AlexNet", "lenet5": "LeNet-5"}
    return names[config.name] + ("-BN" if config.batch_norm else "")


def _kind(module: nn.Module) -> str:
    """Returns the first class of torch.nn that a module is."""
    return next(c.__name__ for c in type(module).__mro__ if c.__module__.startswith("torch.nn."))


def _flops(module: nn.Module, shape: tuple[int, ...]) -> int:
    if isinstance(module, nn.Conv2d):
        return 2 * module.weight.numel() * shape[1] * shape[2]
    return 2 * module.weight.numel() if isinstance(module, nn.Linear) else 0

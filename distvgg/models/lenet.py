"""LeNet-5 (LeCun et al., "Gradient-Based Learning Applied to Document Recognition", 1998).

Owns its layers, with tanh as in the paper. Departs from the paper as most later code: colour
images, all connections in the second convolution, averages without weights, a linear output layer.
"""

from torch import nn

from distvgg.config import ModelConfig
from distvgg.models.blocks import BatchNorm2d, Features, UnbiasedConv2d

GRID = 5
"""Side of the grid that enters the head; images of 32 pixels give it without the average pool."""


def lenet5_layers(
    config: ModelConfig, num_classes: int
) -> tuple[Features, nn.AdaptiveAvgPool2d, nn.Sequential]:
    """Builds the features, the average pool and the classifier of a LeNet-5."""
    layers: list[nn.Module] = []
    kind = UnbiasedConv2d if config.batch_norm else nn.Conv2d
    channels, (first, second) = 3, map(config.scaled, (120, 84))
    for out in map(config.scaled, (6, 16)):
        layers.append(kind(channels, out, kernel_size=5))
        if config.batch_norm:
            layers.append(BatchNorm2d(out))
        layers += [nn.Tanh(), nn.AvgPool2d(2)]
        channels = out
    classifier = nn.Sequential(
        nn.Linear(channels * GRID**2, first),
        nn.Tanh(),
        nn.Linear(first, second),
        nn.Tanh(),
        nn.Linear(second, num_classes),
    )
    return Features(*layers), nn.AdaptiveAvgPool2d(GRID), classifier

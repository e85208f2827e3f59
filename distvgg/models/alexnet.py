"""AlexNet in the form of torchvision (Krizhevsky, "One Weird Trick", 2014), on one GPU.

Owns its layers. Invariant: the keys of the weights are torchvision's. With `width=1,
head_width=4096, pool_size=6, batch_norm=False` the shapes are torchvision's too.
"""

from torch import nn

from distvgg.config import ModelConfig
from distvgg.models.blocks import BatchNorm2d, Features, UnbiasedConv2d

# Channels, side of the filters, stride and padding of each convolution; None is a max-pool.
TABLE = (
    (64, 11, 4, 2),
    None,
    (192, 5, 1, 2),
    None,
    (384, 3, 1, 1),
    (256, 3, 1, 1),
    (256, 3, 1, 1),
    None,
)


def alexnet_layers(
    config: ModelConfig, num_classes: int
) -> tuple[Features, nn.AdaptiveAvgPool2d, nn.Sequential]:
    """Builds the features, the average pool and the classifier of an AlexNet."""
    layers: list[nn.Module] = []
    kind = UnbiasedConv2d if config.batch_norm else nn.Conv2d
    channels, hidden = 3, config.scaled(config.head_width)
    for entry in TABLE:
        if entry is None:
            layers.append(nn.MaxPool2d(3, 2))
            continue
        out, side, stride, padding = config.scaled(entry[0]), *entry[1:]
        layers.append(kind(channels, out, kernel_size=side, stride=stride, padding=padding))
        if config.batch_norm:
            layers.append(BatchNorm2d(out))
        layers.append(nn.ReLU(inplace=True))
        channels = out
    classifier = nn.Sequential(
        nn.Dropout(config.dropout),
        nn.Linear(channels * config.pool_size**2, hidden),
        nn.ReLU(inplace=True),
        nn.Dropout(config.dropout),
        nn.Linear(hidden, hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, num_classes),
    )
    return Features(*layers), nn.AdaptiveAvgPool2d(config.pool_size), classifier

"""VGG (Simonyan and Zisserman, "Very Deep Convolutional Networks", ICLR 2015), any table.

Owns the layers and their initial values, independent of processes, devices and training.
Invariant: the keys of `state_dict()` are torchvision's (`features.N.*`, `classifier.N.*`). With
`width=1, head_width=4096, pool_size=7` the shapes are torchvision's too, so that either library can
load the other's weights.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from distvgg.config import ModelConfig
from distvgg.layer_table import POOL, convolution
from distvgg.models.alexnet import alexnet_layers
from distvgg.models.blocks import BatchNorm2d, Features, UnbiasedConv2d, fold_biases
from distvgg.models.lenet import lenet5_layers
from distvgg.models.small_conv import Conv3x3, UnbiasedConv3x3

# Output channels of the convolutions between max-pools (table 1 of the paper).
STAGES: dict[int, tuple[tuple[int, ...], ...]] = {
    11: ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    13: ((64, 64), (128, 128), (256, 256), (512, 512), (512, 512)),
    16: ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3),
    19: ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4),
}


def layers_of_table(config: ModelConfig) -> list[int | str | None]:
    """Returns the table of a config, from the shorthands where it has none.

    The entries are those of `distvgg.layer_table`. None is a max-pool that `max_pools` drops.
    """
    if config.layers is not None:
        return [*config.layers]
    table: list[int | str | None] = []
    for number, stage in enumerate(STAGES[config.depth], start=1):
        table += [*stage, POOL if number in config.max_pools else None]
    return table


class LastPool(nn.MaxPool2d):
    """The last max-pool, which returns a single pixel (from images below 32 pixels) unchanged."""

    def __init__(self) -> None:
        super().__init__(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x if min(x.shape[-2:]) < 2 else super().forward(x)


class FrozenBatchNorm(nn.BatchNorm2d):
    """A BatchNorm layer that always normalises by its running statistics, which never change."""

    def train(self, mode: bool = True) -> "FrozenBatchNorm":
        """Stays in evaluation mode."""
        return super().train(False)


class VGG(nn.Module):
    """A network: images [n, 3, s, s], s >= 16, normalised floats -> logits [n, num_classes].

    It is a VGG, or one of the two networks before it that `model.name` chooses.
    """

    def __init__(self, config: ModelConfig, num_classes: int) -> None:
        super().__init__()
        networks = {"vgg": vgg_layers, "alexnet": alexnet_layers, "lenet5": lenet5_layers}
        layers = networks[config.name](config, num_classes)
        self.features, self.avgpool, self.classifier = layers

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.avgpool(self.features(images)).flatten(1))
        return logits

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *rest: Any, **more: Any
    ) -> None:
        fold_biases(self.features, state_dict, f"{prefix}features.")
        super()._load_from_state_dict(state_dict, prefix, *rest, **more)


def vgg_layers(
    config: ModelConfig, num_classes: int
) -> tuple[Features, nn.AdaptiveAvgPool2d, nn.Sequential]:
    """Builds the features, the average pool and the classifier of a VGG."""
    table = layers_of_table(config)
    # At 32x32, only networks with five max-pools have grids of 2x2 pixels.
    tiny_grids = table.count(POOL) >= 5
    layers: list[nn.Module] = []
    channels = 3
    for at, entry in enumerate(table):
        if entry is None:
            # A dropped pool keeps its index, so that the layers after it keep their keys.
            layers.append(nn.Identity())
        elif entry == POOL:
            layers.append(nn.MaxPool2d(2, 2) if POOL in table[at + 1 :] else LastPool())
        else:
            side, out = convolution(entry)
            out = config.scaled(out)
            if side == 3 and tiny_grids:
                layers.append((UnbiasedConv3x3 if config.batch_norm else Conv3x3)(channels, out))
            else:
                kind = UnbiasedConv2d if config.batch_norm else nn.Conv2d
                layers.append(kind(channels, out, kernel_size=side, padding=side // 2))
            if config.batch_norm:
                layers.append(BatchNorm2d(out))
            layers.append(nn.ReLU(inplace=True))
            channels = out
    hidden = config.scaled(config.head_width)
    classifier = nn.Sequential(
        nn.Linear(channels * config.pool_size**2, hidden),
        nn.ReLU(inplace=True),
        nn.Dropout(config.dropout),
        nn.Linear(hidden, hidden),
        nn.ReLU(inplace=True),
        nn.Dropout(config.dropout),
        nn.Linear(hidden, num_classes),
    )
    return Features(*layers), nn.AdaptiveAvgPool2d(config.pool_size), classifier


def build_vgg(config: ModelConfig, num_classes: int, seed: int) -> VGG:
    """Builds a network whose initial weights are a pure function of `seed`.

    All layers that end in a ReLU have He initialisation (He et al., 2015, equation 10), so that the
    signal keeps its variance through 19 layers even without BatchNorm. The last layer is small, so
    that the first loss is ln(num_classes). The layers of LeNet-5 have the gain of tanh instead. The
    caller's random state does not change.
    """
    nonlinearity: Literal["relu", "tanh"] = "tanh" if config.name == "lenet5" else "relu"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VGG(config, num_classes)
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity=nonlinearity)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
            if config.init == "dirac":
                _pass_on(module)
        last = model.classifier[-1]
        assert isinstance(last, nn.Linear)
        nn.init.normal_(last.weight, std=0.01)
    return model


def _pass_on(module: nn.Module) -> None:
    """Initialises a layer to the identity, as far as it has outputs for its inputs.

    Extra outputs keep their initial weights. A linear layer that is not square also keeps them.
    """
    if isinstance(module, nn.Conv2d):
        nn.init.dirac_(module.weight[: module.in_channels])
    elif isinstance(module, nn.Linear) and module.in_features == module.out_features:
        nn.init.eye_(module.weight)


def batch_norm_layers(model: nn.Module) -> list[nn.BatchNorm2d]:
    """Returns the BatchNorm layers of a model that measure statistics, in order."""
    layers = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    return [m for m in layers if not isinstance(m, FrozenBatchNorm)]

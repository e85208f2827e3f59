"""VGG (Simonyan and Zisserman, "Very Deep Convolutional Networks", ICLR 2015), columns A, B, D, E.

Owns the layers and their initial values, independent of processes, devices and training.
Invariant: the keys of `state_dict()` are torchvision's (`features.N.*`, `classifier.N.*`). With
`width=1, head_width=4096, pool_size=7` the shapes are torchvision's too, so that either library can
load the other's weights.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from distvgg.config import ModelConfig
from distvgg.models.blocks import BatchNorm2d, Features, UnbiasedConv2d, fold_biases
from distvgg.models.small_conv import Conv3x3, UnbiasedConv3x3

# Output channels of the convolutions between max-pools (table 1 of the paper).
STAGES: dict[int, tuple[tuple[int, ...], ...]] = {
    11: ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    13: ((64, 64), (128, 128), (256, 256), (512, 512), (512, 512)),
    16: ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3),
    19: ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4),
}


class LastPool(nn.MaxPool2d):
    """The fifth max-pool, which returns a single pixel (from images below 32 pixels) unchanged."""

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
    """A VGG network: images [n, 3, s, s], s >= 16, normalised floats -> logits [n, num_classes]."""

    def __init__(self, config: ModelConfig, num_classes: int) -> None:
        super().__init__()

        def scaled(channels: int) -> int:
            return max(1, round(channels * config.width))

        # At 32x32, only networks with all five max-pools have grids of 2x2 pixels.
        plain = config.max_pools == (1, 2, 3, 4, 5)
        convolution: Callable[[int, int], nn.Module]
        if plain:
            convolution = UnbiasedConv3x3 if config.batch_norm else Conv3x3
        else:
            kind = UnbiasedConv2d if config.batch_norm else nn.Conv2d
            convolution = partial(kind, kernel_size=3, padding=1)
        layers: list[nn.Module] = []
        channels = 3
        for number, stage in enumerate(STAGES[config.depth], start=1):
            for out in map(scaled, stage):
                layers.append(convolution(channels, out))
                if config.batch_norm:
                    layers.append(BatchNorm2d(out))
                layers.append(nn.ReLU(inplace=True))
                channels = out
            # A dropped pool keeps its index, so that the layers after it keep their keys.
            pool = LastPool() if number == len(STAGES[config.depth]) else nn.MaxPool2d(2, 2)
            layers.append(pool if number in config.max_pools else nn.Identity())
        self.features = Features(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(config.pool_size)
        hidden = scaled(config.head_width)
        self.classifier = nn.Sequential(
            nn.Linear(channels * config.pool_size**2, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(config.dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(config.dropout),
            nn.Linear(hidden, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.avgpool(self.features(images)).flatten(1))
        return logits

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *rest: Any, **more: Any
    ) -> None:
        fold_biases(self.features, state_dict, f"{prefix}features.")
        super()._load_from_state_dict(state_dict, prefix, *rest, **more)


def build_vgg(config: ModelConfig, num_classes: int, seed: int) -> VGG:
    """Builds a VGG whose initial weights are a pure function of `seed`.

    All layers that end in a ReLU have He initialisation (He et al., 2015, equation 10), so that the
    signal keeps its variance through 19 layers even without BatchNorm. The last layer is small, so
    that the first loss is ln(num_classes). The caller's random state does not change.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VGG(config, num_classes)
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
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

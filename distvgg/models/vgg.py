"""VGG (Simonyan and Zisserman, "Very Deep Convolutional Networks", ICLR 2015), columns A, B, D, E.

Owns the layers and their initial values; knows nothing of processes, devices or training.
Invariant: the keys of `state_dict()` are torchvision's (`features.N.*`, `classifier.N.*`), and with
`width=1, head_width=4096, pool_size=7` so are the shapes, so that weights go both ways.
"""

from functools import partial

import torch
from torch import Tensor, nn

from distvgg.config import ModelConfig
from distvgg.models.small_conv import Conv3x3

# Output channels of the convolutions between max-pools (table 1 of the paper).
STAGES: dict[int, tuple[tuple[int, ...], ...]] = {
    11: ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    13: ((64, 64), (128, 128), (256, 256), (512, 512), (512, 512)),
    16: ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3),
    19: ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4),
}


class LastPool(nn.MaxPool2d):
    """The fifth max-pool, which below 32 pixels has a single pixel left and passes it on."""

    def __init__(self) -> None:
        super().__init__(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x if min(x.shape[-2:]) < 2 else super().forward(x)


class VGG(nn.Module):
    """Images [n, 3, s, s], s >= 16, normalised floats -> logits [n, num_classes]."""

    def __init__(self, config: ModelConfig, num_classes: int) -> None:
        super().__init__()

        def scaled(channels: int) -> int:
            return max(1, round(channels * config.width))

        # Grids of 2x2 pixels, at 32x32, are left by all five max-pools only.
        plain = config.max_pools == (1, 2, 3, 4, 5)
        convolution = Conv3x3 if plain else partial(nn.Conv2d, kernel_size=3, padding=1)
        layers: list[nn.Module] = []
        channels = 3
        for number, stage in enumerate(STAGES[config.depth], start=1):
            for out in map(scaled, stage):
                layers.append(convolution(channels, out))
                if config.batch_norm:
                    layers.append(nn.BatchNorm2d(out))
                layers.append(nn.ReLU(inplace=True))
                channels = out
            # A dropped pool keeps its place, and the layers after it their keys.
            pool = LastPool() if number == len(STAGES[config.depth]) else nn.MaxPool2d(2, 2)
            layers.append(pool if number in config.max_pools else nn.Identity())
        self.features = nn.Sequential(*layers)
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


def build_vgg(config: ModelConfig, num_classes: int, seed: int) -> VGG:
    """A VGG with initial weights that are a pure function of `seed`.

    He initialisation (He et al., 2015, equation 10) for all layers that end in a ReLU, so that the
    signal keeps its variance through 19 layers even without BatchNorm; a small last layer, so that
    the first loss is ln(num_classes). The caller's random state is left as it was.
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
    """Makes a layer hand on its input unchanged, as far as it has outputs for it: what is left of
    them keeps its initial weights, and so does a linear layer that is not square."""
    if isinstance(module, nn.Conv2d):
        nn.init.dirac_(module.weight[: module.in_channels])
    elif isinstance(module, nn.Linear) and module.in_features == module.out_features:
        nn.init.eye_(module.weight)


def batch_norm_layers(model: nn.Module) -> list[nn.BatchNorm2d]:
    """All BatchNorm layers of a model, in order."""
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]

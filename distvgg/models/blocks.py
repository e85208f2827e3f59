"""The feature layers of a network: convolution, BatchNorm, ReLU and max-pool.

Owns which of them run as one. Invariant: layers and state keys are torchvision's in number, order
and shape, whatever runs as one.

A bias before BatchNorm has no effect: the mean takes it away, and its exact gradient is zero. It is
therefore no parameter here. On an H100 it took 3.1 of the 20.5 ms in kernels of a step.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class UnbiasedConv2d(nn.Conv2d):
    """A convolution before BatchNorm, whose `bias` is a buffer of zeros that is not added."""

    def __init__(self, in_channels: int, out_channels: int, **options: Any) -> None:
        # With a bias, so that initial weights are those of a network that has one.
        super().__init__(in_channels, out_channels, **options)
        del self.bias
        self.register_buffer("bias", torch.zeros(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Convolves [n, in, h, w] -> [n, out, h, w]."""
        y: Tensor = self._conv_forward(x, self.weight, None)
        return y


class BatchNorm2d(nn.BatchNorm2d):
    """BatchNorm that may run as one with the layers behind it.

    It counts batches only for a `momentum` of None, which needs the count.

    Attributes:
        kernels: run as one with ReLU and max-pool in training, by `norm_kernels.py`.
        rectifies: a ReLU follows.
        pools: and then a max-pool of 2x2 pixels.
    """

    kernels = False
    rectifies = False
    pools = False

    def following(self, x: Tensor) -> int:
        """Returns the number of layers behind this one that `forward` includes."""
        in_use = self.kernels and self.rectifies and self.training
        if not in_use or self.momentum is None:
            return 0
        return 2 if self.pools and not (x.shape[2] % 2 or x.shape[3] % 2) else 1

    def forward(self, x: Tensor) -> Tensor:
        """Normalises [n, c, h, w]; with `following`, also rectifies and pools."""
        if self.momentum is None:
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        running = self.running_mean, self.running_var
        following = self.following(x)
        if not following:
            return F.batch_norm(
                x, *running, self.weight, self.bias, self.training, self.momentum, self.eps
            )
        from distvgg.models.norm_kernels import norm_relu

        return norm_relu(
            *(x, self.weight, self.bias, running, self.momentum, self.eps), pool=following > 1
        )


class Features(nn.Sequential):
    """Layers in order, without those that the BatchNorm in front of them includes."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        for norm, relu, pool in zip(layers, layers[1:], (*layers[2:], None), strict=False):
            if isinstance(norm, BatchNorm2d):
                norm.rectifies = isinstance(relu, nn.ReLU)
                norm.pools = isinstance(pool, nn.MaxPool2d) and pool.kernel_size == pool.stride == 2

    def forward(self, x: Tensor) -> Tensor:
        """Runs the layers."""
        included = 0
        for layer in self:
            if included:
                included -= 1
                continue
            included = layer.following(x) if isinstance(layer, BatchNorm2d) else 0
            x = layer(x)
        return x


def use_kernels(network: nn.Module, on: bool = True) -> None:
    """Lets BatchNorm run as one with the layers behind it; the device is one for the kernels."""
    for layer in network.modules():
        if isinstance(layer, BatchNorm2d):
            layer.kernels = on


def kernels_fail(device: torch.device) -> str | None:
    """Compiles the kernels of `norm_kernels.py` and runs them once.

    Returns:
        The reason if they cannot be used: Triton or a C compiler is missing, or the GPU is too old.
    """
    try:
        from distvgg.models.norm_kernels import norm_relu

        with torch.enable_grad():
            for pool in (False, True):
                shape = 2, 64, 4, 4
                x = torch.ones(shape, device=device, dtype=torch.bfloat16, requires_grad=True)
                weight, bias, *running = torch.ones(4, 64, device=device)
                y = norm_relu(x, weight, bias, (running[0], running[1]), 1.0, 1e-5, pool=pool)
                torch.autograd.grad(y.float().sum(), x)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        return (str(error).splitlines() or [type(error).__name__])[0]
    return None


def fold_biases(features: nn.Module, state: dict[str, Any], prefix: str) -> None:
    """Moves biases before BatchNorm, of weights trained elsewhere, into its running mean.

    Args:
        features: the layers.
        state: tensors by name, changed in place.
        prefix: of the names of the layers in `state`.
    """
    for (conv, layer), (norm, _) in pairwise(features.named_children()):
        if not isinstance(layer, UnbiasedConv2d):
            continue
        bias, mean = (state.get(prefix + name) for name in (f"{conv}.bias", f"{norm}.running_mean"))
        if bias is None or mean is None or bias.shape != mean.shape:
            continue  # load_state_dict says what does not fit
        state[f"{prefix}{norm}.running_mean"] = mean - bias
        state[f"{prefix}{conv}.bias"] = torch.zeros_like(bias)

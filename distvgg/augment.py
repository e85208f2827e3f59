"""Random views of images: pure batched tensor functions of (images, draws).

Draws belong to `(seed, epoch, sample)`, so that they depend neither on batches nor on processes; a
whole epoch's are made at once on the CPU and indexed on the device. Invariant: no function here
reads a global generator.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from distvgg.config import AugmentConfig
from distvgg.sampling import generator


class Draws(NamedTuple):
    """One random view for each of n samples: top and left in 0..2*padding, int64; flip, bool."""

    top: Tensor
    left: Tensor
    flip: Tensor

    def take(self, index: Tensor | slice) -> "Draws":
        return Draws(*(field[index] for field in self))

    def to(self, device: torch.device) -> "Draws":
        return Draws(*(sent(field, device) for field in self))


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on its way to a device, which the host does not wait for: a GPU copies by
    itself only from pinned memory."""
    source = tensor.pin_memory() if device.type == "cuda" else tensor
    return source.to(device, non_blocking=True)


def draw_epoch(config: AugmentConfig, seed: int, epoch: int, n_samples: int) -> Draws:
    """The views of all samples of one epoch, indexed by sample: [n_samples] each, on the CPU."""
    rng = generator(seed, "augment", epoch)
    top, left = torch.randint(0, 2 * config.crop_padding + 1, (2, n_samples), generator=rng)
    flip = torch.rand(n_samples, generator=rng) < 0.5
    return Draws(top, left, flip if config.flip else torch.zeros_like(flip))


def view(images: Tensor, index: Tensor, draws: Draws, padding: int) -> Tensor:
    """Takes images by index, pads them by reflection, crops at (top, left) and flips: whole rows
    first, which are runs of memory, then columns within them.

    Args:
        images: [N, height, width, 3] uint8, contiguous.
        index: [n] int64, which of them.
        draws: [n] each.
        padding: pixels of border, less than height and width.

    Returns:
        [n, height, width, 3] uint8.
    """
    height, width, channels = images.shape[1:]
    rows = _reflect(draws.top[:, None] - padding + _arange(height, images), height)
    taken = images.view(-1, width * channels)[(index[:, None] * height + rows).flatten()]
    columns = _arange(width, images)
    columns = torch.where(draws.flip[:, None], width - 1 - columns, columns)
    columns = _reflect(draws.left[:, None] - padding + columns, width)
    values = (columns[:, :, None] * channels + _arange(channels, images)).flatten(1)
    taken = taken.view(len(index), height, -1)
    return taken.gather(2, values[:, None].expand_as(taken)).view(-1, height, width, channels)


def normalise(images: Tensor, mean: Tensor, std: Tensor, side: int) -> Tensor:
    """[n, height, width, 3] uint8 -> [n, 3, side, side], standardised per channel and resized where
    the size differs (bilinear, antialiased); NHWC in memory. `mean` and `std` are [3], in 0..1;
    their dtype is the result's."""
    x = torch.addcmul(-mean / std, images.to(mean.dtype), 1 / (255 * std))
    x = x.permute(0, 3, 1, 2)
    if x.shape[-2:] != (side, side):
        x = F.interpolate(x, (side, side), mode="bilinear", antialias=True)
    return x


def _arange(n: int, like: Tensor) -> Tensor:
    return torch.arange(n, device=like.device)


def _reflect(at: Tensor, n: int) -> Tensor:
    """Mirrors coordinates outside 0..n-1 at the border pixels, which are not repeated."""
    at = at.abs()
    return torch.where(at >= n, 2 * (n - 1) - at, at)

"""Per-sample augmentation and normalisation: batched pure functions of (images, parameters).

Parameters are a function of `(seed, epoch, sample)`, independent of batches and processes. The
parameters of an epoch are drawn at once on the CPU and indexed on the device. Invariant: no
function here reads a global generator, and enabling one augmentation does not change the parameters
of another.

The order is that of torchvision's reference training of classifiers. Crop, flip and then
TrivialAugment run on uint8. Normalisation, cutout, resizing and mixing (`mixing.py`) follow.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from distvgg.config import AugmentConfig
from distvgg.data.trivial_augment import LEVELS, OPS, apply_ops
from distvgg.rng import generator


class AugmentParams(NamedTuple):
    """Augmentation parameters of n samples.

    `cutout_center` and `trivial` are [n, 0] if their augmentation is off.

    Attributes:
        top: Top of the crop in the padded image, [n] int64 in 0..2*padding.
        left: Left side of the crop, like `top`.
        flip: [n] bool.
        cutout_center: As fractions of height and width, [n, 2] float32 in [0, 1).
        trivial: TrivialAugment's operation and level, [n, 2] int64. Always on the host, which
            groups samples by operation.
    """

    top: Tensor
    left: Tensor
    flip: Tensor
    cutout_center: Tensor
    trivial: Tensor

    def take(self, index: Tensor | slice) -> "AugmentParams":
        return AugmentParams(*(field[index] for field in self))

    def to(self, device: torch.device) -> "AugmentParams":
        return AugmentParams(*(f if f is self.trivial else copy_async(f, device) for f in self))


def copy_async(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a host tensor to a device without blocking the host.

    A GPU copies asynchronously only from pinned memory.
    """
    source = tensor.pin_memory() if device.type == "cuda" else tensor
    return source.to(device, non_blocking=True)


def draw_epoch(config: AugmentConfig, seed: int, epoch: int, n_samples: int) -> AugmentParams:
    """Draws the parameters of one epoch on the CPU, indexed by sample: [n_samples] each."""
    rng = generator(seed, "augment", epoch)
    top, left = torch.randint(0, 2 * config.crop_padding + 1, (2, n_samples), generator=rng)
    flip = torch.rand(n_samples, generator=rng) < 0.5
    if config.flip == "no":
        flip = torch.zeros_like(flip)
    elif config.flip == "alternating":
        first = torch.rand(n_samples, generator=generator(seed, "alternating flip")) < 0.5
        flip = first ^ bool(epoch % 2)
    cutout_center = torch.empty(n_samples, 0)
    if config.cutout:
        rng = generator(seed, "cutout", epoch)
        cutout_center = torch.rand(n_samples, 2, dtype=torch.float32, generator=rng)
    trivial = torch.empty(n_samples, 0, dtype=torch.int64)
    if config.trivial:
        rng = generator(seed, "trivial", epoch)
        bounds = len(OPS), LEVELS
        trivial = torch.stack([torch.randint(n, (n_samples,), generator=rng) for n in bounds], 1)
    return AugmentParams(top, left, flip, cutout_center, trivial)


def crop_and_flip(images: Tensor, index: Tensor, params: AugmentParams, padding: int) -> Tensor:
    """Takes images by index, pads them by reflection, crops at (top, left) and flips.

    Complete rows, which are contiguous in memory, are taken first, then columns within them.

    Args:
        images: [N, height, width, 3] uint8, contiguous.
        index: The images to take, [n] int64.
        params: [n] each.
        padding: Width of the border in pixels, less than height and width.

    Returns:
        [n, height, width, 3] uint8.
    """
    height, width, channels = images.shape[1:]
    if padding == 0 and images.device.type == "cpu":  # half the time; on a GPU it would wait
        taken = images[index]
        taken[params.flip] = taken[params.flip].flip(2)
        return taken
    rows = _reflect(params.top[:, None] - padding + _arange(height, images), height)
    taken = images.view(-1, width * channels)[(index[:, None] * height + rows).flatten()]
    columns = _arange(width, images)
    columns = torch.where(params.flip[:, None], width - 1 - columns, columns)
    columns = _reflect(params.left[:, None] - padding + columns, width)
    values = (columns[:, :, None] * channels + _arange(channels, images)).flatten(1)
    taken = taken.view(len(index), height, -1)
    return taken.gather(2, values[:, None].expand_as(taken)).view(-1, height, width, channels)


def trivial_augment(images: Tensor, params: AugmentParams) -> Tensor:
    """Returns [n, height, width, 3] uint8 images under TrivialAugment; the input is not changed.

    The host groups images by operation, which costs a copy of 16 bytes per image to the device.
    """
    op, level = params.trivial.unbind(1)
    order = op.argsort(stable=True)
    counts = op.bincount(minlength=len(OPS)).tolist()
    index, level = copy_async(torch.stack([order, level[order]]), images.device)
    out = torch.empty_like(images)
    out[index] = apply_ops(images[index], counts, level)
    return out


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Standardises images per channel: [n, height, width, 3] uint8 -> [n, 3, height, width].

    The result is NHWC in memory. `mean` and `std` are [3], in 0..1, and have the dtype of the
    result.
    """
    x = torch.addcmul(-mean / std, images.to(mean.dtype), 1 / (255 * std))
    return x.permute(0, 3, 1, 2)


def cutout(images: Tensor, cutout_center: Tensor, size: int) -> Tensor:
    """Fills a square of each image with zero, the mean colour, in place (DeVries and Taylor, 2017).

    Args:
        images: [n, 3, height, width], normalised.
        cutout_center: Centres of the squares as fractions of height and width, [n, 2].
        size: Side of the squares in pixels. Squares are clipped at the border.
    """
    # Centres lie inside the image, so clamping clips the squares.
    rows, columns = (
        ((centre * n).long()[:, None] - size // 2 + _arange(size, images)).clamp(0, n - 1)
        for centre, n in zip(cutout_center.unbind(1), images.shape[2:], strict=True)
    )
    image = _arange(len(images), images)
    images.permute(0, 2, 3, 1)[image[:, None, None], rows[:, :, None], columns[:, None]] = 0
    return images


def resize(images: Tensor, image_size: int) -> Tensor:
    """Resizes floats [n, 3, height, width] -> [n, 3, image_size, image_size].

    Bilinear and antialiased. Images that already have that size are returned unchanged.
    """
    if images.shape[-2:] == (image_size, image_size):
        return images
    return F.interpolate(images, (image_size, image_size), mode="bilinear", antialias=True)


def _arange(n: int, like: Tensor) -> Tensor:
    return torch.arange(n, device=like.device)


def _reflect(at: Tensor, n: int) -> Tensor:
    """Mirrors coordinates outside 0..n-1 at the border pixels, which are not repeated."""
    at = at.abs()
    return torch.where(at >= n, 2 * (n - 1) - at, at)

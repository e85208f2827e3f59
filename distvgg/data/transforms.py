"""Per-sample augmentation and normalisation: batched pure functions of (images, parameters).

Parameters belong to `(seed, epoch, sample)`, so that they depend neither on batches nor on
processes. A whole epoch is drawn at once on the CPU and indexed on the device. Invariant: no
function here reads a global generator, and switching one augmentation on does not change the
parameters of another.

The order is that of torchvision's reference training of classifiers: crop and flip, then
TrivialAugment, on uint8; then normalisation, cutout, resizing; then mixing (`mixing.py`).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from distvgg.config import AugmentConfig
from distvgg.data.trivial_augment import LEVELS, OPS, apply_ops
from distvgg.rng import generator


class AugmentParams(NamedTuple):
    """One random view for each of n samples.

    `top` and `left` [n] in 0..2*padding, int64; `flip` [n] bool; `hole` [n, 2] float32 in [0, 1),
    the centre of the cutout as shares of height and width; `trivial` [n, 2] int64, TrivialAugment's
    operation and level, always on the host, which groups samples by operation. `hole` and `trivial`
    are [n, 0] where they are off.
    """

    top: Tensor
    left: Tensor
    flip: Tensor
    hole: Tensor
    trivial: Tensor

    def take(self, index: Tensor | slice) -> "AugmentParams":
        return AugmentParams(*(field[index] for field in self))

    def to(self, device: torch.device) -> "AugmentParams":
        return AugmentParams(*(f if f is self.trivial else sent(f, device) for f in self))


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on its way to a device, which the host does not wait for: a GPU copies by
    itself only from pinned memory."""
    source = tensor.pin_memory() if device.type == "cuda" else tensor
    return source.to(device, non_blocking=True)


def draw_epoch(config: AugmentConfig, seed: int, epoch: int, n_samples: int) -> AugmentParams:
    """The views of all samples of one epoch, indexed by sample: [n_samples] each, on the CPU."""
    rng = generator(seed, "augment", epoch)
    top, left = torch.randint(0, 2 * config.crop_padding + 1, (2, n_samples), generator=rng)
    flip = torch.rand(n_samples, generator=rng) < 0.5
    if config.flip == "no":
        flip = torch.zeros_like(flip)
    elif config.flip == "alternating":
        first = torch.rand(n_samples, generator=generator(seed, "alternating flip")) < 0.5
        flip = first ^ bool(epoch % 2)
    hole = torch.empty(n_samples, 0)
    if config.cutout:
        rng = generator(seed, "cutout", epoch)
        hole = torch.rand(n_samples, 2, dtype=torch.float32, generator=rng)
    trivial = torch.empty(n_samples, 0, dtype=torch.int64)
    if config.trivial:
        rng = generator(seed, "trivial", epoch)
        bounds = len(OPS), LEVELS
        trivial = torch.stack([torch.randint(n, (n_samples,), generator=rng) for n in bounds], 1)
    return AugmentParams(top, left, flip, hole, trivial)


def view(images: Tensor, index: Tensor, draws: AugmentParams, padding: int) -> Tensor:
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


def trivial_augment(images: Tensor, draws: AugmentParams) -> Tensor:
    """TrivialAugment of [n, height, width, 3] uint8 images, which it leaves as they were: grouped
    by operation on the host, which costs a copy of 16 bytes an image to the device."""
    op, level = draws.trivial.unbind(1)
    order = op.argsort(stable=True)
    counts = op.bincount(minlength=len(OPS)).tolist()
    index, level = sent(torch.stack([order, level[order]]), images.device)
    out = torch.empty_like(images)
    out[index] = apply_ops(images[index], counts, level)
    return out


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """[n, height, width, 3] uint8 -> [n, 3, height, width], standardised per channel; NHWC in
    memory. `mean` and `std` are [3], in 0..1; their dtype is the result's."""
    x = torch.addcmul(-mean / std, images.to(mean.dtype), 1 / (255 * std))
    return x.permute(0, 3, 1, 2)


def cutout(images: Tensor, hole: Tensor, size: int) -> Tensor:
    """Fills a square of each image with zero, the mean colour, in place (DeVries and Taylor, 2017).

    Args:
        images: [n, 3, height, width], normalised.
        hole: [n, 2], the squares' centres as shares of height and width.
        size: of the squares, in pixels; clipped at the border.
    """
    # A centre lies inside, so that clamping clips its square.
    rows, columns = (
        ((centre * n).long()[:, None] - size // 2 + _arange(size, images)).clamp(0, n - 1)
        for centre, n in zip(hole.unbind(1), images.shape[2:], strict=True)
    )
    image = _arange(len(images), images)
    images.permute(0, 2, 3, 1)[image[:, None, None], rows[:, :, None], columns[:, None]] = 0
    return images


def resize(images: Tensor, side: int) -> Tensor:
    """[n, 3, height, width] floats -> [n, 3, side, side]: bilinear, antialiased, and untouched
    where the size is that already."""
    if images.shape[-2:] == (side, side):
        return images
    return F.interpolate(images, (side, side), mode="bilinear", antialias=True)


def _arange(n: int, like: Tensor) -> Tensor:
    return torch.arange(n, device=like.device)


def _reflect(at: Tensor, n: int) -> Tensor:
    """Mirrors coordinates outside 0..n-1 at the border pixels, which are not repeated."""
    at = at.abs()
    return torch.where(at >= n, 2 * (n - 1) - at, at)

"""Random views of images, and mixtures of them: pure batched tensor functions of (images, draws).

Draws of a view belong to `(seed, epoch, sample)`, those of a mixture to `(seed, step, k)`, so that
they depend neither on batches nor on processes. A whole epoch's views are drawn at once on the CPU
and indexed on the device; a mixture is a few numbers, which the host keeps. Invariant: no function
here reads a global generator, and no switch moves the draws of another.

The order is that of torchvision's reference training of classifiers: crop and flip, then
TrivialAugment, on uint8; then normalised, cutout, resized; then mixed.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from distvgg.config import AugmentConfig
from distvgg.sampling import generator
from distvgg.trivial_augment import LEVELS, OPS, apply_ops


class Draws(NamedTuple):
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

    def take(self, index: Tensor | slice) -> "Draws":
        return Draws(*(field[index] for field in self))

    def to(self, device: torch.device) -> "Draws":
        return Draws(*(f if f is self.trivial else sent(f, device) for f in self))


class Mixture(NamedTuple):
    """How the images of a micro-batch are mixed: each with the one `shift` places before it.

    A shift is all that a random pairing takes: samples come in random order. It is a number of the
    host, so that nothing is copied to the device. `share` is the first image's; `box` is what the
    other replaces, (top, bottom, left, right) in pixels, or None where the two are blended.
    """

    shift: int
    share: float
    box: tuple[int, int, int, int] | None


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
    return Draws(top, left, flip, hole, trivial)


def draw_mixture(
    config: AugmentConfig, seed: int, step: int, k: int, n: int, side: int
) -> Mixture | None:
    """How the n images of `side` pixels in micro-batch k of a step are mixed; None: not at all.

    The weight of mixup is from Beta(alpha, alpha) (Zhang et al., 2018, equation 1); the box of
    cutmix has the share 1 - weight of the image before it is clipped at the border, and `share` is
    what it leaves (Yun et al., 2019, equations 1 and 2).
    """
    alphas = config.mixup_alpha, config.cutmix_alpha
    if not any(alphas):
        return None
    rng = generator(seed, "mix", step, k)
    whether, which, x, y = torch.rand(4, generator=rng).tolist()
    if whether >= config.mix_probability:
        return None
    cuts = which < 0.5 if all(alphas) else alphas[1] > 0
    shift = int(torch.randint(1, n, (), generator=rng))
    # G / (G + H) of two gammas, from Gamma(a) = Gamma(a + 1) * U^(1 / a) in logarithms: of a small
    # alpha both would underflow. torch.distributions takes no generator.
    alpha = torch.full((2,), alphas[cuts], dtype=torch.float64)
    gamma = torch._standard_gamma(alpha + 1, generator=rng).log()
    gamma += torch.rand(2, dtype=torch.float64, generator=rng).log() / alpha
    share = torch.sigmoid(gamma[0] - gamma[1]).item()
    if not cuts:
        return Mixture(shift, share, None)
    half = int(side * math.sqrt(1 - share) / 2)
    top, bottom = _span(int(y * side), half, side)
    left, right = _span(int(x * side), half, side)
    share = 1 - (bottom - top) * (right - left) / side**2
    return Mixture(shift, share, (top, bottom, left, right))


def _span(centre: int, half: int, n: int) -> tuple[int, int]:
    return max(0, centre - half), min(n, centre + half)


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


def trivial_augment(images: Tensor, draws: Draws) -> Tensor:
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


def mix(images: Tensor, mixture: Mixture) -> Tensor:
    """Mixes the images of a micro-batch, [n, 3, side, side] normalised, in place."""
    if mixture.box is None:
        return images.lerp_(images.roll(mixture.shift, 0), 1 - mixture.share)
    top, bottom, left, right = mixture.box
    box = images[:, :, top:bottom, left:right]
    box.copy_(box.roll(mixture.shift, 0))
    return images


def _arange(n: int, like: Tensor) -> Tensor:
    return torch.arange(n, device=like.device)


def _reflect(at: Tensor, n: int) -> Tensor:
    """Mirrors coordinates outside 0..n-1 at the border pixels, which are not repeated."""
    at = at.abs()
    return torch.where(at >= n, 2 * (n - 1) - at, at)

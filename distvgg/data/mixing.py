"""MixUp and CutMix: the images and labels of a micro-batch, combined in pairs.

AugmentParams belong to `(seed, step, k)` and are a few numbers that the host keeps.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from distvgg.config import AugmentConfig
from distvgg.rng import generator


class MixParams(NamedTuple):
    """How the images of a micro-batch are mixed: each with the one `shift` places before it.

    A shift is all that a random pairing takes: samples come in random order. It is a number of the
    host, so that nothing is copied to the device. `share` is the first image's; `box` is what the
    other replaces, (top, bottom, left, right) in pixels, or None where the two are blended.
    """

    shift: int
    share: float
    box: tuple[int, int, int, int] | None


def draw_mix_params(
    config: AugmentConfig, seed: int, step: int, k: int, n: int, side: int
) -> MixParams | None:
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
        return MixParams(shift, share, None)
    half = int(side * math.sqrt(1 - share) / 2)
    top, bottom = _span(int(y * side), half, side)
    left, right = _span(int(x * side), half, side)
    share = 1 - (bottom - top) * (right - left) / side**2
    return MixParams(shift, share, (top, bottom, left, right))


def _span(centre: int, half: int, n: int) -> tuple[int, int]:
    return max(0, centre - half), min(n, centre + half)


def mix(images: Tensor, mixture: MixParams) -> Tensor:
    """Mixes the images of a micro-batch, [n, 3, side, side] normalised, in place."""
    if mixture.box is None:
        return images.lerp_(images.roll(mixture.shift, 0), 1 - mixture.share)
    top, bottom, left, right = mixture.box
    box = images[:, :, top:bottom, left:right]
    box.copy_(box.roll(mixture.shift, 0))
    return images

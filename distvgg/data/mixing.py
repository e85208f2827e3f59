"""MixUp and CutMix: combination of the images and labels of a micro-batch in pairs.

`MixParams` are a function of `(seed, step, k)`: a few numbers that stay on the host.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from distvgg.config import AugmentConfig
from distvgg.rng import generator


class MixParams(NamedTuple):
    """Parameters that mix each image of a micro-batch with the image `shift` places before it.

    A shift gives a random pairing, because samples come in random order. The shift is a Python int,
    so nothing is copied to the device.

    Attributes:
        shift: Distance to the second image, in places of the micro-batch.
        lam: Mixing weight of the first image.
        box: Region that the second image replaces, (top, bottom, left, right) in pixels; None if
            the two images are blended.
    """

    shift: int
    lam: float
    box: tuple[int, int, int, int] | None


def draw_mix_params(
    config: AugmentConfig, seed: int, step: int, k: int, n: int, image_size: int
) -> MixParams | None:
    """Draws the mixing parameters of a micro-batch; None if its images are not mixed.

    Micro-batch `k` of the step has `n` images of side `image_size`, in pixels. The weight is drawn
    from Beta(alpha, alpha) (Zhang et al., 2018, equation 1). MixUp uses the weight as `lam`.
    CutMix's box covers the fraction 1 - weight of the image before the box is clipped at the
    border. `lam` is the fraction that the clipped box leaves (Yun et al., 2019, equations 1 and 2).
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
    # The beta variate is G / (G + H) of two gammas. Each is Gamma(a) = Gamma(a + 1) * U^(1 / a), in
    # logarithms because both would underflow for a small alpha. torch.distributions takes no
    # generator (pytorch/pytorch issue 45115).
    alpha = torch.full((2,), alphas[cuts], dtype=torch.float64)
    gamma = torch._standard_gamma(alpha + 1, generator=rng).log()
    gamma += torch.rand(2, dtype=torch.float64, generator=rng).log() / alpha
    lam = torch.sigmoid(gamma[0] - gamma[1]).item()
    if not cuts:
        return MixParams(shift, lam, None)
    half = int(image_size * math.sqrt(1 - lam) / 2)
    top, bottom = _span(int(y * image_size), half, image_size)
    left, right = _span(int(x * image_size), half, image_size)
    lam = 1 - (bottom - top) * (right - left) / image_size**2
    return MixParams(shift, lam, (top, bottom, left, right))


def _span(centre: int, half: int, n: int) -> tuple[int, int]:
    return max(0, centre - half), min(n, centre + half)


def mix(images: Tensor, params: MixParams) -> Tensor:
    """Mixes the images of a micro-batch in place: [n, 3, image_size, image_size], normalised."""
    if params.box is None:
        return images.lerp_(images.roll(params.shift, 0), 1 - params.lam)
    top, bottom, left, right = params.box
    box = images[:, :, top:bottom, left:right]
    box.copy_(box.roll(params.shift, 0))
    return images

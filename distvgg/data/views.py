"""Views of original images of any size: random crops for training, the centre for evaluation.

The numbers of a crop are a function of `(seed, epoch, sample)`, as in `transforms.py`, and of the
image's size.
"""

import math

import torch
from PIL import Image

from distvgg.config import AugmentConfig
from distvgg.rng import generator

ASPECTS = 3 / 4, 4 / 3
TRIES = 10

Box = tuple[float, float, float, float]


def needs_originals(config: AugmentConfig) -> bool:
    """Returns True if training takes random views of the original images."""
    return bool(config.random_resized_crop or config.scale_jitter)


def random_view(
    image: Image.Image, side: int, config: AugmentConfig, seed: int, epoch: int, sample: int
) -> Image.Image:
    """Returns the view of an image in an epoch: a random part, resized to `side` squared."""
    if config.scale_jitter:
        box = scale_jitter_box(image.size, side, config.scale_jitter, seed, epoch, sample)
    else:
        box = random_resized_box(image.size, config.random_resized_crop, seed, epoch, sample)
    return image.resize((side, side), Image.Resampling.BILINEAR, box=box)


def random_resized_box(
    size: tuple[int, int], smallest: float, seed: int, epoch: int, sample: int
) -> Box:
    """Draws a part of an image, with the distribution of torchvision's RandomResizedCrop.

    The share of the area is uniform, and the logarithm of the aspect ratio. Of ten draws, the first
    that fits into the image is taken, else the centre.

    Args:
        size: width and height of the image in pixels.
        smallest: share of the area, from which the part is drawn.
        seed: of the run.
        epoch: counted from 0.
        sample: place in the training set.

    Returns:
        (left, top, right, bottom) in whole pixels.
    """
    width, height = size
    rng = generator(seed, "random resized crop", epoch, sample)
    areas, ratios, x, y = torch.rand(4, TRIES, dtype=torch.float64, generator=rng).tolist()
    low, high = map(math.log, ASPECTS)
    for area, ratio, left, top in zip(areas, ratios, x, y, strict=True):
        pixels = width * height * (smallest + (1 - smallest) * area)
        aspect = math.exp(low + (high - low) * ratio)
        w, h = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if 0 < w <= width and 0 < h <= height:
            i, j = int(left * (width - w + 1)), int(top * (height - h + 1))
            return i, j, i + w, j + h
    w = min(width, round(height * ASPECTS[1]))
    h = min(height, round(width / ASPECTS[0]))
    i, j = (width - w) // 2, (height - h) // 2
    return i, j, i + w, j + h


def scale_jitter_box(
    size: tuple[int, int], side: int, scales: tuple[int, ...], seed: int, epoch: int, sample: int
) -> Box:
    """Draws a square part of an image (Simonyan and Zisserman, 2015, section 3.1).

    The part is what a random crop of `side` pixels shows after the image's shorter side was resized
    to a random number of pixels.

    Args:
        size: width and height of the image in pixels.
        side: of the crop.
        scales: smallest and largest number of pixels, both included.
        seed: of the run.
        epoch: counted from 0.
        sample: place in the training set.

    Returns:
        (left, top, right, bottom) in pixels, not whole.
    """
    rng = generator(seed, "scale jitter", epoch, sample)
    scale, x, y = torch.rand(3, dtype=torch.float64, generator=rng).tolist()
    smallest, largest = scales
    shorter = smallest + int(scale * (largest - smallest + 1))
    part = side * min(size) / shorter
    left, top = x * (size[0] - part), y * (size[1] - part)
    # Rounding may put the end a little outside, which Pillow refuses.
    return left, top, min(left + part, size[0]), min(top + part, size[1])

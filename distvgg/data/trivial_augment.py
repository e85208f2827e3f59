"""Operations of TrivialAugment, wide, on many images at once.

Source: Mueller and Hutter, "TrivialAugment: Tuning-free Yet State-of-the-Art Data Augmentation",
ICCV 2021, table 1.

This module owns the effect of an operation at a level. The operation of an image is drawn
elsewhere. Invariant: the result is bitwise equal to torchvision's `TrivialAugmentWide` on each
image, and depends neither on the device nor on the other images.

A level is one of 31 bins and, for operations with two directions, a sign. Levels 0..30 are positive
and 31..61 negative. Other operations ignore the sign.
"""

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

BINS = 31
LEVELS = 2 * BINS
Op = Callable[[Tensor, Tensor], Tensor]


def apply_ops(images: Tensor, counts: list[int], level: Tensor) -> Tensor:
    """Applies each operation to its group of images.

    Args:
        images: [n, height, width, 3] uint8, sorted by operation.
        counts: Number of images for each of `OPS`, in order.
        level: [n] int64 in 0..61.

    Returns:
        [n, height, width, 3] uint8.
    """
    parts = torch.split(images, counts), torch.split(level, counts)
    groups = zip(OPS.values(), *parts, strict=True)
    return torch.cat([op(group, at) for op, group, at in groups if len(group)])


def _identity(images: Tensor, level: Tensor) -> Tensor:
    return images


def _moved(images: Tensor, level: Tensor, op: str) -> Tensor:
    """Takes each pixel from its source in a table: exact, and only a gather on the device."""
    n, height, width, channels = images.shape
    source = _sources(op, height, width, images.device)[level].long()
    outside = images.new_zeros(n, 1, channels)
    pixels = torch.cat([outside, images.flatten(1, 2)], 1)
    return pixels.gather(1, source[:, :, None].expand(-1, -1, channels)).view_as(images)


@lru_cache(maxsize=16)
def _sources(op: str, height: int, width: int, device: torch.device) -> Tensor:
    """Returns the source of each pixel at each level: [62, height * width] int32.

    A source is 1 + its pixel index, or 0 outside the image. torchvision moves an image of indices
    with nearest-neighbour interpolation, so the rounding is torchvision's. The table takes 250 KB
    for 32 pixels and 12 MB for 224.
    """
    # Imported lazily, because only runs with these operations need it.
    from torchvision.transforms.v2 import functional as tv  # type: ignore[import-untyped]

    assert height * width < 2**24  # float32 holds consecutive integers up to here
    index = torch.arange(1, height * width + 1, dtype=torch.float32).view(1, height, width)

    def shear(x: float, y: float) -> Tensor:
        degrees = [math.degrees(math.atan(m)) for m in (x, y)]
        return cast(Tensor, tv.affine(index, 0.0, [0, 0], 1.0, degrees, center=[0, 0]))

    def translate(x: float, y: float) -> Tensor:
        return cast(Tensor, tv.affine(index, 0.0, [int(x), int(y)], 1.0, [0.0, 0.0]))

    def rotate(angle: float) -> Tensor:
        return cast(Tensor, tv.rotate(index, angle))

    moves: dict[str, tuple[float, Callable[[float], Tensor]]] = {
        "shear_x": (0.99, lambda m: shear(m, 0.0)),
        "shear_y": (0.99, lambda m: shear(0.0, m)),
        "translate_x": (32.0, lambda m: translate(m, 0.0)),
        "translate_y": (32.0, lambda m: translate(0.0, m)),
        "rotate": (135.0, rotate),
    }
    largest, move = moves[op]
    moved = [move(m).flatten() for m in _signed(largest).tolist()]
    return torch.stack(moved).to(torch.int32).to(device)


def _brightness(images: Tensor, level: Tensor) -> Tensor:
    return _bytes(images * _at("factor", level))


def _color(images: Tensor, level: Tensor) -> Tensor:
    return _blend(images, _grey(images), level)


def _contrast(images: Tensor, level: Tensor) -> Tensor:
    mean = _grey(images).double().mean((1, 2, 3), keepdim=True)  # exact up to the last rounding
    return _blend(images, mean.float(), level)


def _sharpness(images: Tensor, level: Tensor) -> Tensor:
    """Blends with a blurred image, whose border is that of the original image."""
    x = images.float()
    ones = x.new_ones(3, 1, 3, 3)
    total = F.conv2d(x.permute(0, 3, 1, 2), ones, groups=3).permute(0, 2, 3, 1)
    centre = x[:, 1:-1, 1:-1]
    blurred = ((total + 4 * centre) / 13).round()  # never a tie: 13 is odd
    x[:, 1:-1, 1:-1] = _multiply_add(centre, _at("rest", level), blurred - centre)
    return _bytes(x)


def _posterize(images: Tensor, level: Tensor) -> Tensor:
    return images & _at("mask", level)


def _solarize(images: Tensor, level: Tensor) -> Tensor:
    return torch.where(images >= _at("threshold", level), ~images, images)


def _autocontrast(images: Tensor, level: Tensor) -> Tensor:
    """Stretches each channel to 0..255, except channels of a single value."""
    x = images.float()
    low, high = x.amin((1, 2), keepdim=True), x.amax((1, 2), keepdim=True)
    scale = (high - low) * (1 / 255)
    flat = scale == 0
    return _bytes((x - low.masked_fill(flat, 0)) / scale.masked_fill(flat, 1))


def _equalize(images: Tensor, level: Tensor) -> Tensor:
    """Equalizes the histogram of each channel, in integers as PIL does.

    A step of the lookup table is 1/255 of the pixels that are darker than the brightest.
    """
    x = images.permute(0, 3, 1, 2).flatten(2).long()
    counts = x.new_zeros(*x.shape[:2], 256).scatter_add_(2, x, torch.ones_like(x))
    brightest = counts.gather(2, x.amax(2, keepdim=True))
    step = (x.shape[2] - brightest) // 255
    darker = counts.cumsum(2) - counts
    table = ((darker + step // 2) // step.clamp(min=1)).clamp(max=255)
    table = torch.where(step == 0, torch.arange(256, device=x.device), table)
    n, height, width, channels = images.shape
    out = table.gather(2, x).to(images.dtype).view(n, channels, height, width)
    return out.permute(0, 2, 3, 1)


def _blend(images: Tensor, other: Tensor, level: Tensor) -> Tensor:
    return _bytes(_multiply_add(images * _at("factor", level), _at("rest", level), other))


def _grey(images: Tensor) -> Tensor:
    """Returns the luma, rounded down: [n, height, width, 1] float32."""
    red, green, blue = torch.split(images.float(), 1, 3)
    grey = _multiply_add(red * _LUMA[0], _LUMA[1], green)
    return _multiply_add(grey, _LUMA[2], blue).floor()


def _multiply_add(a: Tensor, b: Tensor | float, c: Tensor) -> Tensor:
    """Returns a + b * c of float32 numbers, rounded once.

    Vector units of CPUs and GPUs also round once if the compiler allows it. The result must not
    depend on that: bytes are rounded down, so a pixel that should keep its value could otherwise
    lose 1.
    """
    return (a.double() + b * c.double()).float()


def _bytes(x: Tensor) -> Tensor:
    """Clamps to 0..255 and rounds down to uint8, as torchvision does."""
    return x.clamp(0, 255).to(torch.uint8)


def _signed(largest: float) -> Tensor:
    """Returns the magnitudes by level, [62] float32: evenly from 0 to `largest`, then negated."""
    bins = torch.linspace(0.0, largest, BINS, dtype=torch.float32)
    return torch.cat([bins, -bins])


def _tables() -> dict[str, Tensor]:
    factor = 1.0 + _signed(0.99).double()  # in float64 first, as Python computes with magnitudes
    bits = (8 - torch.arange(BINS) / ((BINS - 1) / 6)).round().int()
    return {
        "factor": factor.float(),
        "rest": (1.0 - factor).float(),
        "mask": (256 - 2 ** (8 - bits)).to(torch.uint8).repeat(2),
        "threshold": (255 * torch.linspace(1.0, 0.0, BINS, dtype=torch.float32)).repeat(2),
    }


# Parameters of the operations by level: [62] each.
_TABLES = _tables()
# Luma weights of red, green and blue, in float32.
_LUMA = torch.tensor([0.2989, 0.587, 0.114], dtype=torch.float32).tolist()


@lru_cache
def _table(name: str, device: torch.device) -> Tensor:
    return _TABLES[name].to(device)


def _at(name: str, level: Tensor) -> Tensor:
    """Returns the entries of a table at the levels: [n, 1, 1, 1]."""
    return _table(name, level.device)[level][:, None, None, None]


OPS: dict[str, Op] = {
    "identity": _identity,
    **{
        name: partial(_moved, op=name)
        for name in ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
    },
    "brightness": _brightness,
    "color": _color,
    "contrast": _contrast,
    "sharpness": _sharpness,
    "posterize": _posterize,
    "solarize": _solarize,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
}

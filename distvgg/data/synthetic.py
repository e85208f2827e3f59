"""The synthetic dataset: made in code, learnable, and never passed off as CIFAR-100.

100 classes in 20 superclasses of 32x32 colour images. A superclass is a smooth random pattern, a
class adds one of its own; an image is the sum, shifted, with its contrast varied, under noise.
Invariant: a pure function of the constants below, so that every machine trains on the same images
(to the rounding of its exponentials).
"""

from pathlib import Path
from typing import Any

import numpy as np

# Part of the cache's fingerprint: raise it whenever a constant or a formula below changes.
VERSION = 1
CLASSES, SUPERCLASSES, SIDE = 100, 20, 32
SIZES = {"train": 10_000, "test": 2_000}
NOISE = 0.9  # so that a good network errs now and then: a set that is always right shows no bug


def write(folder: Path) -> dict[str, Any]:
    """Writes the arrays of a cache entry; returns what `decode.write` returns."""
    rng = np.random.default_rng(100)
    superclass_of = np.arange(CLASSES) * SUPERCLASSES // CLASSES
    patterns = (
        _smooth(rng, SUPERCLASSES, cutoff=3)[superclass_of] + _smooth(rng, CLASSES, cutoff=4)
    ) / np.sqrt(2)
    for name, n in SIZES.items():
        labels = rng.permutation(np.arange(n) % CLASSES)
        np.save(folder / f"{name}_labels.npy", labels)
        blocks = [_images(rng, patterns[part]) for part in np.array_split(labels, n // 1000)]
        np.save(folder / f"{name}_images.npy", np.concatenate(blocks))
    return {
        "class_names": [f"class_{i:02d}" for i in range(CLASSES)],
        "superclass_names": [f"superclass_{i:02d}" for i in range(SUPERCLASSES)],
        "superclass_of": superclass_of.tolist(),
    }


def _smooth(rng: np.random.Generator, n: int, cutoff: float) -> np.ndarray:
    """[n, SIDE, SIDE, 3] fields of zero mean and unit variance with no frequency above `cutoff`
    cycles an image: noise under a Gaussian low-pass filter."""
    frequency = np.fft.fftfreq(SIDE, 1 / SIDE)
    lowpass = np.exp(-((frequency[:, None] ** 2 + frequency**2) / cutoff**2))[None, :, :, None]
    noise = rng.standard_normal((n, SIDE, SIDE, 3))
    field = np.fft.ifft2(np.fft.fft2(noise, axes=(1, 2)) * lowpass, axes=(1, 2)).real
    field -= field.mean((1, 2), keepdims=True)
    field /= field.std((1, 2, 3), keepdims=True)
    return field


def _images(rng: np.random.Generator, patterns: np.ndarray) -> np.ndarray:
    """Shifts each pattern, scales its contrast, adds noise: [n, SIDE, SIDE, 3] uint8."""
    n = len(patterns)
    rows, columns = (np.arange(SIDE) + rng.integers(-3, 4, (n, 1)) for _ in range(2))
    shifted = patterns[
        np.arange(n)[:, None, None], rows[:, :, None] % SIDE, columns[:, None] % SIDE
    ]
    contrast = rng.uniform(0.6, 1.4, (n, 1, 1, 1))
    noise = NOISE * (_smooth(rng, n, cutoff=8) + 0.5 * rng.standard_normal(patterns.shape))
    pixels: np.ndarray = 128 + 45 * (contrast * shifted + noise)
    return pixels.clip(0, 255).astype(np.uint8)

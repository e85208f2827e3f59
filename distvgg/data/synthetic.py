"""Synthetic dataset: generated in code, learnable, and never presented as CIFAR-100.

It has 32x32 colour images of 100 classes in 20 superclasses. A superclass is a smooth random
pattern, and a class adds its own pattern. An image is their sum, shifted, with varied contrast and
added noise. Invariant: the dataset is a pure function of the constants below, so every machine
trains on the same images (up to the rounding of exponentials).
"""

from pathlib import Path
from typing import Any

import numpy as np

# Part of the cache's fingerprint. Increase it when a constant or a formula below changes.
VERSION = 1
CLASSES, SUPERCLASSES, SIDE = 100, 20, 32
SIZES = {"train": 10_000, "test": 2_000}
NOISE = 0.9  # a good network must make some errors: constant full accuracy hides bugs


def write(folder: Path) -> dict[str, Any]:
    """Writes the arrays of a cache entry and returns the same fields as `decode.write`."""
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
    """Returns [n, SIDE, SIDE, 3] smooth random fields of zero mean and unit variance.

    The fields are noise under a Gaussian low-pass filter, whose gain falls to 1/e at `cutoff`
    cycles per image.
    """
    frequency = np.fft.fftfreq(SIDE, 1 / SIDE)
    lowpass = np.exp(-((frequency[:, None] ** 2 + frequency**2) / cutoff**2))[None, :, :, None]
    noise = rng.standard_normal((n, SIDE, SIDE, 3))
    field = np.fft.ifft2(np.fft.fft2(noise, axes=(1, 2)) * lowpass, axes=(1, 2)).real
    field -= field.mean((1, 2), keepdims=True)
    field /= field.std((1, 2, 3), keepdims=True)
    return field


def _images(rng: np.random.Generator, patterns: np.ndarray) -> np.ndarray:
    """Shifts each pattern, scales its contrast and adds noise: [n, SIDE, SIDE, 3] uint8."""
    n = len(patterns)
    rows, columns = (np.arange(SIDE) + rng.integers(-3, 4, (n, 1)) for _ in range(2))
    shifted = patterns[
        np.arange(n)[:, None, None], rows[:, :, None] % SIDE, columns[:, None] % SIDE
    ]
    contrast = rng.uniform(0.6, 1.4, (n, 1, 1, 1))
    noise = NOISE * (_smooth(rng, n, cutoff=8) + 0.5 * rng.standard_normal(patterns.shape))
    pixels: np.ndarray = 128 + 45 * (contrast * shifted + noise)
    return pixels.clip(0, 255).astype(np.uint8)

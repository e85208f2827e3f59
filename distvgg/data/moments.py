"""Mean and standard deviation of pixels by channel, from exact counts of their values."""

import numpy as np


def count_values(images: np.ndarray) -> np.ndarray:
    """Counts the pixels of [n, height, width, 3] uint8 by channel and value: [3, 256] int64."""
    counts = np.zeros((3, 256), dtype=np.int64)
    # Blocks of half a megabyte stay in the CPU cache and are twice as fast as large blocks.
    for block in np.array_split(images, -(-images.size // 2**19)):
        for channel in range(3):
            counts[channel] += np.bincount(block[..., channel].ravel(), minlength=256)
    return counts


def moments(counts: np.ndarray) -> tuple[list[float], list[float]]:
    """Computes the mean and standard deviation, in 0..1, of counts [3, 256] by value."""
    levels = np.arange(256) / 255
    mean = counts @ levels / counts.sum(1)
    # Rounding may leave the variance of a constant channel below zero.
    std = np.sqrt(np.maximum(counts @ levels**2 / counts.sum(1) - mean**2, 0))
    std[std < 1e-6] = 1  # normalised to zero, not to NaN
    return mean.tolist(), std.tolist()

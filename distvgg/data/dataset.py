"""Decoded datasets in memory-mapped arrays, and their train/validation split."""

from dataclasses import dataclass

import numpy as np
import torch

from distvgg.config import DataConfig
from distvgg.errors import UserError
from distvgg.rng import generator


@dataclass(frozen=True)
class Split:
    """Images [n, height, width, 3] uint8; labels [n] int64; superclass labels [n] int64 or None."""

    images: np.ndarray
    labels: np.ndarray
    superclasses: np.ndarray | None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Dataset:
    """The decoded train and test splits with what is known of their classes.

    `superclass_of` is [num_classes] int64, the superclass of each class, or None; `mean` and `std`
    are per channel over the whole train split, in 0..1.
    """

    train: Split
    test: Split | None
    class_names: list[str]
    superclass_names: list[str]
    superclass_of: np.ndarray | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fingerprint: str

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


def train_val_indices(labels: np.ndarray, config: DataConfig) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the train split for training and for validation: disjoint, sorted [n] int64 arrays.

    Stratified: each class gives to validation in proportion to its size, and so to a smaller
    `train_size`. A pure function of the labels and the config.

    Raises:
        UserError: the sizes asked for exceed what there is.
    """
    n = len(labels)
    if config.val_size >= n:
        raise UserError(
            f"data.val_size {config.val_size} leaves nothing to train on: the train split has"
            f" {n} images"
        )
    val, rest = _stratified(labels, np.arange(n), config.val_size, config.split_seed, "val")
    if config.train_size is None:
        return rest, val
    if config.train_size > len(rest):
        raise UserError(
            f"data.train_size {config.train_size} is more than the {len(rest)} images that"
            f" data.val_size {config.val_size} leaves of {n}"
        )
    train, _ = _stratified(labels, rest, config.train_size, config.split_seed, "train_size")
    return train, val


def _stratified(
    labels: np.ndarray, rows: np.ndarray, size: int, seed: int, purpose: str
) -> tuple[np.ndarray, np.ndarray]:
    """Parts rows into `size` drawn class by class and the rest; largest remainders round up."""
    order = rows[torch.randperm(len(rows), generator=generator(seed, purpose)).numpy()]
    by_class = order[np.argsort(labels[order], kind="stable")]
    _, counts = np.unique(labels[rows], return_counts=True)
    # Integer arithmetic: quotas and remainders are exact, ties go to the lower class.
    quotas, remainders = np.divmod(counts * size, len(rows))
    quotas[np.argsort(-remainders, kind="stable")[: size - quotas.sum()]] += 1
    rank_in_class = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    taken = rank_in_class < np.repeat(quotas, counts)
    return np.sort(by_class[taken]), np.sort(by_class[~taken])

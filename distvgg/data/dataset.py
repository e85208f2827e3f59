"""Decoded datasets in memory-mapped arrays, and their train/validation split.

Torch is imported only to split.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distvgg.config import DataConfig
from distvgg.data.encoded import EncodedImages
from distvgg.errors import UserError
from distvgg.rng import generator


@dataclass(frozen=True)
class Split:
    """Images and labels of one split.

    Attributes:
        images: [n, height, width, 3] uint8; encoded images are decoded when they are indexed.
        labels: [n] int64.
        superclasses: Superclass labels, [n] int64, or None.
        files: A JSON file with the list of the images' files, or None.
    """

    images: np.ndarray | EncodedImages
    labels: np.ndarray
    superclasses: np.ndarray | None
    files: Path | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def file_names(self) -> list[str] | None:
        """Reads the file of each image, below the folder of the data, or None if not known."""
        if self.files is None:
            return None
        names: list[str] = json.loads(self.files.read_text())
        return names


@dataclass(frozen=True)
class Dataset:
    """Decoded train and test splits with the names and superclasses of their classes.

    Attributes:
        superclass_of: The superclass of each class, [num_classes] int64, or None.
        mean: Per-channel mean over the complete train split, in 0..1.
        std: Per-channel standard deviation over the complete train split, in 0..1.
        fingerprint: The hash in the name of the cache entry.
        val: The validation split of the source, or None: then validation is held out of train.
        notes: Lines for the user about the source.
        card: Lines that describe the source: splits, classes, sizes.
    """

    train: Split
    test: Split | None
    class_names: list[str]
    superclass_names: list[str]
    superclass_of: np.ndarray | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fingerprint: str
    val: Split | None = None
    notes: tuple[str, ...] = ()
    card: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


def splits_of(dataset: Dataset) -> dict[str, Split]:
    """Returns the splits that a dataset has, by name."""
    found = {"train": dataset.train, "val": dataset.val, "test": dataset.test}
    return {name: split for name, split in found.items() if split is not None}


def train_and_val(dataset: Dataset, config: DataConfig) -> tuple[np.ndarray, Split, np.ndarray]:
    """Returns what is trained on and what is validated on.

    Returns:
        Training rows of the train split; the split that validation is part of, and its rows there:
        all rows of the source's own validation split, else rows held out of train.

    Raises:
        UserError: The requested sizes exceed the train split.
    """
    if dataset.val is None:
        train, val = train_val_indices(dataset.train.labels, config)
        return train, dataset.train, val
    train = np.arange(len(dataset.train))
    if config.train_size is not None:
        labels = dataset.train.labels
        if config.train_size > len(train):
            raise UserError(
                f"data.train_size {config.train_size} is more than the {len(train)} images of the"
                " train split"
            )
        train, _ = _stratified(labels, train, config.train_size, config.split_seed, "train_size")
    return train, dataset.val, np.arange(len(dataset.val))


def train_val_indices(labels: np.ndarray, config: DataConfig) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows of the train split for training and for validation.

    Both are stratified: each class contributes to validation, and to a smaller `train_size`, in
    proportion to its size. The result is a pure function of the labels and the config.

    Returns:
        Two disjoint, sorted [n] int64 arrays: training rows and validation rows.

    Raises:
        UserError: The requested sizes exceed the train split.
    """
    n = len(labels)
    if config.val_size >= n:
        raise UserError(
            f"data.val_size {config.val_size} leaves nothing to train on: the train split has"
            f" {n} images; give less, such as --data.val_size {n // 10}"
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
    """Splits rows into `size` rows, drawn class by class, and the remaining rows.

    Classes with the largest remainders are rounded up.
    """
    import torch

    order = rows[torch.randperm(len(rows), generator=generator(seed, purpose)).numpy()]
    by_class = order[np.argsort(labels[order], kind="stable")]
    _, counts = np.unique(labels[rows], return_counts=True)
    # Integer arithmetic keeps quotas and remainders exact. Ties go to the lower class.
    quotas, remainders = np.divmod(counts * size, len(rows))
    quotas[np.argsort(-remainders, kind="stable")[: size - quotas.sum()]] += 1
    rank_in_class = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    taken = rank_in_class < np.repeat(quotas, counts)
    return np.sort(by_class[taken]), np.sort(by_class[~taken])

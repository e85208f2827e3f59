"""DeviceLoader: a split resident on the device -> the micro-batches of a step.

The uint8 images go to the device once; order and augmentation draws go there an epoch at a time; a
step then only indexes, and copies nothing from host to device. On a CPU the images stay the mapped
pages of the cache, which all processes share.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from distvgg.augment import Draws, draw_epoch, normalise, view
from distvgg.config import Config, UserError
from distvgg.data import Dataset, Split
from distvgg.sampling import Plan, derive_seed, epoch_permutation


class MicroBatch(NamedTuple):
    """What one forward and backward computes on, and all that it may depend on.

    `images` [m, 3, side, side], normalised; `labels` [m] int64; `rows` [m] int64, which rows of the
    split they are; `dropout_seed` seeds the forward.
    """

    k: int
    images: Tensor
    labels: Tensor
    rows: Tensor
    dropout_seed: int


class DeviceLoader:
    """The micro-batches that a rank runs in a step: a pure function of (config, data, step, rank).

    Args:
        rows: [plan.n_samples] int64, the rows of `split` that are trained on.

    Raises:
        UserError: the images are smaller than the crop's padding allows.
    """

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        rows: np.ndarray,
        plan: Plan,
        rank: int,
        device: torch.device,
    ) -> None:
        side = min(dataset.train.images.shape[1:3])
        if config.augment.crop_padding >= side:
            raise UserError(
                f"augment.crop_padding {config.augment.crop_padding} must be less than the images'"
                f" side of {side} pixels"
            )
        self._config, self._plan, self._rank, self._device = config, plan, rank, device
        self._pixels = _Pixels(dataset, dataset.train, config.model.image_size, device)
        self._rows = torch.from_numpy(rows).to(device)
        # Two, since a step may straddle two epochs.
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """The rank's micro-batches of a step, in order of `k`."""
        plan, seed = self._plan, self._config.seed
        parts = []
        for epoch, first, last in plan.spans(plan.positions(step, self._rank)):
            rows, draws = self._epoch(epoch)
            parts.append((rows[first:last], draws.take(slice(first, last))))
        rows = torch.cat([r for r, _ in parts])
        draws = Draws(*map(torch.cat, zip(*(d for _, d in parts), strict=True)))
        images = self._pixels.augmented(rows, draws, self._config.augment.crop_padding)
        labels = self._pixels.labels[rows]
        m = plan.micro_batch_size
        return [
            MicroBatch(
                k,
                images[a * m : (a + 1) * m],
                labels[a * m : (a + 1) * m],
                rows[a * m : (a + 1) * m],
                derive_seed(seed, "dropout", step, k),
            )
            for a, k in enumerate(plan.rank_micro_batches(self._rank))
        ]

    def _draw_epoch(self, epoch: int) -> tuple[Tensor, Draws]:
        """Rows and draws of one epoch in stream order, on the device."""
        seed, n = self._config.seed, self._plan.n_samples
        order = epoch_permutation(seed, epoch, n)
        draws = draw_epoch(self._config.augment, seed, epoch, n).take(order).to(self._device)
        return self._rows[order.to(self._device, non_blocking=True)], draws


class EvalLoader:
    """Fixed batches of a split in order, unaugmented. Which images share a batch depends on the
    batch size alone, never on how many processes divide the batches among them."""

    def __init__(
        self,
        dataset: Dataset,
        split: Split,
        rows: np.ndarray | None,
        batch_size: int,
        image_size: int,
        device: torch.device,
    ) -> None:
        self._pixels = _Pixels(dataset, split, image_size, device)
        every = np.arange(len(split)) if rows is None else rows
        self._batches = torch.split(torch.from_numpy(every).to(device), batch_size)
        self.n_samples = len(every)

    def __len__(self) -> int:
        return len(self._batches)

    def batches(self, rank: int, world_size: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Every `world_size`-th batch from `rank` on: (batch number, images, labels)."""
        for i in range(rank, len(self._batches), world_size):
            rows = self._batches[i]
            yield i, self._pixels.plain(rows), self._pixels.labels[rows]


class _Pixels:
    """A split on the device, and how its bytes become network input."""

    def __init__(self, dataset: Dataset, split: Split, side: int, device: torch.device) -> None:
        self._images = torch.from_numpy(split.images).to(device)
        self._side = side
        dtype = torch.get_default_dtype()
        self._mean = torch.tensor(dataset.mean, dtype=dtype, device=device)
        self._std = torch.tensor(dataset.std, dtype=dtype, device=device)
        self.labels = torch.from_numpy(split.labels).to(device)

    def augmented(self, rows: Tensor, draws: Draws, padding: int) -> Tensor:
        return normalise(
            view(self._images, rows, draws, padding), self._mean, self._std, self._side
        )

    def plain(self, rows: Tensor) -> Tensor:
        return normalise(self._images[rows], self._mean, self._std, self._side)

"""Micro-batches, and loaders that make them from a split that is resident on the device.

The uint8 images are copied to the device once. Sample order and augmentation parameters are copied
an epoch at a time. A step then only indexes, and its only copy from host to device is
TrivialAugment's. On a CPU the images remain the mapped pages of the cache, which all processes
share.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from distvgg.config import AugmentConfig, Config
from distvgg.data.dataset import Dataset, Split
from distvgg.data.mixing import draw_mix_params, mix
from distvgg.data.plan import BatchPlan, epoch_permutation
from distvgg.data.transforms import (
    AugmentParams,
    copy_async,
    crop_and_flip,
    cutout,
    draw_epoch,
    normalise,
    resize,
    trivial_augment,
)
from distvgg.errors import UserError
from distvgg.rng import derive_seed


class MicroBatch(NamedTuple):
    """Input of one forward and backward, and everything that both may depend on.

    Under MixUp or CutMix, an image combines two samples. `labels` and `rows` belong to the first
    sample, `partner_labels` to the second.

    Attributes:
        k: Index of the micro-batch in the step.
        images: [m, 3, image_size, image_size], normalised.
        labels: [m] int64.
        rows: Rows of the split, [m] int64.
        dropout_seed: Seed of the forward.
        partner_labels: [m] int64, or None if the images are not mixed.
        lam: Mixing weight of the first sample.
    """

    k: int
    images: Tensor
    labels: Tensor
    rows: Tensor
    dropout_seed: int
    partner_labels: Tensor | None = None
    lam: float = 1.0

    @property
    def loss_weights(self) -> tuple[float, float]:
        """Weights of the losses for `labels` and `partner_labels`."""
        return self.lam, 1 - self.lam

    @property
    def hard_labels(self) -> Tensor:
        """Label with the larger mixing weight for each image, [m] int64."""
        if self.partner_labels is None or self.lam >= 0.5:
            return self.labels
        return self.partner_labels


class NetworkInput:
    """Conversion of uint8 images on a device to network input.

    Args:
        image_size: Side of the network's input, in pixels.
    """

    def __init__(self, dataset: Dataset, image_size: int, device: torch.device) -> None:
        self.device = device
        self._image_size = image_size
        dtype = torch.get_default_dtype()
        self._mean = torch.tensor(dataset.mean, dtype=dtype, device=device)
        self._std = torch.tensor(dataset.std, dtype=dtype, device=device)

    def augmented(
        self, images: Tensor, index: Tensor | None, params: AugmentParams, config: AugmentConfig
    ) -> Tensor:
        """Returns augmented views of some images: [n, 3, image_size, image_size].

        Args:
            images: [N, height, width, 3] uint8.
            index: The images to take, [n] int64; None takes all, which are flipped already.
            params: [n] each.
            config: The augmentation.
        """
        if index is None:  # a copy of the images is 2% of the time in which they are decoded
            assert not config.crop_padding
        else:
            images = crop_and_flip(images, index, params, config.crop_padding)
        if config.trivial:
            images = trivial_augment(images, params)
        x = normalise(images, self._mean, self._std)
        if config.cutout:
            x = cutout(x, params.cutout_center, config.cutout)
        return resize(x, self._image_size)

    def plain(self, images: Tensor) -> Tensor:
        """Converts [n, height, width, 3] uint8 -> [n, 3, image_size, image_size]."""
        return resize(normalise(images, self._mean, self._std), self._image_size)


class DeviceImages:
    """Images and labels of a split on a device, and their conversion to network input.

    Args:
        image_size: Side of the network's input, in pixels.
    """

    def __init__(
        self, dataset: Dataset, split: Split, image_size: int, device: torch.device
    ) -> None:
        self.device = device
        self.labels = torch.from_numpy(split.labels).to(device)
        images = split.images if isinstance(split.images, np.ndarray) else split.images[:]
        self._images = torch.from_numpy(images).to(device)
        self._input = NetworkInput(dataset, image_size, device)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shorter_side(self) -> int:
        """Shorter side of the stored images, in pixels."""
        return min(self._images.shape[1:3])

    def augmented(self, rows: Tensor, params: AugmentParams, config: AugmentConfig) -> Tensor:
        """Returns augmented views of some rows: [n] int64 -> [n, 3, image_size, image_size]."""
        return self._input.augmented(self._images, rows, params, config)

    def plain(self, rows: Tensor) -> Tensor:
        """Returns some rows without augmentation: [n] int64 -> [n, 3, image_size, image_size]."""
        return self._input.plain(self._images[rows])


class SampleStream:
    """Rows and augmentation parameters of the sample stream, by position.

    Args:
        config: Of the run.
        rows: Rows of the split to train on, [plan.n_samples] int64.
        plan: The batch plan.
        device: Of the results.
    """

    def __init__(
        self, config: Config, rows: np.ndarray, plan: BatchPlan, device: torch.device
    ) -> None:
        assert len(rows) == plan.n_samples
        self._config, self._plan, self._device = config, plan, device
        self._rows = torch.from_numpy(rows).to(device)
        # Two entries, because a step may span two epochs.
        self.order = lru_cache(maxsize=2)(self._draw_order)
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)

    def take(self, positions: range) -> tuple[Tensor, AugmentParams]:
        """Returns the rows and parameters at some positions, [n] each."""
        parts = []
        for epoch, first, last in self._plan.spans(positions):
            rows, params = self._epoch(epoch)
            parts.append((rows[first:last], params.take(slice(first, last))))
        rows = torch.cat([r for r, _ in parts])
        return rows, AugmentParams(*map(torch.cat, zip(*(p for _, p in parts), strict=True)))

    def rows(self, step: int, k: int) -> Tensor:
        """Returns the rows of the split in any micro-batch, also another rank's: [m] int64."""
        m = self._plan.micro_batch_size
        start = step * self._plan.global_batch_size + k * m
        return self.take(range(start, start + m))[0]

    def _draw_order(self, epoch: int) -> Tensor:
        """Returns the places in `rows` of one epoch in stream order, on the host."""
        return epoch_permutation(self._config.seed, epoch, self._plan.n_samples)

    def _draw_epoch(self, epoch: int) -> tuple[Tensor, AugmentParams]:
        """Returns rows and augmentation parameters of one epoch in stream order, on the device."""
        seed, n, device = self._config.seed, self._plan.n_samples, self._device
        order = self.order(epoch)
        params = draw_epoch(self._config.augment, seed, epoch, n).take(order).to(device)
        return self._rows[copy_async(order, device)], params


def check_sides(config: AugmentConfig, shortest: int) -> None:
    """Checks an augmentation against the shorter side of the images, in pixels.

    Raises:
        UserError: The crop's padding or the cutout is not smaller than the images.
    """
    for field in ("crop_padding", "cutout"):
        if (value := getattr(config, field)) >= shortest:
            raise UserError(
                f"augment.{field} {value} must be less than the images' {shortest} pixels"
            )


def mixed(config: Config, step: int, batch: MicroBatch) -> MicroBatch:
    """Returns a micro-batch, with its images mixed in place if mixing is drawn for it."""
    params = draw_mix_params(
        config.augment, config.seed, step, batch.k, len(batch.labels), config.model.image_size
    )
    if params is None:
        return batch
    mix(batch.images, params)
    return batch._replace(partner_labels=batch.labels.roll(params.shift), lam=params.lam)


class DeviceLoader:
    """Loader of the micro-batches that a rank runs in a step.

    The micro-batches are a pure function of (config, data, step, rank).

    Args:
        rows: Rows of the split to train on, [plan.n_samples] int64.

    Raises:
        UserError: The crop's padding or the cutout is not smaller than the images.
    """

    def __init__(
        self, config: Config, pixels: DeviceImages, rows: np.ndarray, plan: BatchPlan, rank: int
    ) -> None:
        check_sides(config.augment, pixels.shorter_side)
        self._config, self._pixels, self._plan, self._rank = config, pixels, plan, rank
        self._samples = SampleStream(config, rows, plan, pixels.device)

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """Returns the rank's micro-batches of a step, in order of `k`."""
        plan, seed = self._plan, self._config.seed
        rows, params = self._samples.take(plan.positions(step, self._rank))
        images = self._pixels.augmented(rows, params, self._config.augment)
        labels = self._pixels.labels[rows]
        m = plan.micro_batch_size
        return [
            mixed(
                self._config,
                step,
                MicroBatch(
                    k,
                    images[a * m : (a + 1) * m],
                    labels[a * m : (a + 1) * m],
                    rows[a * m : (a + 1) * m],
                    derive_seed(seed, "dropout", step, k),
                ),
            )
            for a, k in enumerate(plan.rank_micro_batches(self._rank))
        ]

    def rows(self, step: int, k: int) -> Tensor:
        """Returns the rows of the split in any micro-batch, also another rank's: [m] int64."""
        return self._samples.rows(step, k)


class EvalLoader:
    """Loader of fixed batches of a split in order, without augmentation.

    The images of a batch depend only on the batch size, never on the number of processes that
    partition the batches.

    Args:
        rows: Rows to load, [n] int64; None for all.
    """

    def __init__(self, pixels: DeviceImages, rows: np.ndarray | None, batch_size: int) -> None:
        self._pixels = pixels
        taken = torch.arange(len(pixels)) if rows is None else torch.from_numpy(rows)
        self._batches = torch.split(taken.to(pixels.device), batch_size)
        self.n_samples = len(taken)

    def __len__(self) -> int:
        return len(self._batches)

    def batches(self, rank: int, world_size: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yields every `world_size`-th batch from `rank` on: (batch number, images, labels)."""
        for i in range(rank, len(self._batches), world_size):
            rows = self._batches[i]
            yield i, self._pixels.plain(rows), self._pixels.labels[rows]

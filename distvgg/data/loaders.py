"""Choice of a loader by size and free memory, and the loaders of one process."""

import math
import os
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from distvgg.config import Config
from distvgg.cores import granted_cores
from distvgg.data.dataset import Dataset, Split, splits_of
from distvgg.data.encoded import EncodedImages
from distvgg.data.loader import DeviceImages, DeviceLoader, EvalLoader
from distvgg.data.micro_batches import EvalSource, MicroBatchSource
from distvgg.data.plan import BatchPlan
from distvgg.data.views import needs_originals
from distvgg.errors import UserError

if TYPE_CHECKING:
    from distvgg.data.stream import WorkerPool

ROOM = 0.5  # share of the free memory that the images of all splits may take
MOST_WORKERS = 16
UNSAID = 2**30  # bytes of images below which the choice of the device goes without saying


class Choice(NamedTuple):
    """A loader.

    Attributes:
        streams: worker processes read the images, which are not in the memory of the device.
        note: a line for the user; empty where nothing needs saying.
    """

    streams: bool
    note: str


def choose_loader(config: Config, dataset: Dataset, device: torch.device) -> Choice:
    """Chooses the loader of a run. The choice has no effect on results.

    Raises:
        UserError: `data.loader device` and an option that crops the original images.
    """
    size = sum(math.prod(split.images.shape) for split in splits_of(dataset).values())
    free = _free_memory(device)
    crops = needs_originals(config.augment) or config.eval.crop_ratio < 1
    asked = config.data.loader
    if asked == "device":
        if crops:
            raise UserError(
                "data.loader device holds decoded images, and augment.random_resized_crop,"
                " augment.scale_jitter and eval.crop_ratio crop the original ones: drop the option"
            )
        return Choice(False, "")
    facts = f"images take {_size(size)} decoded, {_size(free)} are free on {device.type}"
    if asked == "stream":
        return Choice(True, f"loader stream, as set ({facts})")
    if crops:
        return Choice(True, "loader stream, because each epoch crops the original images anew")
    if isinstance(dataset.train.images, EncodedImages):
        return Choice(True, f"loader stream, because the cache holds encoded images ({facts})")
    if size > ROOM * free:
        return Choice(True, f"loader stream, because images do not fit the device ({facts})")
    return Choice(False, f"loader device ({facts})" if size >= UNSAID else "")


class Loaders:
    """The loaders of one process over one dataset.

    Args:
        config: of the run.
        dataset: the data.
        device: of the micro-batches.
        streams: of `choose_loader`.

    Raises:
        UserError: the shared memory of the machine is too small for the workers.
    """

    def __init__(
        self, config: Config, dataset: Dataset, device: torch.device, *, streams: bool
    ) -> None:
        self._config, self._dataset, self._device = config, dataset, device
        self._pool = self._start_pool() if streams else None
        self._train_images: DeviceImages | None = None

    def training(self, rows: np.ndarray, plan: BatchPlan, rank: int) -> MicroBatchSource:
        """Returns the loader of the micro-batches of a rank, from rows of the train split."""
        if self._pool is None:
            return DeviceLoader(self._config, self._images(self._dataset.train), rows, plan, rank)
        from distvgg.data.stream import StreamLoader

        return StreamLoader(self._config, self._dataset, self._pool, rows, plan, rank, self._device)

    def evaluation(self, split: Split, rows: np.ndarray | None) -> EvalSource:
        """Returns the loader of some rows of a split, or of all, without augmentation."""
        if self._pool is None:
            return EvalLoader(self._images(split), rows, self._config.eval.batch_size)
        from distvgg.data.stream import StreamEvalLoader

        return StreamEvalLoader(self._config, self._dataset, split, self._pool, rows, self._device)

    def close(self) -> None:
        """Ends the worker processes; the loaders cannot be used after that."""
        if self._pool is not None:
            self._pool.close()

    def _images(self, split: Split) -> DeviceImages:
        side = self._config.model.image_size
        if split is not self._dataset.train:
            return DeviceImages(self._dataset, split, side, self._device)
        if self._train_images is None:
            self._train_images = DeviceImages(self._dataset, split, side, self._device)
        return self._train_images

    def _start_pool(self) -> "WorkerPool":
        from distvgg.data.stream import ImageReader, WorkerPool

        workers = self._config.data.workers
        if workers is None:
            workers = default_workers(self._config, self._device)
        size = math.prod(self._dataset.train.images.shape[1:])
        return WorkerPool(ImageReader(self._dataset, self._config), workers, self._device, size)


def default_workers(config: Config, device: torch.device) -> int:
    """Returns the workers of each rank: the granted cores that computing leaves."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    busy = config.train.cpu_threads if device.type == "cpu" else 1
    return max(1, min(MOST_WORKERS, int(granted_cores()) // ranks - busy))


def _free_memory(device: torch.device) -> int:
    """Returns the free bytes of a GPU, else of the host."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available


def _size(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"

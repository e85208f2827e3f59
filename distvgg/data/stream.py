"""Loaders whose images worker processes read from the cache, for sets of any size.

Workers read, decode and crop; uint8 goes to the device, which does the rest with the code of the
loaders in `loader.py`. Invariant: a micro-batch is the same function of `(config, data, step, k)`
as there. It depends neither on the number of workers nor on the steps that were asked for before.
"""

import atexit
import multiprocessing
import os
import signal
import sys
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from torch.utils.data import Dataset as TorchDataset

from distvgg import preemption
from distvgg.config import AugmentConfig, Config
from distvgg.data.dataset import Dataset, Split, splits_of
from distvgg.data.encoded import EncodedImages
from distvgg.data.images import cover
from distvgg.data.loader import MicroBatch, NetworkInput, SampleStream, check_sides, mixed
from distvgg.data.plan import BatchPlan
from distvgg.data.views import needs_originals, random_view
from distvgg.errors import UserError
from distvgg.rng import derive_seed

SHARED_MEMORY = Path("/dev/shm")
PART_BYTES = 2**23  # images that a worker reads at once
PREFETCHED = 2  # parts that each worker has ready


class Part(NamedTuple):
    """The images that a worker reads at once.

    Attributes:
        split: name of the split.
        rows: [n] int64.
        draws: epoch and place in the training set of each row, [n, 2] int64; None without
            augmentation.
        flips: [n] bool, encoded images to flip after the crop; None if the device flips.
    """

    split: str
    rows: np.ndarray
    draws: np.ndarray | None
    flips: np.ndarray | None = None


class MappedImages:
    """A memory-mapped array that is sent to other processes by the name of its file."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._array: np.ndarray | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_path": self._path, "_array": None}

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        if self._array is None:
            self._array = np.load(self._path, mmap_mode="r")
        found: np.ndarray = self._array[rows]
        return found


class ImageReader(TorchDataset[Tensor]):
    """Reads parts of a dataset, in a worker or here.

    Args:
        dataset: its splits.
        config: of the run: augmentation, seed, `eval.crop_ratio`.
    """

    def __init__(self, dataset: Dataset, config: Config) -> None:
        self._images = {name: _sendable(split) for name, split in splits_of(dataset).items()}
        self._augment: AugmentConfig = config.augment
        self._seed, self._ratio = config.seed, config.eval.crop_ratio
        self._height, self._width = dataset.train.images.shape[1:3]

    def __getitem__(self, part: Part) -> Tensor:
        """Returns the images of a part, before any augmentation of the device: uint8, NHWC."""
        images = self._images[part.split]
        if not isinstance(images, EncodedImages):
            return torch.from_numpy(images[part.rows])
        views = [
            torch.from_numpy(images.read(row, partial(self._flipped, part=part, at=at)))
            for at, row in enumerate(part.rows.tolist())
        ]
        # In a worker it writes into shared memory, which saves a copy of the part.
        stacked: Tensor = default_collate(views)
        return stacked

    def _view(self, image: Image.Image, part: Part, at: int) -> Image.Image:
        if part.draws is None:
            return cover(image, self._height, self._width, self._ratio)
        if not needs_originals(self._augment):
            return cover(image, self._height, self._width)
        epoch, sample = part.draws[at].tolist()
        return random_view(image, self._height, self._augment, self._seed, epoch, sample)

    def _flipped(self, image: Image.Image, part: Part, at: int) -> Image.Image:
        view = self._view(image, part, at)
        if part.flips is None or not part.flips[at]:
            return view
        return view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


class WorkerPool:
    """Worker processes that read one sequence of parts at a time, ahead of their use.

    Args:
        reader: what they do.
        workers: their number; 0 reads in this process.
        device: that the images are copied to.
        image_bytes: bytes of an image.

    Raises:
        UserError: the shared memory of the machine cannot hold the images that are under way.
    """

    def __init__(
        self, reader: ImageReader, workers: int, device: torch.device, image_bytes: int
    ) -> None:
        self.part_images = max(1, PART_BYTES // image_bytes)
        if workers:
            _check_shared_memory(workers * (PREFETCHED + 1) * self.part_images * image_bytes)
        self._workers, self._device = workers, device
        self._order = _Order()
        self._sequence = 0
        options: dict[str, Any] = {}
        if workers:
            # Not forked: a fork would hold the locks and connections of a rank that was killed.
            options = {"multiprocessing_context": "spawn", "prefetch_factor": PREFETCHED}
        loader = DataLoader(
            reader,
            batch_size=None,
            sampler=self._order,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # the global one must not move
            **options,
        )
        self._parts: dict[str, Any] = {"loader": loader}
        self._processes: list[BaseProcess] = []
        self._close = weakref.finalize(self, _end, self._parts, self._processes)

    def begin(self, parts: Iterable[Part]) -> int:
        """Begins another sequence, and drops the one under way; returns its number."""
        self._order.parts = parts
        self._sequence += 1
        if self._workers and "running" not in self._parts:
            resource_tracker.ensure_running()  # its start unblocks SIGTERM (Python 3.11)
            before = multiprocessing.active_children()
            with _signals_blocked(), _without_main_module():
                self._parts["running"] = iter(self._parts["loader"])
            started = set(multiprocessing.active_children()).difference(before)
            self._processes.extend(started)
            # Before multiprocessing's own exit, which sends SIGTERM, blocked here, and waits.
            atexit.register(self._close)
        else:
            self._parts["running"] = iter(self._parts["loader"])
        return self._sequence

    def is_under_way(self, sequence: int) -> bool:
        """Returns True if no other sequence has begun since."""
        return sequence == self._sequence

    def next(self) -> Tensor:
        """Returns the images of the next part, on the device.

        Raises:
            UserError: the cache cannot be read.
        """
        try:
            images: Tensor = next(self._parts["running"])
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[-1].removeprefix("ValueError: ")
            raise UserError(
                f"cannot read an image of the data cache ({reason}): remove this entry, and the"
                " same command builds it again"
            ) from error
        return images.to(self._device, non_blocking=True)

    def close(self) -> None:
        """Ends the workers."""
        self._close()

    def split(self, rows: np.ndarray) -> list[np.ndarray]:
        """Splits rows into those of parts."""
        return np.array_split(rows, -(-len(rows) // self.part_images))


class StreamLoader:
    """Loader of the micro-batches that a rank runs in a step, as `DeviceLoader`.

    Args:
        config: of the run.
        dataset: of which the train split is read.
        pool: the workers.
        rows: rows of the train split to train on, [plan.n_samples] int64.
        plan: the batch plan.
        rank: of this process.
        device: of the micro-batches.

    Raises:
        UserError: The crop's padding or the cutout is not smaller than the images.
    """

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        pool: WorkerPool,
        rows: np.ndarray,
        plan: BatchPlan,
        rank: int,
        device: torch.device,
    ) -> None:
        check_sides(config.augment, min(dataset.train.images.shape[1:3]))
        self._config, self._pool, self._plan, self._rank = config, pool, plan, rank
        self._input = NetworkInput(dataset, config.model.image_size, device)
        self._samples = SampleStream(config, rows, plan, device)
        self._rows = rows
        self._labels = torch.from_numpy(dataset.train.labels).to(device)
        self._parts_each = len(pool.split(np.arange(plan.micro_batch_size)))
        self._sequence, self._next = -1, -1
        # On a CPU, workers flip what they crop, because they need half the time for it.
        encoded = isinstance(dataset.train.images, EncodedImages)
        crops = config.augment.crop_padding > 0
        self._workers_flip = device.type == "cpu" and encoded and not crops
        m = plan.micro_batch_size
        self._index = None if self._workers_flip else torch.arange(m, device=device)

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """Returns the rank's micro-batches of a step, in order of `k`.

        Steps in order are read ahead; any other step begins again from there.
        """
        plan, m = self._plan, self._plan.micro_batch_size
        rows, params = self._samples.take(plan.positions(step, self._rank))
        batches = []
        for a, (k, images) in enumerate(self.read(step)):
            at = slice(a * m, (a + 1) * m)
            x = self._input.augmented(images, self._index, params.take(at), self._config.augment)
            seed = derive_seed(self._config.seed, "dropout", step, k)
            batch = MicroBatch(k, x, self._labels[rows[at]], rows[at], seed)
            batches.append(mixed(self._config, step, batch))
        return batches

    def read(self, step: int) -> Iterator[tuple[int, Tensor]]:
        """Yields `k` and the images of each micro-batch before the device's part.

        The images are [m, height, width, 3] uint8, on the device.
        """
        if step != self._next or not self._pool.is_under_way(self._sequence):
            self._sequence = self._pool.begin(self._parts(step))
        self._next = -1  # until all of the step is read
        for k in self._plan.rank_micro_batches(self._rank):
            parts = [self._pool.next() for _ in range(self._parts_each)]
            yield k, parts[0] if len(parts) == 1 else torch.cat(parts)
        self._next = step + 1

    def rows(self, step: int, k: int) -> Tensor:
        """Returns the rows of the split in any micro-batch, also another rank's: [m] int64."""
        return self._samples.rows(step, k)

    def _parts(self, step: int) -> Iterator[Part]:
        """Yields the parts of the rank's micro-batches from a step on, to the end of the run."""
        plan, m = self._plan, self._plan.micro_batch_size
        last = max(step + 1, plan.steps(self._config.train.epochs))
        for s in range(step, last):
            positions = plan.positions(s, self._rank)
            draws = np.concatenate([self._draws(*span) for span in plan.spans(positions)])
            flips = None
            if self._workers_flip:
                flips = self._samples.take(positions)[1].flip.numpy()
            for of_batch in np.split(np.arange(len(draws)), len(draws) // m):
                for at in self._pool.split(of_batch):
                    rows = self._rows[draws[at, 1]]
                    yield Part("train", rows, draws[at], None if flips is None else flips[at])

    def _draws(self, epoch: int, first: int, last: int) -> np.ndarray:
        samples = self._samples.order(epoch)[first:last].numpy()
        return np.stack([np.full_like(samples, epoch), samples], axis=1)


class StreamEvalLoader:
    """Loader of fixed batches of a split in order, without augmentation, as `EvalLoader`.

    Args:
        config: of the run.
        dataset: the data.
        split: its split to load.
        pool: the workers.
        rows: rows to load, [n] int64; None for all.
        device: of the batches.
    """

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        split: Split,
        pool: WorkerPool,
        rows: np.ndarray | None,
        device: torch.device,
    ) -> None:
        self._pool = pool
        self._input = NetworkInput(dataset, config.model.image_size, device)
        self._name = next(name for name, of in splits_of(dataset).items() if of is split)
        taken = np.arange(len(split)) if rows is None else rows
        size = config.eval.batch_size
        self._batches = [taken[at : at + size] for at in range(0, len(taken), size)]
        self._labels = torch.from_numpy(split.labels).to(device)
        self.n_samples = len(taken)

    def __len__(self) -> int:
        return len(self._batches)

    def batches(self, rank: int, world_size: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yields every `world_size`-th batch from `rank` on: (batch number, images, labels)."""
        own = range(rank, len(self._batches), world_size)
        parts = (Part(self._name, p, None) for i in own for p in self._pool.split(self._batches[i]))
        sequence = self._pool.begin(parts)
        for i in own:
            assert self._pool.is_under_way(sequence), "another loader took the workers"
            rows = self._batches[i]
            images = torch.cat([self._pool.next() for _ in self._pool.split(rows)])
            yield i, self._input.plain(images), self._labels[torch.from_numpy(rows)]


class _Order:
    """The parts that a DataLoader asks for, which change from sequence to sequence."""

    def __init__(self) -> None:
        self.parts: Iterable[Part] = ()

    def __iter__(self) -> Iterator[Part]:
        return iter(self.parts)


def _sendable(split: Split) -> EncodedImages | MappedImages | np.ndarray:
    """Returns the images of a split as something that is sent to a worker without its pixels."""
    images = split.images
    if isinstance(images, np.memmap) and images.filename is not None:
        return MappedImages(os.fspath(images.filename))
    return images


def _check_shared_memory(needed: int) -> None:
    """Checks that workers can hand over their images."""
    try:
        found = os.statvfs(SHARED_MEMORY)
    except OSError:  # another system, with another way
        return
    free = found.f_bavail * found.f_frsize
    if free < needed:
        raise UserError(
            f"{SHARED_MEMORY} has {free // 2**20} MiB free, and data.workers need"
            f" {needed // 2**20 + 1} MiB there: lower data.workers, or give the container more"
            " (--shm-size)"
        )


def _end(parts: dict[str, Any], processes: list[BaseProcess]) -> None:
    """Ends the workers: the loader's way, or by SIGKILL.

    An error that is under way has references to the loader, which then does not end them. They
    block SIGTERM, for which multiprocessing would wait for ever.
    """
    parts.clear()
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Blocks signals that stop a run; processes that start meanwhile never receive them.

    A scheduler signals all processes. Workers must go on until the run has saved its state.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, preemption.SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _without_main_module() -> Iterator[None]:
    """Hides the main module, which processes that start meanwhile would import.

    They need nothing of it, and a script without a guard would start itself again.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main

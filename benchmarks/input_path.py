"""The input path alone: augmented images/s of DeviceLoader against torchvision in a DataLoader.

    python -m benchmarks.input_path [--data.path FOLDER] [--workers 2] [--rounds 5] [--out FILE]

Both sides make the same batches from the same uint8 array: cropped from a reflected border of 4,
flipped, float32, normalised, with their labels. A turn is one epoch of them, which are looked at
and dropped; DeviceLoader's goes from the middle of an epoch to the middle of the next, so that it
holds the drawing of one. The two peers:

- `torchvision`: its transforms on PIL images, one by one, as for `torchvision.datasets.CIFAR100`;
- `torchvision v2`: crop and flip on uint8 tensors one by one, the rest a batch at a time in the
  worker, which is the most that its interface lets a worker save.

Their workers persist from epoch to epoch and pin memory where there is a GPU. No side trains.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils import data
from torchvision import transforms  # type: ignore[import-untyped]
from torchvision.transforms import v2  # type: ignore[import-untyped]

from benchmarks.measure import in_turns, ratio, report, save, spread
from distvgg.commands.text_tables import markdown_table
from distvgg.config import Config
from distvgg.data.cache import load_dataset
from distvgg.data.dataset import Dataset, Split, train_and_val
from distvgg.data.loader import DeviceImages, DeviceLoader
from distvgg.data.plan import BatchPlan
from distvgg.distributed.device import device_here
from distvgg.recipe import load

OURS, V1, V2 = "distvgg DeviceLoader", "torchvision", "torchvision v2"
QUICK_IMAGES = 2048
Collate = Callable[[list[Any]], tuple[Tensor, Tensor]]


def main() -> int:
    """Runs the measurement."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data.path", dest="path", help="default: CIFAR-100 of the hub")
    parser.add_argument("--workers", type=int, default=2, help="of a DataLoader")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="noise instead of CIFAR-100")
    parser.add_argument("--out", type=Path, help="a JSON file")
    options = parser.parse_args()
    config = load("fast", {"data.path": options.path} if options.path else {})
    dataset = noise(QUICK_IMAGES) if options.quick else load_dataset(config.data)
    rows = np.arange(len(dataset.train))
    if not options.quick:
        rows, _, _ = train_and_val(dataset, config.data)
    device, batch = device_here(), config.train.global_batch_size

    cases = {OURS: device_loader(config, dataset, rows, device)}
    for name, peer in ((V1, Views(dataset, rows)), (V2, TensorViews(dataset, rows))):
        cases[name] = data_loader(peer, peer.collate, batch, options.workers, device)
    rounds = 2 if options.quick else options.rounds
    for epoch in cases.values():
        epoch()  # starts workers, warms up
    samples = in_turns(cases, rounds)
    ratios = {peer: ratio(samples, OURS, peer) for peer in (V1, V2)}
    cells = [
        [name, f"{spread(values)['median']:,.0f}", f"{ratios.get(name, 1):.3g}"]
        for name, values in samples.items()
    ]
    print(markdown_table(["input path", "images/s", "distvgg is faster by"], cells))
    found = {name: spread(values) for name, values in samples.items()}
    shape = {"images": len(rows), "batch": batch, "workers": options.workers}
    save(report(device, **shape, images_per_sec=found, ratio=ratios), options.out)
    return 0


def noise(n: int) -> Dataset:
    """A train split of n random images in CIFAR-100's shape: what is in them costs nothing."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
    split = Split(images, rng.integers(0, 100, n), None)
    names = [str(i) for i in range(100)]
    return Dataset(split, None, names, [], None, (0.5,) * 3, (0.25,) * 3, "noise")


def device_loader(
    config: Config, dataset: Dataset, rows: np.ndarray, device: torch.device
) -> Callable[[], float]:
    """Our input path, built as for one process of a run; each call is the next epoch."""
    train = config.train
    plan = BatchPlan(len(rows), train.global_batch_size, train.micro_batch_size)
    pixels = DeviceImages(dataset, dataset.train, config.model.image_size, device)
    loader = DeviceLoader(config, pixels, rows, plan, rank=0)
    steps = plan.steps(1)
    at = steps // 2

    def epoch() -> float:
        nonlocal at
        batches = (
            (b.images, b.labels) for s in range(at, at + steps) for b in loader.micro_batches(s)
        )
        at += steps
        return images_per_sec(batches, device)

    return epoch


class Views(data.Dataset[Any]):
    """Random views as `torchvision.datasets.CIFAR100` gives them: array -> PIL -> transforms."""

    collate: Collate | None = None

    def __init__(self, dataset: Dataset, rows: np.ndarray) -> None:
        self._images, self._labels = dataset.train.images[rows], dataset.train.labels[rows]
        self._transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4, padding_mode="reflect"),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(dataset.mean, dataset.std),
            ]
        )

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return self._transform(Image.fromarray(self._images[row])), int(self._labels[row])


class TensorViews(data.Dataset[Any]):
    """Random views by transforms.v2 on uint8 tensors [3, 32, 32], normalised by batches."""

    def __init__(self, dataset: Dataset, rows: np.ndarray) -> None:
        nchw = np.ascontiguousarray(dataset.train.images[rows].transpose(0, 3, 1, 2))
        self._images, self._labels = torch.from_numpy(nchw), dataset.train.labels[rows]
        self._transform = v2.Compose(
            [v2.RandomCrop(32, padding=4, padding_mode="reflect"), v2.RandomHorizontalFlip()]
        )
        self._normalise = v2.Compose(
            [v2.ToDtype(torch.float32, scale=True), v2.Normalize(dataset.mean, dataset.std)]
        )

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return self._transform(self._images[row]), int(self._labels[row])

    def collate(self, items: list[Any]) -> tuple[Tensor, Tensor]:
        """A batch: [n, 3, 32, 32] float32, [n] int64."""
        images, labels = zip(*items, strict=True)
        return self._normalise(torch.stack(images)), torch.tensor(labels)


def data_loader(
    views: Views | TensorViews,
    collate: Collate | None,
    batch: int,
    workers: int,
    device: torch.device,
) -> Callable[[], float]:
    """A peer's input path; each call is an epoch."""
    loader = data.DataLoader(
        views,
        batch,
        shuffle=True,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        persistent_workers=True,
        prefetch_factor=4,
    )

    def epoch() -> float:
        return images_per_sec(
            (tuple(part.to(device, non_blocking=True) for part in batch) for batch in loader),
            device,
        )

    return epoch


def images_per_sec(batches: Iterator[tuple[Tensor, ...]], device: torch.device) -> float:
    """Measures the rate of batches of (images, labels), including the device's work.

    One value of each batch is read on the device.
    """
    count, touched = 0, torch.zeros((), device=device)
    began = perf_counter()
    for images, labels in batches:
        touched += images[-1, -1, -1, -1] + labels[-1]
        count += len(labels)
    touched.item()  # a host sync
    return count / (perf_counter() - began)


if __name__ == "__main__":
    sys.exit(main())

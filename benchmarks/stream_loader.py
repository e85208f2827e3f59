"""Streamed photographs: images/s of StreamLoader against torchvision's reference loader.

    python -m benchmarks.stream_loader [--data.path FOLDER] [--workers 2] [--rounds 5] [--out FILE]

Both sides decode JPEG files with Pillow in as many worker processes, take random resized crops of
224 pixels, flip them, and give batches of uint8 on the device. This project flips on a GPU, or in
the workers where there is none. The peer is ImageFolder with RandomResizedCrop,
RandomHorizontalFlip and PILToTensor in a DataLoader, as in torchvision's reference training of
classifiers. A turn is one epoch of the train split, which is looked at and dropped; no side reads
ahead beyond its turn. No side trains. The time that a side takes of all cores, its workers
included, is measured as well: other work on the machine hardly changes it. Without a folder,
photographs are made: of 300 to 600 pixels a side, as in ImageNet, with detail that gives files of
74 kB on average.
"""

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil
import torch
from PIL import Image
from torch import Tensor
from torch.utils import data
from torchvision.datasets import ImageFolder  # type: ignore[import-untyped]
from torchvision.transforms import v2  # type: ignore[import-untyped]

from benchmarks.input_path import images_per_sec
from benchmarks.measure import Samples, in_turns, ratio, report, save, spread
from distvgg.commands.text_tables import markdown_table
from distvgg.config import Config
from distvgg.data.cache import load_dataset
from distvgg.data.dataset import Dataset, train_and_val
from distvgg.data.loaders import Loaders
from distvgg.data.plan import BatchPlan
from distvgg.data.stream import StreamLoader
from distvgg.data.transforms import crop_and_flip, draw_epoch
from distvgg.distributed.device import device_here
from distvgg.recipe import load

OURS, PEER = "distvgg StreamLoader", "torchvision ImageFolder"


def main() -> int:
    """Runs the measurement."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data.path", dest="path", type=Path, help="with train/CLASS/*")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=1024, help="to make, without a folder")
    parser.add_argument("--out", type=Path, help="a JSON file")
    options = parser.parse_args()
    with TemporaryDirectory() as scratch:
        path = options.path
        if path is None:
            os.environ["DISTVGG_CACHE"] = str(Path(scratch) / "cache")
            path = make_photographs(Path(scratch) / "photographs", options.images)
        return measure(path, options.workers, options.rounds, options.out)


def measure(path: Path, workers: int, rounds: int, out: Path | None) -> int:
    """Measures both sides on the train split of a folder."""
    config = load(
        "imagenet",
        {"data.path": str(path), "data.workers": workers, "data.val_size": 1, "train.epochs": 1},
    )
    torch.set_num_threads(config.train.cpu_threads)  # as a run does
    dataset, device = load_dataset(config.data), device_here()
    loaders = Loaders(config, dataset, device, streams=True)
    cases = {
        OURS: stream_loader(config, dataset, loaders, device),
        PEER: reference_loader(config, path, device),
    }
    for epoch in cases.values():
        epoch()  # starts workers
    busy: Samples = {name: [] for name in cases}

    def timed(name: str) -> float:
        before = cpu_seconds()
        rate = cases[name]()
        busy[name].append((cpu_seconds() - before) / len(dataset.train) * 1000)
        return rate

    samples = in_turns({name: partial(timed, name) for name in cases}, rounds)
    loaders.close()
    ratios = {"images_per_sec": ratio(samples, OURS, PEER), "cpu_ms": ratio(busy, OURS, PEER)}
    cells = [
        [name, f"{spread(samples[name])['median']:,.0f}", f"{spread(busy[name])['median']:.3g}"]
        for name in cases
    ]
    print(markdown_table(["input path", "images/s", "ms of a core an image"], cells))
    print(
        f"\n{OURS} / {PEER}, median of ratios within a round: images/s"
        f" {ratios['images_per_sec']:.3g}, time of cores {ratios['cpu_ms']:.3g}"
    )
    found = {name: spread(values) for name, values in samples.items()}
    cores = {name: spread(values) for name, values in busy.items()}
    shape = {"images": len(dataset.train), "workers": workers, "rounds": rounds}
    save(report(device, **shape, images_per_sec=found, cpu_ms=cores, ratios=ratios), out)
    return 0


def cpu_seconds() -> float:
    """Returns the time that this process and its workers have taken of all cores."""
    here = psutil.Process()
    return sum(sum(p.cpu_times()[:2]) for p in (here, *here.children(recursive=True)))


def make_photographs(folder: Path, n: int) -> Path:
    """Writes n JPEG files of varied sizes in ten classes, below train/."""
    rng = np.random.default_rng(0)
    for i in range(n):
        width, height = rng.integers(300, 600, 2).tolist()
        small = rng.integers(0, 256, (height // 6, width // 6, 3), dtype=np.uint8)
        image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
        path = folder / "train" / f"class_{i % 10}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=90)
    return folder


def stream_loader(
    config: Config, dataset: Dataset, loaders: Loaders, device: torch.device
) -> Callable[[], float]:
    """Our input path, built as for one process of a run; each call is the first epoch again."""
    rows, _, _ = train_and_val(dataset, config.data)
    plan = BatchPlan(len(rows), config.train.global_batch_size, config.train.micro_batch_size)
    loader = loaders.training(rows, plan, 0)
    assert isinstance(loader, StreamLoader)
    m = plan.micro_batch_size
    labels, index = torch.zeros(m, device=device), torch.arange(m, device=device)
    params = draw_epoch(config.augment, 0, 0, m).to(device)

    def epoch() -> float:
        # On a CPU, the workers have flipped.
        flips = device.type != "cpu"
        batches = (
            (crop_and_flip(images, index, params, 0) if flips else images, labels)
            for step in range(plan.steps(1))
            for _, images in loader.read(step)
        )
        return images_per_sec(batches, device)

    return epoch


def reference_loader(config: Config, path: Path, device: torch.device) -> Callable[[], float]:
    """The peer's input path; each call is an epoch."""
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(224, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
        ]
    )
    loader = data.DataLoader(
        ImageFolder(str(path / "train"), transform),
        config.train.micro_batch_size,
        shuffle=True,
        num_workers=config.data.workers or 0,
        pin_memory=device.type == "cuda",
        persistent_workers=True,
    )

    def batch(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return images.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    return lambda: images_per_sec((batch(*pair) for pair in loader), device)


if __name__ == "__main__":
    sys.exit(main())

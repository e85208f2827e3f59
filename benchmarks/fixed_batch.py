"""Plain torch loops that the training step is compared with.

They have the same network, optimizer and arithmetic. They run on one fixed batch without a loader,
or behind a DataLoader.

Invariant: a loop is a function that takes one step; nothing in it waits for the device.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms  # type: ignore[import-untyped]

from distvgg.config import Config
from distvgg.data.dataset import Dataset as Arrays
from distvgg.distributed.device import resolve_precision
from distvgg.models.vgg import VGG, build_vgg
from distvgg.optim.build import build_optimizer

Step = Callable[[], None]
# Batches that each worker has ready when nobody waits for them.
PREFETCH = 2

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}


def cudnn(*, deterministic: bool) -> None:
    """Lets cuDNN take reproducible kernels, as `process_group.start` does, or the fastest ones."""
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic


def fixed_batch(
    config: Config, num_classes: int, device: torch.device, *, mode: str | None = None
) -> Step:
    """Returns forward, backward and optimizer on one fixed micro-batch of the config's size.

    `mode` is that of torch.compile; with None the model runs eagerly.
    """
    model = network(config, num_classes, device)
    n, side = config.train.micro_batch_size, config.model.image_size
    images = torch.randn(n, 3, side, side, device=device).to(memory_format=torch.channels_last)
    labels = torch.arange(n, device=device) % num_classes
    runs: Callable[[Tensor], Tensor] = model
    if mode is not None:
        runs = torch.compile(model, mode=mode)
    update = updater(config, model, runs, device)
    return lambda: update(images, labels)


def captured(step: Step) -> Step:
    """The whole step as one CUDA graph, which costs the host a single launch."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is allocated once must be there before
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return Replay(graph, step)


@dataclass(frozen=True)
class Replay:
    """A captured step.

    The graph's kernels use memory addresses and keep no tensor alive. The step holds the weights
    and images at these addresses; otherwise the memory would be reused.
    """

    graph: torch.cuda.CUDAGraph
    step: Step

    def __call__(self) -> None:
        self.graph.replay()


def data_loader(config: Config, arrays: Arrays, device: torch.device, workers: int) -> Step:
    """Returns a step of the loop that most CIFAR repositories have.

    PIL and torchvision's transforms run in `workers` processes. Memory is pinned, and the copy does
    not block.
    """
    model = network(config, arrays.num_classes, device)
    update = updater(config, model, model, device)
    loader = DataLoader(
        Pictures(arrays, config.augment.crop_padding),
        batch_size=config.train.micro_batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        prefetch_factor=PREFETCH if workers else None,
        persistent_workers=workers > 0,
    )
    batches = _endless(loader)

    def step() -> None:
        images, labels = next(batches)
        images = images.to(device, memory_format=torch.channels_last, non_blocking=True)
        update(images, labels.to(device, non_blocking=True))

    return step


class Pictures(Dataset[tuple[Tensor, int]]):
    """The train split as pairs of an augmented, normalised [3, side, side] image and its label."""

    def __init__(self, arrays: Arrays, padding: int) -> None:
        self._images, self._labels = arrays.train.images, arrays.train.labels
        self._view = transforms.Compose(
            [
                transforms.RandomCrop(self._images.shape[1], padding),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(arrays.mean, arrays.std),
            ]
        )

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image: Tensor = self._view(Image.fromarray(np.asarray(self._images[index])))
        return image, int(self._labels[index])


def network(config: Config, num_classes: int, device: torch.device) -> VGG:
    """The config's network on a device, NHWC."""
    model = build_vgg(config.model, num_classes, seed=0).to(device)
    model.to(memory_format=torch.channels_last)
    return model


def updater(
    config: Config, model: VGG, runs: Callable[[Tensor], Tensor], device: torch.device
) -> Callable[[Tensor, Tensor], None]:
    """Returns one step on (images, labels) under autocast in the config's precision.

    `runs` is `model`, or the result of torch.compile on `model`.
    """
    dtype = _DTYPES[resolve_precision(config.train.precision, device)]
    optimizer = build_optimizer(model, config.optim)

    def update(images: Tensor, labels: Tensor) -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = runs(images)
        loss = F.cross_entropy(logits.float(), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return update


def synchronize(device: torch.device) -> None:
    """Waits for all that a device was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _endless(loader: "DataLoader[tuple[Tensor, int]]") -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from loader

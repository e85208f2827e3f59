"""Minimal start of a VGG-16 training with accelerate: the baseline of `benchmarks.startup`.

    python -m benchmarks.bare_start [--step] [--width 1.0] [--precision bf16]

Imports torch and accelerate, makes an Accelerator, builds the network; with `--step` an optimizer
too, and takes one step of 256 images, four micro-batches of 64, on one fixed batch of noise. Then
prints the seconds of that step. Imports nothing of distvgg.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

# Column D of Simonyan and Zisserman (2015), table 1; "M" is a max-pool.
LAYERS: list[int | str] = [
    64,
    64,
    "M",
    128,
    128,
    "M",
    *(256,) * 3,
    "M",
    *(512,) * 3,
    "M",
    *(512,) * 3,
    "M",
]
CLASSES, HEAD, MICRO_BATCH, ACCUMULATION = 100, 512, 64, 4


def main() -> None:
    """Starts, and says so."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--step", action="store_true")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--precision", default="bf16")
    options = parser.parse_args()
    accelerator = Accelerator(mixed_precision=options.precision)
    model = vgg16(options.width).to(accelerator.device)
    model = model.to(memory_format=torch.channels_last)
    seconds = first_step(accelerator, model) if options.step else 0.0
    print(seconds, flush=True)


def vgg16(width: float) -> nn.Sequential:
    """VGG-16 with BatchNorm and a head for 32x32 images, its channels multiplied by `width`."""
    layers: list[nn.Module] = []
    channels = 3
    for layer in LAYERS:
        if isinstance(layer, str):
            layers.append(nn.MaxPool2d(2))
            continue
        out = round(layer * width)
        layers += [nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(True)]
        channels = out
    head = round(HEAD * width)
    layers += [nn.Flatten(), nn.Linear(channels, head), nn.ReLU(True), nn.Dropout()]
    layers += [nn.Linear(head, head), nn.ReLU(True), nn.Dropout(), nn.Linear(head, CLASSES)]
    return nn.Sequential(*layers)


def first_step(accelerator: Accelerator, network: nn.Module) -> float:
    """Takes one optimizer step; the seconds from its first forward on."""
    sgd = torch.optim.SGD(
        network.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True
    )
    model, optimizer = accelerator.prepare(network, sgd)
    images = torch.randn(MICRO_BATCH, 3, 32, 32, device=accelerator.device)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.arange(MICRO_BATCH, device=accelerator.device)
    began = time.perf_counter()
    for _ in range(ACCUMULATION):
        loss = F.cross_entropy(model(images), labels, label_smoothing=0.1)
        accelerator.backward(loss / ACCUMULATION)
    optimizer.step()
    loss.item()  # a host sync
    return time.perf_counter() - began


if __name__ == "__main__":
    main()

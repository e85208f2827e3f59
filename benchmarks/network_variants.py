"""Forward and backward of a micro-batch under changes that may make it faster on a GPU.

Each variant is one function of (images, labels) that returns loss and gradients. On a GPU it is
replayed as a CUDA graph, so that only its kernels count. None of these is part of distvgg: one that
pays is then built in, with its own tests.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.fixed_batch import Step, captured, network
from distvgg.config import Config
from distvgg.models.blocks import Features, use_kernels
from distvgg.models.vgg import VGG
from distvgg.optim.muon import A, B, C, orthogonalise, products_in_tf32

Change = Callable[[VGG], None]
NORM_BATCH = 128
"""Images over which BatchNorm normalises in larger micro-batches."""


def kernels(vgg: VGG) -> None:
    """Runs BatchNorm, ReLU and max-pool by `norm_kernels.py`, as training does on a GPU."""
    if next(vgg.parameters()).is_cuda:
        use_kernels(vgg)


def bf16_filters(vgg: VGG) -> None:
    """Keeps filters and matrices in bf16, as if they were cast once a step."""
    for layer in vgg.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.to(torch.bfloat16)


def compiled_pointwise(vgg: VGG) -> None:
    """Compiles BatchNorm, ReLU and pool of each layer into one function, convolutions excluded."""
    layers: list[nn.Module] = []
    block: list[nn.Module] = []
    for layer in [*vgg.features, None]:
        if layer is None or isinstance(layer, nn.Conv2d):
            if block:
                layers.append(torch.compile(nn.Sequential(*block)))  # type: ignore[arg-type]
            block = []
            if layer is not None:
                layers.append(layer)
        else:
            block.append(layer)
    vgg.features = Features(*layers)


def grouped_norm(vgg: VGG) -> None:
    """Lets BatchNorm normalise groups of `NORM_BATCH` images of a larger micro-batch."""
    for number, layer in enumerate(vgg.features):
        if isinstance(layer, nn.BatchNorm2d):
            vgg.features[number] = _GroupedNorm(layer)


class _GroupedNorm(nn.Module):
    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.norm(group) for group in torch.split(x, NORM_BATCH)])


VARIANTS: dict[str, tuple[Change, ...]] = {
    "as it is": (kernels,),
    "torch's BatchNorm": (),
    "torch's BatchNorm over groups": (grouped_norm,),
    "BatchNorm to pool compiled": (compiled_pointwise,),
    "filters in bf16": (kernels, bf16_filters),
}


def micro_batch(
    config: Config, num_classes: int, device: torch.device, size: int, changes: tuple[Change, ...]
) -> Step:
    """Returns forward and backward of one fixed micro-batch, as a CUDA graph on a GPU."""
    vgg = network(config, num_classes, device)
    for change in changes:
        change(vgg)
    side = config.model.image_size
    images = torch.randn(size, 3, side, side, device=device).to(memory_format=torch.channels_last)
    labels = torch.arange(size, device=device) % num_classes
    parameters = list(vgg.parameters())

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            logits = vgg(images)
        loss = F.cross_entropy(logits.float(), labels, reduction="sum")
        torch.autograd.grad(loss, parameters)

    return captured(step) if device.type == "cuda" else step


def newton_schulz(config: Config, device: torch.device, *, batched: bool, tf32: bool) -> Step:
    """Returns Muon's orthogonalisations of a step, layer by layer or batched by equal shape."""
    vgg = network(config, 100, device)
    shapes = [p.flatten(1).shape for p in vgg.parameters() if p.ndim > 1][:-1]
    matrices = [torch.randn(shape, device=device).bfloat16() for shape in shapes]
    steps = config.optim.muon_steps
    stacks = [
        torch.stack([m for m in matrices if m.shape == shape]) for shape in dict.fromkeys(shapes)
    ]

    def step() -> None:
        with products_in_tf32(torch.bfloat16 if tf32 else torch.float32, device):
            for stack in stacks if batched else ():
                orthogonalise_batch(stack, steps)
            for matrix in () if batched else matrices:
                orthogonalise(matrix, steps)

    return captured(step) if device.type == "cuda" else step


def orthogonalise_batch(matrices: Tensor, steps: int) -> Tensor:
    """Returns `orthogonalise` of each matrix: [n, rows, columns] -> [n, rows, columns]."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    gram = (x @ x.mT).float()
    product: Tensor | None = None
    for step in range(steps):
        factor = torch.baddbmm(gram, gram, gram, beta=B, alpha=C)
        factor.diagonal(dim1=1, dim2=2).add_(A)
        product = factor if product is None else factor @ product
        if step < steps - 1:
            gram = factor @ gram @ factor
    assert product is not None
    x = torch.bmm(product.to(x.dtype), x)
    return x.mT if tall else x

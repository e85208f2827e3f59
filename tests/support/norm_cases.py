"""The kernels of BatchNorm, ReLU and max-pool beside torch in float64.

On a CPU by Triton's interpreter: TRITON_INTERPRET=1 python tests/support/norm_cases.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from distvgg.models import norm_kernels
from distvgg.models.norm_kernels import norm_relu

# Channels that fill no tile, one, two and a half; rows that fill no part of a sum, and several; the
# single pixel behind the last pool.
SHAPES = (
    ((3, 5, 6, 4), False),
    ((3, 5, 6, 4), True),
    ((2, 160, 4, 4), True),
    ((9, 64, 8, 8), False),
    ((9, 64, 8, 8), True),
    ((7, 3, 1, 1), False),
)
LARGE = ((128, 64, 32, 32), False), ((128, 128, 32, 32), True), ((128, 512, 8, 8), True)
TOLERANCES = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
MOMENTUM, EPS = 0.3, 1e-5


def compare(device: str, dtype: torch.dtype, shape: tuple[int, ...], *, pool: bool) -> None:
    """Output, gradients and running statistics, relative to the largest of each."""
    torch.manual_seed(0)
    channels = shape[1]
    # A mean of several deviations: sums of squares would lose digits.
    x = (torch.randn(shape, device=device) + 5).to(dtype, memory_format=torch.channels_last)
    weight, bias = (torch.randn(channels, device=device) for _ in range(2))
    outputs = [*shape[:2], *(side // 2 if pool else side for side in shape[2:])]
    gradient = torch.randn(outputs, device=device).to(dtype)

    def run(work: torch.dtype, kernels: bool) -> dict[str, Tensor]:
        leaves = [t.detach().to(work).requires_grad_() for t in (x, weight, bias)]
        if kernels:
            leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
        running = torch.zeros(channels, device=device), torch.ones(channels, device=device)
        if kernels:
            y = norm_relu(*leaves, running, MOMENTUM, EPS, pool=pool)
        else:
            running = running[0].to(work), running[1].to(work)
            y = F.relu(F.batch_norm(leaves[0], *running, *leaves[1:], True, MOMENTUM, EPS))
            y = F.max_pool2d(y, 2) if pool else y
        found = torch.autograd.grad(y, leaves, gradient.to(y.dtype))
        names = "output", "input", "weight", "bias", "running mean", "running variance"
        return dict(zip(names, (y.detach(), *found, *running), strict=True))

    ours, again, exact = run(dtype, True), run(dtype, True), run(torch.float64, False)
    for name, expected in exact.items():
        assert torch.equal(ours[name], again[name]), f"{name} does not repeat itself: {shape}"
        assert ours[name].shape == expected.shape
        error = (ours[name].double() - expected).abs().max() / expected.abs().max()
        assert error < TOLERANCES[dtype], f"{name} of {shape} in {dtype}, pool {pool}: {error}"


def keeps_nan(device: str) -> None:
    """A NaN or an infinite input is not rectified away."""
    for wrong in (float("nan"), float("inf")):
        x = torch.randn(2, 5, 4, 4, device=device).to(memory_format=torch.channels_last)
        x[0, 2, 1, 1] = wrong
        one, running = torch.ones(5, device=device), torch.ones(2, 5, device=device)
        for pool in (False, True):
            y = norm_relu(x, one, one, (running[0], running[1]), 1.0, EPS, pool=pool)
            assert y[:, 2].isnan().all()
            assert y[:, [0, 1, 3, 4]].isfinite().all()


if __name__ == "__main__":
    norm_kernels.PROGRAMS = 4  # so that a part of a sum has several tiles
    for shape, pool in SHAPES:
        compare("cpu", torch.float32, shape, pool=pool)
    keeps_nan("cpu")
    print("equal")

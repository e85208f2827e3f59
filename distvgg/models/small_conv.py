"""Convolutions on grids of a few pixels, where most taps of a 3x3 filter fall on padding.

Owns what VGG's last two stages compute on a CPU at 32x32. Invariant: the results are those of
`nn.Conv2d` up to the order of floating-point sums; only products with padding are left out. Of the
products that the definition counts, 100 in 144 are real on a 4x4 grid and 16 in 36 on a 2x2 grid,
and the library's kernels compute most of the others as well. Measured on two cores (Zen 4, bf16,
512 channels, 64 images, one thread): forward and backward of a convolution take 53 ms in place of
59 at 4x4, and 12 in place of 26 at 2x2. Used by networks with all five max-pools, whose step of
512 images at 32x32 takes 2.36 s in place of 2.53 (VGG-16, two processes). With one pool less there
is no 2x2 grid, and 7.85 s in place of 7.90 were not worth it; at 8x8 there is nothing to gain.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

DENSE_SIDE = 2
"""Grids up to this side are computed as one matrix that holds every pair of pixels."""
TAPS_SIDE = 4
"""Grids up to this side have their weight gradient computed tap by tap."""


class Conv3x3(nn.Conv2d):
    """`nn.Conv2d` with 3x3 filters and one pixel of zero padding, which knows tiny grids."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[n, in, h, w] -> [n, out, h, w], in autocast's dtype where it is on."""
        if not x.is_cpu or max(x.shape[-2:]) > TAPS_SIDE or torch.compiler.is_compiling():
            return super().forward(x)
        assert self.bias is not None
        if torch.is_autocast_enabled("cpu"):
            x = x.to(torch.get_autocast_dtype("cpu"))
        y: Tensor = _TinyGrid.apply(x, self.weight, self.bias)
        return y


class _TinyGrid(torch.autograd.Function):
    """The convolution and its gradients, in the dtype of its input; the gradients of weight and
    bias in theirs: [n, i, h, w], [o, i, 3, 3], [o] -> [n, o, h, w]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        n, _, h, w = x.shape
        ctx.dtype = weight.dtype
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        if max(h, w) > DENSE_SIDE:
            ctx.save_for_backward(x, weight)
            return torch.conv2d(x, weight, bias, padding=1)
        matrix = dense_matrix(weight, h, w)
        ctx.save_for_backward(x, matrix)
        shape = (n, len(weight), h, w)
        y = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
        # Into y itself: a view of something else could not be changed in place by the ReLU.
        flat = _pixels_last(y).view(n, -1)
        torch.addmm(bias.repeat(h * w), _pixels_last(x).reshape(n, -1), matrix.T, out=flat)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        (grad,) = gradients
        x, weight = ctx.saved_tensors
        n, _, h, w = x.shape
        grad_x = None
        if ctx.needs_input_grad[0]:
            if weight.ndim == 4:
                grad_x = conv2d_input(x.shape, weight, grad, padding=1)  # type: ignore[no-untyped-call]
            else:
                flat = _pixels_last(grad).reshape(n, -1) @ weight
                grad_x = flat.view(n, h, w, -1).permute(0, 3, 1, 2)
        return grad_x, weight_gradient(x, grad, ctx.dtype), grad.sum((0, 2, 3), dtype=ctx.dtype)


def dense_matrix(weight: Tensor, height: int, width: int) -> Tensor:
    """A 3x3 convolution on a grid of at most 2x2 pixels as a matrix from all its pixels to all its
    pixels: [o, i, 3, 3] -> [height * width * o, height * width * i], channels running fastest."""
    assert max(height, width) <= DENSE_SIDE  # else there are pairs of pixels without a tap
    o, i = weight.shape[:2]
    filters = _pixels_last(weight)
    blocks = weight.new_empty(height, width, o, height, width, i)
    for y in range(height):
        for x in range(width):
            blocks[y, x] = filters[:, 1 - y : 1 - y + height, 1 - x : 1 - x + width]
    return blocks.view(height * width * o, height * width * i)


def weight_gradient(x: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of a 3x3 convolution's filters, from its input [n, i, h, w] and its output's
    gradient [n, o, h, w]: one matrix product a tap, over the pixels where it met the image.

    Returns:
        [o, i, 3, 3] of a dtype, NHWC in memory.
    """
    _, i, h, w = x.shape
    o = grad.shape[1]
    x, grad = _pixels_last(x), _pixels_last(grad)
    gradient = x.new_empty(o, 3, 3, i, dtype=dtype)
    for ky, rows_out, rows_in in _meetings(h):
        for kx, columns_out, columns_in in _meetings(w):
            there = grad[:, rows_out, columns_out].reshape(-1, o)
            here = x[:, rows_in, columns_in].reshape(-1, i)
            gradient[:, ky, kx] = there.T @ here
    return gradient.permute(0, 3, 1, 2)


def _meetings(side: int) -> Iterator[tuple[int, slice, slice]]:
    """For each tap along one axis, the outputs that it contributes to and the inputs it reads."""
    for tap in range(3):
        shift = tap - 1
        first, last = max(0, -shift), max(0, min(side, side - shift))
        yield tap, slice(first, last), slice(first + shift, last + shift)


def _pixels_last(x: Tensor) -> Tensor:
    """[a, b, h, w] -> [a, h, w, b]: no copy where `x` is NHWC in memory."""
    return x.permute(0, 2, 3, 1)

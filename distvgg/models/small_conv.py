"""Convolutions on grids of a few pixels, where most taps of a 3x3 filter fall on padding.

Owns the computation of VGG's last two stages on a CPU at 32x32. Invariant: the results are those of
`nn.Conv2d` up to the order of floating-point sums. Only products with padding are left out.

Of the products in the definition, 100 in 144 are real on a 4x4 grid and 16 in 36 on a 2x2 grid. The
library's kernels compute most of the other products as well. Measured on two cores (Zen 4, bf16,
512 channels, 64 images, one thread): forward and backward of a convolution take 53 ms instead of 59
at 4x4, and 12 instead of 26 at 2x2.

Only networks with at least five max-pools use this module. A step of 512 images at 32x32 then takes
2.36 s instead of 2.53 (VGG-16, two processes). With one pool less there is no 2x2 grid, and a gain
from 7.90 to 7.85 s was not worthwhile. At 8x8 there is nothing to gain.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from distvgg.models.blocks import UnbiasedConv2d

DENSE_SIDE = 2
"""Largest side of a grid that is computed as one matrix over all pairs of pixels."""
TAPS_SIDE = 4
"""Largest side of a grid whose weight gradient is computed tap by tap."""


class Conv3x3(nn.Conv2d):
    """`nn.Conv2d` with 3x3 filters and one pixel of zero padding, optimised for tiny grids."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Convolves [n, in, h, w] -> [n, out, h, w], in autocast's dtype if autocast is on."""
        if _is_tiny(x):
            return _on_tiny_grid(x, self.weight, self.bias)
        return super().forward(x)


class UnbiasedConv3x3(UnbiasedConv2d):
    """`UnbiasedConv2d` with 3x3 filters, optimised for tiny grids as `Conv3x3` is."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Convolves [n, in, h, w] -> [n, out, h, w], in autocast's dtype if autocast is on."""
        return _on_tiny_grid(x, self.weight, None) if _is_tiny(x) else super().forward(x)


def _is_tiny(x: Tensor) -> bool:
    return x.is_cpu and max(x.shape[-2:]) <= TAPS_SIDE and not torch.compiler.is_compiling()


def _on_tiny_grid(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if torch.is_autocast_enabled("cpu"):
        x = x.to(torch.get_autocast_dtype("cpu"))
    y: Tensor = _TinyGrid.apply(x, weight, bias)
    return y


class _TinyGrid(torch.autograd.Function):
    """The convolution [n, i, h, w], [o, i, 3, 3], [o] or None -> [n, o, h, w], and its gradients.

    The output and the gradient of the input have the dtype of the input. The gradients of weight
    and bias have the dtype of the weight.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        n, _, h, w = x.shape
        ctx.dtype = weight.dtype
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        if max(h, w) > DENSE_SIDE:
            ctx.save_for_backward(x, weight)
            return torch.conv2d(x, weight, bias, padding=1)
        matrix = dense_matrix(weight, h, w)
        ctx.save_for_backward(x, matrix)
        shape = (n, len(weight), h, w)
        y = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
        # Written into y itself: the ReLU could not change a view of another tensor in place.
        flat = _pixels_last(y).view(n, -1)
        pixels = _pixels_last(x).reshape(n, -1)
        if bias is None:
            torch.mm(pixels, matrix.T, out=flat)
        else:
            torch.addmm(bias.repeat(h * w), pixels, matrix.T, out=flat)
        return y

    @staticmethod
    def backward(
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
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
        grad_weight = weight_gradient(x, grad, ctx.dtype) if ctx.needs_input_grad[1] else None
        grad_bias = grad.sum((0, 2, 3), dtype=ctx.dtype) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias


def dense_matrix(weight: Tensor, height: int, width: int) -> Tensor:
    """Returns a 3x3 convolution on a grid of at most 2x2 pixels as a matrix.

    The matrix maps all pixels to all pixels: [o, i, 3, 3] -> [height * width * o, height * width *
    i], with channels running fastest.
    """
    assert max(height, width) <= DENSE_SIDE  # larger grids have pairs of pixels without a tap
    o, i = weight.shape[:2]
    filters = _pixels_last(weight)
    blocks = weight.new_empty(height, width, o, height, width, i)
    for y in range(height):
        for x in range(width):
            blocks[y, x] = filters[:, 1 - y : 1 - y + height, 1 - x : 1 - x + width]
    return blocks.view(height * width * o, height * width * i)


def weight_gradient(x: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the gradient of a 3x3 convolution's filters.

    Each tap takes one matrix product, over the pixels where the tap meets the image.

    Args:
        x: the input, [n, i, h, w].
        grad: the gradient of the output, [n, o, h, w].
        dtype: of the result.

    Returns:
        [o, i, 3, 3] of `dtype`, NHWC in memory.
    """
    _, i, h, w = x.shape
    o = grad.shape[1]
    x, grad = _pixels_last(x), _pixels_last(grad)
    gradient = x.new_empty(o, 3, 3, i, dtype=dtype)
    for ky, rows_out, rows_in in _overlaps(h):
        for kx, columns_out, columns_in in _overlaps(w):
            there = grad[:, rows_out, columns_out].reshape(-1, o)
            here = x[:, rows_in, columns_in].reshape(-1, i)
            gradient[:, ky, kx] = there.T @ here
    return gradient.permute(0, 3, 1, 2)


def _overlaps(side: int) -> Iterator[tuple[int, slice, slice]]:
    """Yields each tap along one axis, with the outputs that it adds to and the inputs it reads."""
    for tap in range(3):
        shift = tap - 1
        first, last = max(0, -shift), max(0, min(side, side - shift))
        yield tap, slice(first, last), slice(first + shift, last + shift)


def _pixels_last(x: Tensor) -> Tensor:
    """Returns [a, b, h, w] as the view [a, h, w, b], contiguous if `x` is NHWC in memory."""
    return x.permute(0, 2, 3, 1)

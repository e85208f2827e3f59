"""BatchNorm, ReLU and max-pool of a training step as Triton kernels for a GPU.

Owns the kernels and their autograd function. Invariant: results depend on shapes and values alone,
not on the GPU's model, its load or the number of processes. Blocks have fixed sizes, partial sums
are added in a fixed order, and nothing is tuned at run time.

torch launches up to eight kernels for these layers, each of which reads or writes whole
activations. Here the forward pass reads them twice and writes them once: it adds up the statistics
(Chan, Golub and LeVeque, "Algorithms for Computing the Sample Variance", 1983, equation 2.1), then
normalises, rectifies and pools. The backward pass computes the rectified values and the pixel that
a max-pool took again, so that neither is stored (Rota Bulò et al., "In-Place Activated BatchNorm",
CVPR 2018, has a similar aim).

Accumulations are in float32. All tensors are NHWC in memory; a tile is rows (pixels) by channels.
This module imports Triton, which torch's CUDA builds bring along.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 2048
"""Elements of a tile: rows times channels."""
BLOCK_CHANNELS = 64
"""Most channels of a tile."""
PROGRAMS = 512
"""Most programs that share a sum; about four for each multiprocessor of an H100."""
SUMMED_CHANNELS = 16
"""Channels of a program that adds up partial sums."""


def norm_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running: tuple[Tensor, Tensor],
    momentum: float,
    eps: float,
    *,
    pool: bool,
) -> Tensor:
    """Normalises by the statistics of the batch, rectifies, and takes the maximum of 2x2 pixels.

    Args:
        x: [n, c, h, w] in bf16, fp16 or fp32 on a GPU, n * h * w > 1; h and w are even if `pool`.
        weight: [c] float32.
        bias: [c] float32.
        running: mean and unbiased variance, [c] float32, updated in place.
        momentum: share of this batch in `running`.
        eps: added to the variance.
        pool: False leaves the maximum out.

    Returns:
        [n, c, h, w], or half the grid if `pool`, in the dtype of `x`.
    """
    y: Tensor = _NormReLU.apply(x, weight, bias, *running, momentum, eps, pool)
    return y


class _NormReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
        eps: float,
        pool: bool,
    ) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        n, c, h, w = x.shape
        rows, out = n * h * w, (n, c, h // 2, w // 2) if pool else (n, c, h, w)
        tile, parts, rows_of_part = _split(rows, c, 1)
        partial = torch.empty(2, parts, c, dtype=torch.float32, device=x.device)
        _statistics[(parts, triton.cdiv(c, tile["COLUMNS"]))](
            x, partial, rows, c, rows_of_part, parts, **tile
        )
        found = torch.empty(2, c, dtype=torch.float32, device=x.device)
        _sum_statistics[(triton.cdiv(c, SUMMED_CHANNELS),)](
            *(partial, found, running_mean, running_var),
            *(rows, c, rows_of_part, parts, momentum, eps),
            PARTS=triton.next_power_of_2(parts),
            COLUMNS=SUMMED_CHANNELS,
        )
        y = torch.empty(out, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        rows_out = y.numel() // c
        tile, _, _ = _split(rows_out, c, 4 if pool else 1)
        _apply[_grid(rows_out, c, tile)](
            x, y, found, weight, bias, rows_out, c, w, POOL=pool, **tile
        )
        ctx.save_for_backward(x, found, weight, bias)
        ctx.pool = pool
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, found, weight, bias = ctx.saved_tensors
        dy = gradients[0].contiguous(memory_format=torch.channels_last)
        c, w = x.shape[1], x.shape[3]
        rows, rows_out, pool = x.numel() // c, dy.numel() // c, ctx.pool
        tile, parts, rows_of_part = _split(rows_out, c, 4 if pool else 1)
        partial = torch.empty(2, parts, c, dtype=torch.float32, device=x.device)
        _gradient_sums[(parts, triton.cdiv(c, tile["COLUMNS"]))](
            *(x, dy, partial, found, weight, bias, rows_out, c, w, rows_of_part, parts),
            POOL=pool,
            **tile,
        )
        sums = torch.empty(2, c, dtype=torch.float32, device=x.device)
        _sum_gradients[(triton.cdiv(c, SUMMED_CHANNELS),)](
            *(partial, sums, c, parts),
            PARTS=triton.next_power_of_2(parts),
            COLUMNS=SUMMED_CHANNELS,
        )
        if not ctx.needs_input_grad[0]:
            return None, sums[1], sums[0], None, None, None, None, None
        dx = torch.empty_like(x)
        _input_gradient[_grid(rows_out, c, tile)](
            x, dy, dx, found, weight, bias, sums, rows, rows_out, c, w, POOL=pool, **tile
        )
        return dx, sums[1], sums[0], None, None, None, None, None


def _split(rows: int, channels: int, taps: int) -> tuple[dict[str, int], int, int]:
    """Returns a tile's sides, the number of parts of a sum over rows, and the rows of a part."""
    columns = min(BLOCK_CHANNELS, triton.next_power_of_2(channels))
    height = TILE // taps // columns
    programs = max(1, PROGRAMS // triton.cdiv(channels, columns))
    rows_of_part = height * triton.cdiv(triton.cdiv(rows, height), programs)
    tile = {"ROWS": height, "COLUMNS": columns}
    return tile, triton.cdiv(rows, rows_of_part), rows_of_part


def _grid(rows: int, channels: int, tile: dict[str, int]) -> tuple[int, int]:
    return triton.cdiv(rows, tile["ROWS"]), triton.cdiv(channels, tile["COLUMNS"])


@triton.jit
def _columns(channels, COLUMNS: tl.constexpr):
    """The channels of this program's tile."""
    return tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)


@triton.jit
def _place(row, column, channels, width, tap: tl.constexpr, POOL: tl.constexpr):
    """Offsets of a tile: of the pixel `row`, or of one of four that a pixel of the output takes."""
    pixel = row.to(tl.int64)
    if POOL:
        across = width // 2
        pixel = (2 * (pixel // across) + tap // 2) * width + 2 * (pixel % across) + tap % 2
    return pixel[:, None] * channels + column[None, :]


@triton.jit
def _statistics(
    x, partial, rows, channels, rows_of_part, parts, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Mean and sum of squared deviations of a part of the rows, by channel."""
    part = tl.program_id(0)
    column = _columns(channels, COLUMNS)
    begin = part * rows_of_part
    end = tl.minimum(begin + rows_of_part, rows)
    mean = tl.zeros((ROWS, COLUMNS), tl.float32)
    squares = tl.zeros((ROWS, COLUMNS), tl.float32)
    count = tl.zeros((ROWS, 1), tl.float32)
    for start in range(begin, end, ROWS):
        row = start + tl.arange(0, ROWS)
        there = (row < end)[:, None]
        at = _place(row, column, channels, 0, 0, False)
        value = tl.load(x + at, there & (column < channels)[None, :], 0.0).to(tl.float32)
        count += there.to(tl.float32)
        delta = value - mean
        mean += tl.where(there, delta / tl.maximum(count, 1.0), 0.0)
        squares += tl.where(there, delta * (value - mean), 0.0)
    total = (end - begin).to(tl.float32)
    mean_of_part = tl.sum(mean * count, 0) / total
    between = mean - mean_of_part[None, :]
    squares_of_part = tl.sum(squares + count * between * between, 0)
    out = partial + part * channels + column
    tl.store(out, mean_of_part, column < channels)
    tl.store(out + parts * channels, squares_of_part, column < channels)


@triton.jit
def _sum_statistics(
    partial,
    found,
    running_mean,
    running_var,
    rows,
    channels,
    rows_of_part,
    parts,
    momentum,
    eps,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Mean and 1 / standard deviation over all parts, and their running averages."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.arange(0, PARTS)
    inside = column < channels
    mask = (part < parts)[:, None] & inside[None, :]
    at = partial + part[:, None] * channels + column[None, :]
    means = tl.load(at, mask, 0.0)
    squares = tl.load(at + parts * channels, mask, 0.0)
    count = tl.maximum(0, tl.minimum(rows_of_part, rows - part * rows_of_part))
    count = count.to(tl.float32)[:, None]
    mean = tl.sum(means * count, 0) / rows
    between = means - mean[None, :]
    square = tl.sum(squares + count * between * between, 0)
    tl.store(found + column, mean, inside)
    tl.store(found + channels + column, 1.0 / tl.sqrt(square / rows + eps), inside)
    old = tl.load(running_mean + column, inside)
    tl.store(running_mean + column, momentum * mean + (1.0 - momentum) * old, inside)
    old = tl.load(running_var + column, inside)
    unbiased = square / (rows - 1)
    tl.store(running_var + column, momentum * unbiased + (1.0 - momentum) * old, inside)


@triton.jit
def _of_channel(found, weight, bias, column, channels):
    """Mean, 1 / standard deviation, weight and bias of a tile's channels, as rows."""
    inside = column < channels
    mean = tl.load(found + column, inside, 0.0)[None, :]
    scale = tl.load(found + channels + column, inside, 0.0)[None, :]
    w = tl.load(weight + column, inside, 0.0)[None, :]
    b = tl.load(bias + column, inside, 0.0)[None, :]
    return mean, scale, w, b


@triton.jit
def _normalised(x, row, column, mask, mean, scale, channels, width, tap, POOL: tl.constexpr):
    """A tile of the input, less its mean and over its standard deviation."""
    value = tl.load(x + _place(row, column, channels, width, tap, POOL), mask, 0.0)
    return (value.to(tl.float32) - mean) * scale


@triton.jit
def _apply(
    x,
    y,
    found,
    weight,
    bias,
    rows,
    channels,
    width,
    POOL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Normalised, rectified and pooled values; a NaN stays one."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = _columns(channels, COLUMNS)
    mask = (row < rows)[:, None] & (column < channels)[None, :]
    mean, scale, w, b = _of_channel(found, weight, bias, column, channels)
    best = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tap in tl.static_range(4 if POOL else 1):
        value = _normalised(x, row, column, mask, mean, scale, channels, width, tap, POOL) * w + b
        best = tl.where(value <= best, best, value)
    tl.store(y + _place(row, column, channels, 0, 0, False), best.to(y.dtype.element_ty), mask)


@triton.jit
def _winner(x, row, column, mask, mean, scale, w, b, channels, width, POOL: tl.constexpr):
    """The tap whose value a pixel of the output has; -1 if it is zero."""
    best = tl.zeros(mask.shape, tl.float32)
    winner = tl.full(mask.shape, -1, tl.int32)
    for tap in tl.static_range(4 if POOL else 1):
        value = _normalised(x, row, column, mask, mean, scale, channels, width, tap, POOL) * w + b
        winner = tl.where(value <= best, winner, tap)
        best = tl.where(value <= best, best, value)
    return winner


@triton.jit
def _gradient_sums(
    x,
    dy,
    partial,
    found,
    weight,
    bias,
    rows,
    channels,
    width,
    rows_of_part,
    parts,
    POOL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Gradients of bias and weight by a part of the rows."""
    part = tl.program_id(0)
    column = _columns(channels, COLUMNS)
    mean, scale, w, b = _of_channel(found, weight, bias, column, channels)
    begin = part * rows_of_part
    end = tl.minimum(begin + rows_of_part, rows)
    of_bias = tl.zeros((ROWS, COLUMNS), tl.float32)
    of_weight = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(begin, end, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < end)[:, None] & (column < channels)[None, :]
        gradient = tl.load(dy + _place(row, column, channels, 0, 0, False), mask, 0.0)
        winner = _winner(x, row, column, mask, mean, scale, w, b, channels, width, POOL)
        for tap in tl.static_range(4 if POOL else 1):
            normalised = _normalised(x, row, column, mask, mean, scale, channels, width, tap, POOL)
            taken = tl.where(winner == tap, gradient.to(tl.float32), 0.0)
            of_bias += taken
            of_weight += taken * normalised
    out = partial + part * channels + column
    tl.store(out, tl.sum(of_bias, 0), column < channels)
    tl.store(out + parts * channels, tl.sum(of_weight, 0), column < channels)


@triton.jit
def _sum_gradients(partial, sums, channels, parts, PARTS: tl.constexpr, COLUMNS: tl.constexpr):
    """Gradients of bias and weight, over all parts."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.arange(0, PARTS)
    mask = (part < parts)[:, None] & (column < channels)[None, :]
    at = partial + part[:, None] * channels + column[None, :]
    tl.store(sums + column, tl.sum(tl.load(at, mask, 0.0), 0), column < channels)
    of_weight = tl.sum(tl.load(at + parts * channels, mask, 0.0), 0)
    tl.store(sums + channels + column, of_weight, column < channels)


@triton.jit
def _input_gradient(
    x,
    dy,
    dx,
    found,
    weight,
    bias,
    sums,
    rows,
    rows_out,
    channels,
    width,
    POOL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Gradient of the input (Ioffe and Szegedy, 2015, section 3)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = _columns(channels, COLUMNS)
    inside = column < channels
    mask = (row < rows_out)[:, None] & inside[None, :]
    mean, scale, w, b = _of_channel(found, weight, bias, column, channels)
    of_bias = tl.load(sums + column, inside, 0.0)[None, :] / rows
    of_weight = tl.load(sums + channels + column, inside, 0.0)[None, :] / rows
    gradient = tl.load(dy + _place(row, column, channels, 0, 0, False), mask, 0.0)
    winner = _winner(x, row, column, mask, mean, scale, w, b, channels, width, POOL)
    for tap in tl.static_range(4 if POOL else 1):
        normalised = _normalised(x, row, column, mask, mean, scale, channels, width, tap, POOL)
        taken = tl.where(winner == tap, gradient.to(tl.float32), 0.0)
        result = (taken - of_bias - normalised * of_weight) * (w * scale)
        tl.store(
            dx + _place(row, column, channels, width, tap, POOL),
            result.to(dx.dtype.element_ty),
            mask,
        )

"""Convolutions on tiny grids against torch's own."""

import pytest
import torch
from torch import nn

from distvgg.models.small_conv import Conv3x3

GRIDS = [(1, 1), (1, 2), (2, 2), (2, 4), (3, 3), (4, 4), (5, 4)]


def pair(*channels: int) -> tuple[nn.Conv2d, Conv3x3]:
    torch.manual_seed(0)
    ours = Conv3x3(*channels)
    reference = nn.Conv2d(*channels, 3, padding=1)
    reference.load_state_dict(ours.state_dict())
    return reference, ours


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("grid", GRIDS)
def test_values_and_gradients_are_those_of_the_convolution(
    grid: tuple[int, int], layout: torch.memory_format
) -> None:
    found = []
    for conv in pair(6, 10):
        conv.double().to(memory_format=layout)
        x = torch.randn(
            5, 6, *grid, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
        )
        x = x.to(memory_format=layout).requires_grad_()
        y = nn.functional.relu_(conv(x))  # in place, as VGG without BatchNorm has it
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y))
        found.append((y, x.grad, conv.weight.grad, conv.bias.grad))
    for reference, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("grid", [(2, 2), (4, 4)])
def test_under_autocast_no_further_from_the_truth_than_the_convolution(
    grid: tuple[int, int],
) -> None:
    x = torch.randn(32, 128, *grid).to(memory_format=torch.channels_last)
    errors = []
    for conv in pair(128, 64):
        conv.to(memory_format=torch.channels_last)
        exact = nn.functional.conv2d(x, conv.weight, conv.bias, padding=1)
        (wanted,) = torch.autograd.grad(exact.square().sum(), conv.weight)
        with torch.autocast("cpu", torch.bfloat16):
            y = conv(x)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        assert conv.weight.grad.dtype == torch.float32
        errors.append([(y - exact).norm(), (conv.weight.grad - wanted).norm()])
    for reference, ours in zip(*errors, strict=True):
        assert ours < 1.2 * reference


def test_frozen_input_asks_for_no_gradient_and_no_bias_is_lost() -> None:
    reference, ours = pair(3, 4)
    x = torch.randn(2, 3, 2, 2)
    for conv in (reference, ours):
        conv(x).sum().backward()
    torch.testing.assert_close(ours.bias.grad, reference.bias.grad)
    torch.testing.assert_close(ours.weight.grad, reference.weight.grad)

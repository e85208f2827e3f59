"""The kernels of BatchNorm, ReLU and max-pool on a CPU; tests/gpu/test_gpu.py has them on a GPU."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from distvgg.config import ModelConfig
from distvgg.models.blocks import BatchNorm2d, kernels_fail, use_kernels
from distvgg.models.vgg import VGG
from processes import ROOT


@pytest.mark.variant
@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_outputs_and_gradients_are_those_of_torch_in_tritons_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "support" / "norm_cases.py")],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "equal\n"


def test_a_batch_norm_includes_what_follows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the kernels that computes the same by torch's layers."""

    def stand_in(norm: BatchNorm2d, x: torch.Tensor) -> torch.Tensor:
        following, norm.kernels = norm.following(x), False
        calls.append(following)
        for layer in (norm, nn.ReLU(), nn.MaxPool2d(2, 2))[: 1 + following]:
            x = layer(x)
        norm.kernels = True
        return x

    calls: list[int] = []
    config = ModelConfig(depth=11, width=0.05, max_pools=(1, 3, 4, 5), image_size=24, dropout=0)
    torch.manual_seed(0)
    vgg = VGG(config, 10).train()
    images = torch.randn(4, 3, 24, 24)
    expected = vgg(images)
    use_kernels(vgg)
    plain = BatchNorm2d.forward
    monkeypatch.setattr(
        BatchNorm2d, "forward", lambda n, x: stand_in(n, x) if n.kernels else plain(n, x)
    )
    assert torch.equal(vgg(images), expected)
    # Grids of 24, 12, 12, 12, 6 and 6 pixels end in a pool or not; that of 3 is odd.
    assert calls == [2, 1, 1, 2, 1, 2, 1, 1]
    vgg.eval()
    assert [n.following(images) for n in vgg.modules() if isinstance(n, BatchNorm2d)] == [0] * 8


def test_a_device_without_the_kernels_is_said_to_be_one() -> None:
    failure = kernels_fail(torch.device("cpu"))
    assert failure is not None
    assert "\n" not in failure

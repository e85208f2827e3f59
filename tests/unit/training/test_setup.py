"""What is restored of a checkpoint."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from accelerate.state import AcceleratorState

from configs import tiny
from distvgg.models.vgg import batch_norm_layers
from distvgg.training import setup
from distvgg.training.checkpoint import Checkpoint
from distvgg.training.state import checkpoint_tensors


@pytest.fixture(autouse=True)
def _no_accelerator_left_over() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_checkpoint_with_biases_before_batch_norm_goes_on_as_the_same_function(
    tmp_path: Path,
) -> None:
    run = setup.build(tiny(train__precision="no"), tmp_path / "run")
    weights, rest = (
        {n: t.detach().clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}
        for tensors in checkpoint_tensors(run, run.vgg)
    )
    bias = torch.arange(len(weights["features.0.bias"]), dtype=torch.float32)
    weights = weights | {"features.0.bias": bias}
    rest = rest | {"momentum_buffer.features.0.bias": bias}
    contents = [safetensors.torch.save(tensors) for tensors in (weights, rest)]
    old = Checkpoint("step_00000000", *contents, run.state.model_dump())
    bare: Any = run.optimizer
    trainable = setup._Trainable(run.vgg, run.ema, bare.optimizer, run.meter)
    setup._restore(old, run.state, trainable, run.accelerator)
    assert not run.vgg.features[0].bias.any()
    first = batch_norm_layers(run.vgg)[0]
    assert torch.equal(first.running_mean, weights["features.1.running_mean"] - bias)

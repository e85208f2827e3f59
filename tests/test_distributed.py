"""The promise: the number of processes decides where micro-batches run, and nothing else.

In float64, with dropout and augmentation on. Two orders of summation differ by about 1e-16 at each
addition, and over these 47 steps that stays below 1e-12, while any real difference (a sample, a
mask, the weight of one update) shows at 1e-3 and more. In float32 the rounding is large enough to
carry activations across ReLU's kink in each step: already the micro-batches of one process, added
in reverse order, part in the third digit within ten steps. That would hide small mistakes.
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.numpy import load_file
from torch import nn

from distvgg.distributed import StepSums
from distvgg.sampling import Plan
from launch import FLOAT64, rows, train

TOLERANCE = 1e-12
WORLD_SIZES = (1, 2, 4)
# Nothing divides anything: 601 train, 103 val, 2,000 test images; steps straddle epochs.
ARGS = ("--data.train_size", "601", "--train.epochs", "5", "--eval.batch_size", "37")
# Ranks share out what Muon computes, and what BatchNorm measures of an average.
ARGS += ("--optim.name", "muon", "--optim.ema_decay", "0.9", "--model.init", "dirac")
ARGS += ("--augment.flip", "alternating", "--augment.cutout", "8", "--augment.trivial", "true")
ARGS += ("--augment.mixup_alpha", "0.2", "--augment.cutmix_alpha", "1", "--train.start_size", "24")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same config on 1, 2 and 4 processes: run folders by the number of processes."""
    folders = {w: tmp_path_factory.mktemp(f"processes{w}") / "run" for w in WORLD_SIZES}
    for w, folder in folders.items():
        train(folder, *ARGS, processes=w, program=FLOAT64)
    return folders


@pytest.mark.parametrize("world_size", WORLD_SIZES[1:])
def test_metrics_do_not_depend_on_the_number_of_processes(
    runs: dict[int, Path], world_size: int
) -> None:
    alone, together = rows(runs[1]), rows(runs[world_size])
    assert len([r for r in alone if "train/loss" in r]) == 47  # ceil(5 * 601 / 64)
    assert len(alone) == len(together) == 47 + 5 + 1
    for a, b in zip(alone, together, strict=True):
        measured = {k for k in a if not k.startswith("perf/")}
        assert measured == {k for k in b if not k.startswith("perf/")}
        for name in measured:
            if name.endswith(("top1", "top5", "lr", "count")) or name in ("step", "epoch"):
                assert a[name] == b[name], (name, a["step"])
            else:
                assert a[name] == pytest.approx(b[name], rel=TOLERANCE), (name, a["step"])


@pytest.mark.parametrize("world_size", WORLD_SIZES[1:])
def test_weights_and_batchnorm_buffers_do_not_depend_on_the_number_of_processes(
    runs: dict[int, Path], world_size: int
) -> None:
    alone, together = (load_file(runs[w] / "model.safetensors") for w in (1, world_size))
    assert alone.keys() == together.keys()
    assert any(name.endswith("running_var") for name in alone)
    for name, value in alone.items():
        np.testing.assert_allclose(together[name], value, rtol=TOLERANCE, atol=TOLERANCE)
    counters = [v for k, v in alone.items() if k.endswith("num_batches_tracked")]
    assert {int(v) for v in counters} == {47 * 4}


def test_every_evaluation_counts_each_image_once(runs: dict[int, Path]) -> None:
    for folder in runs.values():
        counts = [(k, r[k]) for r in rows(folder) for k in r if k.endswith("/count")]
        assert counts == [("val/count", 103)] * 5 + [("test/count", 2000)]


def test_the_seed_changes_the_run(runs: dict[int, Path], tmp_path: Path) -> None:
    """Guards the tests above: they would also pass if nothing depended on anything."""
    train(tmp_path / "other", *ARGS, "--seed", "1", "--train.epochs", "0.2", program=FLOAT64)
    other, first = rows(tmp_path / "other")[0], rows(runs[1])[0]
    assert not math.isclose(other["train/loss"], first["train/loss"], rel_tol=1e-4)


def test_gradients_in_bf16_on_the_wire_are_near_the_whole_ones(tmp_path: Path) -> None:
    """By SGD, to which a small error stays small: Muon makes small directions as long as others."""
    words = ("--data.train_size", "601", "--optim.warmup_epochs", "5")
    for name in ("no", "bf16"):
        args = (*words, "--train.gradient_compression", name)
        train(tmp_path / name, *args, processes=2, program=FLOAT64)
    (first, *_, last), whole = rows(tmp_path / "bf16")[:10], rows(tmp_path / "no")
    assert first["train/loss"] == pytest.approx(whole[0]["train/loss"], rel=TOLERANCE)
    for row, other in ((first, whole[0]), (last, whole[9])):
        assert row["train/lr"] == other["train/lr"]
        assert row["train/grad_norm"] == pytest.approx(other["train/grad_norm"], rel=0.05)
        assert row["train/grad_norm"] != pytest.approx(other["train/grad_norm"], rel=1e-6)


def test_batchnorm_takes_one_update_a_step_with_the_mean_of_its_micro_batches() -> None:
    layer = nn.BatchNorm2d(3).double()
    plan = Plan(n_samples=40, global_batch_size=40, micro_batch_size=8)
    sums = StepSums(Accelerator(cpu=True), plan, [layer])
    steps = torch.randn(2, 5, 8, 3, 4, 4, dtype=torch.float64)
    mean, variance = torch.zeros(3).double(), torch.ones(3).double()
    for step in steps:
        for k, batch in enumerate(step):
            labels = torch.arange(8)
            sums.add(k, layer(batch).sum(), torch.eye(8) if k % 2 else torch.ones(8, 8), labels)
        sums.start(stop=False)
        losses, hits, stop = sums.finish()
        assert hits.tolist() == [1, 8, 1, 8, 1]
        assert (len(losses), stop) == (5, 0)
        mean = 0.9 * mean + 0.1 * step.mean((1, 3, 4)).mean(0)
        variance = 0.9 * variance + 0.1 * step.transpose(1, 2).flatten(2).var(2).mean(0)
    torch.testing.assert_close(layer.running_mean, mean)
    torch.testing.assert_close(layer.running_var, variance)

"""The promise: the number of processes decides where micro-batches run, and nothing else.

Every byte of the weights and every row of metrics.jsonl but perf/* are equal, with all that could
tell processes apart switched on, in each precision that a CPU has. In float64 too, which a mistake
of rounding could not hide in: a sample, a mask or an update of another weight shows at 1e-3.
"""

import functools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

import distvgg
from distvgg.distributed.reduction_plan import TreePlan
from distvgg.distributed.step_sums import StepReducer
from distvgg.distributed.tree_sum import ExchangeQueue
from distvgg.recipe import load
from processes import FLOAT64, ROOT, Started, assert_same_run, rows, run, train

# 12 micro-batches a step, so that ranks have 12, 6, 4, 3 and 2 of them: powers of two and not.
# Nothing else divides anything: 601 train, 103 val, 2,000 test images; steps straddle epochs.
ARGS = ("--train.global_batch_size", "192", "--train.micro_batch_size", "16")
ARGS += ("--data.train_size", "601", "--train.epochs", "3", "--eval.batch_size", "37")
# Ranks share out what Muon computes, and what BatchNorm measures of an average.
ARGS += ("--optim.name", "muon", "--optim.ema_decay", "0.9", "--model.init", "dirac")
ARGS += ("--augment.flip", "alternating", "--augment.cutout", "8")
ARGS += ("--augment.mixup_alpha", "0.2", "--augment.cutmix_alpha", "1")
ARGS += ("--optim.clip_norm", "1", "--train.label_smoothing", "0.1", "--eval.tta", "flip")
ARGS += ("--eval.every_epochs", "2")
STEPS = math.ceil(3 * 601 / 192)
# Slow, and steps that differ do so at once: these take one step of the second epoch.
IN_FLOAT64 = ("--augment.trivial", "true", "--train.epochs", "1.2", "--eval.test", "false")
PRECISIONS = {
    "bf16": (1, 3, 4, 6),  # and 2, in the run over restarts
    "no": (1, 3),
    "float64": (1, 2),
}


def trained(folder: Path, precision: str, processes: int, *more: str) -> Path:
    """A finished run of `ARGS`."""
    args = (*ARGS, "--train.precision", "bf16" if precision == "bf16" else "no", *more)
    program = ("-m", "distvgg")
    if precision == "float64":
        program, args = FLOAT64, (*args, *IN_FLOAT64)
    train(folder, *args, processes=processes, program=program)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns the run on one process in a precision, which is made when it is first asked for."""
    folder = tmp_path_factory.mktemp("alone")
    return functools.cache(lambda precision: trained(folder / precision, precision, 1))


@pytest.fixture(scope="module")
def on_three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in bf16 on three processes, which two tests look at."""
    return trained(tmp_path_factory.mktemp("three") / "run", "bf16", 3)


@pytest.mark.parametrize(
    ("precision", "processes"),
    [
        # Three are no power of two; float64 sees more than float32.
        pytest.param(
            precision, w, marks=[pytest.mark.variant] if w > 3 or precision == "no" else []
        )
        for precision, sizes in PRECISIONS.items()
        for w in sizes
        if w > 1
    ],
)
def test_a_run_is_equal_to_the_bit_on_any_number_of_processes(
    alone: Callable[[str], Path], on_three: Path, tmp_path: Path, precision: str, processes: int
) -> None:
    if (precision, processes) == ("bf16", 3):
        folder = on_three
    else:
        folder = trained(tmp_path / "run", precision, processes)
    assert_same_run(folder, alone(precision))


@pytest.mark.parametrize(
    "kills", [((2, 5),), pytest.param(((2, 4), (6, 8)), marks=pytest.mark.variant)]
)
def test_a_run_is_equal_to_the_bit_over_restarts_on_other_numbers_of_processes(
    alone: Callable[[str], Path], tmp_path: Path, kills: tuple[tuple[int, int], ...]
) -> None:
    """Killed on so many processes after such a step, some steps after its newest checkpoint."""
    args = (*ARGS, "--train.precision", "bf16", "--checkpoint.every_steps", "2")
    for processes, step in kills:
        started = Started(tmp_path / "run", *args, processes=processes)
        started.until_step(step)
        started.kill()
        assert rows(tmp_path / "run")[-1]["step"] < STEPS
    said = train(tmp_path / "run", *args, processes=3)
    assert "resumed after step" in said
    noted = json.loads((tmp_path / "run" / "result.json").read_text())["starts"]
    assert [processes for _, processes in noted] == [processes for processes, _ in kills] + [3]
    # The cadence of checkpoints is not part of a run's numbers.
    assert_same_run(tmp_path / "run", alone("bf16"))


def test_a_checkpoint_holds_nothing_of_any_one_process(
    alone: Callable[[str], Path], on_three: Path
) -> None:
    """The optimizer, the average and the weights behind it, as those of one process."""
    states = [
        sorted(f.glob("checkpoints/*/state.safetensors"))[-1] for f in (alone("bf16"), on_three)
    ]
    assert states[0].parent.name == states[1].parent.name
    assert states[0].read_bytes() == states[1].read_bytes()


def test_the_runs_are_what_they_are_meant_to_be(alone: Callable[[str], Path]) -> None:
    """Guards the tests above: precisions differ, rows are all there, each image is counted once."""
    tables = [rows(alone(precision)) for precision in ("bf16", "float64")]
    steps = [len([r for r in table if "train/loss" in r]) for table in tables]
    assert steps == [STEPS, 4]
    counts = [[(k, r[k]) for r in table for k in r if k.endswith("/count")] for table in tables]
    assert counts[0] == [("val/count", 103)] * 2 + [("test/count", 2000)]
    assert counts[1] == [("val/count", 103)]
    one, other = (table[0]["train/loss"] for table in tables)
    assert one != other
    assert one == pytest.approx(other, rel=0.05)  # of other images: TrivialAugment in float64 alone


@pytest.mark.variant
def test_a_table_of_layers_is_equal_to_the_bit_on_two_processes(tmp_path: Path) -> None:
    args = ("--model.layers", "64,M,64,1x1-32,M,64,M", "--optim.name", "muon")
    args += ("--optim.ema_decay", "0.9", "--train.epochs", "0.5")
    folders = [tmp_path / "one", tmp_path / "two"]
    for processes, folder in enumerate(folders, start=1):
        assert "VGG-7-BN" in train(folder, *args, processes=processes)
    assert_same_run(*folders)
    # The weights alone describe their network.
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "model.safetensors").write_bytes((folders[0] / "model.safetensors").read_bytes())
    ours, theirs = (distvgg.load(folder) for folder in (alone, folders[1]))
    image = np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)
    assert ours.classify(image) == theirs.classify(image)
    assert ours.features[4].kernel_size == (3, 3)
    assert ours.features[7].kernel_size == (1, 1)


@pytest.mark.variant
def test_alexnet_is_equal_to_the_bit_on_two_processes(tmp_path: Path) -> None:
    """Its max-pools overlap, so that a pixel has gradients from several."""
    args = ("--model.name", "alexnet", "--model.image_size", "64", "--train.epochs", "0.5")
    folders = [tmp_path / "one", tmp_path / "two"]
    for processes, folder in enumerate(folders, start=1):
        assert "AlexNet-BN" in train(folder, *args, processes=processes)
    assert_same_run(*folders)
    assert distvgg.load(folders[0]).features[0].stride == (4, 4)


def test_the_seed_changes_the_run(alone: Callable[[str], Path], tmp_path: Path) -> None:
    """Guards the tests above: they would also pass if nothing depended on anything."""
    other = trained(tmp_path / "other", "bf16", 1, "--seed", "1", "--train.epochs", "0.2")
    first = rows(alone("bf16"))[0]["train/loss"]
    assert rows(other)[0]["train/loss"] != first


def test_batchnorm_takes_one_update_a_step_with_the_mean_of_its_micro_batches() -> None:
    layer = nn.BatchNorm2d(3).double()
    accelerator = Accelerator(cpu=True)
    sums = StepReducer(accelerator, TreePlan(5), [layer], ExchangeQueue(accelerator.device))
    steps = torch.randn(2, 5, 8, 3, 4, 4, dtype=torch.float64)
    mean, variance = torch.zeros(3).double(), torch.ones(3).double()
    for step in steps:
        for k, batch in enumerate(step):
            labels = torch.arange(8)
            sums.add(k, layer(batch).sum(), torch.eye(8) if k % 2 else torch.ones(8, 8), labels)
        sums.start(stop=False)
        losses, correct, stop = sums.finish()
        assert correct.tolist() == [1, 8, 1, 8, 1]
        assert (len(losses), stop) == (5, 0)
        mean = 0.9 * mean + 0.1 * step.mean((1, 3, 4)).mean(0)
        variance = 0.9 * variance + 0.1 * step.transpose(1, 2).flatten(2).var(2).mean(0)
    torch.testing.assert_close(layer.running_mean, mean)
    torch.testing.assert_close(layer.running_var, variance)


def test_one_rank_chooses_the_precision_lists_the_data_and_looks_for_the_stop_file(
    tmp_path: Path,
) -> None:
    folder, program = tmp_path / "run", (str(ROOT / "tests" / "support" / "unlike_ranks.py"),)
    args = ("--train.precision", "auto", "--train.epochs", "3")
    output = train(folder, *args, processes=2, program=program)
    assert load(str(folder / "config.yaml")).train.precision == "bf16"
    found = re.findall(r"rank (\d): (\d+) listings, (\d+) looks", output)
    counts = {int(rank): (int(listings), int(looks)) for rank, listings, looks in found}
    steps = rows(folder)[-1]["step"]
    assert counts[0][0] == 1
    assert counts[1][0] == 0
    assert counts[0][1] > steps
    assert counts[1][1] < steps / 2  # while data are loaded, each rank may decode them


def test_a_checkpoint_reaches_other_ranks_as_it_is_and_in_parts(tmp_path: Path) -> None:
    """By tests/support/bytes_of_ranks.py, which makes the parts small."""
    done = run([], processes=3, program=(str(ROOT / "tests" / "support" / "bytes_of_ranks.py"),))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("equal") == 3, done.stdout

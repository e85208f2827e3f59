"""Runs that cannot go on as they are: numbers that are not finite, disks without room."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from disks import small_disk
from distvgg.data.cache import load_dataset
from distvgg.data.dataset import train_val_indices
from distvgg.data.plan import BatchPlan, epoch_permutation
from distvgg.distributed.peer_failure import translate_peer_failure
from distvgg.errors import PeerLostError, RunError
from distvgg.recipe import load
from distvgg.training.checkpoint import read
from distvgg.training.nan_monitor import MAX_SKIPPED_STEPS, NonFiniteError, StepMonitor
from distvgg.training.state import TrainState
from processes import ROOT, Started, assert_same_run, measured, rows, train

ARGS = ("--checkpoint.every_steps", "4", "--train.epochs", "3")  # 29 steps
POISON = ROOT / "tests" / "support" / "poisoned.py"
STEP, MICRO_BATCH = 9, 2


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(folder, *ARGS)
    return folder


@pytest.mark.parametrize(
    ("what", "processes"),
    [
        *(pytest.param("loss", n, marks=pytest.mark.variant) for n in (1, 2)),
        ("gradient", 2),
    ],
)
def test_the_micro_batch_that_went_wrong_is_named_and_nothing_is_spoilt(
    what: str, processes: int, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    started = Started(
        folder, *ARGS, processes=processes, program=(str(POISON),), env={"POISON": what}
    )
    code, output = started.end()
    assert code == 1, output
    failure = json.loads((folder / "failure.json").read_text())
    assert (failure["step"], failure["micro_batch"]) == (STEP, MICRO_BATCH)
    assert (failure["what"], failure["value"]) == (what, "nan")
    (said,) = re.findall(r"^distvgg: error: (.+)$", output, re.MULTILINE)
    assert said.startswith(f"step {STEP}: the {what} of micro-batch {MICRO_BATCH} is nan at")
    assert f"{' '.join(map(str, failure['samples'][:5]))} ... (all in " in said

    # The samples, from the definition of the stream.
    config = load(str(folder / "config.yaml"))
    taken, _ = train_val_indices(load_dataset(config.data).train.labels, config.data)
    plan = BatchPlan(len(taken), 64, 16)
    at = (STEP - 1) * 64 + MICRO_BATCH * 16
    order = [taken[epoch_permutation(config.seed, e, len(taken))] for e in range(2)]
    assert failure["samples"] == np.concatenate(order)[at : at + plan.micro_batch_size].tolist()

    assert [r["step"] for r in rows(folder) if "train/loss" in r] == list(range(1, STEP))
    assert not (folder / "REQUEUE").exists()
    read(folder / "checkpoints" / "step_00000008")
    if processes == 1:
        # A machine that erred once: the same command, on a sound one, goes on.
        code, output = Started(folder, *ARGS).end()
        assert code == 0, output
        assert "resumed after step 8" in output
        assert not (folder / "failure.json").exists()
        assert_same_run(whole, folder)


def test_a_step_that_failed_changes_no_weight_nor_does_any_later_one(tmp_path: Path) -> None:
    from accelerate.state import AcceleratorState

    from configs import tiny
    from distvgg.training.setup import build
    from distvgg.training.step import train_step

    run = build(tiny(), tmp_path / "run")
    train_step(run, 0, run.loader.micro_batches(0), lr=0.1)
    before = {k: v.clone() for k, v in run.vgg.named_parameters()}
    batches = run.loader.micro_batches(1)
    batches[3] = batches[3]._replace(images=batches[3].images * torch.inf)
    train_step(run, 1, batches, lr=0.1)
    train_step(run, 2, run.loader.micro_batches(2), lr=0.1)  # the host may be a step late
    for name, value in run.vgg.named_parameters():
        assert torch.equal(value, before[name]), name
    with pytest.raises(NonFiniteError):
        run.monitor.drain()
    run.accelerator.end_training()
    AcceleratorState._reset_state(reset_partial_state=True)


def watch_steps(monitor: StepMonitor, norms: list[float], stop_at: int | None = None) -> None:
    losses = torch.ones(2, dtype=torch.float64)
    for step, norm in enumerate(norms):
        stop = torch.tensor([float(step == stop_at)], dtype=torch.float64)
        monitor.push(step, losses, torch.tensor(norm), stop)
        monitor.poll()


def test_a_gpu_is_read_one_step_late_and_all_ranks_alike() -> None:
    late, prompt = StepMonitor(lag=1, fp16=False), StepMonitor(lag=0, fp16=False)
    for monitor in (late, prompt):
        watch_steps(monitor, [1.0, 2.0], stop_at=1)
    assert (late.stop, prompt.stop) == (False, True)
    assert (late.grad_norm, prompt.grad_norm) == (1.0, 2.0)
    late.drain()
    assert (late.stop, late.grad_norm) == (True, 2.0)
    with pytest.raises(NonFiniteError) as failure:
        watch_steps(StepMonitor(lag=1, fp16=False), [1.0, float("inf"), 1.0])
    assert (failure.value.step, failure.value.micro_batch) == (1, None)


def test_fp16_counts_the_steps_that_it_skips_and_gives_up_when_all_are() -> None:
    monitor, inf = StepMonitor(lag=0, fp16=True, skipped=5), float("inf")
    watch_steps(monitor, [inf, 1.0, inf, inf, 1.0])
    assert monitor.skipped == 8
    with pytest.raises(NonFiniteError):
        watch_steps(monitor, [inf] * MAX_SKIPPED_STEPS)
    assert monitor.skipped == 8 + MAX_SKIPPED_STEPS - 1
    # A start that goes on after the last but one of them gives up at the same step.
    again = StepMonitor(lag=0, fp16=True, skipped=7, skipped_in_a_row=MAX_SKIPPED_STEPS - 1)
    with pytest.raises(NonFiniteError):
        watch_steps(again, [inf])


def test_a_message_that_quotes_a_broken_connection_is_no_lost_contact() -> None:
    with pytest.raises(RunError, match="see Broken pipe") as error, translate_peer_failure():
        raise RunError("see Broken pipe")
    assert not isinstance(error.value, PeerLostError)
    with pytest.raises(PeerLostError), translate_peer_failure():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")


def test_fp16s_loss_scale_goes_on_from_a_checkpoint() -> None:
    scaler, again = torch.amp.GradScaler("cpu"), torch.amp.GradScaler("cpu")
    weight = torch.nn.Parameter(torch.ones(1))
    for scale in (scaler, again):
        optimizer = torch.optim.SGD([weight], lr=0.1, fused=True)
        scale.scale(weight.sum() * (torch.inf if scale is scaler else 1)).backward()
        scale.step(optimizer)
        scale.update()
        if scale is scaler:
            kept = TrainState(scaler=scaler.state_dict()).model_dump_json()
            again.load_state_dict(TrainState.model_validate_json(kept).scaler or {})
            assert again.state_dict() == scaler.state_dict()
        weight.grad = None
    assert again.get_scale() == 2.0**15  # halved by the overflow, then kept


def test_a_full_disk_stops_nothing_and_loses_no_row(whole: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "3m") as disk:
        folder = disk / "run"
        started = Started(folder, *ARGS, log=tmp_path / "log")
        started.until_step(5)
        hog = fill(disk)
        started.until(lambda: "rows wait in memory" in started.output())
        started.until(lambda: "the one before it stands" in started.output())
        hog.unlink()
        code, output = started.end()
        assert code == 0, output
        assert "metrics.jsonl: all rows are written" in output
        assert_same_run(whole, folder)


@pytest.mark.variant
def test_a_disk_that_stays_full_is_said_at_the_end_and_the_run_goes_on_later(
    whole: Path, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", "3m") as disk:
        folder = disk / "run"
        started = Started(folder, *ARGS, log=tmp_path / "log")
        started.until_step(9)
        hog = fill(disk)
        code, output = started.end()
        assert code == 1, output
        *_, last = output.splitlines()
        assert re.fullmatch(
            r"distvgg: error: the result cannot be written to .+ \(No space left on device\): .+",
            last,
        )
        assert measured(folder) == measured(whole)[: len(measured(folder))]
        hog.unlink()
        code, output = Started(folder, *ARGS, log=tmp_path / "log").end()
        assert code == 0, output
        assert "resumed after step" in output
        assert_same_run(whole, folder)


def test_without_room_for_the_last_checkpoint_a_stopped_run_is_not_to_be_requeued(
    tmp_path: Path,
) -> None:
    with small_disk(tmp_path / "disk", "3m") as disk:
        folder = disk / "run"
        started = Started(folder, *ARGS, "--train.epochs", "99", log=tmp_path / "log")
        started.until_step(9)
        fill(disk)
        started.process.terminate()
        code, output = started.end()
        assert code == 1, output
        *_, last = output.splitlines()
        assert last.startswith("distvgg: error: SIGTERM: stopped after step")
        assert last.endswith("failed: No space left on device; the one before it stands")
        assert not (folder / "REQUEUE").exists()


def fill(disk: Path) -> Path:
    """A file that leaves no byte of room."""
    hog = disk / "hog"
    with hog.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return hog

"""The parts and the state of a run.

Invariant: what `TrainState` and the tensors of a checkpoint hold is all that a run has come to; the
rest is a function of config and data. It is the same on every rank after every step.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor, nn

from distvgg import metrics
from distvgg.config import Config
from distvgg.data.dataset import Dataset
from distvgg.data.loader import DeviceImages, DeviceLoader, EvalLoader
from distvgg.data.plan import BatchPlan
from distvgg.distributed.gradients import GradientReducer
from distvgg.distributed.reduction_plan import TreePlan
from distvgg.distributed.step_sums import StepReducer
from distvgg.distributed.tree_sum import ExchangeQueue
from distvgg.models.ema import EMA, STATISTICS_STEPS
from distvgg.models.vgg import VGG, batch_norm_layers
from distvgg.runs.metrics_file import Mark
from distvgg.runs.preprocessing import Preprocessing
from distvgg.training.checkpoint import CheckpointManager, optimizer_tensors
from distvgg.training.meters import Clock, TrainMeter
from distvgg.training.nan_monitor import StepMonitor

if TYPE_CHECKING:
    from accelerate import Accelerator


METER = "meter.sums"
TRAINED = "trained."  # before the names of the weights where their average is the network


class TrainState(BaseModel, extra="forbid"):
    """How far a run has come: what is kept of it beside tensors."""

    step: int = 0
    """Optimizer steps taken."""
    saved: int = 0
    """The step of the newest checkpoint."""
    validated: int = 0
    """The step of the newest validation, and its metrics by their bare names."""
    val: metrics.Row = {}
    best_step: int | None = None
    """The step whose validation has the highest top-1 so far, the earliest of equals."""
    best_top1: float = 0.0
    skipped: int = 0
    """Steps that fp16 skipped, those since the last that it took, and its loss scale."""
    skipped_in_a_row: int = 0
    scaler: dict[str, int | float] | None = None
    metrics: Mark = Mark()
    """The end of metrics.jsonl."""
    timed: tuple[int, float] = (0, 0.0)
    """Steps and seconds that the clock has measured."""
    starts: list[tuple[int, int]] = []
    """(step, number of processes) of every start that a checkpoint came of."""
    data: str = ""
    """Digest of the data."""
    machine: dict[str, str] = {}
    """Device and versions of the newest start."""


@dataclass(frozen=True)
class Run:
    """The parts of one training run. `vgg` is the bare network; `model` runs it with mixed
    precision and compilation as accelerate arranged them. The network that is evaluated and kept is
    that of `average`, where the config asks for one. `failed` is 1 on the device from the first
    non-finite step on. `checkpoints` and `lock` are the main process's. `notes` are what the user
    should know of the machine and the environment, a line each."""

    config: Config
    folder: Path
    accelerator: "Accelerator"
    dataset: Dataset
    preprocessing: Preprocessing
    plan: BatchPlan
    steps: int
    loader: DeviceLoader
    val_loader: EvalLoader
    vgg: VGG
    ema: EMA | None
    model: nn.Module
    optimizer: torch.optim.Optimizer
    tree: TreePlan
    queue: ExchangeQueue
    sums: StepReducer
    gradients: GradientReducer
    failed: Tensor
    meter: TrainMeter
    clock: Clock
    monitor: StepMonitor
    state: TrainState
    checkpoints: CheckpointManager | None
    lock: int | None
    notes: list[str]


def of_global_batch(run: Run, size: int, pixels: DeviceImages, rows: np.ndarray) -> Run:
    """The same run over some rows in global batches of another size, for measurements. Its
    `gradients` are not attached, and those of the first must not be beside them."""
    plan = replace(run.plan, n_samples=len(rows), global_batch_size=size)
    tree = TreePlan(plan.micro_batches, run.tree.ranks)
    return replace(
        run,
        plan=plan,
        loader=DeviceLoader(run.config, pixels, rows, plan, run.accelerator.process_index),
        tree=tree,
        sums=StepReducer(run.accelerator, tree, batch_norm_layers(run.vgg), run.queue),
        gradients=GradientReducer(run.vgg.parameters(), tree, run.queue),
    )


def synchronized_eval_model(run: Run) -> VGG:
    """The network that is evaluated and kept. Every rank must call it."""
    ema, step = run.ema, run.state.step
    if ema is None:
        return run.vgg
    if ema.measured_at != step:
        steps = range(max(0, step - STATISTICS_STEPS), step)
        batches = (batch.images for s in steps for batch in run.loader.micro_batches(s))
        ema.measure(batches, run.tree, run.queue, step)
    return ema.network


def warmup_steps(run: Run) -> int:
    """The steps of linear warm-up, at most all."""
    epochs = run.config.optim.warmup_epochs
    return min(run.steps, run.plan.steps(epochs)) if epochs else 0


def checkpoint_tensors(run: Run, vgg: VGG) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Collects the tensors of a checkpoint.

    Args:
        vgg: `synchronized_eval_model(run)`.

    Returns:
        Those of `vgg`; and the rest: the optimizer's, the sums of unwritten rows, the trained
        weights where `vgg` has their average.
    """
    seen = run.state.step * run.plan.micro_batches
    model = {
        # BatchNorm counts the micro-batches of one rank; the run's own count is that of all.
        name: torch.full_like(value, seen) if name.endswith("num_batches_tracked") else value
        for name, value in vgg.state_dict().items()
    }
    rest = optimizer_tensors(run.optimizer, _names(run.vgg)) | {METER: run.meter.sums}
    if run.ema is not None:
        rest |= {f"{TRAINED}{name}": value for name, value in run.vgg.state_dict().items()}
    return model, rest


def _names(vgg: VGG) -> dict[Tensor, str]:
    return {parameter: name for name, parameter in vgg.named_parameters()}

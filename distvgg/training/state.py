"""The parts and the state of a run.

Invariant: `TrainState` and the tensors of a checkpoint are the complete state of a run; everything
else is derived from config and data. What a step changes is the same on every rank after it; what a
clock measures and where files end is the main process's.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor

from distvgg import metrics
from distvgg.data.dataset import Dataset
from distvgg.data.loader import DeviceImages, DeviceLoader
from distvgg.data.loaders import Loaders
from distvgg.data.micro_batches import EvalSource, MicroBatchSource
from distvgg.distributed.gradients import GradientReducer
from distvgg.distributed.reduction_plan import TreePlan
from distvgg.distributed.step_sums import StepReducer
from distvgg.distributed.tree_sum import ExchangeQueue
from distvgg.file_lock import FileLock
from distvgg.models.ema import STATISTICS_STEPS
from distvgg.models.freezing import learned_parameters
from distvgg.models.vgg import VGG, batch_norm_layers
from distvgg.runs.initial_weights import InitialWeights
from distvgg.runs.metrics_file import Mark
from distvgg.runs.preprocessing import Preprocessing
from distvgg.training.checkpoint import CheckpointManager, optimizer_tensors
from distvgg.training.meters import Clock
from distvgg.training.step import StepParts

METER = "meter.sums"
TRAINED = "trained."  # prefix of the trained weights where the saved network is the EMA


class TrainState(BaseModel, extra="forbid"):
    """The progress of a run: its state besides tensors."""

    step: int = 0
    """Optimizer steps taken."""
    saved: int = 0
    """Step of the newest checkpoint."""
    validated: int = 0
    """Step of the newest validation."""
    val: metrics.Row = {}
    """Metrics of the newest validation, by their bare names."""
    best_step: int | None = None
    """Step of the validation with the highest top-1 so far; the earliest of several."""
    best_top1: float = 0.0
    """Its top-1."""
    skipped: int = 0
    """Steps that fp16 skipped."""
    skipped_in_a_row: int = 0
    """Steps that fp16 skipped since the last step that it took."""
    scaler: dict[str, int | float] | None = None
    """State of fp16's loss scaler."""
    metrics: Mark = Mark()
    """End of metrics.jsonl."""
    timed: tuple[int, float] = (0, 0.0)
    """Steps and seconds that the clock has measured."""
    starts: list[tuple[int, int]] = []
    """(step, world size) at each launch that led to a checkpoint."""
    data: str = ""
    """Digest of the data."""
    machine: dict[str, str] = {}
    """Device and versions of the newest launch."""


@dataclass(frozen=True, kw_only=True)
class Run(StepParts):
    """The parts of one training run.

    Attributes:
        vgg: the bare network; `model` runs it.
        initial_weights: what it started from; None: all layers started anew.
        steps: optimizer steps of the whole run.
        checkpoints, lock: on the main process only.
        notes: lines for the user about the machine and the environment.
    """

    folder: Path
    dataset: Dataset
    preprocessing: Preprocessing
    steps: int
    loaders: Loaders
    loader: MicroBatchSource
    val_loader: EvalSource
    vgg: VGG
    initial_weights: InitialWeights | None
    tree: TreePlan
    queue: ExchangeQueue
    gradients: GradientReducer
    clock: Clock
    state: TrainState
    checkpoints: CheckpointManager | None
    lock: FileLock | None
    notes: list[str]


def of_global_batch(run: Run, size: int, pixels: DeviceImages, rows: np.ndarray) -> Run:
    """Returns the same run over other images, in global batches of another size, for measurements.

    Its `gradients` are not attached. Those of the first run must be detached before.
    """
    plan = replace(run.plan, n_samples=len(rows), global_batch_size=size)
    tree = TreePlan(plan.micro_batches, run.tree.ranks)
    return replace(
        run,
        plan=plan,
        loader=DeviceLoader(run.config, pixels, rows, plan, run.accelerator.process_index),
        graphs=run.graphs and run.graphs.fresh(),
        tree=tree,
        sums=StepReducer(run.accelerator, tree, batch_norm_layers(run.vgg), run.queue),
        gradients=GradientReducer(learned_parameters(run.vgg), tree, run.queue),
    )


def synchronized_eval_model(run: Run) -> VGG:
    """Returns the network that is evaluated and saved: the EMA where there is one.

    A collective operation: every rank must call it. Under an EMA it may run forward passes over the
    last steps' images, to measure BatchNorm's statistics.
    """
    ema, step = run.ema, run.state.step
    if ema is None:
        return run.vgg
    if ema.measured_at != step:
        steps = range(max(0, step - STATISTICS_STEPS), step)
        batches = (batch.images for s in steps for batch in run.loader.micro_batches(s))
        ema.measure(batches, run.tree, run.queue, step)
    return ema.network


def warmup_steps(run: Run) -> int:
    """Returns the steps of linear warm-up, at most all."""
    epochs = run.config.optim.warmup_epochs
    return min(run.steps, run.plan.steps(epochs)) if epochs else 0


def checkpoint_tensors(run: Run, vgg: VGG) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Collects the tensors of a checkpoint.

    Args:
        run: after its last step.
        vgg: `synchronized_eval_model(run)`.

    Returns:
        Those of `vgg`; and the rest: the optimizer's, the sums of unwritten rows, the trained
        weights where `vgg` has their average.
    """
    seen = run.state.step * run.plan.micro_batches

    def tensors_of(network: VGG) -> dict[str, Tensor]:
        # BatchNorm counts the micro-batches of one rank; a checkpoint has the count of all ranks.
        return {
            name: torch.full_like(value, seen) if name.endswith("num_batches_tracked") else value
            for name, value in network.state_dict().items()
        }

    model = tensors_of(vgg)
    rest = optimizer_tensors(run.optimizer, parameter_names(run.vgg)) | {METER: run.meter.sums}
    if run.ema is not None:
        rest |= {f"{TRAINED}{name}": value for name, value in tensors_of(run.vgg).items()}
    return model, rest


def parameter_names(vgg: VGG) -> dict[Tensor, str]:
    """Returns the name of each parameter."""
    return {parameter: name for name, parameter in vgg.named_parameters()}

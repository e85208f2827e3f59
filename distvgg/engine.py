"""Training: build the parts of a run, take its steps, finish it.

Invariant: a step is a pure function of (config, data, weights, optimizer state, step number); the
number of processes decides only where its micro-batches run. Progress is one integer.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from distvgg import metrics
from distvgg.config import Config, match_run_folder, stamp_run_folder
from distvgg.data import Dataset, load_dataset, train_val_indices
from distvgg.distributed import (
    BATCH_NORM_MOMENTUM,
    accumulation_momentum,
    average_batch_norm,
    batch_norm_layers,
    distribute,
    place,
    set_batch_norm_momentum,
    start,
    summing,
)
from distvgg.evaluate import evaluate_over_ranks
from distvgg.loader import DeviceLoader, EvalLoader, MicroBatch, Pixels
from distvgg.metrics import Clock, TrainMeter
from distvgg.model import VGG, build_vgg
from distvgg.optim import build_optimizer, lr_at, set_lr
from distvgg.result import Result, read_result, save_result, save_weights
from distvgg.sampling import Plan, derive_seed
from distvgg.tracking import Tracking


@dataclass
class TrainState:
    """How far a run has come: the number of optimizer steps taken."""

    step: int = 0


@dataclass(frozen=True)
class Run:
    """The parts of one training run. `vgg` is the bare network; `model` runs it with mixed
    precision, gradient all-reduce and compilation as accelerate arranged them."""

    config: Config
    accelerator: Accelerator
    dataset: Dataset
    plan: Plan
    steps: int
    loader: DeviceLoader
    val_loader: EvalLoader
    vgg: VGG
    model: nn.Module
    optimizer: torch.optim.Optimizer
    batch_norms: list[nn.BatchNorm2d]
    meter: TrainMeter
    clock: Clock
    state: TrainState


def train(config: Config, run_dir: Path) -> Result:
    """Trains a config into a run folder; a run that is finished already is only read.

    Raises:
        UserError: config, data, processes or run folder do not fit together.
    """
    config = match_run_folder(run_dir, config)
    if (earlier := read_result(run_dir)) is not None:
        return earlier
    run = build(config, run_dir)
    config, clock, meter, state = run.config, run.clock, run.meter, run.state
    run.accelerator.print(summary(run, run_dir))
    tracking = Tracking(run.accelerator, config, run_dir, run.steps)

    warmup = warmup_steps(run)
    val: metrics.Row = {}
    while state.step < run.steps:
        lr = lr_at(state.step, config.optim, run.steps, warmup)
        with clock.waiting_for_data():
            micro_batches = run.loader.micro_batches(state.step)
        log_now = due(state.step + 1, config.track.every_steps, run.steps)
        grad_norm = train_step(run, micro_batches, lr, want_norm=log_now)
        state.step += 1
        clock.step_done()
        tracking.step_done()

        where: metrics.Row = {metrics.STEP: state.step, metrics.EPOCH: run.plan.epoch(state.step)}
        if log_now:
            row = where | meter.read() | {metrics.TRAIN_LR: lr}
            row[metrics.TRAIN_GRAD_NORM] = float(grad_norm)
            tracking.log(row | clock.read())
        if evaluation_due(state.step, config.eval.every_epochs, run.plan, run.steps):
            with clock.paused():
                val = measure(run, run.val_loader)
                tracking.log(where | prefixed("val", val))

    result = finish(run, run_dir, val, tracking)
    run.accelerator.end_training()
    return result


def train_step(
    run: Run, micro_batches: list[MicroBatch], lr: float, *, want_norm: bool = False
) -> torch.Tensor | float:
    """One optimizer step over this rank's micro-batches; gradients are summed over ranks.

    Returns:
        The global gradient norm before clipping if `want_norm` or clipping asks for it, else nan:
        it costs a pass over the gradients.
    """
    optim, world_size = run.config.optim, run.accelerator.num_processes
    for a, batch in enumerate(micro_batches, start=1):
        set_batch_norm_momentum(
            run.batch_norms,
            accumulation_momentum(BATCH_NORM_MOMENTUM, a, len(micro_batches)),
        )
        last = a == len(micro_batches)
        # All-reduce once a step: with the last micro-batch's backward, overlapping it.
        with nullcontext() if last else run.accelerator.no_sync(run.model):
            torch.manual_seed(batch.dropout_seed)
            logits = run.model(batch.images)
            loss = F.cross_entropy(
                logits,
                batch.labels,
                reduction="sum",
                label_smoothing=run.config.train.label_smoothing,
            )
            # A sum over G: accumulation and ranks need no second correction, but DDP averages.
            run.accelerator.backward(loss * (world_size / run.plan.global_batch_size))
        run.meter.add(loss, logits, batch.labels)
    norm: torch.Tensor | float = math.nan
    if want_norm or optim.clip_norm is not None:
        limit = math.inf if optim.clip_norm is None else optim.clip_norm
        norm = run.accelerator.clip_grad_norm_(run.model.parameters(), limit)
    set_lr(run.optimizer, lr)
    run.optimizer.step()
    run.optimizer.zero_grad()
    return norm


def measure(run: Run, loader: EvalLoader) -> metrics.Row:
    """Evaluates the network as it is now, over all ranks."""
    average_batch_norm(run.batch_norms, run.accelerator, run.state.step * run.plan.micro_batches)
    return evaluate_over_ranks(run.accelerator, run.vgg, loader, run.dataset.superclass_of)


def build(config: Config, run_dir: Path) -> Run:
    """Joins the process group, takes the run folder, and makes every part of the run."""
    accelerator = start(config, run_dir)
    device = accelerator.device
    config = config.replace(train__precision=accelerator.mixed_precision)
    if accelerator.is_main_process:
        stamp_run_folder(run_dir, config)
    dataset = load_dataset(config.data)
    train_rows, val_rows = train_val_indices(dataset.train.labels, config.data)
    plan = Plan(
        len(train_rows),
        config.train.global_batch_size,
        config.train.micro_batch_size,
        accelerator.num_processes,
    )
    steps = plan.steps(config.train.epochs)
    torch.autograd.set_detect_anomaly(config.train.detect_anomaly)
    vgg = build_vgg(config.model, dataset.num_classes, derive_seed(config.seed, "weights"))
    place(vgg, accelerator, config)
    optimizer = build_optimizer(vgg, config.optim, fused=device.type in ("cpu", "cuda"))
    model, optimizer = distribute(accelerator, vgg, optimizer)
    model.train()
    pixels = Pixels(dataset, dataset.train, config.model.image_size, device)
    return Run(
        config=config,
        accelerator=accelerator,
        dataset=dataset,
        plan=plan,
        steps=steps,
        loader=DeviceLoader(config, pixels, train_rows, plan, accelerator.process_index),
        val_loader=EvalLoader(pixels, val_rows, config.eval.batch_size),
        vgg=vgg,
        model=model,
        optimizer=optimizer,
        batch_norms=batch_norm_layers(vgg),
        meter=TrainMeter(device, summing(accelerator)),
        clock=Clock(plan.global_batch_size),
        state=TrainState(),
    )


def finish(run: Run, run_dir: Path, val: metrics.Row, tracking: Tracking) -> Result:
    """Reads test once, then writes the weights and the result."""
    test: metrics.Row | None = None
    if run.dataset.test is not None:
        side, device = run.config.model.image_size, run.accelerator.device
        pixels = Pixels(run.dataset, run.dataset.test, side, device)
        test = measure(run, EvalLoader(pixels, None, run.config.eval.batch_size))
        step = {metrics.STEP: run.state.step, metrics.EPOCH: run.plan.epoch(run.state.step)}
        tracking.log(step | prefixed("test", test))
    result = Result.of(
        run.config,
        run.dataset,
        run.plan,
        run.accelerator,
        val=val,
        test=test,
        images_per_sec=run.clock.images_per_sec(),
        curves=tracking.curves,
    )
    if run.accelerator.is_main_process:
        save_weights(run.vgg, run_dir)
        save_result(result, run_dir)
    return result


def due(step: int, every: int, total: int) -> bool:
    """Whether something done every so many steps, and at the end, is due after `step` steps."""
    return step % every == 0 or step == total


def evaluation_due(step: int, every_epochs: float, plan: Plan, total: int) -> bool:
    """Whether to validate after `step` steps: where a multiple of `every_epochs` has just been
    passed, and at the end."""

    def passed(steps: int) -> int:
        # The rounding error of a fraction such as 0.1 must not cost a step: as in Plan.steps.
        return math.floor(plan.epoch(steps + 1e-6) / every_epochs)

    return passed(step) > passed(step - 1) or step == total


def warmup_steps(run: Run) -> int:
    """The steps of linear warm-up, at most all."""
    epochs = run.config.optim.warmup_epochs
    return min(run.steps, run.plan.steps(epochs)) if epochs else 0


def prefixed(split: str, row: metrics.Row) -> metrics.Row:
    """A split's metrics by the names that they have in rows."""
    return {f"{split}/{name}": value for name, value in row.items()}


def summary(run: Run, run_dir: Path) -> str:
    """What is about to run, in a line or two."""
    model, plan, accelerator = run.config.model, run.plan, run.accelerator
    size = sum(p.numel() for p in run.vgg.parameters()) / 1e6
    name = f"VGG-{model.depth}{'-BN' if model.batch_norm else ''}"
    return (
        f"{name} of {size:.1f}M parameters on {run.config.data.name}:"
        f" {plan.n_samples:,} train, {run.val_loader.n_samples:,} val images\n"
        f"{run.steps:,} steps of {plan.global_batch_size} = {accelerator.num_processes} process(es)"
        f" x {plan.accumulation} x {plan.micro_batch_size}, {accelerator.mixed_precision} on"
        f" {accelerator.device.type}, into {run_dir}"
    )

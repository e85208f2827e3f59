"""Diagnosis of a non-finite step: its micro-batches are computed again, one by one."""

import json
from contextlib import suppress

import torch

from distvgg.models.freezing import learned_parameters
from distvgg.optim.schedule import lr_at
from distvgg.runs.files import atomic_write
from distvgg.runs.layout import FAILURE_FILE
from distvgg.training.nan_monitor import NonFiniteError
from distvgg.training.state import Run, warmup_steps
from distvgg.training.step import forward

SHOWN = 5  # samples in the line


def diagnose(run: Run, failure: NonFiniteError) -> str:
    """Finds the micro-batch that made a step non-finite, and writes `failure.json`.

    Returns:
        A line for the user, with the first samples of the micro-batch.
    """
    what, k = "loss", failure.micro_batch
    if k is None:
        what, k = "gradient", find_non_finite_gradient(run, failure.step)
    plan, step = run.plan, failure.step + 1
    samples = [] if k is None else run.loader.rows(failure.step, k).tolist()
    facts = {
        "step": step,
        "epoch": plan.epoch(step),
        "micro_batch": k,
        "what": what,
        "value": str(failure.value),
        "samples": samples,
        "lr": lr_at(failure.step, run.config.optim, run.steps, warmup_steps(run)),
        "precision": run.accelerator.mixed_precision,
        "num_processes": plan.world_size,
    }
    if run.checkpoints is not None:
        with suppress(OSError):  # a full disk: the line has what matters
            atomic_write(run.folder / FAILURE_FILE, json.dumps(facts, indent=2).encode() + b"\n")
    place = "the sum over micro-batches" if k is None else f"micro-batch {k}"
    first = " ".join(map(str, samples[:SHOWN])) + " ..." * (len(samples) > SHOWN)
    return (
        f"step {step}: the {what} of {place} is {failure.value} at learning rate"
        f" {facts['lr']:.3g}. Lower optim.lr or set optim.clip_norm. Train samples:"
        f" {first or 'all of the step'} (all in {run.folder / FAILURE_FILE}). To look into it:"
        f" distvgg replay {run.folder} --step {step}" + ("" if k is None else f" --micro-batch {k}")
    )


def find_non_finite_gradient(run: Run, step: int) -> int | None:
    """Returns the first micro-batch of a step whose own gradient is not finite.

    Every rank computes its micro-batches again; the weights are still those before the step. None:
    each gradient is finite, and only their sum is not.
    """
    parameters = learned_parameters(run.vgg)
    scaler, found = run.accelerator.scaler, run.plan.micro_batches
    for batch in reversed(run.loader.micro_batches(step)):
        loss, _ = forward(run.vgg, batch, run.config.train.label_smoothing)
        scale = 1.0 if scaler is None else scaler.get_scale()
        gradients = torch.autograd.grad(loss * scale, parameters)
        if not torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
            found = batch.k
    here = torch.tensor([found], device=run.accelerator.device)
    first = int(run.accelerator.gather(here).min())
    return first if first < run.plan.micro_batches else None

"""Which micro-batch made a step non-finite: computed again, and said in a line."""

import json
from contextlib import suppress

import torch

from distvgg.optim.schedule import lr_at
from distvgg.runs.files import atomic_write
from distvgg.runs.layout import FAILURE_FILE
from distvgg.training.nan_monitor import NonFiniteError
from distvgg.training.state import Run, warmup_steps
from distvgg.training.step import summed_loss


def diagnose(run: Run, failure: NonFiniteError) -> str:
    """Finds the micro-batch of a step that failed, writes `failure.json`, and says it in a line."""
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
        with suppress(OSError):  # a full disk: the line has it all as well
            atomic_write(run.folder / FAILURE_FILE, json.dumps(facts, indent=2).encode() + b"\n")
    place = "the sum over micro-batches" if k is None else f"micro-batch {k}"
    return (
        f"step {step}: the {what} of {place} is {failure.value} at learning rate"
        f" {facts['lr']:.3g}. Lower optim.lr or set optim.clip_norm. Train samples:"
        f" {' '.join(map(str, samples))} (also in {run.folder / FAILURE_FILE})"
    )


def find_non_finite_gradient(run: Run, step: int) -> int | None:
    """The first micro-batch of a step whose gradient alone is not finite, by computing them again,
    every rank its own. The weights are still those before the step. None: only their sum is."""
    parameters = list(run.vgg.parameters())
    scaler, found = run.accelerator.scaler, run.plan.micro_batches
    for batch in reversed(run.loader.micro_batches(step)):
        torch.manual_seed(batch.dropout_seed)
        loss = summed_loss(run, run.vgg(batch.images), batch)
        scale = 1.0 if scaler is None else scaler.get_scale()
        gradients = torch.autograd.grad(loss * scale, parameters)
        if not torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
            found = batch.k
    here = torch.tensor([found], device=run.accelerator.device)
    first = int(run.accelerator.gather(here).min())
    return first if first < run.plan.micro_batches else None

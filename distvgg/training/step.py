"""One optimizer step.

Invariant: a step is a pure function of (config, data, weights, optimizer state, step number); the
number of processes decides only where its micro-batches run.
"""

import torch
import torch.nn.functional as F

from distvgg import preemption
from distvgg.data.loader import MicroBatch
from distvgg.optim.build import set_lr, skip_step_if
from distvgg.training.state import Run


def train_step(run: Run, micro_batches: list[MicroBatch], lr: float) -> None:
    """One optimizer step over this rank's micro-batches; gradients are summed over all.

    A step whose loss or gradient is not finite changes no weight, nor does any later one (in fp16,
    which skips such steps by itself, a later one may); the host learns of it from `run.monitor`.
    """
    for batch in micro_batches:
        torch.manual_seed(batch.dropout_seed)
        logits = run.model(batch.images)
        loss = summed_loss(run, logits, batch)
        run.sums.add(batch.k, loss, logits, batch.hard_labels)
        if batch is micro_batches[-1]:
            run.sums.start(preemption.requested())
        run.accelerator.backward(loss / run.plan.global_batch_size)
    run.gradients.finish()
    losses, hits, stop = run.sums.finish()
    run.meter.add(losses.sum(), hits.sum(), run.plan.global_batch_size)
    norm = clip_gradients(run)
    run.monitor.push(run.state.step, losses, norm, stop)
    if run.accelerator.scaler is None:  # which would skip the step by itself
        run.failed.copy_(run.failed.bool() | ~torch.isfinite(losses.sum() + norm))
        skip_step_if(run.optimizer, run.failed)
    set_lr(run.optimizer, lr)
    run.optimizer.step()
    run.optimizer.zero_grad()
    if run.ema is not None:
        run.ema.update(run.state.step)


def summed_loss(run: Run, logits: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    """Cross-entropy summed over a micro-batch; of mixed images that with either label, by share."""

    def with_labels(labels: torch.Tensor) -> torch.Tensor:
        smoothing = run.config.train.label_smoothing
        return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)

    if batch.partner_labels is None:
        return with_labels(batch.labels)
    share = batch.share
    return share * with_labels(batch.labels) + (1 - share) * with_labels(batch.partner_labels)


def clip_gradients(run: Run) -> torch.Tensor:
    """The global gradient norm, before the clipping that the config asks for."""
    run.accelerator.unscale_gradients()
    parameters = list(run.model.parameters())
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if run.config.optim.clip_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, run.config.optim.clip_norm, norm)
    return norm

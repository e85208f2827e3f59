"""One optimizer step.

Invariant: a step is a pure function of (config, data, weights, optimizer state, step number); the
number of processes decides only where its micro-batches run. Nothing here needs a run folder: the
same functions train, measure (`commands/bench.py`) and compute a micro-batch again (`diagnose.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distvgg import preemption
from distvgg.config import Config
from distvgg.data.loader import MicroBatch
from distvgg.data.plan import BatchPlan
from distvgg.distributed.step_sums import StepReducer
from distvgg.models.ema import EMA
from distvgg.optim.build import set_lr, skip_step_if
from distvgg.training.meters import TrainMeter
from distvgg.training.nan_monitor import StepMonitor

if TYPE_CHECKING:
    from accelerate import Accelerator

    from distvgg.training.cuda_graphs import InputBuffers, StepGraphs


class GradientSum(Protocol):
    """Sums the gradients that backward leaves, micro-batch by micro-batch."""

    def add(self, gradients: Sequence[Tensor]) -> None:
        """Takes a micro-batch's gradients that backward did not leave, in order."""

    def finish(self) -> None:
        """Gives each parameter its gradient, summed over all micro-batches of the step."""


@dataclass(frozen=True, kw_only=True)
class StepParts:
    """The parts of a run that a step works on.

    Attributes:
        model: the network with mixed precision and compilation.
        graphs: of micro-batches, on a GPU; None: each operation is launched by the host.
        ema: the moving average of its weights, or None.
        failed: [] float32 on the device, 1 from the first non-finite step on; unused in fp16.
    """

    config: Config
    accelerator: "Accelerator"
    model: nn.Module
    graphs: "StepGraphs | None"
    optimizer: torch.optim.Optimizer
    ema: EMA | None
    gradients: GradientSum
    sums: StepReducer
    meter: TrainMeter
    monitor: StepMonitor
    failed: Tensor
    plan: BatchPlan


def train_step(parts: StepParts, step: int, micro_batches: Sequence[MicroBatch], lr: float) -> None:
    """Takes one optimizer step.

    A step whose loss or gradient is not finite changes no weight, nor does any later step, and
    `parts.monitor` reports it to the host. In fp16 the loss scaler skips a step whose gradient is
    not finite, and the run continues.

    Args:
        parts: what the step changes: weights, optimizer state, EMA, sums.
        step: number of the step, from 0.
        micro_batches: those of this rank, in order.
        lr: learning rate of the step.
    """
    if parts.graphs is not None:
        parts.graphs.start_step(parts)
    for batch in micro_batches:
        computed = None if parts.graphs is None else parts.graphs.run(parts, batch)
        if computed is None:
            loss, logits = forward(parts.model, batch, parts.config.train.label_smoothing)
        else:
            loss, logits = computed.loss, computed.logits
        parts.sums.add(batch.k, loss, logits, batch.hard_labels)
        if batch is micro_batches[-1]:
            parts.sums.start(preemption.requested())  # overlaps with the last backward
        if computed is None:
            parts.accelerator.backward(loss / parts.plan.global_batch_size)
        else:
            parts.gradients.add(computed.gradients)
    parts.gradients.finish()
    losses, correct, stop = parts.sums.finish()
    parts.meter.add(losses.sum(), correct.sum(), parts.plan.global_batch_size)
    norm = clip_gradients(parts)
    parts.monitor.push(step, losses, norm, stop)
    if parts.accelerator.scaler is None:  # a scaler skips the step itself
        parts.failed.copy_(parts.failed.bool() | ~torch.isfinite(losses.sum() + norm))
        skip_step_if(parts.optimizer, parts.failed)
    set_lr(parts.optimizer, lr)
    parts.optimizer.step()
    parts.optimizer.zero_grad()
    if parts.ema is not None:
        parts.ema.update(step)


def forward(model: nn.Module, batch: MicroBatch, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """Runs a model on a micro-batch, with the batch's own dropout masks.

    Returns:
        The summed cross-entropy, and the logits [m, classes].
    """
    torch.manual_seed(batch.dropout_seed)  # dropout draws from the global generator only
    logits = model(batch.images)
    return summed_loss(logits, batch, label_smoothing), logits


def summed_loss(
    logits: Tensor,
    batch: "MicroBatch | InputBuffers",
    label_smoothing: float,
    reduction: str = "sum",
) -> Tensor:
    """Computes the cross-entropy summed over a micro-batch; with reduction `none`, of each sample.

    With MixUp or CutMix: the losses for `labels` and `partner_labels`, by `loss_weights`.
    """

    def cross_entropy(labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, reduction=reduction, label_smoothing=label_smoothing)

    if batch.partner_labels is None:
        return cross_entropy(batch.labels)
    weight, partner_weight = batch.loss_weights
    return weight * cross_entropy(batch.labels) + partner_weight * cross_entropy(
        batch.partner_labels
    )


def clip_gradients(parts: StepParts) -> Tensor:
    """Clips the gradients if the config says so, and returns their norm before that."""
    parts.accelerator.unscale_gradients()
    parameters = list(parts.model.parameters())
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if (largest := parts.config.optim.clip_norm) is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return norm

"""Losses, hits, BatchNorm statistics and stop requests of a step, summed over ranks."""

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distvgg.distributed.reduction_plan import TreePlan
from distvgg.distributed.tree_sum import ExchangeQueue, TreeSum

if TYPE_CHECKING:
    from accelerate import Accelerator


BATCH_NORM_MOMENTUM = 0.1  # torch's and torchvision's default


class StepReducer:
    """What all ranks must know of a step: the loss and hits of each micro-batch and the wish to
    stop, in one small all-reduce, and the statistics that BatchNorm took, summed along the tree.
    Both hide behind backward.

    Invariant: after `finish` every rank holds the same bits, whichever of them ran what. BatchNorm
    takes one update a step, with the mean over all micro-batches: a function of the step alone, and
    so is a checkpoint at any step. The layers' own momentum is 1, which leaves in their buffers
    what a micro-batch measured; one that changed within a step would be compiled anew for each
    value, and not at all from the ninth on (torch 2.14).

    Args:
        queue: runs the exchanges of the step; others' may be in it.
    """

    def __init__(
        self,
        accelerator: "Accelerator",
        plan: TreePlan,
        layers: list[nn.BatchNorm2d],
        queue: ExchangeQueue,
    ) -> None:
        for layer in layers:
            layer.momentum = 1.0
        self._plan, self._queue = plan, queue
        self._buffers = [
            b for m in layers for b in (m.running_mean, m.running_var) if b is not None
        ]
        # Another rank's micro-batches are zero here, and adding zero is exact.
        parts = [plan.n, plan.n, 1]
        self._flat = torch.zeros(sum(parts), dtype=torch.float64, device=accelerator.device)
        self._losses, self._hits, self._stop = torch.split(self._flat, parts)
        self._pending: dist.Work | None = None
        if self._buffers:
            self._running = torch.cat(self._buffers)
            self._running_parts = torch.split(self._running, [b.numel() for b in self._buffers])
            self._statistics = TreeSum(plan, [self._running], torch.float64)

    @torch.no_grad()
    def add(self, k: int, summed_loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Adds a micro-batch after its forward: its loss summed over samples, [m, classes] logits,
        [m] labels, and what BatchNorm measured."""
        self._losses[k] = summed_loss
        self._hits[k] = (logits.argmax(1) == labels).sum()
        if self._buffers:
            self._statistics.add([torch.cat(self._buffers)])

    @torch.no_grad()
    def start(self, stop: bool) -> None:
        """Begins the reduction; to be called by every rank after its last forward of a step."""
        self._stop.fill_(float(stop))
        if self._plan.ranks.world_size > 1:
            self._pending = dist.all_reduce(self._flat, async_op=True)
        if self._buffers:
            self._queue.start(self._statistics.exchange())

    @torch.no_grad()
    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ends the reduction, updates BatchNorm's buffers, and makes ready for the next step. Not
        before backward, which reads what the buffers were.

        Returns:
            float64 on the device: [G/m] losses and [G/m] hits by micro-batch, and how many ranks
            wish to stop.
        """
        self._queue.finish()
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
        if self._buffers:
            mean = (self._statistics.total[0] / self._plan.n).to(self._running.dtype)
            self._running.lerp_(mean, BATCH_NORM_MOMENTUM)
            torch._foreach_copy_(self._buffers, self._running_parts)
        totals = self._losses.clone(), self._hits.clone(), self._stop.clone()
        self._flat.zero_()
        return totals

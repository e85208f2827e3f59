"""Sums over ranks of a step's losses, correct counts, BatchNorm statistics and stop requests."""

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
    """The reduction of a step's losses, correct counts, stop requests and BatchNorm statistics.

    One small all-reduce carries the loss and correct count of each micro-batch and the stop
    requests. The statistics that BatchNorm measured are summed along the tree. Both overlap with
    backward.

    Invariant: after `finish` every rank holds the same bits, whichever rank ran a micro-batch.
    BatchNorm is updated once a step, with the mean over all micro-batches. The update is a function
    of the step alone, and so is a checkpoint at any step.

    The layers' own momentum is 1, so that their buffers hold the statistics of one micro-batch. A
    momentum that changes within a step would be recompiled for each value, and not compiled at all
    from the ninth value on (torch 2.14).

    Args:
        accelerator: the handle on the process group.
        plan: of the sums over micro-batches.
        layers: all BatchNorm layers of the network.
        queue: runs the exchanges of the step; may hold other exchanges too.
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
        # The micro-batches of other ranks are zero here, and adding zero is exact.
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
        """Adds a micro-batch after its forward, and the statistics that BatchNorm measured in it.

        Args:
            k: the index of the micro-batch in the step.
            summed_loss: summed over samples.
            logits: [m, classes].
            labels: [m].
        """
        self._losses[k] = summed_loss
        self._hits[k] = (logits.argmax(1) == labels).sum()
        if self._buffers:
            self._statistics.add([torch.cat(self._buffers)])

    @torch.no_grad()
    def start(self, stop: bool) -> None:
        """Starts the reduction; every rank calls it after its last forward of a step."""
        self._stop.fill_(float(stop))
        if self._plan.ranks.world_size > 1:
            self._pending = dist.all_reduce(self._flat, async_op=True)
        if self._buffers:
            self._queue.start(self._statistics.exchange())

    @torch.no_grad()
    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ends the reduction, updates BatchNorm's buffers, and resets the sums for the next step.

        Must not be called before backward, which reads the old buffers.

        Returns:
            float64 on the device: [G/m] losses and [G/m] correct counts by micro-batch, and the
            number of ranks with a stop request.
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

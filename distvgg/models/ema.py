"""The exponential moving average (EMA) of the weights, and the network with the average weights.

Owns the average and BatchNorm's statistics under the average. Invariant: the average is a pure
function of the weights after each step, the same on every rank. The statistics are a pure function
of the average and of the last steps, and so need not be kept.

Averaging removes the noise of the last steps from the weights (Polyak and Juditsky, 1992; Tarvainen
and Valpola, 2017). BatchNorm's statistics from training belong to the trained weights, and would be
wrong for their average (Izmailov et al., 2018, section 3.2). The statistics are therefore measured
again.
"""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor

from distvgg.distributed.reduction_plan import TreePlan
from distvgg.distributed.tree_sum import ExchangeQueue, TreeSum
from distvgg.models.vgg import VGG, batch_norm_layers

STATISTICS_STEPS = 8
"""Number of last steps on whose images BatchNorm's statistics are measured."""


class EMA:
    """The exponential moving average of a network's weights.

    Args:
        vgg: the network whose weights are averaged.
        decay: of the average in a step. It is smaller in early steps, (1 + step) / (10 + step), so
            that the initial weights are forgotten.

    Attributes:
        network: the network with the average weights.
        measured_at: the step for which `network` also has BatchNorm's statistics, or None.
    """

    def __init__(self, vgg: VGG, decay: float) -> None:
        self._decay = decay
        self.network = copy.deepcopy(vgg).eval().requires_grad_(False)
        self.measured_at: int | None = None
        pairs = zip(self.network.parameters(), vgg.parameters(), strict=True)
        learned = [(average, weight) for average, weight in pairs if weight.requires_grad]
        self._average: list[Tensor] = [average for average, _ in learned]
        self._weights: list[Tensor] = [weight for _, weight in learned]
        self._layers = batch_norm_layers(self.network)
        for layer in self._layers:
            layer.momentum = 1.0  # so that the buffers hold the statistics of one batch

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Adds the weights after step `step`, counted from 0, to the average."""
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._average, self._weights, 1 - decay)

    @torch.no_grad()
    def measure(
        self, batches: Iterable[Tensor], plan: TreePlan, queue: ExchangeQueue, step: int
    ) -> None:
        """Sets BatchNorm's statistics to their mean over the batches of some steps.

        The statistics of each batch are measured with the average weights. Every rank must call
        this method.

        Args:
            batches: [m, 3, s, s] each; the batches of this rank, one step after the other.
            plan: of the sum over the batches of a step.
            queue: runs the exchanges.
            step: the number of steps taken, which `measured_at` records.
        """
        self.measured_at = step
        if not (buffers := self._buffers()):
            return
        flat = torch.cat(buffers)
        of_step, total, steps = TreeSum(plan, [flat], torch.float64), flat.double().zero_(), 0
        for layer in self._layers:
            layer.train()
        for images in batches:
            self.network(images)
            of_step.add([torch.cat(buffers)])
            if of_step.complete:
                queue.start(of_step.exchange())
                queue.finish()
                total += of_step.total[0]
                steps += 1
        self.network.eval()
        mean = (total / (steps * plan.n)).to(flat.dtype)
        torch._foreach_copy_(buffers, torch.split(mean, [b.numel() for b in buffers]))

    def _buffers(self) -> list[Tensor]:
        return [b for m in self._layers for b in (m.running_mean, m.running_var) if b is not None]

"""An exponential moving average of the weights, and the network that has them.

Owns the average and BatchNorm's statistics under it. Invariant: the average is a pure function of
the weights after each step, the same on every rank; the statistics are one of the average and of
the steps just taken, and so need not be kept.

Averaging takes the noise of the last steps out of the weights (Polyak and Juditsky, 1992; Tarvainen
and Valpola, 2017). What BatchNorm measured belongs to the weights that were trained, and would be
wrong for their average (Izmailov et al., 2018, section 3.2): it is measured again.
"""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor

from distvgg.distributed.reduction_plan import TreePlan
from distvgg.distributed.tree_sum import ExchangeQueue, TreeSum
from distvgg.models.vgg import VGG, batch_norm_layers

STATISTICS_STEPS = 8
"""The steps just taken whose images BatchNorm's statistics are measured on."""


class EMA:
    """The average of a network's weights.

    Args:
        vgg: whose weights are averaged.
        decay: of the average in a step; less in early ones, (1 + step) / (10 + step), so that the
            initial weights are forgotten.

    Attributes:
        network: has the average weights.
        measured_at: the step for which it has BatchNorm's statistics too.
    """

    def __init__(self, vgg: VGG, decay: float) -> None:
        self._decay = decay
        self.network = copy.deepcopy(vgg).eval().requires_grad_(False)
        self.measured_at: int | None = None
        self._average: list[Tensor] = list(self.network.parameters())
        self._weights: list[Tensor] = list(vgg.parameters())
        self._layers = batch_norm_layers(self.network)
        for layer in self._layers:
            layer.momentum = 1.0  # leaves in the buffers what one batch measured

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after the step of this number, from 0."""
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._average, self._weights, 1 - decay)

    @torch.no_grad()
    def measure(
        self, batches: Iterable[Tensor], plan: TreePlan, queue: ExchangeQueue, step: int
    ) -> None:
        """Sets BatchNorm's statistics to the mean, over some steps' batches, of what it measures on
        each with the average weights. Every rank must call it.

        Args:
            batches: [m, 3, s, s] each, this rank's of one step after the other.
            plan: of the sum over the batches of a step.
            step: after which this is.
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

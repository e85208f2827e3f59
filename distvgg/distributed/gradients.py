"""The gradient of a step: summed over its micro-batches along the tree, in buckets.

Owns the buckets and the moment at which each is exchanged: with the rank's last micro-batch, as
soon as backward has it, so that messages travel while backward goes on (Li et al., "PyTorch
Distributed", VLDB 2020, section 3.2.3). Invariant: between two steps no parameter has a gradient;
after `finish` each has that of the whole step, with the same bits on every rank. The buckets do not
reach into the bits, since every element is summed along the same tree.
"""

from collections.abc import Iterable
from functools import partial

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from distvgg.distributed.reduction_plan import TreePlan, buckets
from distvgg.distributed.tree_sum import ExchangeQueue, TreeSum


class GradientReducer:
    """Takes the gradients of each micro-batch from the parameters, and gives them back summed.

    Args:
        parameters: in the order of the network; all must take part in every backward.
        queue: runs the exchanges; others' may be in it.
    """

    def __init__(self, parameters: Iterable[Tensor], plan: TreePlan, queue: ExchangeQueue) -> None:
        backwards = list(parameters)[::-1]
        sizes = [p.numel() * p.element_size() for p in backwards]
        self._buckets = [[backwards[i] for i in bucket] for bucket in buckets(sizes)]
        self._sums = [TreeSum(plan, bucket, bucket[0].dtype) for bucket in self._buckets]
        self._queue = queue
        self._missing = list(map(len, self._buckets))
        self._next = 0
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """Takes the gradients of every backward from here on, if it does not yet."""
        if self._handles:
            return
        for number, bucket in enumerate(self._buckets):
            for p in bucket:
                taken = partial(self._arrived, number)
                handle = p.register_post_accumulate_grad_hook(taken)  # type: ignore[no-untyped-call]
                self._handles.append(handle)

    def detach(self) -> None:
        """Leaves gradients to others again."""
        while self._handles:
            self._handles.pop().remove()

    def finish(self) -> None:
        """Ends the step: gives every parameter its gradient, summed over all micro-batches."""
        self._queue.finish()
        for bucket, total in zip(self._buckets, self._sums, strict=True):
            for p, gradient in zip(bucket, total.total, strict=True):
                p.grad = gradient

    def _arrived(self, number: int, _: Tensor) -> None:
        self._missing[number] -= 1
        # In order, whichever is there first: all ranks must exchange them alike.
        while self._missing[self._next] == 0:
            self._take(self._next)
            self._next = (self._next + 1) % len(self._buckets)

    def _take(self, number: int) -> None:
        bucket, total = self._buckets[number], self._sums[number]
        gradients = [p.grad for p in bucket if p.grad is not None]
        total.add(gradients)
        self._missing[number] = len(bucket)
        for p in bucket:
            p.grad = None
        if total.complete:
            self._queue.start(total.exchange())

"""The gradient of a step, summed over its micro-batches along the tree, in buckets.

Owns the buckets and the moment at which each bucket is exchanged. In the rank's last micro-batch, a
bucket is exchanged as soon as backward has produced it. Messages then overlap with the rest of
backward (Li et al., "PyTorch Distributed", VLDB 2020, section 3.2.3).

Invariant: between two steps no parameter has a gradient. After `finish` each parameter has the
gradient of the complete step, with the same bits on every rank. The buckets do not affect the bits,
since every element is summed along the same tree.
"""

from collections.abc import Iterable, Sequence
from functools import partial

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from distvgg.distributed.reduction_plan import TreePlan, buckets
from distvgg.distributed.tree_sum import ExchangeQueue, TreeSum


class GradientReducer:
    """Takes each micro-batch's gradients from the parameters and gives back their sum.

    Args:
        parameters: those that are trained, in the order of the network; every backward must produce
            all their gradients.
        plan: of the sum over micro-batches.
        queue: runs the exchanges; may hold other exchanges too.
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
        """Takes the gradients of every later backward; does nothing if already attached."""
        if self._handles:
            return
        for number, bucket in enumerate(self._buckets):
            for p in bucket:
                taken = partial(self._arrived, number)
                handle = p.register_post_accumulate_grad_hook(taken)  # type: ignore[no-untyped-call]
                self._handles.append(handle)

    def detach(self) -> None:
        """Leaves the gradients of every later backward in the parameters."""
        while self._handles:
            self._handles.pop().remove()

    def add(self, gradients: Sequence[Tensor]) -> None:
        """Takes a micro-batch's gradients, which were not left in the parameters.

        Args:
            gradients: in the order of the parameters.
        """
        backwards = iter(gradients[::-1])
        for number, bucket in enumerate(self._buckets):
            self._take(number, [next(backwards) for _ in bucket])

    def finish(self) -> None:
        """Ends the step: sets each parameter's gradient to its sum over all micro-batches."""
        self._queue.finish()
        for bucket, total in zip(self._buckets, self._sums, strict=True):
            for p, gradient in zip(bucket, total.total, strict=True):
                p.grad = gradient

    def _arrived(self, number: int, _: Tensor) -> None:
        self._missing[number] -= 1
        # In a fixed order, even if a later bucket is complete: it must be the same on all ranks.
        while self._missing[self._next] == 0:
            bucket = self._buckets[self._next]
            self._take(self._next, [p.grad for p in bucket if p.grad is not None])
            self._missing[self._next] = len(bucket)
            for p in bucket:
                p.grad = None
            self._next = (self._next + 1) % len(self._buckets)

    def _take(self, number: int, gradients: list[Tensor]) -> None:
        total = self._sums[number]
        total.add(gradients)
        if total.complete:
            self._queue.start(total.exchange())

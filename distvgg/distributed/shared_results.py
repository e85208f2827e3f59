"""Matrices that ranks compute in turn and hand to each other."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from distvgg.distributed.partition import greedy_partition
from distvgg.distributed.reduction_plan import Ranks
from distvgg.distributed.tree_sum import Messages, all_gather


class PartitionedCompute:
    """Matrices of which each is computed by one rank and wanted by all.

    Who computes which is a function of costs and ranks alone (`partition.greedy_partition`).
    Invariant: after `exchange` every rank holds the same bits, and what is computed for one matrix
    does not depend on who computes it, nor on what else that rank computes.

    Args:
        shapes: of the matrices, (rows, columns).
        costs: of computing them, in any one unit.
        ranks: this process among all.

    Attributes:
        mine: the numbers of those that this rank computes, into `self[i]`.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        costs: Sequence[float],
        dtype: torch.dtype,
        device: torch.device,
        ranks: Ranks,
    ) -> None:
        self.dtype, self.device, self._ranks = dtype, device, ranks
        owners = greedy_partition(costs, ranks.world_size)
        self.mine = {i for i, owner in enumerate(owners) if owner == ranks.rank}
        # One after the other by owner: what a rank computes is one segment.
        order = sorted(range(len(shapes)), key=lambda i: owners[i])
        sizes = [math.prod(shapes[i]) for i in order]
        self._flat = torch.zeros(sum(sizes), dtype=dtype, device=device)
        views = dict(zip(order, torch.split(self._flat, sizes), strict=True))
        self._results = [views[i].view(shape) for i, shape in enumerate(shapes)]
        self._segments: dict[int, tuple[int, int]] = {}
        end = 0
        for i, size in zip(order, sizes, strict=True):
            first, _ = self._segments.get(owners[i], (end, end))
            end += size
            self._segments[owners[i]] = first, end
        others = [rank for rank in range(ranks.world_size) if rank != ranks.rank]
        sends = [(peer, self._common(ranks.rank, peer)) for peer in others]
        receives = [(peer, self._common(peer, ranks.rank)) for peer in others]
        # Of many ranks few have anything in common: each step would pass over the rest.
        self._to_shards = Messages(
            *([(peer, part) for peer, part in ends if part.numel()] for ends in (sends, receives))
        )

    def __getitem__(self, i: int) -> Tensor:
        return self._results[i]

    def exchange(self) -> Iterator[Messages]:
        """Hands this rank's results to all others: first to the ranks that hold their shards, then
        these to all. So results, and not ranks, decide how many bytes travel."""
        if self._ranks.world_size > 1:
            yield self._to_shards
        yield from all_gather(self._ranks, self._flat)

    def _common(self, owner: int, holder: int) -> Tensor:
        """The part of one rank's results that lies in the shard of another."""
        shard = self._ranks.shard(self._flat, holder)
        start = int(shard.storage_offset())
        first, end = self._segments.get(owner, (0, 0))
        first, end = max(first, start), min(end, start + shard.numel())
        return self._flat[first : max(first, end)]

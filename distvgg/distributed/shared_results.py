"""Matrices whose computation is partitioned over ranks and whose values are sent to all ranks."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from distvgg.distributed.partition import greedy_partition
from distvgg.distributed.reduction_plan import Ranks
from distvgg.distributed.tree_sum import Messages, all_gather


class PartitionedCompute:
    """Matrices that are each computed by one rank and needed by all ranks.

    The owner of a matrix is a function of costs and ranks alone (`partition.greedy_partition`).
    Invariant: after `exchange` every rank holds the same bits. The result for a matrix depends
    neither on its owner nor on the owner's other matrices.

    Args:
        shapes: (rows, columns) of each matrix.
        costs: of computing each matrix, in any common unit.
        ranks: the rank of this process and the levels of the exchange.

    Attributes:
        mine: the indices of the matrices that this rank computes, into `self[i]`.
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
        # Sorted by owner, so that the results of a rank are one segment.
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
        # Among many ranks, few pairs have a common part. Empty parts are dropped once, not in each
        # step.
        self._to_shards = Messages(
            *([(peer, part) for peer, part in ends if part.numel()] for ends in (sends, receives))
        )

    def __getitem__(self, i: int) -> Tensor:
        return self._results[i]

    def exchange(self) -> Iterator[Messages]:
        """Yields the messages that bring the results of every rank to all ranks.

        Results go first to the ranks that hold their shards, and from these ranks to all. The bytes
        sent depend on the size of the results, not on the number of ranks.
        """
        if self._ranks.world_size > 1:
            yield self._to_shards
        yield from all_gather(self._ranks, self._flat)

    def _common(self, owner: int, holder: int) -> Tensor:
        """Returns the part of one rank's results that lies in the shard of another rank."""
        shard = self._ranks.shard(self._flat, holder)
        start = int(shard.storage_offset())
        first, end = self._segments.get(owner, (0, 0))
        first, end = max(first, start), min(end, start + shard.numel())
        return self._flat[first : max(first, end)]

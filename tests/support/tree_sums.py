"""Sums along the tree by their definition, and exchanges among ranks in one process."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from distvgg.distributed.tree_sum import Messages


def by_definition(leaves: Sequence[Tensor]) -> Tensor:
    """Splits at the largest power of two below the number of leaves, and adds the halves."""
    if len(leaves) == 1:
        return leaves[0]
    middle = max(2**i for i in range(11) if 2**i < len(leaves))
    return by_definition(leaves[:middle]) + by_definition(leaves[middle:])


def some_leaves(n: int, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[n, size] numbers of all magnitudes, whose sum depends on the order."""
    generator = torch.Generator().manual_seed(n)
    exponents = torch.randint(-20, 20, (n, size), generator=generator)
    return (torch.randn(n, size, generator=generator) * 2.0**exponents).to(dtype)


def over_ranks(exchanges: Sequence[Iterator[Messages]]) -> tuple[list[int], list[int]]:
    """Runs the exchanges of all ranks in one process, stage by stage; the elements and the messages
    that each rank has sent."""
    sent, messages = [0] * len(exchanges), [0] * len(exchanges)
    while True:
        stages = [next(exchange, None) for exchange in exchanges]
        if None in stages:
            assert set(stages) == {None}
            return sent, messages
        mail: dict[tuple[int, int], list[Tensor]] = {}
        for rank, stage in enumerate(stages):
            assert isinstance(stage, Messages)
            for peer, tensor in stage.sends:
                mail.setdefault((rank, peer), []).append(tensor.clone())
                sent[rank] += tensor.numel()
                messages[rank] += 1
        for rank, stage in enumerate(stages):
            assert stage is not None
            for peer, tensor in stage.receives:
                tensor.copy_(mail[peer, rank].pop(0))
        assert not any(mail.values())

"""Sums over the micro-batches of a step that do not depend on the number of ranks, to the last bit.

Owns the sums of this rank's micro-batches and their exchange with other ranks, along the tree of
`reduction_plan.py`. Knows tensors and a plan, nothing of networks. Invariant: messages are copies,
and the additions are made here, so that no algorithm of NCCL or gloo reaches into the bits.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from distvgg.distributed.reduction_plan import Ranks, TreePlan, additions

# Floats between the starts of two parts in a vector, so that each begins at a multiple of 64 bytes:
# vectorised kernels load whole lines, as from a tensor of its own.
ALIGNMENT = 16


class Messages(NamedTuple):
    """Messages of one rank at a time, (peer, vector) each. The vectors are read and written until
    all have arrived."""

    sends: list[tuple[int, Tensor]]
    receives: list[tuple[int, Tensor]]


class TreeSum:
    """A vector in parts, summed over the leaves of all ranks: `add` each of this rank's leaves, in
    order, then run `exchange` to its end. After it every rank has the same bits in `total`, and the
    next `add` begins the next sum.

    Memory: `plan.slots` vectors, of which `total` is one; during the exchange also what peers send,
    less than one vector where one partial sum travels.

    Args:
        parts: tensors with the parts' shapes, strides and device; they must be dense.
        dtype: of the sums.
    """

    def __init__(self, plan: TreePlan, parts: Sequence[Tensor], dtype: torch.dtype) -> None:
        starts, size = [], 0
        for part in parts:
            starts.append(size)
            size += -(-part.numel() // ALIGNMENT) * ALIGNMENT
        self._plan = plan
        self._slots = torch.zeros(plan.slots, size, dtype=dtype, device=parts[0].device)
        self._parts = [
            [
                slot.as_strided(part.shape, part.stride(), slot.storage_offset() + start)
                for part, start in zip(parts, starts, strict=True)
            ]
            for slot in self._slots
        ]
        self._added = 0

    @property
    def total(self) -> list[Tensor]:
        """The parts of the sum; views of memory that the next sum takes."""
        return self._parts[0]

    @property
    def complete(self) -> bool:
        """Whether this rank has added all its leaves since the last exchange."""
        return self._added == len(self._plan.placements)

    @torch.no_grad()
    def add(self, parts: Sequence[Tensor]) -> None:
        """Adds this rank's next leaf."""
        slot, is_new, merges = self._plan.placements[self._added]
        fill = torch._foreach_copy_ if is_new else torch._foreach_add_
        fill(self._parts[slot], list(parts))
        for right in range(slot, slot - merges, -1):
            self._slots[right - 1] += self._slots[right]
        self._added += 1

    def exchange(self) -> Iterator[Messages]:
        """Sums over ranks. What is yielded must have arrived before going on."""
        assert self.complete
        self._added = 0
        n, ranks = self._plan.n, self._plan.ranks
        sums = list(self._slots[: len(self._plan.nodes(0, ranks.rank))])
        for level in range(len(ranks.levels)):
            peers = ranks.peers(level, ranks.rank)
            nodes = [self._plan.nodes(level, peer) for peer in peers]
            parts = [s.tensor_split(len(peers)) for s in sums]
            messages = Messages([], [])
            pieces: list[Tensor] = []
            for digit, peer in enumerate(peers):
                if peer == ranks.rank:
                    pieces += [part[digit] for part in parts]
                    continue
                messages.sends.extend((peer, part[digit]) for part in parts)
                mine = parts[0][peers.index(ranks.rank)]
                received = [torch.empty_like(mine) for _ in nodes[digit]]
                messages.receives.extend((peer, piece) for piece in received)
                pieces += received
            yield messages
            pairs, remaining = additions([node for found in nodes for node in found], n)
            for i, j in pairs:
                pieces[i] += pieces[j]
            sums = [pieces[i] for i in remaining]
        (total,) = sums
        own = ranks.shard(self._slots[0], ranks.rank)
        if total.data_ptr() != own.data_ptr():  # else it was added up in place
            own.copy_(total)
        yield from all_gather(ranks, self._slots[0])


def all_gather(ranks: Ranks, vector: Tensor) -> Iterator[Messages]:
    """Hands every rank's shard of a vector to all others, level by level. What is yielded must
    have arrived before going on."""
    stages: list[dict[int, Tensor]] = []
    for level, radix in enumerate(ranks.levels):
        peers = ranks.peers(level, ranks.rank)
        stages.append(dict(zip(peers, vector.tensor_split(radix), strict=True)))
        vector = stages[-1][ranks.rank]
    for shards in reversed(stages):
        own = shards.pop(ranks.rank)
        yield Messages([(peer, own) for peer in shards], list(shards.items()))


class _Pending(NamedTuple):
    exchange: Iterator[Messages]
    works: list[dist.Work]
    arriving: list[tuple[Tensor, Tensor]]
    """(where it is wanted, where it arrives) of what does not arrive where it is wanted."""


class ExchangeQueue:
    """Exchanges of several sums under way at a time, beside computation.

    Every rank must start the same exchanges in the same order. On a GPU all happens on a stream of
    its own, and only that waits: an exchange is sent whole as it starts. Where the host waits, on a
    CPU and with gloo, starting an exchange takes those before it a stage further: a fixed order on
    every rank, in which messages of one exchange travel while the next one's sum is computed.
    """

    def __init__(self, device: torch.device) -> None:
        self._running: deque[_Pending] = deque()
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._on_host = (
            device.type != "cpu" and dist.is_initialized() and dist.get_backend() == "gloo"
        )

    @torch.no_grad()
    def start(self, exchange: Iterator[Messages]) -> None:
        """Begins an exchange: a generator of messages that goes on when they have arrived."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with self._beside():
            self._advance()
            self._continue(exchange)
            while self._stream is not None and not self._on_host and self._running:
                self._advance()

    @torch.no_grad()
    def finish(self) -> None:
        """Ends all that is under way; every `total` is then there to be read."""
        with self._beside():
            while self._running:
                self._advance()
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def _advance(self) -> None:
        for _ in range(len(self._running)):
            exchange, works, arriving = self._running.popleft()
            for work in works:
                work.wait()
            for wanted, arrived in arriving:
                wanted.copy_(arrived)
            self._continue(exchange)

    def _continue(self, exchange: Iterator[Messages]) -> None:
        messages = next(exchange, None)
        if messages is None:
            return
        operations, arriving = [], []
        for operation, ends in ((dist.isend, messages.sends), (dist.irecv, messages.receives)):
            for peer, tensor in ends:
                if not tensor.numel():  # a vector may have fewer elements than there are ranks
                    continue
                wire = tensor.to("cpu") if self._on_host else tensor
                operations.append(dist.P2POp(operation, wire, peer))
                if operation is dist.irecv and wire is not tensor:
                    arriving.append((tensor, wire))
        works = dist.batch_isend_irecv(operations) if operations else []
        self._running.append(_Pending(exchange, works, arriving))

    def _beside(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

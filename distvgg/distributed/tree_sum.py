"""Sums over the micro-batches of a step, with the same bits at any world size.

Owns the sums of this rank's micro-batches and the exchange of these sums with other ranks, along
the tree of `reduction_plan.py`. Handles tensors and a plan, and is independent of networks.
Invariant: messages are copies, and the additions are made here, so that no algorithm of NCCL or
gloo affects the bits.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from distvgg.distributed.reduction_plan import Ranks, TreePlan, additions

# Each part starts in the vector at a multiple of this number of floats, so at a multiple of 64
# bytes. Vectorised kernels then load full cache lines, as from a separate tensor.
ALIGNMENT = 16


class Messages(NamedTuple):
    """The messages of one rank in one stage, as (peer, vector).

    The vectors are read and written until all messages have arrived.
    """

    sends: list[tuple[int, Tensor]]
    receives: list[tuple[int, Tensor]]


class TreeSum:
    """The sum of a vector in parts over the leaves of all ranks.

    Call `add` for each of this rank's leaves, in order, then run `exchange` to its end. Every rank
    then has the same bits in `total`. The next `add` starts the next sum.

    Memory: `plan.slots` vectors, one of which is `total`. The exchange also holds the messages from
    peers, less than one vector if one partial sum is exchanged.

    Args:
        plan: of the additions and the exchange.
        parts: dense tensors with the shapes, strides and device of the parts.
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
        """The parts of the sum, as views of memory that the next sum overwrites."""
        return self._parts[0]

    @property
    def complete(self) -> bool:
        """True if this rank has added all its leaves since the last exchange."""
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
        """Sums over ranks and yields the messages of each stage.

        The yielded messages must have arrived before the generator is resumed.
        """
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
        if total.data_ptr() != own.data_ptr():  # otherwise it was added up in place
            own.copy_(total)
        yield from all_gather(ranks, self._slots[0])


def all_gather(ranks: Ranks, vector: Tensor) -> Iterator[Messages]:
    """Yields the messages that send each rank's shard of a vector to all others, by level.

    The yielded messages must have arrived before the generator is resumed.
    """
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
    """(destination, receive buffer) of each message that is not received in its destination."""


class ExchangeQueue:
    """Concurrent exchanges of several sums, overlapped with computation.

    Every rank must start the same exchanges in the same order. On a GPU all exchanges run on a
    separate stream, and only that stream waits: `start` enqueues all stages of an exchange. On a
    CPU and with gloo the host waits: `start` first advances each earlier exchange by one stage.
    That order is the same on every rank. The messages of one exchange then overlap with the
    computation of the next sum.
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
        """Starts an exchange, a generator of messages that is resumed when they have arrived."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with self._beside():
            self._advance()
            self._continue(exchange)
            while self._stream is not None and not self._on_host and self._running:
                self._advance()

    @torch.no_grad()
    def finish(self) -> None:
        """Ends all pending exchanges; every `total` can then be read."""
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

"""Sums over the micro-batches of a step that do not depend on the number of ranks, to the last bit.

Owns one fixed binary tree over n leaves, the micro-batches, and the exchange of partial sums along
it. Knows tensors and ranks, nothing of networks. Invariant: the order of additions is a function of
n alone. Ranks and levels of the exchange decide only where an addition is computed.

The tree over leaves [low, high) splits at the largest power of two below high - low. A node is a
pair (low, high). A rank holds a run of leaves and adds up the largest nodes that lie whole in it
(`cover`); only these partial sums travel. One sum travels where the leaves of a rank are a power of
two, at most 2 log2(leaves of a rank) otherwise.

The exchange is a reduce-scatter and an all-gather, as a ring all-reduce is, and moves as many bytes
where one sum travels: 2 (W - 1)/W of a vector for each rank (Patarasuk and Yuan, JPDC 2009). The
ranks are the digits of a number in mixed radix, one digit a level. In a level, ranks that differ in
that digit alone send each other shards of the vector and add along the tree; then, level by level
back, they send each other the shards that are summed. One level is a direct exchange of all ranks,
W - 1 messages; a node's GPUs first and the nodes after them send messages W/nodes times as large
between nodes (hierarchical reduction); radix 2 in all levels is recursive halving (Thakur,
Rabenseifner and Gropp, IJHPCA 2005, section 4.3). Messages are copies, and the additions are ours,
so that no algorithm of NCCL or gloo reaches into the bits.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

Node = tuple[int, int]
# Floats between the starts of two parts in a vector, so that each begins at a multiple of 64 bytes:
# vectorised kernels load whole lines, as from a tensor of its own.
ALIGNMENT = 16


def split(n: int) -> int:
    """The largest power of two below n, where a node of n > 1 leaves splits."""
    return 1 << (n - 1).bit_length() - 1


def cover(n: int, leaves: range) -> list[Node]:
    """The largest nodes of the tree over n leaves that lie whole in a run, from left to right."""

    def within(low: int, high: int) -> list[Node]:
        if leaves.stop <= low or high <= leaves.start:
            return []
        if leaves.start <= low and high <= leaves.stop:
            return [(low, high)]
        middle = low + split(high - low)
        return within(low, middle) + within(middle, high)

    return within(0, n)


def siblings(left: Node, right: Node, n: int) -> bool:
    """Whether two adjacent nodes are the halves of one: the left is a full power of two of leaves,
    and the right all that follows up to the next, or to n."""
    size = left[1] - left[0]
    is_power = size & (size - 1) == 0
    return is_power and left[0] % (2 * size) == 0 and right[1] == min(left[0] + 2 * size, n)


def additions(nodes: Sequence[Node], n: int) -> tuple[list[tuple[int, int]], list[int]]:
    """The additions that bring adjacent nodes, from left to right, to the largest they make up.

    Returns:
        In order, pairs (i, j): add number j to number i, which lies left of it. And the numbers of
        those that remain.
    """
    pairs: list[tuple[int, int]] = []
    stack: list[tuple[Node, int]] = []
    for number, node in enumerate(nodes):
        stack.append((node, number))
        while len(stack) > 1 and siblings(stack[-2][0], stack[-1][0], n):
            right, j = stack.pop()
            left, i = stack.pop()
            pairs.append((i, j))
            stack.append(((left[0], right[1]), i))
    return pairs, [number for _, number in stack]


def levels_of(world_size: int, ranks_per_node: int, largest: int = 16) -> tuple[int, ...]:
    """The radices of the exchange: the ranks of a node, then the nodes in factors of at most
    `largest` where they have such. One level alone where nodes are not equally full."""
    if ranks_per_node < 1 or world_size % ranks_per_node:
        ranks_per_node = 1
    rest, factors = world_size // ranks_per_node, [ranks_per_node]
    while rest > 1:
        factor = next((f for f in range(min(largest, rest), 1, -1) if rest % f == 0), rest)
        factors.append(factor)
        rest //= factor
    return tuple(f for f in factors if f > 1)


class Placement(NamedTuple):
    """What a rank does with one of its leaves."""

    slot: int
    is_new: bool
    """The leaf begins a partial sum in this slot; else it is added to the one that is there."""
    merges: int
    """How often the two last partial sums are added to each other then."""


@dataclass(frozen=True)
class Ranks:
    """This process among all, and the levels in which they exchange.

    Args:
        levels: the radices of the exchange, whose product is `world_size`.
    """

    rank: int = 0
    world_size: int = 1
    levels: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        assert prod(self.levels) == self.world_size
        assert 0 <= self.rank < self.world_size

    def peers(self, level: int, rank: int) -> list[int]:
        """The ranks that exchange with one in a level, that one among them, by their digit."""
        stride, radix = prod(self.levels[:level]), self.levels[level]
        first = rank - rank // stride % radix * stride
        return [first + digit * stride for digit in range(radix)]

    def shard(self, vector: Tensor, rank: int) -> Tensor:
        """The part of a vector that a rank holds between the two halves of an exchange."""
        for level, radix in enumerate(self.levels):
            vector = vector.tensor_split(radix)[self.peers(level, rank).index(rank)]
        return vector


@dataclass(frozen=True)
class TreePlan:
    """Who adds up what: n leaves over all ranks, in contiguous runs of equal length."""

    n: int
    ranks: Ranks = Ranks()

    def __post_init__(self) -> None:
        assert self.n % self.ranks.world_size == 0

    def leaves(self, first: int, ranks: int = 1) -> range:
        """The leaves of some adjacent ranks."""
        each = self.n // self.ranks.world_size
        return range(first * each, (first + ranks) * each)

    @cached_property
    def placements(self) -> list[Placement]:
        """For each of this rank's leaves, in order. A leaf that is the right half of a pair is
        added to the left half at once, so that a pair takes one slot."""
        found: list[Placement] = []
        stack: list[Node] = []
        for k in self.leaves(self.ranks.rank):
            stack.append((k, k + 1))
            depth = len(stack)
            while len(stack) > 1 and siblings(stack[-2], stack[-1], self.n):
                right, left = stack.pop(), stack.pop()
                stack.append((left[0], right[1]))
            merges = depth - len(stack)
            is_new = merges == 0
            found.append(Placement(depth - 1 if is_new else depth - 2, is_new, max(0, merges - 1)))
        assert stack == cover(self.n, self.leaves(self.ranks.rank))
        return found

    @property
    def slots(self) -> int:
        """The partial sums that a rank holds at a time, at most: log2(leaves of a rank), and at
        least 1, where these are a power of two."""
        return 1 + max(placement.slot for placement in self.placements)

    def nodes(self, level: int, rank: int) -> list[Node]:
        """The partial sums that a rank brings into a level: those of all ranks that share its
        higher digits."""
        ranks = prod(self.ranks.levels[:level])
        return cover(self.n, self.leaves(rank // ranks * ranks, ranks))


class Messages(NamedTuple):
    """What a rank sends and receives at a time: (peer, a vector of memory) each. The vectors are
    read and written until all have arrived."""

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

    Every rank must start the same exchanges in the same order. Starting one takes those before it a
    stage further, waiting for the messages of that stage: a fixed order on every rank, in which
    messages of one exchange travel while the next one's sum is computed. On a GPU all happens on a
    stream of its own, and only that waits, but with gloo, which sends from host memory.
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

"""The plan of a step's sums: which rank adds up what, and which messages that takes.

Owns one fixed binary tree over n leaves, the micro-batches of a step; the levels in which ranks
exchange partial sums along it; and the buckets of the gradient. Invariant: the order of additions
is a function of n alone. Ranks and levels decide only where an addition is computed. Imports no
torch, so that the model of step time can ask the same functions as the step.

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
Rabenseifner and Gropp, IJHPCA 2005, section 4.3).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


MIB = 2**20
# The first bucket is small, so that its messages are on their way early; others are large enough
# that latency does not count. DistributedDataParallel has the same sizes.
FIRST_BUCKET, BUCKET = MIB, 25 * MIB
Node = tuple[int, int]


def split(n: int) -> int:
    """The largest power of two below n, where a node of n > 1 leaves splits."""
    return 1 << (n - 1).bit_length() - 1


@lru_cache(maxsize=2**14)  # asked in every exchange
def cover(n: int, leaves: range) -> tuple[Node, ...]:
    """The largest nodes of the tree over n leaves that lie whole in a run, from left to right."""

    def within(low: int, high: int) -> tuple[Node, ...]:
        if leaves.stop <= low or high <= leaves.start:
            return ()
        if leaves.start <= low and high <= leaves.stop:
            return ((low, high),)
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


def levels_of(world_size: int, ranks_per_node: int, largest: int = 8) -> tuple[int, ...]:
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
    """The place of one of a rank's leaves among its partial sums."""

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

    def shard(self, vector: "Tensor", rank: int) -> "Tensor":
        """The part of a vector that a rank holds between the two halves of an exchange."""
        for level, radix in enumerate(self.levels):
            vector = vector.tensor_split(radix)[self.peers(level, rank).index(rank)]
        return vector


@dataclass(frozen=True)
class TreePlan:
    """The division of n leaves among all ranks, in contiguous runs of equal length."""

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
        assert tuple(stack) == cover(self.n, self.leaves(self.ranks.rank))
        return found

    @property
    def slots(self) -> int:
        """The partial sums that a rank holds at a time, at most: log2(leaves of a rank), and at
        least 1, where these are a power of two."""
        return 1 + max(placement.slot for placement in self.placements)

    def nodes(self, level: int, rank: int) -> tuple[Node, ...]:
        """The partial sums that a rank brings into a level: those of all ranks that share its
        higher digits."""
        ranks = prod(self.ranks.levels[:level])
        return cover(self.n, self.leaves(rank // ranks * ranks, ranks))


def buckets(sizes: Sequence[int]) -> list[range]:
    """Divides gradients, of these sizes in bytes in the order in which backward has them, into
    buckets. A bucket is closed by the gradient that fills it."""
    found: list[range] = []
    first, filled = 0, 0
    for i, size in enumerate(sizes):
        filled += size
        if filled >= (BUCKET if found else FIRST_BUCKET):
            found.append(range(first, i + 1))
            first, filled = i + 1, 0
    return [*found, range(first, len(sizes))] if filled else found

"""The plan of a step's sums: the additions of each rank, and the messages between ranks.

Owns the reduction tree, one fixed binary tree over n leaves, the micro-batches of a step. Also owns
the levels in which ranks exchange partial sums along the tree, and the buckets of the gradient.
Invariant: the order of additions is a function of n alone. Ranks and levels only decide where an
addition is computed. Imports no torch, so that `cost_model.py` can call the same functions as the
step.

The tree over leaves [low, high) splits at the largest power of two below high - low. A node is a
pair (low, high). A rank holds a contiguous run of leaves and adds up the largest nodes that lie
completely within the run (`cover`). Only these partial sums are exchanged. A rank has one partial
sum if its number of leaves is a power of two, and at most 2 log2(leaves of a rank) otherwise.

The exchange is a reduce-scatter and an all-gather, like a ring all-reduce. With one partial sum it
moves as many bytes as a ring: 2 (W - 1)/W of a vector for each rank (Patarasuk and Yuan, JPDC
2009). A rank is a number in mixed radix, with one digit a level. In a level, ranks that differ in
that digit alone send each other shards of the vector and add along the tree. Then, from the last
level to the first, these ranks send each other the summed shards.

- One level is a direct exchange of all ranks, with W - 1 messages.
- The GPUs of a node and then the nodes are a hierarchical reduction: messages between nodes are
  W/nodes times as large.
- Radix 2 in all levels is recursive halving (Thakur, Rabenseifner and Gropp, IJHPCA 2005, section
  4.3).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


MIB = 2**20
# The first bucket is small, so that its exchange starts early. The others are large enough that
# latency does not count. DistributedDataParallel has the same sizes.
FIRST_BUCKET, BUCKET = MIB, 25 * MIB
Node = tuple[int, int]


def split(n: int) -> int:
    """Returns the largest power of two below n, at which a node of n > 1 leaves splits."""
    return 1 << (n - 1).bit_length() - 1


@lru_cache(maxsize=2**14)  # called in every exchange
def cover(n: int, leaves: range) -> tuple[Node, ...]:
    """Returns the largest nodes of the tree over n leaves within a run, from left to right."""

    def within(low: int, high: int) -> tuple[Node, ...]:
        if leaves.stop <= low or high <= leaves.start:
            return ()
        if leaves.start <= low and high <= leaves.stop:
            return ((low, high),)
        middle = low + split(high - low)
        return within(low, middle) + within(middle, high)

    return within(0, n)


def siblings(left: Node, right: Node, n: int) -> bool:
    """Returns True if two adjacent nodes are the halves of one node.

    The left half has a power of two of leaves. The right half has as many leaves, or fewer if it
    ends at n.
    """
    size = left[1] - left[0]
    is_power = size & (size - 1) == 0
    return is_power and left[0] % (2 * size) == 0 and right[1] == min(left[0] + 2 * size, n)


def additions(nodes: Sequence[Node], n: int) -> tuple[list[tuple[int, int]], list[int]]:
    """Returns the additions that merge adjacent nodes into the largest possible nodes.

    Args:
        nodes: from left to right.
        n: the leaves of the tree.

    Returns:
        Pairs (i, j) of indices into `nodes`, in order: add node j to node i, which lies left of j.
        Then the indices of the nodes that remain.
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
    """Returns the radices of the exchange: the ranks of a node, then factors of the nodes.

    Factors are at most `largest` where the number of nodes has such factors. Where nodes are not
    equally full, each rank counts as a node.
    """
    if ranks_per_node < 1 or world_size % ranks_per_node:
        ranks_per_node = 1
    rest, factors = world_size // ranks_per_node, [ranks_per_node]
    while rest > 1:
        factor = next((f for f in range(min(largest, rest), 1, -1) if rest % f == 0), rest)
        factors.append(factor)
        rest //= factor
    return tuple(f for f in factors if f > 1)


class Placement(NamedTuple):
    """The place of a leaf among the partial sums of its rank."""

    slot: int
    is_new: bool
    """True if the leaf starts a partial sum in this slot, else it is added to the slot's sum."""
    merges: int
    """Number of times that the last two partial sums are then added to each other."""


@dataclass(frozen=True)
class Ranks:
    """The rank of this process, the world size, and the levels of the exchange.

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
        """Returns the ranks that exchange with `rank` in a level, including `rank`, by digit."""
        stride, radix = prod(self.levels[:level]), self.levels[level]
        first = rank - rank // stride % radix * stride
        return [first + digit * stride for digit in range(radix)]

    def shard(self, vector: "Tensor", rank: int) -> "Tensor":
        """Returns the part of a vector that a rank holds between the halves of an exchange."""
        for level, radix in enumerate(self.levels):
            vector = vector.tensor_split(radix)[self.peers(level, rank).index(rank)]
        return vector


@dataclass(frozen=True)
class TreePlan:
    """The partition of n leaves among all ranks, in contiguous runs of equal length."""

    n: int
    ranks: Ranks = Ranks()

    def __post_init__(self) -> None:
        assert self.n % self.ranks.world_size == 0

    def leaves(self, first: int, ranks: int = 1) -> range:
        """Returns the leaves of `ranks` adjacent ranks, from rank `first` on."""
        each = self.n // self.ranks.world_size
        return range(first * each, (first + ranks) * each)

    @cached_property
    def placements(self) -> list[Placement]:
        """Placements of this rank's leaves, in order.

        A leaf that is the right half of a pair is added directly to the left half, so that a pair
        takes one slot.
        """
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
        """Largest number of partial sums that a rank holds at a time.

        For a power of two of leaves, it is log2(leaves of a rank), but at least 1.
        """
        return 1 + max(placement.slot for placement in self.placements)

    def nodes(self, level: int, rank: int) -> tuple[Node, ...]:
        """Returns the partial sums that a rank brings into a level.

        They cover the leaves of all ranks that have the same higher digits as the rank.
        """
        ranks = prod(self.ranks.levels[:level])
        return cover(self.n, self.leaves(rank // ranks * ranks, ranks))


def buckets(sizes: Sequence[int]) -> list[range]:
    """Divides gradients into buckets, each closed by the gradient that fills it.

    Args:
        sizes: bytes of the gradients, in the order in which backward produces them.

    Returns:
        The indices of each bucket's gradients.
    """
    found: list[range] = []
    first, filled = 0, 0
    for i, size in enumerate(sizes):
        filled += size
        if filled >= (BUCKET if found else FIRST_BUCKET):
            found.append(range(first, i + 1))
            first, filled = i + 1, 0
    return [*found, range(first, len(sizes))] if filled else found

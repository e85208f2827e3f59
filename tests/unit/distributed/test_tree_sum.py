"""Sums along the tree against a slow reference: without processes in many shapes, and over gloo."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from distvgg.distributed.reduction_plan import Ranks, TreePlan, cover, levels_of
from distvgg.distributed.tree_sum import TreeSum
from processes import ROOT, run
from tree_sums import by_definition, over_ranks, some_leaves

WORLD_SIZES = (1, 2, 3, 4, 6)


def divisors(n: int) -> list[int]:
    return [w for w in range(1, n + 1) if n % w == 0]


@st.composite
def plans(draw: st.DrawFn) -> tuple[int, int, tuple[int, ...]]:
    """Leaves, ranks, and the radices of an exchange among them, in any order."""
    n = draw(st.integers(1, 256))  # the examples below have more, of two seconds each
    world_size = rest = draw(st.sampled_from(divisors(n)))
    levels = []
    while rest > 1:
        # One level among more would be a million messages.
        radices = [d for d in divisors(rest)[1:] if d <= 16] or [rest]
        levels.append(draw(st.sampled_from(radices)))
        rest //= levels[-1]
    return n, world_size, tuple(levels)


@settings(max_examples=30)
@example(plan=(1024, 1024, (8, 16, 8)), size=3)
@example(plan=(1023, 341, (11, 31)), size=2)
@given(plan=plans(), size=st.integers(1, 12))
def test_every_rank_has_the_sum_by_definition(
    plan: tuple[int, int, tuple[int, ...]], size: int
) -> None:
    n, world_size, levels = plan
    leaves = some_leaves(n, size)
    expected = by_definition(leaves)
    ranks = [TreePlan(n, Ranks(rank, world_size, levels)) for rank in range(world_size)]
    sums = [TreeSum(p, [torch.empty(size)], torch.float32) for p in ranks]
    for p, total in zip(ranks, sums, strict=True):
        for k in p.leaves(p.ranks.rank):
            assert not total.complete
            total.add([leaves[k]])
        assert total.complete
    over_ranks([total.exchange() for total in sums])
    for total in sums:
        assert torch.equal(total.total[0], expected)


def test_the_order_of_additions_matters_to_these_numbers() -> None:
    """Guards the tests above: in another order the same leaves have another sum."""
    leaves = some_leaves(12, 40)
    in_a_row = leaves.cumsum(0)[-1]
    assert not torch.equal(by_definition(leaves), in_a_row)
    torch.testing.assert_close(by_definition(leaves), in_a_row, rtol=1e-5, atol=1)


@given(n=st.integers(1, 1024), data=st.data())
def test_a_cover_is_the_fewest_nodes_that_make_up_a_run(n: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, n - 1))
    run_ = range(first, data.draw(st.integers(first + 1, n)))
    nodes = cover(n, run_)
    assert [k for low, high in nodes for k in range(low, high)] == list(run_)
    halves = set(itertools.pairwise(nodes))
    in_tree = {((low, middle), (middle, high)) for low, middle, high in _inner(0, n)}
    assert not halves & in_tree  # no two of them could be one
    leaves = {(k, k + 1) for k in range(n)}
    assert set(nodes) <= leaves | {(low, high) for low, _, high in _inner(0, n)}


def _inner(low: int, high: int) -> list[tuple[int, int, int]]:
    """(low, middle, high) of every node of more than one leaf, by definition."""
    if high - low < 2:
        return []
    middle = low + max(2**i for i in range(11) if 2**i < high - low)
    return [(low, middle, high), *_inner(low, middle), *_inner(middle, high)]


@given(n=st.integers(1, 1024), data=st.data())
def test_a_rank_holds_few_partial_sums(n: int, data: st.DataObject) -> None:
    """log2(A) of them at a time, and one to send, for A leaves a rank that are a power of two; for
    any other A at most 2 log2(A) + 1."""
    world_size = data.draw(st.sampled_from(divisors(n)))
    rank = data.draw(st.integers(0, world_size - 1))
    accumulation = n // world_size
    plan = TreePlan(n, Ranks(rank, world_size, levels_of(world_size, 1)))
    sent = len(cover(n, plan.leaves(rank)))
    if accumulation & (accumulation - 1) == 0:
        assert plan.slots == max(1, math.log2(accumulation))
        assert sent == 1
    else:
        assert plan.slots <= 2 * math.log2(accumulation) + 1
        assert sent <= 2 * math.log2(accumulation)


@pytest.mark.parametrize("levels", [(8,), (2, 4), (4, 2), (2, 2, 2)])
def test_where_one_partial_sum_travels_as_many_bytes_do_as_in_a_ring(
    levels: tuple[int, ...],
) -> None:
    n, world_size, size = 16, 8, 64
    sums = [
        TreeSum(TreePlan(n, Ranks(rank, world_size, levels)), [torch.empty(size)], torch.float32)
        for rank in range(world_size)
    ]
    for rank, total in enumerate(sums):
        for k in (2 * rank, 2 * rank + 1):
            total.add([some_leaves(n, size)[k]])
    share = Fraction(world_size - 1, world_size)
    sent, _ = over_ranks([total.exchange() for total in sums])
    assert sent == [2 * share * size] * world_size


def test_parts_keep_their_shapes_and_strides() -> None:
    weight = torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last)
    bias = torch.randn(5)
    total = TreeSum(TreePlan(2), [weight, bias], torch.float32)
    for _ in range(2):
        total.add([weight, bias])
    (both, other) = total.total
    assert both.stride() == weight.stride()
    assert torch.equal(both, weight + weight)
    assert torch.equal(other, bias + bias)


@pytest.mark.parametrize(
    ("world_size", "per_node", "levels"),
    [
        (1, 1, ()),
        (2, 2, (2,)),
        (8, 8, (8,)),
        (12, 4, (4, 3)),
        (1024, 8, (8, 8, 8, 2)),
        (16, 1, (8, 2)),
        (34, 1, (2, 17)),
        (6, 4, (6,)),  # nodes are not equally full
    ],
)
def test_levels_are_the_gpus_of_a_node_and_then_nodes(
    world_size: int, per_node: int, levels: tuple[int, ...]
) -> None:
    assert levels_of(world_size, per_node) == levels


@pytest.mark.parametrize(
    "world_size", [3, *(pytest.param(w, marks=pytest.mark.variant) for w in (4, 6))]
)
def test_sums_over_real_processes(world_size: int) -> None:
    """Several at a time, of all shapes, over gloo: tests/support/tree_sum_ranks.py compares."""
    program = (str(ROOT / "tests" / "support" / "tree_sum_ranks.py"),)
    done = run([], processes=world_size, program=program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("equal") == world_size, done.stdout

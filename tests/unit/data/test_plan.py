"""The sample stream: every sample once an epoch, whoever runs it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distvgg.data.plan import BatchPlan, epoch_permutation
from distvgg.errors import UserError
from distvgg.rng import derive_seed


@st.composite
def plans(draw: st.DrawFn) -> BatchPlan:
    """Any samples, micro-batch and accumulation, on up to 1,024 processes."""
    world_size = draw(st.sampled_from([1, 2, 3, 4, 7, 8, 64, 1000, 1024]))
    micro = draw(st.integers(1, 5))
    accumulation = draw(st.integers(1, 3))
    n_samples = draw(st.integers(1, 5000))
    return BatchPlan(n_samples, world_size * accumulation * micro, micro, world_size)


@given(plan=plans(), step=st.integers(0, 10**9))
def test_ranks_share_out_each_step_whole_and_in_order(plan: BatchPlan, step: int) -> None:
    joined = [p for rank in range(plan.world_size) for p in plan.positions(step, rank)]
    start = step * plan.global_batch_size
    assert joined == list(range(start, start + plan.global_batch_size))
    ks = [k for rank in range(plan.world_size) for k in plan.rank_micro_batches(rank)]
    assert ks == list(range(plan.micro_batches))


@given(plan=plans(), seed=st.integers(0, 2**40), epoch=st.integers(0, 3))
def test_every_sample_comes_once_an_epoch(plan: BatchPlan, seed: int, epoch: int) -> None:
    n, per_step = plan.n_samples, plan.global_batch_size
    seen = []
    # All steps that touch the epoch, on all ranks; a step may reach into its neighbours.
    for step in range(epoch * n // per_step, -(-(epoch + 1) * n // per_step)):
        for rank in range(plan.world_size):
            for e, first, last in plan.spans(plan.positions(step, rank)):
                assert 0 <= first < last <= n
                if e == epoch:
                    seen += epoch_permutation(seed, e, n)[first:last].tolist()
    assert sorted(seen) == list(range(n))


@given(plan=plans(), step=st.integers(0, 1000))
def test_one_process_sees_the_same_stream(plan: BatchPlan, step: int) -> None:
    alone = BatchPlan(plan.n_samples, plan.global_batch_size, plan.micro_batch_size)

    def samples(p: BatchPlan, rank: int) -> list[tuple[int, int]]:
        return [
            (epoch, i)
            for epoch, first, last in p.spans(p.positions(step, rank))
            for i in range(first, last)
        ]

    joined = [s for rank in range(plan.world_size) for s in samples(plan, rank)]
    assert joined == samples(alone, 0)


@given(plan=plans(), epochs=st.floats(0.01, 20))
def test_steps_cover_the_epochs_and_no_more(plan: BatchPlan, epochs: float) -> None:
    steps = plan.steps(epochs)
    wanted = epochs * plan.n_samples
    assert steps * plan.global_batch_size >= wanted * (1 - 1e-4)
    assert steps == 1 or (steps - 1) * plan.global_batch_size < wanted


def test_a_tenth_of_an_epoch_ten_times_is_an_epoch() -> None:
    """0.1 * 3 is more than 0.3 in binary: rounding up must not turn that into a step."""
    plan = BatchPlan(n_samples=1000, global_batch_size=10, micro_batch_size=10)
    assert [plan.steps(0.1 * i) for i in range(1, 11)] == [10 * i for i in range(1, 11)]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [epoch_permutation(seed, epoch, 1000) for seed in (0, 1) for epoch in (0, 1, 2)]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert (a == b).float().mean() < 0.02
    assert torch.equal(orders[0], epoch_permutation(0, 0, 1000))


def test_streams_do_not_change_between_versions() -> None:
    """A released stream is a promise: a run must go on as it began after an upgrade."""
    assert derive_seed(0, "order", 0) == 7955589716765508323
    assert derive_seed(1, "dropout", 12, 3) == 1002292495929389966
    assert epoch_permutation(0, 0, 10).tolist() == [9, 6, 3, 1, 4, 5, 2, 8, 7, 0]


def test_processes_that_do_not_divide_the_step_are_refused_with_the_counts_that_work() -> None:
    with pytest.raises(UserError) as error:
        BatchPlan(n_samples=1000, global_batch_size=512, micro_batch_size=64, world_size=3)
    assert "3 processes do not divide the 8 micro-batches" in str(error.value)
    assert "1 or 2 or 4 or 8" in str(error.value)
    assert "multiple of 192" in str(error.value)

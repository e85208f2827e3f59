"""Past this machine: the model of step time against closed forms, and the real distributed parts at
1,024 ranks, of which one at a time runs (torch's fake process group sends nothing)."""

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from hypothesis import given
from hypothesis import strategies as st
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.scaling import compare
from distvgg.commands.bench import FEW, MANY, describe_workload, fit_gpu, measure
from distvgg.commands.bench_options import BenchOptions, assumption, gpu_spec, interconnect
from distvgg.config import Config
from distvgg.data.dataset import Dataset, Split
from distvgg.data.loader import DeviceImages, DeviceLoader
from distvgg.data.plan import BatchPlan, epoch_permutation
from distvgg.distributed import cost_model, process_group
from distvgg.distributed.cost_model import Fabric, Gpu, Job, Layer, Link, Setup
from distvgg.distributed.device import place
from distvgg.distributed.gradients import GradientReducer
from distvgg.distributed.hardware import HARDWARE
from distvgg.distributed.process_group import prepare_model, start
from distvgg.distributed.reduction_plan import MIB, Ranks, TreePlan, levels_of
from distvgg.distributed.shared_results import PartitionedCompute
from distvgg.distributed.step_sums import StepReducer
from distvgg.distributed.tree_sum import ExchangeQueue, Messages, TreeSum
from distvgg.models.flops import training_flops
from distvgg.models.freezing import freeze, learned_parameters
from distvgg.models.vgg import batch_norm_layers, build_vgg
from distvgg.optim.build import build_optimizer
from distvgg.optim.muon import orthogonalise, orthogonalise_flops
from distvgg.recipe import load
from processes import run

RANKS = 1024
# One node of any size: the textbook's flat ring.
INSIDE, BETWEEN = Link(1e9, 2e-6, 3e-6, 6e-6, 7e-7), Link(1e8, 4e-6, 5e-6, 8e-6, 9e-7)
FLAT = Fabric(10**6, launch=0.0, send=0.0, inside=INSIDE, between=BETWEEN)
NODES = FLAT._replace(gpus_per_node=8)


@pytest.mark.parametrize("ranks", [2, 3, 8, 1024])
def test_a_flat_ring_takes_what_the_papers_say(ranks: int) -> None:
    n = 3_000_000
    expected = 2 * (ranks - 1) / ranks * n / 1e9 + 2 * (ranks - 1) * 2e-6
    assert cost_model.ring(n, ranks, FLAT) == pytest.approx(expected, rel=1e-12)


def test_over_nodes_hops_are_counted_by_kind_and_the_narrowest_link_counts() -> None:
    # 64 GPUs on 8 nodes: of 63 hops 7 leave a node; 8 cards of 0.1 GB/s are below 1 GB/s.
    expected = 2 * (56 * 2e-6 + 7 * 4e-6) + 2 * 63 / 64 * 1e6 / 0.8e9
    assert cost_model.ring(10**6, 64, NODES) == pytest.approx(expected, rel=1e-12)
    # A chain of 7 hops in each node, a tree of depth 3 between the 8.
    expected = 2 * (7 * 3e-6 + 3 * 5e-6) + 2 * 1e6 / 0.8e9
    assert cost_model.tree(10**6, 64, NODES) == pytest.approx(expected, rel=1e-12)


def test_small_messages_take_the_tree_and_large_ones_the_ring() -> None:
    for n, faster in ((1000, cost_model.tree), (10**10, cost_model.ring)):
        assert cost_model.all_reduce(n, 1024, NODES) == faster(n, 1024, NODES)


def test_one_gpu_does_not_communicate_or_wait() -> None:
    setup = Setup(describe_workload(load("fast")), Gpu(0.01, 0.002, 0.1), NODES)
    taken = cost_model.step(setup, 1, 4)
    assert (taken.exposed, taken.wait) == (0.0, 0.0)
    assert taken.seconds == pytest.approx(4 * 0.01 + 0.002)
    assert taken.rate == pytest.approx(4 * setup.job.micro_batch_size / 0.042)
    assert cost_model.efficiency(setup, taken, 4) == pytest.approx(1)


def test_an_exchange_takes_what_its_messages_do() -> None:
    """By hand: 64 GPUs on 8 nodes exchange with 7 others in the node, then with 7 nodes; there and
    back. With 3 micro-batches a rank two partial sums travel there."""
    assert cost_model.levels(64, 8) == (8, 8)
    fabric = NODES._replace(send=1e-5)
    near, far = 7 * (7e-7 + 1e6 / 8 / 1e9), 7 * (9e-7 + 1e6 / 64 / 1e8)
    for accumulation, c in ((3, 2), (4, 1)):
        sums = cost_model.partial_sums(64, accumulation, (8, 8))
        assert sums == (c, c)
        there, back = cost_model.exchange(10**6, (8, 8), sums, fabric)
        assert there == pytest.approx([1.6e-5 + c * near, 1.8e-5 + c * far])
        assert back == pytest.approx([1.8e-5 + far, 1.6e-5 + near])
    # In one level 7 peers are in the node and 56 beyond.
    there, back = cost_model.exchange(10**6, (64,), (1,), fabric)
    shard = 1e6 / 64
    assert there == pytest.approx([1.8e-5 + 7 * (7e-7 + shard / 1e9) + 56 * (9e-7 + shard / 1e8)])
    assert back == there
    # Between two ranks of one node it moves as many bytes as a ring.
    fabric = FLAT._replace(inside=Link(1e9, 0, 0, 0, 0))
    there, back = cost_model.exchange(10**6, (2,), (1,), fabric)
    assert sum(there + back) == pytest.approx(cost_model.ring(10**6, 2, fabric))
    assert cost_model.exchange(10**6, (), (), FLAT) == ([], [])


# Of which only stages take time, or only messages, or only bytes.
COUNTING = [
    Fabric(8, 0, send, link, link)
    for send, link in (
        (1, Link(math.inf, 0, 0, 0, 0)),
        (0, Link(math.inf, 0, 0, 0, 1)),
        (0, Link(1, 0, 0, 0, 0)),
    )
]


def counts(exchanges: Iterable[Iterator[Messages]]) -> list[tuple[int, int, int]]:
    """The stages, messages and bytes that each rank sends; nothing is, in fact."""
    found = []
    for exchange in exchanges:
        stages = list(exchange)
        sizes = [t.nbytes for stage in stages for _, t in stage.sends if t.numel()]
        found.append((len(stages), len(sizes), sum(sizes)))
    return found


@pytest.mark.parametrize("radices", [(2,), (6,), (8, 2), (16,), (2, 2, 4), (8, 8)])
@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_the_model_counts_the_stages_messages_and_bytes_that_are_sent(
    radices: tuple[int, ...], accumulation: int
) -> None:
    ranks = math.prod(radices)
    size, sums = 64 * ranks, cost_model.partial_sums(ranks, accumulation, radices)
    total = []
    for rank in range(ranks):
        plan = TreePlan(ranks * accumulation, Ranks(rank, ranks, radices))
        total.append(TreeSum(plan, [torch.zeros(size)], torch.float32))
        for _ in plan.leaves(rank):
            total[-1].add([torch.zeros(size)])
    counted = counts(t.exchange() for t in total)
    halves = [cost_model.exchange(4 * size, radices, sums, fabric) for fabric in COUNTING]
    predicted = [sum(there) + sum(back) for there, back in halves]
    # The most that a rank sends in each level, added up: no less than any rank's own.
    for of_rank in counted:
        assert all(n <= most * (1 + 1e-9) for n, most in zip(of_rank, predicted, strict=True))
        if max(sums) == 1:
            assert of_rank == pytest.approx(predicted)
    assert predicted == pytest.approx(list(map(max, zip(*counted, strict=True))), rel=0.35)


def test_a_bucket_waits_for_its_gradients_and_for_the_one_before() -> None:
    """By hand: backward 1 s; the first of 0.4 s is sent at 0.5, the next of 0.4 at 0.6, the last
    of 0.1 at 1.0."""
    stages = [(0.5, 0.4), (0.6, 0.4), (1.0, 0.1)]
    assert cost_model.backward_end(1.0, stages) == pytest.approx(1.4)
    assert cost_model.backward_end(1.0, stages[:1]) == 1.0
    assert cost_model.backward_end(1.0, stages, overlaps=False) == pytest.approx(1.9)


def test_shared_work_is_as_long_as_the_largest_share_and_its_results_travel_once() -> None:
    """By hand: pieces of 5, 3, 2 and 2 operations are 7 and 5 on two ranks, and 5, 3, 2, 2 and
    nothing on five."""
    job = describe_workload(load("quickstart"))
    setup = Setup(
        dataclasses.replace(job, shared=(5, 3, 2, 2), results=(500, 300, 100, 100)),
        Gpu(0.01, 0.0, 0.0, shared=1.2),
        FLAT._replace(send=0.5),
    )
    assert cost_model.shared_seconds(setup, 1, ()) == (pytest.approx(1.2), 0.0)
    share, gather = cost_model.shared_seconds(setup, 2, (2,))
    assert share == pytest.approx(0.7)
    # 100 of its 600 bytes lie in the other's shard; then shards of 500.
    assert gather == pytest.approx(2 * (0.5 + 6e-6 + 7e-7) + 100 / 1e9 + 500 / 1e9, rel=1e-12)
    assert cost_model.shared_seconds(setup, 5, (5,))[0] == pytest.approx(0.5)
    assert cost_model.step(setup, 2, 1).compute == pytest.approx(0.01 + 0.7)


@pytest.mark.parametrize("radices", [(2,), (6,), (8, 2), (8, 8), (8, 16)])
def test_the_model_counts_what_shared_results_take(radices: tuple[int, ...]) -> None:
    ranks, shapes = math.prod(radices), [(20 * n, 64) for n in range(1, 16)]
    costs, sizes = [n**2 for n, _ in shapes], [4 * rows * columns for rows, columns in shapes]
    job = dataclasses.replace(
        describe_workload(load("quickstart")), shared=tuple(costs), results=tuple(sizes)
    )
    counted = counts(
        PartitionedCompute(
            shapes, costs, torch.float32, torch.device("cpu"), Ranks(rank, ranks, radices)
        ).exchange()
        for rank in range(ranks)
    )
    setups = [Setup(job, Gpu(1, 0, 0), fabric) for fabric in COUNTING]
    predicted = [cost_model.shared_seconds(setup, ranks, radices)[1] for setup in setups]
    for of_rank in counted:
        assert all(n <= most * (1 + 1e-9) for n, most in zip(of_rank, predicted, strict=True))
        # Bytes by results, not by ranks: what a rank computes once, and its shards once.
        assert of_rank[-1] <= 2 * sum(sizes)
    assert predicted == pytest.approx(list(map(max, zip(*counted, strict=True))), rel=0.02)


def test_the_job_shares_out_what_muon_does() -> None:
    config = load("fast").replace(optim__name="muon", model__width=0.1)
    job = describe_workload(config)
    optimizer = build_optimizer(build_vgg(config.model, 100, seed=0), config.optim)
    assert sum(job.results) == optimizer._updates._flat.nbytes
    matrix = torch.randn(20, 70)
    with FlopCounterMode(display=False) as counter:
        orthogonalise(matrix, steps=3)
    assert counter.get_total_flops() == orthogonalise_flops(20, 70, 3)
    assert describe_workload(config.replace(optim__name="sgd")).shared == ()


@pytest.mark.parametrize("ranks", [1, 2, 8, 64, 1024])
def test_the_slowest_of_many_is_as_slow_as_simulated(ranks: int) -> None:
    draws = np.random.default_rng(0).standard_normal((4000, ranks)).max(1)
    error = 4 * draws.std() / math.sqrt(len(draws))
    assert cost_model.slowest(ranks) == pytest.approx(draws.mean(), abs=error + 0.03)
    assert cost_model.slowest(ranks) <= math.sqrt(2 * math.log(ranks))


@st.composite
def setups(draw: st.DrawFn) -> Setup:
    """Any small network on any GPU and links."""
    size = st.integers(1, 5 * 10**7)
    layers = draw(
        st.lists(
            st.builds(
                Layer,
                st.lists(size, min_size=1, max_size=3).map(tuple),
                st.integers(1, 10**9),
                st.integers(1, 10**9),
            ),
            min_size=1,
            max_size=6,
        )
    )
    seconds, links = st.floats(1e-6, 1e-2), st.floats(1e6, 1e12)
    link = st.builds(Link, links, seconds, seconds, seconds, seconds)
    gpu = st.builds(Gpu, st.floats(1e-5, 10), st.floats(0, 1), st.floats(0, 0.5))
    fabric = st.builds(
        Fabric, st.sampled_from([1, 2, 8]), seconds, seconds, link, link, st.booleans()
    )
    return Setup(Job(tuple(layers), 32, 100), draw(gpu), draw(fabric))


@given(setup=setups(), ranks=st.sampled_from([2, 4, 8, 64, 1024]), accumulation=st.integers(1, 9))
def test_no_step_is_faster_than_its_parts(setup: Setup, ranks: int, accumulation: int) -> None:
    job, fabric = setup.job, setup.fabric
    taken = cost_model.step(setup, ranks, accumulation)
    radices = cost_model.levels(ranks, fabric.gpus_per_node)
    talking = sum(t for _, t in cost_model.stages(setup, ranks, accumulation, radices))
    forwards = (accumulation - 1 + job.forward_share) * setup.gpu.micro_batch
    assert taken.seconds >= taken.compute
    assert taken.seconds >= (forwards + talking) * (1 - 1e-9)
    assert taken.exposed <= talking * (1 + 1e-9) + 1e-9
    assert cost_model.efficiency(setup, taken, accumulation) <= 1 + 1e-9
    # Twice the images never take less; nor do twice the ranks, on as full nodes.
    assert cost_model.step(setup, ranks, 2 * accumulation).seconds >= taken.seconds
    if ranks >= fabric.gpus_per_node:
        assert cost_model.step(setup, 2 * ranks, accumulation).seconds >= taken.seconds * (1 - 1e-9)


@pytest.mark.parametrize("ranks", [2**i for i in range(4, 11)])
@pytest.mark.parametrize("gpu", ["h100", "a100"])
def test_the_levels_of_a_run_are_near_the_best(gpu: Literal["h100", "a100"], ranks: int) -> None:
    """Which radices are best depends on constants that nobody measured: a quarter is near."""
    job, options = describe_workload(load("fast")), BenchOptions(gpu=gpu)
    setup = Setup(job, gpu_spec(options, job, 4), interconnect(options))
    chosen, flat, *others = (
        cost_model.step(setup, ranks, 4, radices).exposed
        for radices in (
            cost_model.levels(ranks, 8),
            (ranks,),
            *(levels_of(ranks, 8, largest) for largest in (2, 4, 16, 32, ranks)),
        )
    )
    assert chosen < flat
    assert chosen <= 1.25 * min(others)


@given(setup=setups())
def test_buckets_hold_every_gradient_once_and_are_ready_in_order(setup: Setup) -> None:
    layers = setup.job.layers
    buckets = cost_model.ready_buckets(layers)
    assert sum(n for _, n in buckets) == sum(sum(layer.gradients) for layer in layers)
    ready = [share for share, _ in buckets]
    assert ready == sorted(ready)
    assert 0 < ready[0] <= ready[-1] == 1


@pytest.mark.parametrize("ranks", [2, 8, 64, 512])
def test_the_smallest_efficient_batch_is_the_smallest(ranks: int) -> None:
    options = BenchOptions(gpu="h100", jitter=0.02)
    job = describe_workload(load("fast"))
    setup = Setup(job, gpu_spec(options, job, 4), interconnect(options))
    batch = cost_model.smallest_batch(setup, ranks, 4)
    assert batch is not None
    accumulation, rest = divmod(batch, ranks * job.micro_batch_size)
    assert rest == 0
    reached = [
        cost_model.efficiency(setup, cost_model.step(setup, ranks, a), 4)
        for a in (accumulation, accumulation // 2)
        if a
    ]
    assert reached[0] >= 0.9
    assert all(e < 0.9 for e in reached[1:])
    hopeless = Setup(job, Gpu(0.001, 0.0, 0.5), setup.fabric)
    assert cost_model.smallest_batch(hopeless, ranks, 4) is None


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model__batch_norm": False, "optim__name": "sgd"},
        {"model__depth": 19},
        {"optim__frozen": "features.0,features.1,features.4,classifier.3"},
    ],
)
def test_the_job_is_the_network(changes: dict[str, object]) -> None:
    config = load("fast").replace(**changes)
    job, vgg = describe_workload(config), build_vgg(config.model, 100, seed=0)
    freeze(vgg, config.optim.frozen)
    assert job.flops == training_flops(config.model, 100, config.optim.frozen)
    gradients = [n for layer in job.layers for n in layer.gradients]
    assert sorted(gradients) == sorted(4 * p.numel() for p in learned_parameters(vgg))
    plan = BatchPlan(45_000, 256, 64)
    with world(0, ranks=1) as accelerator:
        tree = TreePlan(plan.micro_batches)
        layers, queue = batch_norm_layers(vgg), ExchangeQueue(accelerator.device)
        sums = StepReducer(accelerator, tree, layers, queue)
        assert job.sums(plan.micro_batches) == sums._flat.nbytes
        assert job.statistics == (sums._running.numel() if layers else 0)


def test_constants_come_back_from_times_that_they_made() -> None:
    noise = np.random.default_rng(0).normal(1, 0.02, (2, 20_000))
    gpu = fit_gpu({FEW: list(0.105 * noise[0]), MANY: list(0.405 * noise[1])})
    assert gpu.micro_batch == pytest.approx(0.1, rel=0.01)
    assert gpu.fixed == pytest.approx(0.005, abs=0.001)
    assert gpu.jitter == pytest.approx(0.02, rel=0.05)
    times = {FEW: [0.135, 0.135], MANY: [0.435, 0.435]}
    assert fit_gpu(times, shared=0.03) == pytest.approx((0.1, 0.005, 0.0, 0.03))


def test_the_check_against_real_runs_finds_no_error_where_the_model_is_true() -> None:
    """Runs as the benchmark's workers write them, made by the model itself."""
    config = load("fast")
    link = Link(1.3e9, 1e-4, 1e-4, 1e-4, 0.0)
    fabric = Fabric(2, 0.0, 0.0, link, link, overlaps=False)
    setup = Setup(describe_workload(config), Gpu(0.3, 0.02, 0.0, 0.1), fabric)

    def made(ranks: int) -> dict[str, object]:
        seconds = {a: cost_model.step(setup, ranks, a).seconds for a in (1, 2, 4)}
        reduces = {"small": 2e-4, "large": 2e-4 + 16 * MIB / 1.3e9}
        times = {str(a): [s] * 4 for a, s in seconds.items()}
        return {"times": times, "shared": 0.1} | reduces

    runs = {"alone": [made(1)], "beside": [made(1)], "together": [made(2), made(2)]}
    rows = compare(config, runs)
    assert [(r["processes"], r["micro_batches"]) for r in rows] == [(1, 2), (2, 1), (2, 2), (2, 4)]
    assert all(abs(r["alone"]["error"]) < 1e-9 for r in rows)
    runs["together"][1]["times"]["4"] = runs["together"][0]["times"]["4"] = [3.0] * 4
    assert compare(config, runs)[-1]["beside"]["error"] < -0.5


def test_measuring_runs_real_steps_and_leaves_nothing(tmp_path: Path) -> None:
    config = load("quickstart").replace(model__width=0.05, train__micro_batch_size=16)
    try:
        gpu = measure(config, seconds=0.5)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert 0 < gpu.micro_batch < 1
    assert gpu.fixed < 1


def test_what_was_measured_on_a_gpu_and_what_is_assumed_is_said() -> None:
    job = describe_workload(load("fast"))
    h100 = BenchOptions(gpu="h100")
    alone = Setup(job, gpu_spec(h100, job, 4), interconnect(h100))
    measured = HARDWARE["h100"].measured
    assert measured is not None
    # Muon's part is computed at the same rate on top.
    rate = cost_model.step(alone, 1, 4).rate
    assert 0.98 * measured.images_per_sec < rate <= measured.images_per_sec
    assert measured.date in assumption(h100, job)
    assert "assumed" not in assumption(h100, job)
    assert "never measured" in assumption(BenchOptions(gpu="a100"), job)
    assert "at 20.0% of its peak" in assumption(BenchOptions(gpu="h100", peak_share=0.2), job)
    assert assumption(BenchOptions(gpu="h100", peak_share=0.2), job).endswith("as given")


def test_the_command_answers_with_tables_and_with_curves() -> None:
    text = run(["bench", "vgg19", "--gpu", "h100", "--jitter", "0.02"]).stdout
    assert (
        "(ASSUMED)\n          an NVIDIA H100 SXM at 24.8% of its peak of 989 TFLOP/s, as measured"
        in text
    )
    assert "that this network reaches the same share is assumed" in text
    assert "of the arithmetic" not in text
    small = run(["bench", "quickstart", "--gpu", "h100"]).stdout
    assert "its micro-batch has 1/232 of the arithmetic of fast's" in small
    assert "512 GPUs: " in text
    done = run(["bench", "fast", "--images_per_sec", "9000", "--json"])
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [p["gpus"] for p in found["weak"]] == [2**i for i in range(11)]
    assert [p["gpus"] for p in found["strong"]] == [1, 2, 4]
    assert found["one_gpu"]["source"] == "given"
    assert found["weak"][0]["images_per_sec"] == pytest.approx(9000)


# The real parts at 1,024 ranks ----------------------------------------------------------------


def test_a_thousand_ranks_partition_the_stream() -> None:
    """Epochs of 45,000 and steps of 4,096: the eleventh straddles two epochs."""
    plan = BatchPlan(45_000, 4 * RANKS, 2, RANKS)
    order = [epoch_permutation(0, epoch, plan.n_samples).numpy() for epoch in (0, 1)]
    seen = []
    for step in range(22):
        positions = [plan.positions(step, rank) for rank in range(RANKS)]
        starts = np.array([p.start for p in positions])
        assert (starts == step * 4096 + 4 * np.arange(RANKS)).all()
        for p in positions:
            seen += [order[e][a:b] for e, a, b in plan.spans(p) if e < 2]
    counts = np.bincount(np.concatenate(seen), minlength=plan.n_samples)
    # 22 steps are 90,112 samples: two epochs whole, and 112 of the third left out above.
    assert (counts == 2).all()
    ks = [k for rank in range(RANKS) for k in plan.rank_micro_batches(rank)]
    assert ks == list(range(plan.micro_batches))


@contextmanager
def world(rank: int, ranks: int = RANKS) -> Iterator[Accelerator]:
    """accelerate's handle in one rank of many, whose collectives return this rank's own values."""
    names = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank % 8, "LOCAL_WORLD_SIZE": 8}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1, "OMP_NUM_THREADS": 1}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (names if ranks > 1 else {}).items():
            patch.setenv(name, str(value))
        patch.setenv("ACCELERATE_USE_CPU", "true")
        if ranks > 1:
            dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
            # The precision: a fake group has no rank 0 to hear of it from.
            patch.setattr(process_group, "broadcast_from_main", lambda process, make: make())
        try:
            yield start(Config().replace(train__precision="no"))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            AcceleratorState._reset_state(reset_partial_state=True)


def images(n: int) -> Dataset:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
    split = Split(pixels, rng.integers(0, 100, n), None)
    return Dataset(split, None, [str(i) for i in range(100)], [], None, (0.5,) * 3, (0.25,) * 3, "")


@pytest.mark.parametrize("rank", [0, 517, 1023])
def test_a_step_of_one_rank_of_a_thousand(rank: int) -> None:
    """Its data, what it sends, and its share of the gradient, which its leaf of the tree is."""
    config = load("fast").replace(
        train__global_batch_size=4 * RANKS, train__micro_batch_size=4, train__precision="no"
    )
    data, n = images(3000), 3000  # less than a step: a step sees epochs end within ranks
    with world(rank) as accelerator:
        assert (accelerator.num_processes, accelerator.process_index) == (RANKS, rank)
        plan = BatchPlan(n, 4 * RANKS, 4, accelerator.num_processes)
        pixels = DeviceImages(data, data.train, 32, accelerator.device)
        loader = DeviceLoader(config, pixels, np.arange(n), plan, rank)
        (batch,) = loader.micro_batches(2)
        assert batch.k == rank

        vgg = build_vgg(config.model, 100, seed=0)
        place(vgg, accelerator, config)
        tree = TreePlan(plan.micro_batches, Ranks(rank, RANKS, cost_model.levels(RANKS, 8)))
        silent, recorder = Recorder(carries_out=False), Recorder()
        optimizer = build_optimizer(vgg, config.optim, "no", tree.ranks, recorder)
        model = prepare_model(accelerator, vgg)
        norms = batch_norm_layers(vgg)
        for queue in (recorder, silent):
            gradients = GradientReducer(vgg.parameters(), tree, queue)
            gradients.attach()
            sums = StepReducer(accelerator, tree, norms, queue)
            vgg.zero_grad()
            torch.manual_seed(batch.dropout_seed)
            logits = model(batch.images)
            loss = F.cross_entropy(logits, batch.labels, reduction="sum")
            sums.add(batch.k, loss, logits, batch.labels)
            sums.start(stop=rank == 0)
            accelerator.backward(loss / plan.global_batch_size)
            gradients.finish()
            losses, correct, stop = sums.finish()
            gradients.detach()
        summed = [p.grad.clone() for p in vgg.parameters()]

        # The one micro-batch that ran, in its place among 1,024.
        assert losses.nonzero().flatten().tolist() == [rank]
        assert losses[rank] == loss.detach()
        assert correct.sum() == (logits.argmax(1) == batch.labels).sum()
        assert stop == (rank == 0)
        # Statistics first, then buckets: what the model says, but for padding to whole lines.
        job = describe_workload(config)
        sums_ = [8 * job.statistics, *(size for _, size in cost_model.ready_buckets(job.layers))]
        assert recorder.sent == pytest.approx([2 * 1023 / 1024 * n for n in sums_], rel=0.01)
        # Muon's results: what this rank computes, and its shards, however many ranks there are.
        results = optimizer._updates
        recorder.start(results.exchange())
        own = sum(results[i].nbytes for i in results.mine)
        assert recorder.sent[-1] <= own + results._flat.nbytes

    # Its leaf of the tree: the gradient of its micro-batch alone, over G.
    vgg.zero_grad()
    torch.manual_seed(batch.dropout_seed)
    loss = F.cross_entropy(vgg(batch.images), batch.labels, reduction="sum")
    (loss / plan.global_batch_size).backward()
    for got, parameter in zip(summed, vgg.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad, rtol=1e-4, atol=1e-6)
    alone = DeviceLoader(config, pixels, np.arange(n), BatchPlan(n, 4 * RANKS, 4), 0).micro_batches(
        2
    )
    assert torch.equal(batch.images, alone[rank].images)
    assert torch.equal(batch.rows, alone[rank].rows)
    assert batch.dropout_seed == alone[rank].dropout_seed


class Recorder(ExchangeQueue):
    """Counts the bytes of each exchange, of which nothing is sent."""

    def __init__(self, *, carries_out: bool = True) -> None:
        super().__init__(torch.device("cpu"))
        self._carries_out = carries_out
        self.sent: list[int] = []

    def start(self, exchange: Iterator[Messages]) -> None:
        if self._carries_out:
            sizes = [tensor.nbytes for stage in exchange for _, tensor in stage.sends]
            self.sent.append(sum(sizes))

"""How long a step takes on 1 to 1,024 GPUs, and how many images a second that makes: a model.

Owns the arithmetic alone. What one GPU takes is measured (`bench.py`) or given; links are cited
below. Imports no torch. A rank takes A micro-batches a step, t seconds each, of which `forward`
and `backward`; W ranks are on N nodes. In seconds and bytes:

    (1) step        = (A - 1) t + forward + end + fixed + shared + wait
    (2) end         = max(backward, done of the last bucket);
        done(b)     = max(ready(b), done(b - 1)) + its exchange
    (3) stage       = send + hop + c_l * the sum over g_l - 1 peers of post + n/P_l / B
        exchange(n) = the stages of levels 1 to L, and of L to 1 with c_l = 1
    (4) ring(n)     = launch + 2 (W - N) ring_in + 2 (N - 1) ring_out + 2 (W - 1)/W n / B
        tree(n)     = launch + 2 (W/N - 1) tree_in + 2 log2(N) tree_out + 2 n / B
        all_reduce  = the smaller;  B = min(inside, GPUs on a node * between)
    (5) wait        = jitter A t E[the largest of W standard normals]
    (6) shared      = the largest of W shares + scatter + the stages of levels L to 1
        scatter     = send + hop_L + the most of W: its messages post_L + its results / B_L

(1), (2): gradients travel once a step, in buckets, each as soon as the last micro-batch's backward
has it. Before them, with the last forward, go the all-reduce of `StepReducer` (4) and BatchNorm's
statistics. One stage is under way at a time.
(3) is the exchange of `reduction_plan.py`: in level l each rank sends c_l partial sums of a shard
of n/P_l bytes, P_l = g_1 ... g_l, to each of g_l - 1 peers, within its node or by its network card.
A stage is a launch and messages as in LogGP (Alexandrov et al., SPAA 1995): latency `hop`, overhead
or gap `post` of a message, gap 1/B of a byte. LogGP lets the overhead hide behind the bytes of the
message before; adding them up makes a stage too long by no more than the smaller of the two.
(4) is the bandwidth-optimal ring (Patarasuk and Yuan, JPDC 2009) with a latency for each hop
(Thakur, Rabenseifner and Gropp, IJHPCA 2005), and the double binary tree (Sanders, Speck and
Traeff, Parallel Computing 2009), which NCCL spans between nodes, with a chain within each. Both
cross nodes through all their network cards at once, and pipeline: the slower kind of link counts.
That is the cost model by which NCCL itself chooses (ncclTopoTuneModel in its src/graph/tuning.cc,
2022). (5) is Blom's approximation (1958), which for many ranks grows as sqrt(2 ln W). (6) is what
Muon orthogonalises: pieces that ranks share out, and whose results go to the ranks that hold their
shards, over the link of the last level, and from these to all. Nothing hides it.

Left out: what the host takes to issue messages, which counts where a GPU waits for its host; the
additions of partial sums, 3 n bytes of a GPU's own memory; what messages take from the kernels
beside them; congestion and other jobs on the network.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import NamedTuple

from distvgg.distributed.partition import greedy_partition
from distvgg.distributed.reduction_plan import Ranks, TreePlan, buckets, levels_of

TARGET = 0.9


class Link(NamedTuple):
    """Between two GPUs: bytes a second in each direction, and seconds."""

    bandwidth: float
    ring_hop: float
    """Of an all-reduce by a ring; by a tree, `tree_hop`."""
    tree_hop: float
    hop: float
    """Until a message arrives, of no bytes."""
    post: float
    """From a message to the next, of no bytes."""

    def message(self, n: float) -> float:
        """From a message of `n` bytes to the next."""
        return self.post + n / self.bandwidth


class Fabric(NamedTuple):
    """How GPUs reach each other: within a node, and between nodes by a network card a GPU."""

    gpus_per_node: int
    launch: float
    """Seconds that any all-reduce takes, however small; a stage of messages, `send`."""
    send: float
    inside: Link
    between: Link
    overlaps: bool = True
    """False where communication needs the cores that compute, as gloo's does on busy cores."""


class Layer(NamedTuple):
    """A convolution or linear layer, with the BatchNorm that follows it."""

    gradients: tuple[int, ...]
    """Bytes, in the order in which the backward produces them."""
    forward: int
    """Floating-point operations of one image."""
    backward: int


@dataclass(frozen=True)
class Job:
    """What every rank computes and sends."""

    layers: tuple[Layer, ...]
    micro_batch_size: int
    statistics: int
    """Numbers in BatchNorm's running statistics."""
    shared: tuple[int, ...] = ()
    """Floating-point operations of each piece of work that ranks share out in a step."""
    results: tuple[int, ...] = ()
    """Bytes of what comes of each."""

    @property
    def flops(self) -> int:
        """Of one image, forward and backward."""
        return sum(layer.forward + layer.backward for layer in self.layers)

    @property
    def forward_share(self) -> float:
        """Of a micro-batch's time that its forward takes, as of its operations."""
        return sum(layer.forward for layer in self.layers) / self.flops

    def sums(self, micro_batches: int) -> int:
        """Bytes of StepReducer' all-reduce: float64 losses and hits, the wish to stop."""
        return 8 * (2 * micro_batches + 1)


class Gpu(NamedTuple):
    """What one GPU takes, in seconds."""

    micro_batch: float
    """Forward and backward of one micro-batch, its input included."""
    fixed: float
    """Once a step, however many micro-batches: clipping, optimizer, bookkeeping."""
    jitter: float
    """Standard deviation of a rank's compute, as a share of it."""
    shared: float = 0.0
    """Once a step: all the work that ranks share out."""


@dataclass(frozen=True)
class Setup:
    """A job on GPUs of one kind."""

    job: Job
    gpu: Gpu
    fabric: Fabric


class Step(NamedTuple):
    """One step of `ranks` ranks, and where its seconds go."""

    ranks: int
    global_batch_size: int
    compute: float
    exposed: float
    """Communication that the backward does not hide."""
    wait: float
    """For the slowest rank."""

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed + self.wait

    @property
    def rate(self) -> float:
        """Images a second over all ranks."""
        return self.global_batch_size / self.seconds


def ring(n: int, ranks: int, fabric: Fabric) -> float:
    """Seconds of a ring all-reduce of `n` bytes: equation 4."""
    nodes, bandwidth = _reach(ranks, fabric)
    hops = (ranks - nodes) * fabric.inside.ring_hop + (nodes - 1) * fabric.between.ring_hop
    return fabric.launch + 2 * hops + 2 * (ranks - 1) / ranks * n / bandwidth


def tree(n: int, ranks: int, fabric: Fabric) -> float:
    """Seconds of a double binary tree's all-reduce of `n` bytes: equation 4."""
    nodes, bandwidth = _reach(ranks, fabric)
    chain = math.ceil(ranks / nodes) - 1
    depth = math.ceil(math.log2(nodes))
    hops = chain * fabric.inside.tree_hop + depth * fabric.between.tree_hop
    return fabric.launch + 2 * hops + 2 * n / bandwidth


def all_reduce(n: int, ranks: int, fabric: Fabric) -> float:
    """Seconds of the all-reduce that is faster for `n` bytes; nothing to do for one rank."""
    return min(ring(n, ranks, fabric), tree(n, ranks, fabric)) if ranks > 1 else 0.0


def levels(ranks: int, gpus_per_node: int) -> tuple[int, ...]:
    """The radices of the exchange among so many ranks."""
    return levels_of(ranks, min(ranks, gpus_per_node))


def exchange(
    n: float, radices: Sequence[int], sums: Sequence[int], fabric: Fabric
) -> tuple[list[float], list[float]]:
    """Seconds of each stage in the exchange of `n` bytes, there and back: equation 3.

    Args:
        sums: the partial sums that a rank sends to each peer, by level.
    """
    there, back, before = [], [], 1
    for radix, c in zip(radices, sums, strict=True):
        near = min(radix, max(1, fabric.gpus_per_node // before))  # in a node, this one among them
        n, before = n / radix, before * radix  # the shards of this level
        seconds = (near - 1) * fabric.inside.message(n) + (radix - near) * fabric.between.message(n)
        alone = fabric.send + (fabric.inside if near == radix else fabric.between).hop
        there.append(alone + c * seconds)
        back.append(alone + seconds)
    return there, back[::-1]


@lru_cache
def partial_sums(ranks: int, accumulation: int, radices: tuple[int, ...]) -> tuple[int, ...]:
    """The partial sums that a rank sends to a peer in each level, at most."""
    plan = TreePlan(ranks * accumulation, Ranks(0, ranks, radices))
    blocks = [math.prod(radices[:level]) for level in range(len(radices))]
    return tuple(
        max(len(plan.nodes(level, rank)) for rank in range(0, ranks, block))
        for level, block in enumerate(blocks)
    )


def shared_seconds(setup: Setup, ranks: int, radices: Sequence[int]) -> tuple[float, float]:
    """The slowest rank's share of the work that ranks share out, and the exchange of what comes of
    it, in seconds: equation 6."""
    job, fabric = setup.job, setup.fabric
    if not job.shared:
        return 0.0, 0.0
    loads, results = [0.0] * ranks, [0] * ranks
    for owner, flops, size in zip(
        greedy_partition(job.shared, ranks), job.shared, job.results, strict=True
    ):
        loads[owner] += flops
        results[owner] += size
    share = setup.gpu.shared * max(loads) / sum(job.shared)
    if ranks == 1:
        return share, 0.0
    link = fabric.inside if ranks <= fabric.gpus_per_node else fabric.between
    sent = scattered(results, radices)
    scatter = (
        fabric.send + link.hop + max(n * link.post + size / link.bandwidth for n, size in sent)
    )
    _, gather = exchange(sum(results), radices, (1,) * len(radices), fabric)
    return share, scatter + sum(gather)


def scattered(results: Sequence[int], radices: Sequence[int]) -> list[tuple[int, float]]:
    """What each rank sends to the holders of the shards in which its results lie, one after the
    other by rank: (messages, bytes)."""
    found = []
    shard, last = sum(results) / len(results), 0.0
    for rank, size in enumerate(results):
        first, last = last, last + size / shard
        own = _place(rank, radices)
        kept = max(0.0, min(last, own + 1) - max(first, own))
        holders = math.ceil(last) - int(first) if size else 0
        found.append((holders - (kept > 0), size - kept * shard))
    return found


def _place(rank: int, radices: Sequence[int]) -> int:
    """The place of a rank's shard among all: its digits, the first level's counting most."""
    place = 0
    for radix in radices:
        rank, digit = divmod(rank, radix)
        place = place * radix + digit
    return place


def _reach(ranks: int, fabric: Fabric) -> tuple[int, float]:
    """Nodes of so many ranks, and the bandwidth at the narrowest place of a ring or tree."""
    nodes = math.ceil(ranks / fabric.gpus_per_node)
    if nodes == 1:
        return 1, fabric.inside.bandwidth
    return nodes, min(fabric.inside.bandwidth, fabric.gpus_per_node * fabric.between.bandwidth)


def ready_buckets(layers: Sequence[Layer]) -> list[tuple[float, int]]:
    """The gradient buckets, from the last layer backwards: (share of the backward after which a
    bucket is complete, its bytes)."""
    total = sum(layer.backward for layer in layers)
    gradients: list[tuple[float, int]] = []
    done = 0
    for layer in reversed(layers):
        done += layer.backward
        gradients += [(done / total, n) for n in layer.gradients]
    return [
        (gradients[bucket[-1]][0], sum(gradients[i][1] for i in bucket))
        for bucket in buckets([n for _, n in gradients])
    ]


def backward_end(
    backward: float, stages: Sequence[tuple[float, float]], *, overlaps: bool = True
) -> float:
    """Seconds from the start of the last backward until the gradients are summed: equation 2.

    Args:
        backward: seconds of computing it.
        stages: (share of the backward after which it is sent, seconds), in order.
    """
    if not overlaps:
        return backward + sum(seconds for _, seconds in stages)
    done = 0.0
    for sent, seconds in stages:
        done = max(sent * backward, done) + seconds
    return max(backward, done)


def slowest(ranks: int) -> float:
    """The expected largest of so many standard normals (Blom, 1958): 0 for one."""
    return NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25))


def stages(
    setup: Setup, ranks: int, accumulation: int, radices: tuple[int, ...]
) -> list[tuple[float, float]]:
    """What ranks tell each other beside the last backward, in order: (share of it after which that
    is sent, seconds). Nothing for one rank."""
    if ranks == 1:
        return []
    job, fabric = setup.job, setup.fabric
    summed = all_reduce(job.sums(ranks * accumulation), ranks, fabric)
    sums = partial_sums(ranks, accumulation, radices)
    exchanges = [(0.0, 8 * job.statistics), *ready_buckets(job.layers)]
    there_and_back = [(start, exchange(n, radices, sums, fabric)) for start, n in exchanges if n]
    return [(0.0, summed)] + [(start, sum(t) + sum(b)) for start, (t, b) in there_and_back]


def step(
    setup: Setup, ranks: int, accumulation: int, radices: tuple[int, ...] | None = None
) -> Step:
    """One step of `ranks` ranks with so many micro-batches each: equation 1.

    Args:
        radices: of the exchange. None: those that a run takes.
    """
    job, gpu, fabric = setup.job, setup.gpu, setup.fabric
    if radices is None:
        radices = levels(ranks, fabric.gpus_per_node)
    micro_batches = ranks * accumulation
    backward = (1 - job.forward_share) * gpu.micro_batch
    sent = stages(setup, ranks, accumulation, radices)
    end = backward_end(backward, sent, overlaps=fabric.overlaps)
    share, gather = shared_seconds(setup, ranks, radices)
    return Step(
        ranks,
        micro_batches * job.micro_batch_size,
        compute=accumulation * gpu.micro_batch + gpu.fixed + share,
        exposed=end - backward + gather,
        wait=gpu.jitter * accumulation * gpu.micro_batch * slowest(ranks),
    )


def efficiency(setup: Setup, taken: Step, accumulation: int) -> float:
    """Images a second over those of as many GPUs, each alone with `accumulation` micro-batches."""
    return taken.rate / (taken.ranks * step(setup, 1, accumulation).rate)


def smallest_batch(setup: Setup, ranks: int, accumulation: int) -> int | None:
    """The smallest global batch with which so many GPUs are at least 90% as fast, each, as one
    alone with `accumulation` micro-batches. None: no batch is large enough."""

    def reaches(a: int) -> bool:
        return efficiency(setup, step(setup, ranks, a), accumulation) >= TARGET

    # Powers of two, of which one partial sum travels.
    found = next((2**i for i in range(16) if reaches(2**i)), None)
    return None if found is None else found * ranks * setup.job.micro_batch_size

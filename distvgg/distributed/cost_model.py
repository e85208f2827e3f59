"""A model of the step time and throughput on 1 to 1,024 GPUs.

Owns the arithmetic alone. The times of one GPU are measured (`commands/bench.py`) or given. The
figures of links are in `hardware.py`. Imports no torch. A rank runs A micro-batches a step, each in
t seconds, which divide into `forward` and `backward`. W ranks are on N nodes. In seconds and bytes:

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

(1), (2): Gradients are exchanged once a step, in buckets. A bucket is sent as soon as the backward
of the last micro-batch has produced it. The all-reduce of `StepReducer` (4) and the exchange of
BatchNorm's statistics precede the buckets; both start after the last forward. One stage is under
way at a time.

(3) is the exchange of `reduction_plan.py`. In level l each rank sends c_l partial sums to each of
g_l - 1 peers, within its node or through its network card. Each partial sum is a shard of n/P_l
bytes, P_l = g_1 ... g_l. A stage is a launch plus messages as in LogGP (Alexandrov et al., SPAA
1995): latency `hop`, overhead or gap `post` of a message, gap 1/B of a byte. LogGP overlaps the
overhead with the bytes of the previous message. Adding the two makes a stage too long by at most
the smaller of the two.

(4) is the bandwidth-optimal ring (Patarasuk and Yuan, JPDC 2009) with a latency for each hop
(Thakur, Rabenseifner and Gropp, IJHPCA 2005), and the double binary tree (Sanders, Speck and
Traeff, Parallel Computing 2009). NCCL builds the tree between nodes, with a chain within each node.
Ring and tree cross nodes through all network cards at once, and pipeline: the slower kind of link
counts. NCCL chooses by this cost model (ncclTopoTuneModel in NCCL's src/graph/tuning.cc, 2022).

(5) is Blom's approximation (1958), which for many ranks grows as sqrt(2 ln W).

(6) is Muon's orthogonalisation, whose tasks are partitioned over ranks. The results go to the ranks
that hold their shards, over the link of the last level, and from these ranks to all. No computation
overlaps with (6).

Not modelled:
- the host's time to issue messages, which counts where a GPU waits for its host
- the additions of partial sums, 3 n bytes of a GPU's own memory
- the slowdown of kernels by messages that run at the same time
- congestion and other jobs on the network
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
    """A link between two GPUs, in bytes a second for each direction, and in seconds."""

    bandwidth: float
    ring_hop: float
    """Latency of a hop in a ring all-reduce; `tree_hop` is the latency in a tree all-reduce."""
    tree_hop: float
    hop: float
    """Time until a message of zero bytes arrives."""
    post: float
    """Time from a message of zero bytes to the next message."""

    def message(self, n: float) -> float:
        """Returns the seconds from a message of `n` bytes to the next message."""
        return self.post + n / self.bandwidth


class Fabric(NamedTuple):
    """The links within a node, and those between nodes through one network card a GPU."""

    gpus_per_node: int
    launch: float
    """Fixed seconds of any all-reduce; `send` is the equivalent for a stage of messages."""
    send: float
    inside: Link
    between: Link
    overlaps: bool = True
    """False if communication needs the cores that compute, as gloo does on busy cores."""


class Layer(NamedTuple):
    """A convolution or linear layer, with the BatchNorm that follows it."""

    gradients: tuple[int, ...]
    """Bytes of each gradient, in the order in which backward produces the gradients."""
    forward: int
    """Floating-point operations of one image; `backward` has the same unit."""
    backward: int


@dataclass(frozen=True)
class Job:
    """The computation and communication of every rank."""

    layers: tuple[Layer, ...]
    micro_batch_size: int
    statistics: int
    """Number of elements in BatchNorm's running statistics."""
    shared: tuple[int, ...] = ()
    """Floating-point operations of each task that is partitioned over ranks in a step."""
    results: tuple[int, ...] = ()
    """Bytes of the result of each task in `shared`."""

    @property
    def flops(self) -> int:
        """Floating-point operations of one image, forward and backward."""
        return sum(layer.forward + layer.backward for layer in self.layers)

    @property
    def forward_share(self) -> float:
        """Forward's share of a micro-batch's time, taken to be its share of the operations."""
        return sum(layer.forward for layer in self.layers) / self.flops

    def sums(self, micro_batches: int) -> int:
        """Returns the bytes of StepReducer's all-reduce: float64 losses, correct counts, stop."""
        return 8 * (2 * micro_batches + 1)


class Gpu(NamedTuple):
    """The times of one GPU, in seconds."""

    micro_batch: float
    """Forward and backward of one micro-batch, including its input."""
    fixed: float
    """Work once a step at any number of micro-batches: clipping, optimizer, bookkeeping."""
    jitter: float
    """Standard deviation of a rank's compute time, as a share of that time."""
    shared: float = 0.0
    """All tasks that are partitioned over ranks, once a step."""


@dataclass(frozen=True)
class Setup:
    """A job on GPUs of one kind."""

    job: Job
    gpu: Gpu
    fabric: Fabric


class Step(NamedTuple):
    """One step of `ranks` ranks, with its seconds by cause."""

    ranks: int
    global_batch_size: int
    compute: float
    exposed: float
    """Communication that does not overlap with backward."""
    wait: float
    """Wait for the slowest rank."""

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed + self.wait

    @property
    def rate(self) -> float:
        """Images a second over all ranks."""
        return self.global_batch_size / self.seconds


def ring(n: int, ranks: int, fabric: Fabric) -> float:
    """Returns the seconds of a ring all-reduce of `n` bytes: equation 4."""
    nodes, bandwidth = _reach(ranks, fabric)
    hops = (ranks - nodes) * fabric.inside.ring_hop + (nodes - 1) * fabric.between.ring_hop
    return fabric.launch + 2 * hops + 2 * (ranks - 1) / ranks * n / bandwidth


def tree(n: int, ranks: int, fabric: Fabric) -> float:
    """Returns the seconds of a double binary tree's all-reduce of `n` bytes: equation 4."""
    nodes, bandwidth = _reach(ranks, fabric)
    chain = math.ceil(ranks / nodes) - 1
    depth = math.ceil(math.log2(nodes))
    hops = chain * fabric.inside.tree_hop + depth * fabric.between.tree_hop
    return fabric.launch + 2 * hops + 2 * n / bandwidth


def all_reduce(n: int, ranks: int, fabric: Fabric) -> float:
    """Returns the seconds of the faster all-reduce for `n` bytes; 0 for one rank."""
    return min(ring(n, ranks, fabric), tree(n, ranks, fabric)) if ranks > 1 else 0.0


def levels(ranks: int, gpus_per_node: int) -> tuple[int, ...]:
    """Returns the radices of the exchange among `ranks` ranks."""
    return levels_of(ranks, min(ranks, gpus_per_node))


def exchange(
    n: float, radices: Sequence[int], sums: Sequence[int], fabric: Fabric
) -> tuple[list[float], list[float]]:
    """Returns the seconds of each stage in the exchange of `n` bytes: equation 3.

    Args:
        n: the size of the vector in bytes.
        radices: of the exchange, by level.
        sums: the number of partial sums that a rank sends to each peer, by level.
        fabric: the links.

    Returns:
        The stages of levels 1 to L (reduce-scatter), and those of levels L to 1 (all-gather).
    """
    there, back, before = [], [], 1
    for radix, c in zip(radices, sums, strict=True):
        # The ranks of this level in one node, including the rank itself.
        near = min(radix, max(1, fabric.gpus_per_node // before))
        n, before = n / radix, before * radix  # this level's shards
        seconds = (near - 1) * fabric.inside.message(n) + (radix - near) * fabric.between.message(n)
        alone = fabric.send + (fabric.inside if near == radix else fabric.between).hop
        there.append(alone + c * seconds)
        back.append(alone + seconds)
    return there, back[::-1]


@lru_cache
def partial_sums(ranks: int, accumulation: int, radices: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the largest number of partial sums that a rank sends to a peer, by level."""
    plan = TreePlan(ranks * accumulation, Ranks(0, ranks, radices))
    blocks = [math.prod(radices[:level]) for level in range(len(radices))]
    return tuple(
        max(len(plan.nodes(level, rank)) for rank in range(0, ranks, block))
        for level, block in enumerate(blocks)
    )


def shared_seconds(setup: Setup, ranks: int, radices: Sequence[int]) -> tuple[float, float]:
    """Returns the seconds of the tasks that are partitioned over ranks: equation 6.

    Returns:
        The tasks of the slowest rank, and the exchange of all results.
    """
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
    """Returns the (messages, bytes) that each rank sends to the holders of its results' shards.

    In the vector of results, each rank's results follow those of the previous rank.
    """
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
    """Returns the index of a rank's shard: its digits, the most significant of the first level."""
    place = 0
    for radix in radices:
        rank, digit = divmod(rank, radix)
        place = place * radix + digit
    return place


def _reach(ranks: int, fabric: Fabric) -> tuple[int, float]:
    """Returns the number of nodes, and the bandwidth at the narrowest place of a ring or tree."""
    nodes = math.ceil(ranks / fabric.gpus_per_node)
    if nodes == 1:
        return 1, fabric.inside.bandwidth
    return nodes, min(fabric.inside.bandwidth, fabric.gpus_per_node * fabric.between.bandwidth)


def ready_buckets(layers: Sequence[Layer]) -> list[tuple[float, int]]:
    """Returns the gradient buckets, from the last layer backwards.

    Returns:
        For each bucket, the share of the backward after which it is complete, and its bytes.
    """
    total = sum(layer.backward for layer in layers) or 1  # a bias alone may be trained
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
    """Returns the seconds from the start of the last backward to the summed gradients: equation 2.

    Args:
        backward: the seconds of the backward alone.
        stages: (share of the backward after which the stage is sent, seconds), in order.
        overlaps: False adds the stages to the backward.
    """
    if not overlaps:
        return backward + sum(seconds for _, seconds in stages)
    done = 0.0
    for sent, seconds in stages:
        done = max(sent * backward, done) + seconds
    return max(backward, done)


def slowest(ranks: int) -> float:
    """Returns the expected largest of `ranks` standard normals (Blom, 1958): 0 for one."""
    return NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25))


def stages(
    setup: Setup, ranks: int, accumulation: int, radices: tuple[int, ...]
) -> list[tuple[float, float]]:
    """Lists the exchanges that overlap with the last backward, in order.

    Returns:
        For each exchange, the share of the backward after which it is sent, and its seconds. Empty
        for one rank.
    """
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
    """Computes one step of `ranks` ranks with `accumulation` micro-batches each: equation 1.

    Args:
        setup: the job, its GPUs and links.
        ranks: the world size.
        accumulation: the micro-batches of each rank.
        radices: of the exchange. None: those of a run.
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
    """Returns the throughput of a step as a share of that of as many independent GPUs.

    Each independent GPU runs `accumulation` micro-batches a step.
    """
    return taken.rate / (taken.ranks * step(setup, 1, accumulation).rate)


def smallest_batch(setup: Setup, ranks: int, accumulation: int) -> int | None:
    """Returns the smallest global batch with an `efficiency` of at least 90% on `ranks` GPUs.

    The efficiency is relative to one GPU with `accumulation` micro-batches. Returns None if no
    batch is large enough.
    """

    def reaches(a: int) -> bool:
        return efficiency(setup, step(setup, ranks, a), accumulation) >= TARGET

    # Only powers of two, for which a single partial sum is exchanged.
    found = next((2**i for i in range(16) if reaches(2**i)), None)
    return None if found is None else found * ranks * setup.job.micro_batch_size

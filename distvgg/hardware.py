"""GPUs and links that are not at hand, by name, with where their numbers are from; and what a user
says of them.

Invariant: nothing here was measured by this project, and what uses it says so. Imports no torch.
"""

import re
from collections.abc import Mapping
from typing import Literal, NamedTuple

from pydantic import Field, ValidationError

from distvgg.config import Section, UserError
from distvgg.scaling import Fabric, Gpu, Job, Link


class Hardware(NamedTuple):
    """A GPU by its name, with its links, in operations and bytes a second."""

    name: str
    peak: float
    inside: float
    between: float


# Dense bf16 of the tensor cores: NVIDIA's data sheets of H100 SXM (2022) and A100 SXM (2020).
# Within a node what NCCL gets out of NVLink: of 450 GB/s 370 (Jeaugey, NVIDIA/nccl-tests issue 212,
# 2024); for the A100 the 235 GB/s at which NCCL's own model caps it (src/graph/tuning.cc). Between
# nodes what NCCL gets out of a network card for each GPU: of NDR InfiniBand's 50 GB/s 46 to 48
# (NVIDIA in NVIDIA/nccl-tests issue 290, 2025); for HDR the same share of 25 is assumed.
HARDWARE = {
    "h100": Hardware("NVIDIA H100 SXM, NVLink 4, NDR InfiniBand", 989e12, 370e9, 47e9),
    "a100": Hardware("NVIDIA A100 SXM, NVLink 3, HDR InfiniBand", 312e12, 235e9, 23.5e9),
}
# The share of that peak which a small convolutional network on 32x32 images reached without
# compilation: 0.36 PFLOP in 3.83 s on an A100 (Jordan, "94% on CIFAR-10 in 3.29 seconds on a single
# GPU", 2024), in batches of 1,024.
PEAK_SHARE = 0.30
# Seconds from NCCL's model of itself (src/graph/tuning.cc, 2022), (within a node, between nodes).
# All-reduces are small and take its protocol LL128: a launch, and a hop of a ring or of a tree.
LAUNCH = 14e-6
RING_HOPS, TREE_HOPS = (1.9e-6, 4.0e-6), (1.25e-6, 8.5e-6)
# Messages take its protocol Simple (up to 16 KiB LL, which is faster; not counted): the launch and
# the hop of a ring. That model has no word on messages to many; assumed, from a message to the
# next: within a node the 0.4 us that it counts for each peer where a GPU talks to all of its node
# ("arity serialization"), between nodes the three times 1 us that the host's processor takes to
# post a message (getNetOverhead; of Intel, 2 us of AMD).
SEND = 8.4e-6
HOPS, POSTS = (3.4e-6, 14.0e-6), (0.4e-6, 3.0e-6)


class BenchOptions(Section):
    """What `distvgg bench` is told beside a config."""

    gpu: Literal["h100", "a100"] | None = None
    """Predict for this GPU, at an assumed share of its peak. None: measure the device here."""
    peak_share: float = Field(PEAK_SHARE, gt=0, le=1)
    """That share. Measure on one, and give `images_per_sec` instead, as soon as you can."""
    images_per_sec: float | None = Field(None, gt=0)
    """Of one GPU in training, measured elsewhere (perf/images_per_sec). None: see `gpu`."""
    fixed_ms: float = Field(0.0, ge=0)
    """What a step takes however many micro-batches it has; for a rate or a named GPU."""
    jitter: float | None = Field(None, ge=0, le=1)
    """Standard deviation of a rank's compute, as a share of it. None: as measured, else 0."""
    gpus_per_node: int = Field(8, ge=1)
    """GPUs of a node, each with a network card."""
    nvlink: float | None = Field(None, gt=0)
    """GB/s that a GPU sends within a node. None: those of the GPU, of an H100 where none is
    named."""
    network: float | None = Field(None, gt=0)
    """GB/s that a GPU sends to other nodes. None: likewise."""
    max_gpus: int = Field(1024, ge=1, le=1 << 20)
    """The largest number of GPUs in the tables."""


def read_options(words: Mapping[str, str]) -> BenchOptions:
    """Options as they were typed.

    Raises:
        UserError: an unknown one, or a value out of range.
    """
    for name in words:
        if name not in BenchOptions.model_fields:
            raise UserError(
                f"no option --{name}: give one of {', '.join(BenchOptions.model_fields)}"
            )
    try:
        return BenchOptions.model_validate(words)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        wanted = re.sub(r"^\w+ should", "must", first["msg"])
        raise UserError(f"--{first['loc'][0]} {wanted} (got {first['input']!r})") from error


def fabric_of(options: BenchOptions) -> Fabric:
    """The links that options name or leave to the GPU."""
    hardware = HARDWARE[options.gpu or "h100"]
    inside = 1e9 * options.nvlink if options.nvlink else hardware.inside
    between = 1e9 * options.network if options.network else hardware.between
    return Fabric(
        options.gpus_per_node,
        LAUNCH,
        SEND,
        Link(inside, RING_HOPS[0], TREE_HOPS[0], HOPS[0], POSTS[0]),
        Link(between, RING_HOPS[1], TREE_HOPS[1], HOPS[1], POSTS[1]),
    )


def gpu_of(options: BenchOptions, job: Job, accumulation: int) -> Gpu:
    """The GPU that options give by its rate with so many micro-batches a step, or by its name.

    Raises:
        UserError: at that rate a step is shorter than its fixed part.
    """
    fixed, jitter = options.fixed_ms / 1000, options.jitter or 0.0
    if options.images_per_sec is None:
        assert options.gpu is not None
        speed = options.peak_share * HARDWARE[options.gpu].peak
        micro_batch = job.micro_batch_size * job.flops / speed
        return Gpu(micro_batch, fixed, jitter, sum(job.shared) / speed)
    seconds = accumulation * job.micro_batch_size / options.images_per_sec
    if seconds <= fixed:
        raise UserError(
            f"at images_per_sec {options.images_per_sec:g} a step takes {1000 * seconds:.3g} ms:"
            f" fixed_ms {options.fixed_ms:g} must be less"
        )
    images = accumulation * job.micro_batch_size * job.flops
    shared = (seconds - fixed) * sum(job.shared) / (images + sum(job.shared))
    return Gpu((seconds - fixed - shared) / accumulation, fixed, jitter, shared)

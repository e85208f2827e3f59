"""The options of `distvgg bench`, and the GPUs and links that they select. Imports no torch."""

from typing import Literal

from pydantic import Field

from distvgg.config import FrozenModel
from distvgg.distributed.cost_model import Fabric, Gpu, Job, Link
from distvgg.distributed.hardware import (
    HARDWARE,
    HOPS,
    LAUNCH,
    PEAK_SHARE,
    POSTS,
    RING_HOPS,
    SEND,
    TREE_HOPS,
)
from distvgg.errors import UserError

# A network whose micro-batch is so many times smaller than the measured one's gets a warning.
MUCH_SMALLER = 4


class BenchOptions(FrozenModel):
    """Options of `distvgg bench` in addition to a config."""

    gpu: Literal["h100", "a100"] | None = None
    """GPU to predict for, at a share of its peak. None: measure the device here."""
    peak_share: float | None = Field(None, gt=0, le=1)
    """Share of the peak of `gpu`. None: the share that distvgg was measured to reach on this GPU,
    else an assumed one. `images_per_sec` of your own network is better, if you have it."""
    images_per_sec: float | None = Field(None, ge=0.01, le=1e8)
    """Images per second of one GPU in training, measured elsewhere (perf/images_per_sec). None: see
    `gpu`."""
    fixed_ms: float = Field(0.0, ge=0, le=1e6)
    """Milliseconds of a step that do not depend on its number of micro-batches. Used with
    `images_per_sec` or `gpu`."""
    jitter: float | None = Field(None, ge=0, le=1)
    """Standard deviation of a rank's compute time, as a share of it. None: as measured, else 0."""
    gpus_per_node: int = Field(8, ge=1)
    """GPUs of a node, each with a network card."""
    nvlink: float | None = Field(None, ge=1e-3, le=1e5)
    """GB/s that a GPU sends within a node. None: the value of `gpu`, or of an H100 if `gpu` is
    None."""
    network: float | None = Field(None, ge=1e-3, le=1e5)
    """GB/s that a GPU sends to other nodes. None: the value of `gpu`, or of an H100 if `gpu` is
    None."""
    max_gpus: int = Field(1024, ge=1, le=1 << 20)
    """Largest number of GPUs in the tables."""


def interconnect(options: BenchOptions) -> Fabric:
    """Returns the links that the options give, else those of the GPU."""
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


def peak_share(options: BenchOptions) -> float:
    """Returns the share of the peak of `gpu`: given, else measured, else assumed."""
    assert options.gpu is not None
    return options.peak_share or HARDWARE[options.gpu].measured_share or PEAK_SHARE


def assumption(options: BenchOptions, job: Job) -> str:
    """Returns how the throughput of a GPU was assumed, and what was measured."""
    assert options.gpu is not None
    gpu = HARDWARE[options.gpu]
    at = (
        f"an {gpu.name.split(',')[0]} at {peak_share(options):.1%} of its peak of"
        f" {gpu.peak / 1e12:.0f} TFLOP/s"
    )
    found = gpu.measured
    if options.peak_share is not None:
        return f"{at}, as given"
    if found is None:
        return f"{at}: distvgg was never measured on this GPU; small micro-batches reach less"
    measured = (
        f"{at}, as measured on {found.date}: {found.images_per_sec:,.0f} images/s of"
        f" {found.network} (distvgg {found.version})"
    )
    if job.flops == found.flops:
        return measured
    text = f"{measured}; that this network reaches the same share is assumed"
    smaller = found.flops * found.micro_batch_size / (job.flops * job.micro_batch_size)
    if smaller < MUCH_SMALLER:
        return text
    return (
        f"{text}\n          its micro-batch has 1/{smaller:,.0f} of the arithmetic of"
        f" {found.network}'s: launches and memory, which are left out here, decide instead, and it"
        " is far slower than this"
    )


def gpu_spec(options: BenchOptions, job: Job, accumulation: int) -> Gpu:
    """Returns the GPU that the options give by `images_per_sec`, else by name.

    `images_per_sec` holds for a step of `accumulation` micro-batches.

    Raises:
        UserError: at that rate a step takes no longer than `fixed_ms`.
    """
    fixed, jitter = options.fixed_ms / 1000, options.jitter or 0.0
    if options.images_per_sec is None:
        assert options.gpu is not None
        speed = peak_share(options) * HARDWARE[options.gpu].peak
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

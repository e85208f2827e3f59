"""GPUs and links by name, with the sources of their figures.

Invariant: only a `Measurement` was measured by this project, and reports state that the rest is
assumed. Imports no torch.
"""

from typing import NamedTuple


class Measurement(NamedTuple):
    """Training throughput of one GPU, measured by this project.

    Attributes:
        images_per_sec: of the training step.
        flops: operations of an image.
        micro_batch_size: images of a micro-batch.
        network: what was trained, and how.
        date, version: of the measurement, and of distvgg.
    """

    images_per_sec: float
    flops: int
    micro_batch_size: int
    network: str
    date: str
    version: str


class Hardware(NamedTuple):
    """A GPU by name, with its links, in operations and bytes a second."""

    name: str
    peak: float
    inside: float
    between: float
    measured: Measurement | None = None

    @property
    def measured_share(self) -> float | None:
        """Share of the peak that training was measured to reach."""
        if self.measured is None:
            return None
        return self.measured.images_per_sec * self.measured.flops / self.peak


# Peak: dense bf16 of the tensor cores, from NVIDIA's data sheets of H100 SXM (2022) and A100 SXM
# (2020).
# Within a node: the bandwidth that NCCL reaches over NVLink. The H100 reaches 370 of 450 GB/s
# (Jeaugey, NVIDIA/nccl-tests issue 212, 2024). NCCL's own model caps the A100 at 235 GB/s
# (src/graph/tuning.cc).
# Between nodes: the bandwidth that NCCL reaches over one network card a GPU. NDR InfiniBand reaches
# 46 to 48 of 50 GB/s (NVIDIA in NVIDIA/nccl-tests issue 290, 2025). The same share of 25 GB/s is
# assumed for HDR.
HARDWARE = {
    "h100": Hardware(
        *("NVIDIA H100 SXM, NVLink 4, NDR InfiniBand", 989e12, 370e9, 47e9),
        # docs/performance.md, "On a GPU"
        Measurement(
            *(36_000, 6_805_303_296, 128, "fast"),
            *("2026-11-27", "0.2.0"),
        ),
    ),
    "a100": Hardware("NVIDIA A100 SXM, NVLink 3, HDR InfiniBand", 312e12, 235e9, 23.5e9),
}
# Share of the peak that is assumed of a GPU without a measurement. A small convolutional network on
# 32x32 images reached it without compilation: 0.36 PFLOP in 3.83 s on an A100, in batches of 1,024
# (Jordan, "94% on CIFAR-10 in 3.29 seconds on a single GPU", 2024).
PEAK_SHARE = 0.30
# Seconds from NCCL's own model (src/graph/tuning.cc, 2022), as (within a node, between nodes).
# All-reduces are small and use NCCL's protocol LL128: a launch, and a hop of a ring or of a tree.
LAUNCH = 14e-6
RING_HOPS, TREE_HOPS = (1.9e-6, 4.0e-6), (1.25e-6, 8.5e-6)
# Messages use NCCL's protocol Simple: the launch and the hop of a ring. Up to 16 KiB they use LL,
# which is faster and not modelled. NCCL's model does not cover messages to many peers, so the time
# from a message to the next is assumed:
# - within a node, the 0.4 us that NCCL's model counts for each peer where a GPU sends to all GPUs
#   of its node ("arity serialization")
# - between nodes, three times the 1 us that the host's processor takes to post a message
#   (getNetOverhead; 1 us on Intel, 2 us on AMD)
SEND = 8.4e-6
HOPS, POSTS = (3.4e-6, 14.0e-6), (0.4e-6, 3.0e-6)

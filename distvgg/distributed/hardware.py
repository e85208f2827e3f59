"""GPUs and links by name, with the sources of their figures.

Invariant: nothing here was measured by this project, and what uses it says so. Imports no torch.
"""

from typing import NamedTuple


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

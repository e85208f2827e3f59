"""Random streams that need no saved state: a seed for each purpose and position in a run.

Torch is imported only to draw.
"""

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive_seed(seed: int, purpose: str, *counters: int) -> int:
    """A 63-bit seed for one stream of random numbers: equal for equal arguments on any machine,
    unrelated for any others (BLAKE2b), so that streams never need a saved state."""
    key = ":".join((str(seed), purpose, *map(str, counters)))
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()) >> 1


def generator(seed: int, purpose: str, *counters: int) -> "torch.Generator":
    """A CPU generator on its own stream. On the CPU always: CUDA's streams differ."""
    import torch

    return torch.Generator().manual_seed(derive_seed(seed, purpose, *counters))

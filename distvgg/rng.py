"""Random streams without saved state: a seed for each purpose and position in a run.

Torch is imported only to draw.
"""

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive_seed(seed: int, purpose: str, *counters: int) -> int:
    """Returns a 63-bit seed for one stream of random numbers, so that no stream needs saved state.

    Seeds are BLAKE2b hashes: equal for equal arguments on any machine, and unrelated for different
    arguments.
    """
    key = ":".join((str(seed), purpose, *map(str, counters)))
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()) >> 1


def generator(seed: int, purpose: str, *counters: int) -> "torch.Generator":
    """Returns a CPU generator for the stream of the arguments.

    The generator is always on the CPU, because CUDA's streams differ.
    """
    import torch

    return torch.Generator().manual_seed(derive_seed(seed, purpose, *counters))

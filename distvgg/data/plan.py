"""Batch plan: the sample stream, its micro-batches, and their assignment to ranks.

Training consumes one infinite sequence of samples: epoch permutations joined end to end. Step `s`
takes positions `[s*G, (s+1)*G)`, where `G` is the global batch size. Micro-batch `k` of that step
takes the `m` positions from `s*G + k*m` on. Invariant: the content of a micro-batch is a pure
function of `(seed, s, k)`. The world size decides only which rank runs it. There is no sampler
state.

Torch is imported only to draw, so steps can be counted without Torch.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from distvgg.errors import UserError
from distvgg.rng import generator

if TYPE_CHECKING:
    from torch import Tensor


def epoch_permutation(seed: int, epoch: int, n_samples: int) -> "Tensor":
    """Returns the sample order of one epoch: a permutation of 0..n_samples-1, [n_samples] int64."""
    import torch

    return torch.randperm(n_samples, generator=generator(seed, "order", epoch))


def valid_world_sizes(micro_batches: int) -> list[int]:
    """Returns the world sizes that divide the micro-batches of a step."""
    return [n for n in range(1, micro_batches + 1) if micro_batches % n == 0]


@dataclass(frozen=True)
class BatchPlan:
    """Assignment of a training split of `n_samples` to `world_size` ranks.

    Raises:
        UserError: `world_size` does not divide the micro-batches of a step.
    """

    n_samples: int
    global_batch_size: int
    micro_batch_size: int
    world_size: int = 1

    def __post_init__(self) -> None:
        assert self.n_samples > 0
        assert self.global_batch_size % self.micro_batch_size == 0
        n, w = self.micro_batches, self.world_size
        if n % w:
            works = " or ".join(map(str, valid_world_sizes(n)))
            raise UserError(
                f"{w} processes do not divide the {n} micro-batches of a step"
                f" (global_batch_size {self.global_batch_size} / micro_batch_size"
                f" {self.micro_batch_size}): start {works} processes, or"
                f" make train.global_batch_size a multiple of {w * self.micro_batch_size}"
            )

    @property
    def micro_batches(self) -> int:
        """Number of micro-batches in a step, over all ranks."""
        return self.global_batch_size // self.micro_batch_size

    @property
    def accumulation(self) -> int:
        """Number of micro-batches in a step on each rank."""
        return self.micro_batches // self.world_size

    def steps(self, epochs: float) -> int:
        """Returns the optimizer steps until every sample has been drawn `epochs` times.

        The number is rounded up, except for the rounding error of a fraction such as 0.1.
        """
        return max(1, math.ceil(epochs * self.n_samples / self.global_batch_size - 1e-6))

    def epoch(self, step: float) -> float:
        """Returns the epochs consumed after `step` steps."""
        return step * self.global_batch_size / self.n_samples

    def rank_micro_batches(self, rank: int) -> range:
        """Returns the micro-batches `k` of every step that a rank runs: contiguous, in order."""
        return range(rank * self.accumulation, (rank + 1) * self.accumulation)

    def positions(self, step: int, rank: int) -> range:
        """Returns the stream positions that a rank consumes in a step: contiguous."""
        ks = self.rank_micro_batches(rank)
        start = step * self.global_batch_size
        return range(
            start + ks.start * self.micro_batch_size, start + ks.stop * self.micro_batch_size
        )

    def spans(self, positions: range) -> Iterator[tuple[int, int, int]]:
        """Yields the parts of `positions` by epoch: (epoch, first, last + 1 of its permutation)."""
        at = positions.start
        while at < positions.stop:
            epoch, first = divmod(at, self.n_samples)
            last = min(first + positions.stop - at, self.n_samples)
            yield epoch, first, last
            at += last - first

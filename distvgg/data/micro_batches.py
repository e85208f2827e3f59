"""Interface of micro-batch sources: device-resident, streamed or replayed data."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from distvgg.data.loader import MicroBatch


class MicroBatchSource(Protocol):
    """Supplies the micro-batches of a rank.

    Invariant: a micro-batch is a pure function of `(config, data, step, k)`.
    """

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """Returns the rank's micro-batches of a step, in order."""

    def rows(self, step: int, k: int) -> Tensor:
        """Returns the sample indices of micro-batch `k` of a step, on any rank: [m] int64."""


class EvalSource(Protocol):
    """Supplies fixed batches of a split in order, without augmentation.

    Attributes:
        n_samples: Images over all batches.
    """

    n_samples: int

    def __len__(self) -> int:
        """Returns the number of batches."""

    def batches(self, rank: int, world_size: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yields every `world_size`-th batch from `rank` on: (batch number, images, labels)."""


@dataclass(frozen=True)
class RepeatedSteps:
    """The micro-batches of the first `steps` steps of a source, over and over."""

    source: MicroBatchSource
    steps: int

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """Returns the micro-batches of step `step % steps`."""
        return self.source.micro_batches(step % self.steps)

    def rows(self, step: int, k: int) -> Tensor:
        """Returns the sample indices of micro-batch `k` of step `step % steps`."""
        return self.source.rows(step % self.steps, k)

"""Sums of losses and correct predictions on the device, and a clock that excludes pauses.

Invariant: metrics are sums and counts, reduced over ranks once and divided once. Reading the sums
is the only host synchronisation, at the interval of the rows.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from distvgg.metrics import (
    DATA_WAIT_MS,
    IMAGES_PER_SEC,
    STEP_MS,
    TFLOPS,
    TRAIN_LOSS,
    TRAIN_TOP1,
    Row,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class TrainMeter:
    """Loss and accuracy over the samples since the last reading, the same on every rank.

    Attributes:
        sums: [3] float64 (loss, correct, count). In float64, a mean of thousands of losses keeps
            its digits.
    """

    def __init__(self, device: "torch.device") -> None:
        import torch

        self.sums = torch.zeros(3, dtype=torch.float64, device=device)

    def add(self, summed_loss: "Tensor", correct: "Tensor", count: int) -> None:
        """Adds the sums of one step over all ranks."""
        self.sums[0].add_(summed_loss)  # `+=` would also copy the element onto itself
        self.sums[1].add_(correct)
        self.sums[2].add_(count)

    def read(self) -> Row:
        """Returns the means since the last reading, and resets the sums."""
        loss, correct, count = self.sums.tolist()  # a host sync
        self.sums.zero_()
        return {TRAIN_LOSS: loss / count, TRAIN_TOP1: correct / count}


class Clock:
    """Wall time of training steps.

    The first step (allocation, compilation) and what runs under `paused` (evaluation) do not count.

    Args:
        images_per_step: the global batch size.
        flops_per_image: of forward and backward.
        steps, seconds: totals of earlier launches of the run.

    Attributes:
        flops_per_image: as given.
    """

    def __init__(
        self,
        images_per_step: int,
        flops_per_image: int,
        steps: int = 0,
        seconds: float = 0.0,
    ) -> None:
        self._images_per_step, self.flops_per_image = images_per_step, flops_per_image
        self._started: float | None = None
        self._steps, self._total_steps = 0, steps
        self._waited, self._total_seconds = 0.0, seconds

    def step_done(self) -> None:
        """Counts a step; the first one only starts the clock."""
        if self._started is None:
            self._started, self._waited = time.perf_counter(), 0.0
        else:
            self._steps += 1

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        before = time.perf_counter()
        yield
        self._waited += time.perf_counter() - before

    @contextmanager
    def paused(self) -> Iterator[None]:
        before = time.perf_counter()
        yield
        if self._started is not None:
            self._started += time.perf_counter() - before

    def read(self) -> Row:
        """Returns the throughput since the last reading; empty before the second step."""
        if not self._steps or self._started is None:
            return {}
        now = time.perf_counter()
        seconds, steps, waited = now - self._started, self._steps, self._waited
        self._total_seconds += seconds
        self._total_steps += steps
        images_per_sec = steps * self._images_per_step / seconds
        self._started, self._steps, self._waited = now, 0, 0.0
        return {
            IMAGES_PER_SEC: images_per_sec,
            TFLOPS: images_per_sec * self.flops_per_image / 1e12,
            STEP_MS: 1000 * seconds / steps,
            DATA_WAIT_MS: 1000 * waited / steps,
        }

    def totals(self) -> tuple[int, float]:
        """Returns the steps and seconds of all readings."""
        return self._total_steps, self._total_seconds

    def images_per_sec(self) -> float | None:
        """Returns the throughput over all readings; None before the first."""
        if not self._total_steps:
            return None
        return self._total_steps * self._images_per_step / self._total_seconds

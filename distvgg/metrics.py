"""What is measured: sums on the device, a clock without pauses, the names of all metrics.

Invariant: metrics are sums and counts, reduced over ranks once and divided once. Reading is the
only host synchronisation, at the cadence of the rows.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

STEP, EPOCH = "step", "epoch"
TRAIN_LOSS, TRAIN_TOP1, TRAIN_LR = "train/loss", "train/top1", "train/lr"
TRAIN_GRAD_NORM = "train/grad_norm"
IMAGES_PER_SEC, STEP_MS, DATA_WAIT_MS = (
    "perf/images_per_sec",
    "perf/step_ms",
    "perf/data_wait_ms",
)
# Under val/ and test/; superclass_top1 only where the data has superclasses.
LOSS, TOP1, TOP5, SUPERCLASS_TOP1, COUNT = "loss", "top1", "top5", "superclass_top1", "count"

Row = dict[str, float | int]


class TrainMeter:
    """Loss and accuracy over the samples since the last reading.

    Sums are float64: a mean of thousands of float32 losses keeps its digits, in any order.
    """

    def __init__(self, device: torch.device, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)
        self._sum_over_ranks = sum_over_ranks

    def add(self, summed_loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Adds one micro-batch: its loss summed over samples, [m, classes] logits, [m] labels."""
        self._sums[0] += summed_loss.detach()
        self._sums[1] += (logits.detach().argmax(1) == labels).sum()
        self._sums[2] += len(labels)

    def read(self) -> Row:
        """The means over all ranks since the last reading. Every rank must call it."""
        loss, correct, count = self._sum_over_ranks(self._sums).tolist()  # the one host sync
        self._sums.zero_()
        return {TRAIN_LOSS: loss / count, TRAIN_TOP1: correct / count}


class Clock:
    """Wall time of training steps. The first step (allocation, compilation) and whatever runs
    under `paused` (evaluation) do not count."""

    def __init__(self, images_per_step: int) -> None:
        self._images_per_step = images_per_step
        self._started: float | None = None
        self._steps = self._total_steps = 0
        self._waited = self._total_seconds = 0.0

    def step_done(self) -> None:
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
        """Throughput since the last reading; empty before the second step."""
        if not self._steps or self._started is None:
            return {}
        now = time.perf_counter()
        seconds, steps, waited = now - self._started, self._steps, self._waited
        self._total_seconds += seconds
        self._total_steps += steps
        self._started, self._steps, self._waited = now, 0, 0.0
        return {
            IMAGES_PER_SEC: steps * self._images_per_step / seconds,
            STEP_MS: 1000 * seconds / steps,
            DATA_WAIT_MS: 1000 * waited / steps,
        }

    def images_per_sec(self) -> float | None:
        """Over all readings; None before the first."""
        if not self._total_steps:
            return None
        return self._total_steps * self._images_per_step / self._total_seconds

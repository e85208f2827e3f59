"""What the host learns of each step without making a device wait: is it finite, shall the run stop.

Invariant: every rank reads the same values after the same step, so that all stop together, or fail
together, with the same step and micro-batch.
"""

import math
from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from distvgg.distributed.host_copy import HostCopy
from distvgg.errors import RunError

# fp16 skips steps whose scaled gradients overflow, and halves the scale each time. After this many
# in a row the scale is 2^-9 of one: it is not the scale.
MAX_SKIPPED_STEPS = 25


class NonFiniteError(RunError):
    """A step whose loss or gradient is nan or infinite.

    Attributes:
        step: which, counted from 0. micro_batch: `k` of the loss, None for a gradient.
    """

    def __init__(self, step: int, micro_batch: int | None, value: float) -> None:
        super().__init__(f"non-finite at step {step + 1}")
        self.step, self.micro_batch, self.value = step, micro_batch, value


class _Record(NamedTuple):
    step: int
    values: HostCopy


class StepMonitor:
    """The steps' outcomes, read `lag` steps later.

    Args:
        lag: 1 for a GPU, which is then never waited for by more than what it is computing anyway.
        fp16: gradients may overflow, which skips a step and is counted in `skipped`.
        skipped, skipped_in_a_row: of earlier starts of the run.
    """

    def __init__(
        self, lag: int, *, fp16: bool, skipped: int = 0, skipped_in_a_row: int = 0
    ) -> None:
        self._lag, self._fp16 = lag, fp16
        self._records: deque[_Record] = deque()
        self.skipped, self.skipped_in_a_row = skipped, skipped_in_a_row
        self.stop = False
        self.grad_norm = math.nan

    def push(self, step: int, losses: Tensor, grad_norm: Tensor, stop: Tensor) -> None:
        """Hands over a step's outcome as it is on the device: [G/m] losses, scalars."""
        values = torch.cat([losses, grad_norm.reshape(1).to(losses), stop.reshape(1)])
        self._records.append(_Record(step, HostCopy(values)))

    def poll(self) -> None:
        """Reads what is old enough.

        Raises:
            NonFiniteError: a step has failed.
        """
        while len(self._records) > self._lag:
            self._read(self._records.popleft())

    def drain(self) -> None:
        """Reads all, waiting for the device: before anything is written down.

        Raises:
            NonFiniteError: a step has failed.
        """
        while self._records:
            self._read(self._records.popleft())

    def _read(self, record: _Record) -> None:
        *losses, self.grad_norm, stop = record.values.read()
        self.stop = self.stop or stop > 0
        for k, loss in enumerate(losses):
            if not math.isfinite(loss):
                raise NonFiniteError(record.step, k, loss)
        if math.isfinite(self.grad_norm):
            self.skipped_in_a_row = 0
            return
        self.skipped_in_a_row += 1
        if not self._fp16 or self.skipped_in_a_row == MAX_SKIPPED_STEPS:
            raise NonFiniteError(record.step, None, self.grad_norm)
        self.skipped += 1

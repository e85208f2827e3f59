"""Asynchronous monitoring of steps: non-finite values and stop requests.

The host reads the results of each step without making the device wait.

Invariant: every rank reads the same values after the same step. All ranks therefore stop together,
or fail together with the same step and micro-batch.
"""

import math
from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from distvgg.distributed.host_copy import HostCopy
from distvgg.errors import RunError

# fp16 skips steps whose scaled gradients overflow, and halves the scale each time. After this many
# skipped steps in a row the scale is 2^-9, so the scale is not the cause.
MAX_SKIPPED_STEPS = 25


class NonFiniteError(RunError):
    """Error for a step whose loss or gradient is NaN or infinite.

    Attributes:
        step: counted from 0.
        micro_batch: index `k` of the micro-batch whose loss it is; None for a gradient.
        value: the loss, or the norm of the gradient.
    """

    def __init__(self, step: int, micro_batch: int | None, value: float) -> None:
        super().__init__(f"non-finite at step {step + 1}")
        self.step, self.micro_batch, self.value = step, micro_batch, value


class _Record(NamedTuple):
    step: int
    values: HostCopy


class StepMonitor:
    """Results of the steps, read `lag` steps later.

    Args:
        lag: 1 for a GPU: the host then waits only for the step before the one just queued.
        fp16: True if gradients may overflow; such a step is skipped and counted in `skipped`.
        skipped, skipped_in_a_row: counts of earlier launches of the run.
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
        """Queues a step's results, which are still on the device: [G/m] losses and two scalars."""
        values = torch.cat([losses, grad_norm.reshape(1).to(losses), stop.reshape(1)])
        self._records.append(_Record(step, HostCopy(values)))

    def poll(self) -> None:
        """Reads the results that are at least `lag` steps old.

        Raises:
            NonFiniteError: a step has failed.
        """
        while len(self._records) > self._lag:
            self._read(self._records.popleft())

    def drain(self) -> None:
        """Reads all results and waits for the device; called before anything is written.

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

"""Copies from device to host that block only when they are read."""

from typing import Any

import torch
from torch import Tensor


class HostCopy:
    """An asynchronous copy of a tensor to the host; only `read` blocks.

    `read` waits for the work that was queued on the device before the copy, not for later work.
    """

    def __init__(self, values: Tensor) -> None:
        self._values, self._copied = values, None
        if values.is_cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values = host.copy_(values, non_blocking=True)
            self._copied = torch.Event(values.device)
            self._copied.record()

    def read(self) -> Any:
        """Returns the values as Python numbers."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values.tolist()

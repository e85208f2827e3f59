"""Copies from device to host that are waited for only when they are read."""

from typing import Any

import torch
from torch import Tensor


class HostCopy:
    """A tensor on its way to the host, which waits for it only when it reads: for what the device
    was given before, not for what it was given since."""

    def __init__(self, values: Tensor) -> None:
        self._values, self._copied = values, None
        if values.is_cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values = host.copy_(values, non_blocking=True)
            self._copied = torch.Event(values.device)
            self._copied.record()

    def read(self) -> Any:
        """The values as Python numbers."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values.tolist()

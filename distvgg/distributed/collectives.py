"""Values that ranks exchange once, at the start of a run or to agree on a stop request."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from accelerate.utils import broadcast_object_list, gather_object

from distvgg.distributed.host_copy import HostCopy
from distvgg.errors import UserError
from distvgg.runs.provenance import machine

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState

T = TypeVar("T")
_BROADCAST_BYTES = 64 * 2**20


def machines(accelerator: "Accelerator") -> list[dict[str, str]]:
    """Returns the device and versions of each rank, by rank.

    Every rank must call this function.
    """
    found: list[dict[str, str]] = gather_object([machine(accelerator.device)])
    return found


def broadcast_from_main(process: "Accelerator | PartialState", make: Callable[[], T]) -> T:
    """Calls `make` on the main process and returns its result on every rank.

    A UserError from `make` is raised on every rank, so that no rank waits forever.
    """
    outcome: list[Any] = [None]
    if process.is_main_process:
        try:
            outcome = [make()]
        except UserError as error:
            outcome = [error]
    broadcast_object_list(outcome)
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    made: T = outcome[0]
    return made


def broadcast_bytes(accelerator: "Accelerator", content: bytes | None) -> bytes:
    """Copies bytes of the main process to every rank, in parts of 64 MiB, without pickling.

    Args:
        accelerator: the handle on the process group.
        content: not empty on the main process; ignored on the other ranks.
    """
    if accelerator.num_processes == 1:
        assert content is not None
        return content
    size = broadcast_from_main(accelerator, lambda: len(content or b""))
    if accelerator.is_main_process:
        assert content is not None
        whole = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    else:
        whole = torch.empty(size, dtype=torch.uint8)
    for part in torch.split(whole, _BROADCAST_BYTES):
        there = part.to(accelerator.device)
        dist.broadcast(there, src=0)
        if there is not part:
            part.copy_(there)
    return whole.numpy().tobytes()


def from_local_main(accelerator: "Accelerator", here: T | None) -> T | None:
    """Returns on every rank the value that the first rank of its node passed.

    Every rank must call this function.
    """
    leader = accelerator.process_index - accelerator.local_process_index
    found: T | None = gather_object([here])[leader]
    return found


def first_error(accelerator: "Accelerator", here: UserError | None) -> UserError | None:
    """Returns on every rank the error of the first rank that has one.

    Every rank must call this function, and waits for the other ranks.
    """
    found: list[UserError | None] = gather_object([here])
    return next((error for error in found if error is not None), None)


def any_rank(accelerator: "Accelerator", here: bool) -> bool:
    """Returns True if `here` is true on any rank.

    Every rank must call this function, and waits for the other ranks.
    """
    flag = torch.tensor(float(here), device=accelerator.device)
    return bool(accelerator.reduce(flag, "sum") > 0)


def make_all_reduce_sum(accelerator: "Accelerator") -> Any:
    """Returns a function that sums a tensor over ranks.

    Every rank must call the returned function equally often, with tensors of the same shape.
    """
    return lambda tensor: accelerator.reduce(tensor, "sum")


class StopConsensus:
    """Asynchronous agreement of all ranks on a stop request.

    `asked` starts an all-reduce and returns the result of the previous one, which is long complete.
    Every rank must call `asked` equally often. Call `close` before the process exits: a pending
    all-reduce aborts an exiting process.
    """

    def __init__(self, accelerator: "Accelerator") -> None:
        self._accelerator = accelerator
        self._flag: HostCopy | None = None
        self._pending: dist.Work | None = None

    def asked(self, here: bool) -> bool:
        """Returns True if a rank requested a stop at the previous call.

        With one process, returns `here`.
        """
        if self._accelerator.num_processes == 1:
            return here
        self.close()
        if self._flag is not None and self._flag.read() > 0:
            return True
        # Filled on the device: a copy from the host would wait for the device's queued work.
        flag = torch.full((), float(here), device=self._accelerator.device)
        self._pending = dist.all_reduce(flag, async_op=True)
        if flag.is_cuda:
            self.close()  # blocks the stream, not the host: the copy must not wait for later work
        self._flag = HostCopy(flag)
        return False

    def close(self) -> None:
        """Waits for the pending all-reduce, if any."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None

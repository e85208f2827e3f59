"""Clean shutdown of the process group, and errors for failures of other processes."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from distvgg.errors import PeerLostError, RunError, UserError

# Messages of gloo if the other end of a connection is gone.
_BROKEN = (
    r"Connection (closed|reset) by peer|Broken pipe|[Cc]onnection refused|Socket closed"
    r"|Timed out waiting"
)


@contextmanager
def clean_shutdown() -> Iterator[None]:
    """Destroys the process group when all ranks fail alike, by a UserError or a RunError.

    A PeerLostError leaves the group as it is. gloo occasionally aborts a process that exits before
    its group is destroyed (pytorch/pytorch issue 190489).
    """
    try:
        yield
    except (UserError, RunError) as error:
        if dist.is_initialized() and not isinstance(error, PeerLostError):
            dist.destroy_process_group()
        raise


@contextmanager
def translate_peer_failure() -> Iterator[None]:
    """Translates a broken connection to another process into an error of one line.

    Raises:
        PeerLostError: in place of the error of torch.distributed.
        RunError: a process that reads images died; torch raises this error at any instruction.
    """
    try:
        yield
    except RunError:  # also a RuntimeError, whose text may match `_BROKEN`
        raise
    except RuntimeError as error:  # gloo has no error type for a broken connection
        text = str(error)
        if text.startswith("DataLoader worker"):
            raise RunError(
                f"a process that reads images died ({' '.join(text.split())[:200]}): if memory was"
                " short, lower data.workers; the same command resumes from the last checkpoint"
            ) from error
        if isinstance(error, dist.DistError) or re.search(_BROKEN, text):
            raise PeerLostError(
                "lost contact with another process, which died or was killed"
                f" ({_reason(text)}); its own output says why. The same command resumes from the"
                " last checkpoint"
            ) from error
        raise


def _reason(text: str) -> str:
    """Returns the message of gloo or NCCL without its source locations."""
    found = re.search(_BROKEN, text)
    return found[0] if found else text.splitlines()[0][:200]

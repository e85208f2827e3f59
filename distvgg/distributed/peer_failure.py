"""The ends of a process group: in order, or by the death of another process."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from distvgg.errors import PeerLostError, RunError, UserError

# How gloo says that the other end of a connection is gone.
_BROKEN = (
    r"Connection (closed|reset) by peer|Broken pipe|[Cc]onnection refused|Socket closed"
    r"|Timed out waiting"
)


@contextmanager
def clean_shutdown() -> Iterator[None]:
    """Takes down the process group where all ranks give up alike, by a UserError or a RunError of
    the run itself. gloo now and then aborts a process that exits with its group still up."""
    try:
        yield
    except (UserError, RunError) as error:
        if dist.is_initialized() and not isinstance(error, PeerLostError):
            dist.destroy_process_group()
        raise


@contextmanager
def translate_peer_failure() -> Iterator[None]:
    """Says in a line what a broken connection to another process means.

    Raises:
        PeerLostError: instead of what torch.distributed raises.
    """
    try:
        yield
    except RunError:  # a RuntimeError too, whose text may quote such words
        raise
    except RuntimeError as error:  # gloo has no type of its own for it
        text = str(error)
        if isinstance(error, dist.DistError) or re.search(_BROKEN, text):
            raise PeerLostError(
                "lost contact with another process, which died or was killed"
                f" ({_reason(text)}); its own lines say why. The same command goes on from the last"
                " checkpoint"
            ) from error
        raise


def _reason(text: str) -> str:
    """What gloo or NCCL says, without the places in their sources."""
    found = re.search(_BROKEN, text)
    return found[0] if found else text.splitlines()[0][:200]

"""Advisory locks on files, which the kernel releases when their process dies (flock(2))."""

import errno
import fcntl

# Lustre mounted without -o flock, NFS without a lock daemon, some FUSE file systems.
_UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


def lock(descriptor: int, *, wait: bool) -> bool:
    """Locks an open file for this process alone.

    Args:
        descriptor: of the file; the lock ends when it is closed.
        wait: wait for another holder.

    Returns:
        False if the file system has no locks. Nothing is locked then.

    Raises:
        BlockingIOError: another process holds the lock, and `wait` is False.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return False
        raise
    return True

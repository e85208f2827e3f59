"""Imported by Python at its start where this folder is on the path: a file system without flock and
without fsync of folders, for the whole process."""

import errno
import fcntl
import os
import stat
from typing import Any


def _flock(*_: Any) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def _fsync(file: Any, fsync: Any = os.fsync) -> None:
    number = file if isinstance(file, int) else file.fileno()
    if stat.S_ISDIR(os.fstat(number).st_mode):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    fsync(number)


fcntl.flock = _flock
os.fsync = _fsync

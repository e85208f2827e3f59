"""Exclusive locks on files, which end when their process dies.

`hold` uses flock(2), which the kernel releases. Where a file system has no flock, a symbolic link
beside the file names the host and process that hold the lock. Its creation is atomic, also on
network file systems. A link of a process of this host that is dead is taken over; the state of a
process of another host cannot be known.
"""

import atexit
import errno
import fcntl
import os
import re
import socket
import time
from contextlib import suppress
from pathlib import Path

# Lustre mounted without -o flock, NFS without a lock daemon, some FUSE file systems.
_UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
_HOLDER = re.compile(r"(process (\d+) on (\S+)) \(boot (\S+), (\S+), start (\d+)\)")
_POLL_SECONDS = 0.2


class HeldError(Exception):
    """Another process holds a lock.

    Attributes:
        holder: the process, as text.
        link: the link to delete if that process is dead, where this host cannot know.
    """

    def __init__(self, holder: str, link: Path | None = None) -> None:
        super().__init__(holder)
        self.holder, self.link = holder, link

    def remedy(self) -> str:
        """Returns the end of a message: how to go on if the holder is dead; else empty."""
        return f"; if that process is dead, delete {self.link}" if self.link else ""


class FileLock:
    """A lock that this process holds until `release`, or until it dies.

    Attributes:
        link: the link that stands for the lock where the file system has no flock.
        exclusive: False if the file system has neither, so that nothing is locked.
    """

    def __init__(self, descriptor: int, link: Path | None, *, exclusive: bool) -> None:
        self._descriptor, self.link, self.exclusive = descriptor, link, exclusive
        self._target = _this_process()
        if link is not None:
            atexit.register(self._remove_link)

    def release(self) -> None:
        """Ends the lock."""
        if self.link is not None:
            self._remove_link()
            atexit.unregister(self._remove_link)
        os.close(self._descriptor)

    def _remove_link(self) -> None:
        assert self.link is not None
        with suppress(OSError):
            if os.readlink(self.link) == self._target:
                self.link.unlink()


def hold(path: Path, *, wait: bool) -> FileLock:
    """Locks a file, which is created if it is missing, for this process alone.

    Args:
        path: the file. The name of the holder is written into it.
        wait: wait for another holder, unless it is a process of another host whose end this host
            cannot see.

    Raises:
        HeldError: another process holds the lock.
        OSError: the file cannot be opened.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        held = FileLock(descriptor, None, exclusive=True)
        if not lock(descriptor, wait=wait):
            link = path.with_name(f"{path.name}.holder")
            made = _make_link(link, wait=wait)
            held = FileLock(descriptor, link if made else None, exclusive=made)
    except BlockingIOError as error:
        holder = os.read(descriptor, 1000).decode(errors="replace") or "another process"
        os.close(descriptor)
        raise HeldError(holder) from error
    except BaseException:
        os.close(descriptor)
        raise
    with suppress(OSError):  # the holder's name is optional; a full disk may reject it
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    return held


def lock(descriptor: int, *, wait: bool) -> bool:
    """Locks an open file by flock alone.

    Args:
        descriptor: of the file; the lock ends when it is closed.
        wait: wait for another holder.

    Returns:
        False if the file system has no flock. Nothing is locked then.

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


def _make_link(link: Path, *, wait: bool) -> bool:
    """Makes the link that stands for a lock; returns False if the file system has no links.

    Raises:
        HeldError: another process has made it.
    """
    while True:
        try:
            os.symlink(_this_process(), link)
        except FileExistsError:
            pass
        except OSError as error:
            if error.errno in (*_UNSUPPORTED, errno.EPERM):
                return False
            raise
        else:
            return True
        try:
            target = os.readlink(link)
        except FileNotFoundError:  # released meanwhile
            continue
        if _is_dead(target):
            _remove_stale(link, target)
        elif wait and _is_of_this_host(target):
            time.sleep(_POLL_SECONDS)
        else:
            known = _HOLDER.fullmatch(target)
            here = _is_of_this_host(target)
            raise HeldError(known[1] if known else target, None if here else link)


def _remove_stale(link: Path, target: str) -> None:
    """Removes the link of a dead process, unless another process has just replaced it."""
    aside = link.with_name(f"{link.name}.{socket.gethostname()}-{os.getpid()}")
    try:
        os.rename(link, aside)
        if (moved := os.readlink(aside)) != target:
            with suppress(FileExistsError):
                os.symlink(moved, link)
        aside.unlink()
    except FileNotFoundError:  # another process was faster
        pass


def _this_process() -> str:
    pid = os.getpid()
    start = _start_of(pid)
    return (
        f"process {pid} on {socket.gethostname()} (boot {_boot()}, {_namespace()}, start {start})"
    )


def _is_of_this_host(target: str) -> bool:
    found = _HOLDER.fullmatch(target)
    return found is not None and (found[3], found[5]) == (socket.gethostname(), _namespace())


def _is_dead(target: str) -> bool:
    """Returns True if a holder was a process of this host, and is no longer one.

    Process ids are used again, and differ between containers. The time of the start and the
    namespace of the ids tell them apart.
    """
    found = _HOLDER.fullmatch(target)
    if found is None or found[3] != socket.gethostname():
        return False
    if found[4] != _boot():
        return True
    return found[5] == _namespace() and _start_of(int(found[2])) != found[6]


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _namespace() -> str:
    return os.readlink("/proc/self/ns/pid")


def _start_of(pid: int) -> str | None:
    """Returns the start of a living process, in clock ticks since the boot; None if it is dead."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else fields[19]

"""Atomic file writes, free disk space, and reading of JSON files."""

import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import TypeVar

from pydantic import TypeAdapter

from distvgg.errors import UserError

T = TypeVar("T")


def free_space(folder: Path) -> int:
    """Returns the free bytes where a folder exists or would be created. Leaves no file there.

    Raises:
        OSError: nothing can be written there.
    """
    while not os.path.lexists(folder):
        folder = folder.absolute().parent
    with TemporaryFile(dir=folder) as probe:
        probe.write(bytes(4096))
        probe.flush()
    return shutil.disk_usage(folder).free


def read_json(path: Path, kind: type[T], remedy: str) -> T | None:
    """Returns the content of a JSON file of a run folder, or None if there is no such file.

    Args:
        path: the file.
        kind: the type that the content is validated against.
        remedy: the end of the error message, about what happens once the file is deleted.

    Raises:
        UserError: the file is corrupt, or cannot be read.
    """
    if (content := read_bytes(path)) is None:
        return None
    try:
        return TypeAdapter(kind).validate_json(content)
    except ValueError as error:
        raise UserError(f"{path} is damaged: delete it, and {remedy}") from error


def read_bytes(path: Path) -> bytes | None:
    """Returns the content of a file of a run folder, or None if there is no such file.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror}): make it a readable file, or move it away"
        ) from error


def atomic_write(path: Path, content: bytes, *, writer: str = "") -> None:
    """Writes a file so that it has either the old or the new content, whatever happens.

    Args:
        path: the file.
        content: the new content.
        writer: distinguishes writers that may write the file at the same time. A file in a run
            folder has one writer, whose next attempt removes the temporary file that a kill left.

    Raises:
        OSError: the write failed, e.g. on a full disk. The old content stays, and no temporary
            file is left.
    """
    tmp = path.with_name(f".{path.name}.{writer}tmp")
    try:
        write_fsync(tmp, content)
        os.replace(tmp, path)
        fsync_dir(path.parent)
    except OSError:
        with suppress(OSError):
            tmp.unlink(missing_ok=True)
        raise


def write_fsync(path: Path, content: bytes) -> None:
    """Writes a file and waits until the content is on the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def fsync_dir(folder: Path) -> None:
    """Waits until the names in a folder are on the disk.

    Without this wait, a power failure may undo a rename. Some network and FUSE file systems have no
    such wait for folders.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)

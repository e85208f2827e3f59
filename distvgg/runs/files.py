"""Files that are on disk completely or not at all, and the reading of JSON files."""

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
    """The bytes that are free where a folder is or would be made. Leaves nothing there.

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
    """What a JSON file of a run folder holds, None where there is none.

    Args:
        remedy: what follows when the file is deleted.

    Raises:
        UserError: the file is damaged.
    """
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path} is damaged: delete it, and {remedy}") from error


def atomic_write(path: Path, content: bytes, *, writer: str = "") -> None:
    """Writes a file so that it has the old content or the new, whatever happens meanwhile.

    Args:
        writer: tells apart those that may write the file at the same time. Files in a run folder
            have one writer, whose next attempt then takes away what a kill left of the last.

    Raises:
        OSError: as of a full disk; the old content stands, and nothing is left beside it.
    """
    aside = path.with_name(f".{path.name}.{writer}tmp")
    try:
        write_fsync(aside, content)
        os.replace(aside, path)
        fsync_dir(path.parent)
    except OSError:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise


def write_fsync(path: Path, content: bytes) -> None:
    """Writes a file and waits until the disk has it."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def fsync_dir(folder: Path) -> None:
    """Waits until the disk has the names in a folder: a rename alone may be lost with the power."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

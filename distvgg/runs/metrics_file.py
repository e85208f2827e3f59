"""metrics.jsonl: one JSON object a line, each row once and none missing, over any number of kills.

Invariant: the file is a prefix of what the run would have written uninterrupted. A checkpoint notes
how long it was (`Mark`), and resuming cuts it there. A row that a full disk refuses waits in memory
for the next one; no checkpoint is written meanwhile, since it would count on that row.
"""

import hashlib
import json
import math
import os
import threading
from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel

from distvgg.metrics import Row


class Mark(BaseModel, frozen=True, extra="forbid"):
    """A length of the file in bytes, and the SHA-256 of that much."""

    bytes: int = 0
    sha256: str = hashlib.sha256().hexdigest()


class MetricsFile:
    """The file of one run, cut to what its checkpoint knows. For the main process.

    Args:
        say: takes a line for the user when rows have to wait, and when they no longer do.
    """

    def __init__(self, path: Path, mark: Mark, say: Callable[[str], None]) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self._path, self._say = path, say
        os.ftruncate(self._file, mark.bytes)
        self.rows: list[Row] = [json.loads(line) for line in path.read_bytes().splitlines()]
        self._on_disk = self._length = mark.bytes
        self._digest = hashlib.sha256(path.read_bytes())
        self._waiting: list[bytes] = []
        self._writing = threading.Lock()  # a checkpoint flushes from a thread of its own

    def append(self, row: Row) -> None:
        """Writes a row, with those that had to wait. JSON knows no nan and no infinity: null."""
        finite = {k: v if math.isfinite(v) else None for k, v in row.items()}
        line = json.dumps(finite, allow_nan=False).encode() + b"\n"
        self._digest.update(line)
        self._length += len(line)
        with self._writing:
            waited = bool(self._waiting)
            self._waiting.append(line)
            try:
                self._write()
            except OSError as error:
                if not waited:
                    self._say(f"{self._path}: {error.strerror}; rows wait in memory for room")
            else:
                if waited:
                    self._say(f"{self._path}: all rows are written")

    def mark(self) -> Mark:
        """The end of the file, waiting rows included."""
        return Mark(bytes=self._length, sha256=self._digest.hexdigest())

    def flush(self) -> None:
        """Returns when every row is on the disk.

        Raises:
            OSError: the disk does not take them.
        """
        with self._writing:
            self._write()
        os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)

    def _write(self) -> None:
        content, written = b"".join(self._waiting), 0
        try:
            while written < len(content):  # a disk that fills up takes a part first
                written += os.pwrite(self._file, content[written:], self._on_disk + written)
        except OSError:
            os.ftruncate(self._file, self._on_disk)  # no half row for a reader
            raise
        self._on_disk += written
        self._waiting.clear()


def holds(path: Path, mark: Mark) -> bool:
    """Whether a file begins with what a mark says."""
    try:
        with path.open("rb") as file:
            head = file.read(mark.bytes)
    except OSError:
        head = b""
    return len(head) == mark.bytes and hashlib.sha256(head).hexdigest() == mark.sha256

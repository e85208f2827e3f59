"""Encoded images of one split: the bytes of their files in shards, decoded when they are read.

Invariant: a plain read gives the pixels that the decoded store of the same data holds.
"""

import os
from array import array
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

SHARD_BYTES = 2**30  # from which the next shard begins
_INDEX = "{split}_index.npy"
_SHARD = "{split}_files_{shard:04d}.bin"


class EncodedImages:
    """Images of one split, read by row from the shards of a cache entry.

    May be sent to another process, which opens the shards itself.

    Args:
        entry: directory of the shards.
        split: name of the split.
        size: height and width in pixels of a plain read.
        max_pixels: largest image that is decoded.
    """

    def __init__(self, entry: Path, split: str, size: tuple[int, int], max_pixels: int) -> None:
        self._entry, self._split = entry, split
        self._index = np.load(entry / _INDEX.format(split=split), mmap_mode="r")
        self._max_pixels = max_pixels
        self._shards: dict[int, int] = {}
        self.shape = len(self._index), *size, 3

    def __len__(self) -> int:
        return len(self._index)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_shards": {}}

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_shards", {}).values():
            os.close(descriptor)

    def content(self, row: int) -> bytes:
        """Returns the bytes of an image's file.

        Raises:
            OSError: the shard cannot be read.
        """
        shard, offset, size = map(int, self._index[row])
        if shard not in self._shards:
            path = self._entry / _SHARD.format(split=self._split, shard=shard)
            self._shards[shard] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        # Without a position of its own, a descriptor may be shared by processes and threads.
        return os.pread(self._shards[shard], size, offset)

    def read(self, row: int, size: Callable[[Any], Any]) -> np.ndarray:
        """Decodes an image and applies `size` to it: [height, width, 3] uint8.

        Raises:
            ValueError: the shard cannot be read, or its bytes changed since the build. The message
                names the cache entry.
        """
        from distvgg.data.images import decode_upright

        try:
            return np.array(size(decode_upright(self.content(row), self._max_pixels)))
        except (OSError, ValueError) as error:
            raise ValueError(f"{self._entry}, row {row}: {error}") from error

    def __getitem__(self, rows: Any) -> np.ndarray:
        """Returns images by row, slice or array of rows, resized and cropped to `shape`."""
        from distvgg.data.images import cover

        _, height, width, _ = self.shape
        if isinstance(rows, int | np.integer):
            return self.read(int(rows), lambda image: cover(image, height, width))
        chosen = np.arange(len(self))[rows]
        out = np.empty((len(chosen), height, width, 3), dtype=np.uint8)
        for at, row in enumerate(chosen):
            out[at] = self[row]
        return out


class EncodedWriter:
    """Writes the files of one split into shards; a context.

    Args:
        entry: directory of the shards.
        split: name of the split.
    """

    def __init__(self, entry: Path, split: str) -> None:
        self._entry, self._split = entry, split
        self._index = array("q")
        self._shard, self._at = -1, SHARD_BYTES
        self._file: BinaryIO | None = None

    def write(self, content: bytes) -> None:
        """Appends the bytes of a file."""
        if self._at >= SHARD_BYTES:
            self._close()
            self._shard, self._at = self._shard + 1, 0
            path = self._entry / _SHARD.format(split=self._split, shard=self._shard)
            self._file = path.open("wb", buffering=2**20)
        assert self._file is not None
        self._index.extend((self._shard, self._at, len(content)))
        self._at += self._file.write(content)

    def finish(self) -> None:
        """Writes the index of all files."""
        self._close()
        index = np.array(self._index, dtype=np.int64).reshape(-1, 3)
        np.save(self._entry / _INDEX.format(split=self._split), index)

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> "EncodedWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

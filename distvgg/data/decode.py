"""Decoding of rows of encoded images and labels into checked arrays or shards on disk.

This module owns all checks of a user's images and labels. It is imported only when the cache is
cold. Invariant: the output of `write` has one image shape, labels in range, and a superclass for
every class or for none.
"""

import io
import json
import os
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from distvgg import preemption
from distvgg.config import DataConfig
from distvgg.cores import granted_cores
from distvgg.data.card import DAMAGED_SHOWN, Card, pixel_digest
from distvgg.data.cifar import (
    CIFAR100_SUPERCLASS_OF,
    CIFAR100_SUPERCLASSES,
    CLASSES,
    SIDE,
)
from distvgg.data.classes import integers, join_classes, number_names
from distvgg.data.encoded import EncodedWriter
from distvgg.data.images import MODE, cover, decode_upright
from distvgg.data.moments import moments
from distvgg.data.readers import read
from distvgg.data.rows import Encoded, Rows
from distvgg.errors import UserError, reason

TASK_BYTES, TASK_IMAGES = 2**18, 64  # encoded images that a thread takes at once
UNREAD_BYTES = 2**16  # an image whose file is not read yet counts as this
ROOM = 0.9  # share of the free disk that decoded images may take under data.store auto
Store = Literal["decoded", "encoded"]


class Prepared(NamedTuple):
    """An image that could be decoded.

    Attributes:
        row: of the split.
        path: of its file, or empty.
        width, height: before any resize.
        mode: before its conversion to RGB, as Pillow calls it.
        stored: size of `pixels`, (width, height).
        pixels: [height, width, 3] uint8, as the decoded store has them.
        digest: of `pixels`.
        content: of the file; pixels without a file are encoded as PNG.
        histogram: [768] number of pixels by value, red first.
    """

    row: int
    path: str
    width: int
    height: int
    mode: str
    stored: tuple[int, int]
    pixels: bytes
    digest: bytes
    content: bytes
    histogram: list[int]


def write(config: DataConfig, source: str, folder: Path) -> dict[str, Any]:
    """Decodes a folder or hub id into arrays in `folder`.

    The arrays are `{split}_images.npy` [n, height, width, 3] uint8 and `{split}_labels.npy` [n]
    int64. They are written for train and, if the source has them, for val and test. In place of
    decoded images there may be encoded ones, as `EncodedImages` reads them (`data.store`).
    `{split}_files.json` lists the files of the images, below the source, if they have any.

    Returns:
        The fields class_names, superclass_names, superclass_of and notes of `Dataset`, and the
        data card, for JSON. For encoded images also `encoded`, which has their size and
        `max_pixels`, and the moments.

    Raises:
        UserError: The source cannot be read, or has an invalid image or label.
        OSError: `folder` cannot be written.
    """
    with TemporaryDirectory(dir=folder) as scratch:
        splits = read(config, source, Path(scratch))
        # All labels are checked before the first image, so a wrong label is found quickly.
        classes = join_classes(config, source, splits)
        splits = {name: splits[name] for name in classes.labels}  # without hidden labels
        superclass_names, superclass_of = _superclasses(splits, classes.labels, classes.names)
        side = config.resize or SIDE
        shape: tuple[int, ...] | None = (side, side, 3) if config.name in CLASSES else None
        card, notes = Card(classes.names), list(classes.notes)
        store = None if config.store == "auto" else config.store
        count = sum(map(len, splits.values()))
        meta: dict[str, Any] = {}
        for name, rows in splits.items():
            decoder = Decoder(config, rows, card)
            kept, shape, store = decoder.write(shape, store, folder, name, count)
            if name == "train" and store == "encoded":
                mean, std = moments(decoder.counts)
                size = shape[:2]
                meta = {"mean": mean, "std": std}
                meta["encoded"] = {"size": size, "max_pixels": config.max_pixels}
                if config.store == "auto":
                    notes.append(
                        f"stored encoded: decoded, {count:,} images of {size[1]}x{size[0]} pixels"
                        " would not fit the disk of the cache"
                    )
            labels = classes.labels[name][kept]
            np.save(folder / f"{name}_labels.npy", labels)
            _write_file_names(folder / f"{name}_files.json", source, decoder.files)
            card.add_split(name, labels, rows.left_out, decoder.damaged)
        missing = sorted(set(classes.labels["train"]) - set(np.load(folder / "train_labels.npy")))
        if missing:
            raise UserError(
                f"{splits['train'].where}: all images of class {classes.names[missing[0]]} are"
                " damaged: fix them, or remove the class"
            )
    return {
        "class_names": classes.names,
        "superclass_names": superclass_names,
        "superclass_of": superclass_of,
        "notes": notes + card.notes(),
        "card": card.lines(),
        **meta,
    }


def _superclasses(
    splits: dict[str, Rows], labels: dict[str, np.ndarray], class_names: list[str]
) -> tuple[list[str], list[int] | None]:
    """Returns the names of the superclasses, and the superclass of each class.

    Both come from the superclass column of the data. Without that column, they follow from the
    class names if these are CIFAR-100's, because an image folder keeps only one label.
    """
    is_cifar100 = set(class_names) == set(CIFAR100_SUPERCLASS_OF)
    train = splits["train"]
    if train.superclass is None:
        names = list(CIFAR100_SUPERCLASSES) if is_cifar100 else []
        table = [names.index(CIFAR100_SUPERCLASS_OF[c]) for c in class_names] if names else None
        return names, table
    names = train.superclass.class_names or (
        list(CIFAR100_SUPERCLASSES)
        if is_cifar100
        else number_names(train.where, train.superclass, len(class_names))
    )
    of = np.full(len(class_names), -1)
    for name, rows in splits.items():
        if rows.superclass is None:
            continue
        fine, coarse = labels[name], integers(rows.where, rows.superclass, len(names))
        new = of[fine] < 0
        of[fine[new]] = coarse[new]
        if (wrong := np.flatnonzero(of[fine] != coarse)).size:
            i = int(wrong[0])
            raise UserError(
                f"{rows.where}: image {i} puts class {class_names[fine[i]]} in superclass"
                f" {names[coarse[i]]}, others are in {names[of[fine[i]]]}: fix its"
                f" {rows.superclass.column}"
            )
    if (of < 0).any():
        unknown = class_names[int(np.argmin(of))]
        raise UserError(
            f"{train.where}: no image of class {unknown} tells its superclass: add one, or drop the"
            f" column {train.superclass.column}"
        )
    return names, of.tolist()


class Decoder:
    """The images of one split, decoded into a file or checked and copied into shards.

    Attributes:
        damaged: a line for each image that cannot be decoded.
        files: path of each image that was written, or empty.
        counts: [3, 256] int64, pixels of the stored images by channel and value. Encoded only.
    """

    def __init__(self, config: DataConfig, rows: Rows, card: Card) -> None:
        self._config, self._rows, self._card = config, rows, card
        self.damaged: list[str] = []
        self.files: list[str] = []
        self.counts = np.zeros((3, 256), dtype=np.int64)

    def write(
        self, shape: tuple[int, ...] | None, store: Store | None, folder: Path, split: str, n: int
    ) -> tuple[np.ndarray, tuple[int, ...], Store]:
        """Decodes images by threads, in bounded memory, and writes them into a directory.

        The first image sets the shape if none is given, and the store if that is None. Files are
        written, not memory-mapped: on a full disk, a memory map raises a signal that kills the
        process.

        Args:
            shape: of all images.
            store: decoded or encoded.
            folder: the directory.
            split: name of the split.
            n: images of all splits.

        Returns:
            The rows that were decoded, [n] int64, the shape, and the store.

        Raises:
            UserError: images are damaged, unless `data.on_error` is skip; or an image has another
                shape.
        """
        if shape is None:
            shape = self._first_shape()
        if store is None:
            fits = n * int(np.prod(shape)) <= ROOM * shutil.disk_usage(folder).free
            store = "decoded" if fits else "encoded"
        kept: list[int] = []
        with (
            PixelWriter(folder, split)
            if store == "decoded"
            else EncodedWriter(folder, split) as writer
        ):
            for image in self._decoded(store):
                width, height = image.stored
                if image.stored != (shape[1], shape[0]):
                    file = f" ({image.path})" if image.path else ""
                    raise UserError(
                        f"{self._rows.where}: image {image.row}{file} is {width}x{height} pixels,"
                        f" expected {shape[1]}x{shape[0]}: fix it, or bring all to one size with"
                        f" --data.resize {max(16, min(shape[:2]))}"
                    )
                kept.append(image.row)
                self.files.append(image.path)
                self._card.add_image(image.width, image.height, image.mode, image.digest)
                if self.damaged and self._config.on_error == "refuse":
                    continue
                if isinstance(writer, EncodedWriter):
                    writer.write(image.content)
                    self.counts += np.reshape(image.histogram, (3, 256))
                else:
                    writer.write(image.pixels)
            if self.damaged and (self._config.on_error == "refuse" or not kept):
                raise UserError(self._refusal())
            if isinstance(writer, EncodedWriter):
                writer.finish()
            else:
                writer.finish((len(kept), *shape))
        return np.array(kept, dtype=np.int64), shape, store

    def _first_shape(self) -> tuple[int, ...]:
        """Returns the stored shape of the first image that can be decoded."""
        for row in enumerate(self._rows.images()):
            preemption.check()
            (found,) = self._prepared([row], "decoded")
            if not isinstance(found, str):
                width, height = found.stored
                return height, width, 3
        return 0, 0, 3  # all are damaged

    def _decoded(self, store: Store) -> Iterator[Prepared]:
        """Yields the images that can be decoded, in order of rows."""
        threads = max(1, int(granted_cores()))
        pool = ThreadPoolExecutor(threads)
        under_way: deque[Future[list[Prepared | str]]] = deque()
        tasks = self._tasks()
        try:
            while True:
                preemption.check()
                while len(under_way) < 2 * threads and (task := next(tasks, None)):
                    under_way.append(pool.submit(self._prepared, task, store))
                if not under_way:
                    return
                for found in under_way.popleft().result():
                    if isinstance(found, str):
                        self.damaged.append(found)
                    else:
                        yield found
        finally:
            pool.shutdown(cancel_futures=True)

    def _tasks(self) -> Iterator[list[tuple[int, Encoded]]]:
        """Yields consecutive rows in groups of limited size."""
        task: list[tuple[int, Encoded]] = []
        size = 0
        for row in enumerate(self._rows.images()):
            task.append(row)
            size += _size(row[1])
            if size >= TASK_BYTES or len(task) == TASK_IMAGES:
                yield task
                task, size = [], 0
        if task:
            yield task

    def _prepared(self, task: Sequence[tuple[int, Encoded]], store: Store) -> list[Prepared | str]:
        """Returns each image of a task, or a line if it is damaged. Runs in a thread."""
        done: list[Prepared | str] = []
        for row, encoded in task:
            path = ""
            try:
                if isinstance(encoded, np.ndarray):
                    image, content = Image.fromarray(encoded), b""
                else:
                    path = (encoded and encoded["path"]) or ""
                    content = _bytes_of(encoded)
                    image = decode_upright(content, self._config.max_pixels)
            except (OSError, ValueError) as error:
                why = "not an image" if isinstance(error, UnidentifiedImageError) else reason(error)
                name = f" ({path})" if path else ""
                done.append(f"image {row}{name} cannot be decoded: {why}")
                continue
            done.append(self._prepare(row, path, image, content, store))
        return done

    def _prepare(
        self, row: int, path: str, image: Image.Image, content: bytes, store: Store
    ) -> Prepared:
        side = self._config.resize
        stored = cover(image, side, side) if side else image
        pixels = stored.tobytes()
        histogram: list[int] = []
        if store == "encoded":
            histogram = stored.histogram()
            content = content or _png(image)
        digest = pixel_digest(pixels)
        was = image.width, image.height, image.info.get(MODE, image.mode)
        return Prepared(row, path, *was, stored.size, pixels, digest, content, histogram)

    def _refusal(self) -> str:
        n = len(self.damaged)
        shown = "; ".join(self.damaged[:DAMAGED_SHOWN]) + ("; ..." if n > DAMAGED_SHOWN else "")
        count = "" if n == 1 else f"{n} of {len(self._rows)} images: "
        them = "it" if n == 1 else "them"
        return (
            f"{self._rows.where}: {count}{shown}; fix or drop {them}, or leave {them} out with"
            " --data.on_error skip"
        )


class PixelWriter:
    """Writes the pixels of one split into an array file; a context."""

    def __init__(self, folder: Path, split: str) -> None:
        self._file = (folder / f"{split}_images.npy").open("wb", buffering=2**20)
        self._file.write(npy_header((0, 0, 0, 3)))

    def write(self, pixels: bytes) -> None:
        """Appends an image."""
        self._file.write(pixels)

    def finish(self, shape: tuple[int, ...]) -> None:
        """Writes the shape of the array."""
        self._file.seek(0)
        self._file.write(npy_header(shape))

    def __enter__(self) -> "PixelWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def npy_header(shape: tuple[int, ...]) -> bytes:
    """Returns the header of a uint8 array file, of the same length for any shape."""
    text = repr({"descr": "|u1", "fortran_order": False, "shape": shape})
    return np.lib.format.magic(1, 0) + (118).to_bytes(2, "little") + f"{text:<117}\n".encode()


def _size(encoded: Encoded) -> int:
    if isinstance(encoded, np.ndarray):
        return encoded.nbytes
    if not encoded or encoded["bytes"] is None:
        return UNREAD_BYTES
    return len(encoded["bytes"])


def _bytes_of(encoded: dict[str, Any] | None) -> bytes:
    if not encoded or not (encoded["bytes"] or encoded["path"]):
        raise ValueError("there is none")
    data: bytes = encoded["bytes"] or Path(encoded["path"]).read_bytes()
    return data


def _write_file_names(out: Path, source: str, paths: Sequence[str]) -> None:
    """Writes the paths of images, if there are any, as JSON.

    Those in the folder of the data are relative to it; others stay, such as names within a table.
    """
    if any(paths):
        root = os.path.abspath(source) + os.sep
        absolute = [os.path.abspath(path) for path in paths]
        names = [
            full.removeprefix(root) if full.startswith(root) else path
            for path, full in zip(paths, absolute, strict=True)
        ]
        out.write_text(json.dumps(names))


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()

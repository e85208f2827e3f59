"""Decoding of rows of encoded images and labels into checked arrays on disk.

This module owns all checks of a user's images and labels. It is imported only when the cache is
cold. Invariant: the output of `write` has one image shape, labels in range, and a superclass for
every class or for none.
"""

import io
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, UnidentifiedImageError

from distvgg import preemption
from distvgg.config import DataConfig
from distvgg.data.cifar import (
    CIFAR100_SUPERCLASS_OF,
    CIFAR100_SUPERCLASSES,
    CLASSES,
    SIDE,
    SPELLING,
)
from distvgg.data.images import PNG, check_png, cover
from distvgg.data.readers import Labels, Rows, read, reason
from distvgg.errors import UserError


def write(config: DataConfig, source: str, folder: Path) -> dict[str, Any]:
    """Decodes a folder or hub id into arrays in `folder`.

    The arrays are `{split}_images.npy` [n, height, width, 3] uint8 and `{split}_labels.npy` [n]
    int64. They are written for train and, if the source has a held-out split, for test.

    Returns:
        The fields class_names, superclass_names and superclass_of of `Dataset`, for JSON.

    Raises:
        UserError: The source cannot be read, or has an invalid image or label.
        OSError: `folder` cannot be written.
    """
    with TemporaryDirectory(dir=folder) as scratch:
        splits = read(source, Path(scratch))
        # All labels are checked before the first image, so a wrong label is found quickly.
        class_names = _class_names(config, source, splits["train"])
        labels = {
            name: _integers(rows.where, rows.label, len(class_names))
            for name, rows in splits.items()
        }
        superclass_names, superclass_of = _superclasses(splits, labels, class_names)
        side = config.resize or SIDE
        shape: tuple[int, ...] | None = (side, side, 3) if config.name in CLASSES else None
        for name, rows in splits.items():
            np.save(folder / f"{name}_labels.npy", labels[name])
            shape = _write_images(rows, config.resize, shape, folder / f"{name}_images.npy")
    return {
        "class_names": class_names,
        "superclass_names": superclass_names,
        "superclass_of": superclass_of,
    }


def _class_names(config: DataConfig, source: str, train: Rows) -> list[str]:
    """Returns the class names from the source's metadata, else known or generated names.

    Without metadata, CIFAR-100 has its known names, and other datasets get numbers.
    """
    expected = CLASSES.get(config.name)
    names = [SPELLING.get(n, n) for n in train.label.class_names]
    if not names and config.name == "cifar100":
        names = sorted(CIFAR100_SUPERCLASS_OF)
    if not names:
        names = _numbers(expected or _count(train.where, train.label, len(train)))
    if expected is not None and len(names) != expected:
        raise UserError(
            f"{source} has {len(names)} classes, {config.name} has {expected}: give that set's"
            " folder as --data.path, or take --data.name custom"
        )
    return names


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
        else _numbers(_count(train.where, train.superclass, len(class_names)))
    )
    of = np.full(len(class_names), -1)
    for name, rows in splits.items():
        assert rows.superclass is not None
        fine, coarse = labels[name], _integers(rows.where, rows.superclass, len(names))
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


def _numbers(n: int) -> list[str]:
    return [str(i) for i in range(n)]


def _count(where: str, column: Labels, limit: int) -> int:
    """Returns the number of classes in a column without names, numbered from 0: at most `limit`."""
    return int(_integers(where, column, limit).max()) + 1


def _integers(where: str, column: Labels, n: int) -> np.ndarray:
    """Returns a column as [rows] int64, checked to be in 0..n-1."""
    values = column.values
    if values.null_count:
        i = int(np.flatnonzero(values.is_null().to_numpy())[0])
        raise UserError(f"{where}: image {i} has no {column.column}: fix or drop that row")
    if not pa.types.is_integer(values.type):
        raise UserError(
            f"{where}: column {column.column} is of type {values.type}: number the classes from 0"
        )
    labels: np.ndarray = values.to_numpy().astype(np.int64)
    if (wrong := np.flatnonzero((labels < 0) | (labels >= n))).size:
        i = int(wrong[0])
        raise UserError(
            f"{where}: image {i} has {column.column} {labels[i]}, out of range 0 to {n - 1}: fix"
            " or drop that row"
        )
    return labels


def _write_images(
    rows: Rows, resize: int | None, shape: tuple[int, ...] | None, path: Path
) -> tuple[int, ...]:
    """Decodes images into a file of [n, *shape] uint8 and returns the shape.

    The first image sets the shape if none is given. The file is written, not memory-mapped: on a
    full disk, a memory map raises a signal that kills the process.
    """
    images = _decoded(rows, resize)
    first = next(images)
    shape = shape or (first.height, first.width, 3)
    height, width, _ = shape
    with path.open("wb", buffering=2**20) as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(rows), *shape)}
        np.lib.format.write_array_header_1_0(file, header)
        for i, image in enumerate(chain([first], images)):
            if image.size != (width, height):
                raise UserError(
                    f"{rows.where}: image {i} is {image.width}x{image.height} pixels, expected"
                    f" {width}x{height}: fix it, or bring all to one size with"
                    f" --data.resize {max(16, min(width, height))}"
                )
            file.write(image.tobytes())
    return shape


def _decoded(rows: Rows, resize: int | None) -> Iterator[Image.Image]:
    """Yields the images as RGB, resized to squares if `resize` is given."""
    for i, encoded in enumerate(rows.images()):
        preemption.check()
        try:
            image = _rgb(_bytes_of(encoded))
        except Exception as error:  # corrupt bytes make Pillow raise any type
            name = f" ({encoded['path']})" if encoded and encoded["path"] else ""
            why = "not an image" if isinstance(error, UnidentifiedImageError) else reason(error)
            raise UserError(
                f"{rows.where}: image {i}{name} cannot be decoded: {why}; fix or drop it"
            ) from error
        yield cover(image, resize, resize) if resize else image


def _bytes_of(encoded: dict[str, Any] | None) -> bytes:
    if not encoded or not (encoded["bytes"] or encoded["path"]):
        raise ValueError("there is none")
    data: bytes = encoded["bytes"] or Path(encoded["path"]).read_bytes()
    if data.startswith(PNG):
        check_png(data)
    return data


def _rgb(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    if image.mode[0] in "IF":
        raise ValueError("more than 8 bits a channel, which would be clipped")
    if image.mode == "RGB":
        image.load()
        return image
    return image.convert("RGB")

"""Decoding of rows of encoded images and labels into checked arrays on disk.

This module owns all checks of a user's images and labels. It is imported only when the cache is
cold. Invariant: the output of `write` has one image shape, labels in range, and a superclass for
every class or for none.
"""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from distvgg import preemption
from distvgg.config import DataConfig
from distvgg.data.card import Card
from distvgg.data.cifar import (
    CIFAR100_SUPERCLASS_OF,
    CIFAR100_SUPERCLASSES,
    CLASSES,
    SIDE,
)
from distvgg.data.classes import integers, join_classes, number_names
from distvgg.data.images import cover, decode_upright
from distvgg.data.readers import Rows, read, reason
from distvgg.errors import UserError

DAMAGED_SHOWN = 10  # damaged images named in an error


def write(config: DataConfig, source: str, folder: Path) -> dict[str, Any]:
    """Decodes a folder or hub id into arrays in `folder`.

    The arrays are `{split}_images.npy` [n, height, width, 3] uint8 and `{split}_labels.npy` [n]
    int64. They are written for train and, if the source has them, for val and test.

    Returns:
        The fields class_names, superclass_names, superclass_of and notes of `Dataset`, and the
        data card, for JSON.

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
        for name, rows in splits.items():
            decoder = Decoder(config, rows, card)
            kept, shape = decoder.write(shape, folder / f"{name}_images.npy")
            labels = classes.labels[name][kept]
            np.save(folder / f"{name}_labels.npy", labels)
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
    """The images of one split, decoded into a file.

    Attributes:
        damaged: a line for each image that cannot be decoded.
    """

    def __init__(self, config: DataConfig, rows: Rows, card: Card) -> None:
        self._config, self._rows, self._card = config, rows, card
        self.damaged: list[str] = []

    def write(
        self, shape: tuple[int, ...] | None, path: Path
    ) -> tuple[np.ndarray, tuple[int, ...]]:
        """Decodes images into a file of [n, *shape] uint8.

        The first image sets the shape if none is given. The file is written, not memory-mapped: on
        a full disk, a memory map raises a signal that kills the process.

        Returns:
            The rows that were decoded, [n] int64, and the shape.

        Raises:
            UserError: images are damaged, unless `data.on_error` is skip; or an image has another
                shape.
        """
        kept = []
        with path.open("wb", buffering=2**20) as file:
            file.write(npy_header((0, 0, 0, 3)))
            for i, image in self._decoded():
                shape = shape or (image.height, image.width, 3)
                height, width, _ = shape
                if image.size != (width, height):
                    raise UserError(
                        f"{self._rows.where}: image {i} is {image.width}x{image.height} pixels,"
                        f" expected {width}x{height}: fix it, or bring all to one size with"
                        f" --data.resize {max(16, min(width, height))}"
                    )
                kept.append(i)
                pixels = image.tobytes()
                self._card.add_pixels(pixels)
                if not self.damaged or self._config.on_error == "skip":
                    file.write(pixels)
            if self.damaged and (self._config.on_error == "refuse" or not kept):
                raise UserError(self._refusal())
            assert shape is not None
            file.seek(0)
            file.write(npy_header((len(kept), *shape)))
        return np.array(kept, dtype=np.int64), shape

    def _decoded(self) -> Iterator[tuple[int, Image.Image]]:
        """Yields row and RGB image, resized to a square if `data.resize` is given."""
        resize = self._config.resize
        for i, encoded in enumerate(self._rows.images()):
            preemption.check()
            name = ""
            try:
                if isinstance(encoded, np.ndarray):
                    image = Image.fromarray(encoded)
                else:
                    name = f" ({encoded['path']})" if encoded and encoded["path"] else ""
                    image = decode_upright(_bytes_of(encoded), self._config.max_pixels)
            except (OSError, ValueError) as error:
                why = "not an image" if isinstance(error, UnidentifiedImageError) else reason(error)
                self.damaged.append(f"image {i}{name} cannot be decoded: {why}")
                continue
            self._card.add_image(image)
            yield i, cover(image, resize, resize) if resize else image

    def _refusal(self) -> str:
        n = len(self.damaged)
        shown = "; ".join(self.damaged[:DAMAGED_SHOWN]) + ("; ..." if n > DAMAGED_SHOWN else "")
        count = "" if n == 1 else f"{n} of {len(self._rows)} images: "
        them = "it" if n == 1 else "them"
        return (
            f"{self._rows.where}: {count}{shown}; fix or drop {them}, or leave {them} out with"
            " --data.on_error skip"
        )


def npy_header(shape: tuple[int, ...]) -> bytes:
    """Returns the header of a uint8 array file, of the same length for any shape."""
    text = repr({"descr": "|u1", "fortran_order": False, "shape": shape})
    return np.lib.format.magic(1, 0) + (118).to_bytes(2, "little") + f"{text:<117}\n".encode()


def _bytes_of(encoded: dict[str, Any] | None) -> bytes:
    if not encoded or not (encoded["bytes"] or encoded["path"]):
        raise ValueError("there is none")
    data: bytes = encoded["bytes"] or Path(encoded["path"]).read_bytes()
    return data

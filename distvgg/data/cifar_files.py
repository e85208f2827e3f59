"""CIFAR-10 and CIFAR-100 in the files that their authors publish, as torchvision unpacks them.

Both versions are read: Python (pickled dictionaries) and binary. Invariant: a pickle can name
nothing but numpy's arrays, so that reading one runs no code of its own.

Source: cs.toronto.edu/~kriz/cifar.html.
"""

import codecs
import pickle
from dataclasses import dataclass
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distvgg.errors import UserError, one_line

PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class CifarSplit:
    """One split.

    Attributes:
        images: [n, 32, 32, 3] uint8.
        labels: [n] int64.
        coarse: superclasses, [n] int64; None for CIFAR-10.
    """

    images: np.ndarray
    labels: np.ndarray
    coarse: np.ndarray | None


@dataclass(frozen=True)
class CifarFiles:
    """Both splits with the names of their classes.

    Attributes:
        class_names, superclass_names: by label; superclasses are empty for CIFAR-10.
    """

    splits: dict[str, CifarSplit]
    class_names: list[str]
    superclass_names: list[str]


class _Layout(NamedTuple):
    """The files of one version.

    Attributes:
        files: of each split.
        names: the file with the names of the classes.
        fine, coarse: keys of these names in `names`; in the binary version, files.
        label_bytes: before the pixels of an image, in the binary version.
    """

    files: dict[str, list[str]]
    names: str
    fine: str
    coarse: str | None
    label_bytes: int = 0


_BATCHES = [f"data_batch_{n}" for n in range(1, 6)]
# By the name of their folder.
_LAYOUTS = {
    "cifar-100-python": _Layout(
        {"train": ["train"], "test": ["test"]}, "meta", "fine_label_names", "coarse_label_names"
    ),
    "cifar-10-batches-py": _Layout(
        {"train": _BATCHES, "test": ["test_batch"]}, "batches.meta", "label_names", None
    ),
    "cifar-100-binary": _Layout(
        {"train": ["train.bin"], "test": ["test.bin"]},
        *("fine_label_names.txt", "fine_label_names.txt", "coarse_label_names.txt", 2),
    ),
    "cifar-10-batches-bin": _Layout(
        {"train": [f"{b}.bin" for b in _BATCHES], "test": ["test_batch.bin"]},
        *("batches.meta.txt", "batches.meta.txt", None, 1),
    ),
}


def find_cifar(root: Path) -> CifarFiles | None:
    """Reads the original files in a folder, or in their own folder below it; None without any.

    Raises:
        UserError: a file is missing or damaged, or a pickle names something else than arrays.
    """
    for name, layout in _LAYOUTS.items():
        needed = [layout.names, *chain.from_iterable(layout.files.values())]
        for folder in (root, root / name):
            missing = [file for file in needed if not (folder / file).is_file()]
            if not missing:
                return (_read_binary if layout.label_bytes else _read_python)(folder, layout)
            if layout.names not in missing and len(missing) < len(needed) - 1:
                raise UserError(
                    f"{folder} has no file {missing[0]}, but others of {name}: download and unpack"
                    " it again"
                )
    return None


def _read_python(folder: Path, layout: _Layout) -> CifarFiles:
    names, splits = _unpickle(folder / layout.names), {}
    for split, group in layout.files.items():
        parts = [_unpickle(folder / file) for file in group]
        labels = "fine_labels" if layout.coarse else "labels"
        found = []
        for file, part in zip(group, parts, strict=True):
            try:
                found.append(_part(part, labels, coarse=layout.coarse is not None))
            except (KeyError, ValueError, TypeError) as error:
                raise _damaged(folder / file, repr(error)) from error
        coarse = [p.coarse for p in found if p.coarse is not None]
        splits[split] = CifarSplit(
            np.concatenate([p.images for p in found]),
            np.concatenate([p.labels for p in found]),
            np.concatenate(coarse) if coarse else None,
        )
    try:
        fine = _texts(names.get(layout.fine, []))
        return CifarFiles(
            splits, fine, _texts(names.get(layout.coarse, [])) if layout.coarse else []
        )
    except (ValueError, TypeError) as error:
        raise _damaged(folder / layout.names, repr(error)) from error


def _part(content: dict[str, Any], labels: str, *, coarse: bool) -> CifarSplit:
    """Returns the images and labels of one file.

    Raises:
        KeyError, ValueError, TypeError: they are not there, of another type, or not as many.
    """
    pixels = content["data"]
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8:
        raise TypeError("data is no array of uint8")
    images = _images(pixels)

    def integers(key: str) -> np.ndarray:
        values = np.asarray(content[key])
        if values.dtype.kind not in "iu" or values.shape != (len(images),):
            raise ValueError(f"{key} are not {len(images)} integers, one for each image")
        return values.astype(np.int64)

    return CifarSplit(images, integers(labels), integers("coarse_labels") if coarse else None)


def _read_binary(folder: Path, layout: _Layout) -> CifarFiles:
    splits = {}
    record = layout.label_bytes + PIXELS
    for split, group in layout.files.items():
        contents = [(folder / file).read_bytes() for file in group]
        for file, content in zip(group, contents, strict=True):
            if not content or len(content) % record:
                raise _damaged(folder / file, f"{len(content)} bytes are no whole images")
        records = np.frombuffer(b"".join(contents), np.uint8).reshape(-1, record)
        labels = records[:, : layout.label_bytes].astype(np.int64)
        # The coarse label comes before the fine one.
        coarse = labels[:, 0] if layout.coarse else None
        splits[split] = CifarSplit(_images(records[:, layout.label_bytes :]), labels[:, -1], coarse)

    def names(file: str | None) -> list[str]:
        try:
            return (folder / file).read_text().split() if file and (folder / file).exists() else []
        except ValueError as error:
            raise _damaged(folder / str(file), repr(error)) from error

    return CifarFiles(splits, names(layout.fine), names(layout.coarse))


def _images(pixels: np.ndarray) -> np.ndarray:
    """[n, 3 * 32 * 32], channel by channel -> [n, 32, 32, 3]."""
    return np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            from numpy._core.multiarray import _reconstruct

            return _reconstruct
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes for Python 2
            return codecs.encode
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no CIFAR file does")


def _unpickle(path: Path) -> dict[str, Any]:
    try:
        found = _ArraysOnly(BytesIO(path.read_bytes()), encoding="bytes").load()
        return {k.decode() if isinstance(k, bytes) else k: v for k, v in found.items()}
    except Exception as error:  # damaged bytes raise any type
        raise _damaged(path, one_line(error)) from error


def _texts(values: list[Any]) -> list[str]:
    return [v.decode() if isinstance(v, bytes) else str(v) for v in list(values)]


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path} cannot be read: {reason}; download and unpack it again")

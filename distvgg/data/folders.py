"""Image folders: which files are images, and of which split and class.

The rules, which docs/data.md repeats:

1. The folders train/, test/ and val/ (or valid/, validation/) are splits. Without any of them, all
   is the train split.
2. The first folder below the split is the class, however deep the files lie below it.
3. Every file is an image or is left out with a reason. The content decides, not the ending.
4. Links are followed. A class is known by its name over all splits.
5. metadata.csv or metadata.jsonl in a split, with the column file_name and one more column, gives
   the classes instead of folders.
6. Without a folder train/, a file train.csv or train.tsv is a table of images, and so is that of
   another split.

Invariant: the result depends on names and content of files, and not on the order of the file
system.
"""

import csv
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from distvgg.data.images import any_size
from distvgg.errors import UserError

SPLITS = {
    "train": "train",
    "test": "test",
    "val": "val",
    "valid": "val",
    "validation": "val",
}
IMAGE_ENDINGS = frozenset(
    [
        *(".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".gif", ".webp", ".tif", ".tiff"),
        *(".ppm", ".pgm", ".pbm", ".tga", ".ico", ".jp2", ".avif"),
    ]
)
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar")
LISTS = (".csv", ".tsv")
METADATA = ("metadata.csv", "metadata.jsonl")
LAYOUT = "put the images of each class in a folder of their own, as train/CLASS/*.png"


@dataclass
class ImageFiles:
    """The images of one split, in order of class and file.

    Attributes:
        files, classes: [n] each.
        left_out: number of files that are no images of a class, by reason.
    """

    files: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def find_images(root: Path) -> dict[str, ImageFiles]:
    """Returns the images of a folder by split: `train`, and `test` and `val` if they exist.

    Returns:
        Empty if there are no images.

    Raises:
        UserError: there are no classes, no train split, two folders of one split, or a link leads
            back to a folder above it.
    """
    folders: dict[str, Path] = {}
    for name in sorted(os.listdir(root)):
        split = SPLITS.get(name.lower())
        if split is None or not (root / name).is_dir():
            continue
        if split in folders:
            raise UserError(
                f"{root} has two folders of one split, {folders[split].name}/ and {name}/: join"
                " them, or remove one"
            )
        folders[split] = root / name
    if not folders:
        for child in filter(Path.is_dir, sorted(root.iterdir())):
            if any(name.lower() in SPLITS for name in os.listdir(child)):
                raise UserError(
                    f"{root} has its splits in {child}: give that folder as data.path, or name the"
                    " classes otherwise"
                )
    found = {split: _images_of(folder) for split, folder in (folders or {"train": root}).items()}
    for split, images in found.items():
        if folders and images.left_out and not images.files:
            listed = ", ".join(f"{n:,} {reason}" for reason, n in sorted(images.left_out.items()))
            raise UserError(
                f"{folders[split]} has no image of a class, only files left out ({listed}): fix"
                " them, or remove the folder"
            )
    found = {split: images for split, images in found.items() if images.files}
    if found and "train" not in found:
        raise UserError(
            f"{root} has no train split, only {', '.join(found)}: put its files in a folder train/"
        )
    if found and folders:
        beside = _count_files(root, {folder.name for folder in folders.values()})
        if beside:
            found["train"].left_out["beside the split folders"] += beside
    return found


def describe_without_images(root: Path) -> str:
    """Returns what a folder without images has instead, and what to do."""
    names = [path.name for path in _files(root)]
    archive = next((n for n in names if n.lower().endswith(ARCHIVES)), None)
    if archive is not None:
        return f"unpack {archive} first"
    if not names:
        return f"it is empty; it needs Parquet files, or images: {LAYOUT}"
    return f"none of its {len(names)} files is an image or a table: {LAYOUT}"


def endings(root: Path) -> set[str]:
    """Returns the endings of all files below a folder, in lower case."""
    return {
        path.suffix.lower()
        for path in _files(root)
        if path.name.lower() not in METADATA and not is_hidden(path.relative_to(root))
    }


def lists_of_splits(root: Path) -> dict[str, str]:
    """Returns the CSV or TSV file of each split in a folder without a folder of the train split."""
    here = sorted(root.iterdir())
    if any(SPLITS.get(path.name.lower()) == "train" for path in here if path.is_dir()):
        return {}
    found = {
        SPLITS[path.stem.lower()]: path.name
        for path in here
        if path.suffix in LISTS and path.stem.lower() in SPLITS and path.is_file()
    }
    return found if "train" in found else {}


def image_in_a_split(root: Path) -> Path | None:
    """Returns a file in a split's folder that has the ending of an image, or None."""
    splits = (p for p in sorted(root.iterdir()) if p.name.lower() in SPLITS and p.is_dir())
    files = (path.relative_to(root) for folder in splits for path in _files(folder))
    return next((p for p in files if p.suffix.lower() in IMAGE_ENDINGS and not is_hidden(p)), None)


def _images_of(folder: Path) -> ImageFiles:
    """Returns the images of one split's folder."""
    by_metadata = _metadata(folder)
    images = ImageFiles()
    direct = 0
    for path in _files(folder):
        where = path.relative_to(folder)
        if reason := "hidden" if is_hidden(where) else _no_image(path):
            images.left_out[reason] += 1
        elif by_metadata is not None:
            name = by_metadata.get(where.as_posix())
            if name is None:
                images.left_out["not in the metadata file"] += 1
            else:
                images.files.append(str(path))
                images.classes.append(name)
        elif len(where.parts) == 1:
            direct += 1
        else:
            images.files.append(str(path))
            images.classes.append(where.parts[0])
    if direct and not images.files:
        raise UserError(f"{folder} has {direct} images outside of class folders: {LAYOUT}")
    if direct:
        images.left_out["not in a class folder"] += direct
    return images


def _files(folder: Path) -> Iterator[Path]:
    """Yields the files below a folder, sorted, through links.

    Raises:
        UserError: a link leads back to a folder above it.
    """

    def walk(directory: Path, above: frozenset[str]) -> Iterator[Path]:
        real = os.path.realpath(directory)
        if real in above:
            raise UserError(f"{directory} is a link to a folder above it: remove the link")
        for name in sorted(os.listdir(directory)):
            path = directory / name
            if path.is_dir():
                yield from walk(path, above | {real})
            else:
                yield path

    return walk(folder, frozenset())


def is_hidden(where: Path) -> bool:
    """Returns True if a file or a folder on the way to it, below the data, has a hidden name."""
    return any(part.startswith(".") for part in where.parts)


def _no_image(path: Path) -> str | None:
    """Returns why a file is left out, or None for an image.

    A file with the ending of an image is taken for one, so that a damaged image is an error and not
    left out.
    """
    name = path.name.lower()
    if not path.exists():
        return "a dangling link"
    if not path.is_file():  # a pipe or a device, which may be read for ever
        return "a pipe or device"
    if path.suffix.lower() in IMAGE_ENDINGS:
        return None
    if name in METADATA:
        return "metadata"
    try:
        with any_size(), Image.open(path):
            return None
    except Exception:  # Pillow's readers raise any type
        return f"not an image ({path.suffix.lower() or 'no ending'})"


def _metadata(folder: Path) -> dict[str, str] | None:
    """Returns the class of each file by a metadata file, or None if there is none to use.

    Raises:
        UserError: the file names classes, but is damaged, lacks one, or gives a file two of them.
    """
    path = next((folder / name for name in METADATA if (folder / name).is_file()), None)
    if path is None:
        return None
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".csv":
            rows = list(csv.DictReader(text.splitlines(), skipinitialspace=True))
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(
            f"{path} cannot be read ({' '.join(str(error).split())[:100]}): write it as UTF-8 with"
            " file_name and label, or rename it if it is no list of classes"
        ) from error
    if not rows or not isinstance(rows[0], dict) or "file_name" not in rows[0]:
        return None  # somebody's own
    columns = [name for name in rows[0] if name != "file_name"]
    labels = [c for c in columns if c in ("label", "class")] or columns
    if len(labels) != 1:
        return None
    classes: dict[str, str] = {}
    for n, row in enumerate(rows, start=1):
        file, label = (row.get(key) for key in ("file_name", labels[0]))
        if not isinstance(file, str) or label in (None, "") or isinstance(label, list | dict):
            raise UserError(f"{path}: row {n} has no {labels[0]} of a file: fix or drop that row")
        if classes.setdefault(Path(file).as_posix(), str(label)) != str(label):
            raise UserError(f"{path}: {file} has two classes: drop one of its rows")
    return classes


def _count_files(root: Path, but: set[str]) -> int:
    """Counts the files of a folder beside some of its subfolders."""
    beside = [root / name for name in sorted(os.listdir(root)) if name not in but]
    return sum(1 if not p.is_dir() else sum(1 for _ in _files(p)) for p in beside)

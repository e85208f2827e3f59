"""Image folders: which files are images, and of which split and class.

The rules, which docs/data.md repeats:

1. The folders train/, test/ and val/ (or valid/, validation/) are splits. Without any of them, all
   is the train split.
2. The first folder below the split is the class, however deep the files lie below it.
3. Every file is an image or is left out with a reason. The content decides, not the ending.
4. Links are followed. A class is known by its name over all splits.
5. metadata.csv or metadata.jsonl in a split, with the column file_name and one more column, gives
   the classes instead of folders.
6. Without a folder train/, a file train.csv or train.tsv that names files and classes gives the
   train split, and test.csv and val.csv the others.

Invariant: the result depends on names and content of files, and not on the order of the file
system.
"""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from distvgg.data.class_lists import LISTS, METADATA, read_list, read_metadata
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


def find_images(
    root: Path, image_column: str | None = None, label_column: str | None = None
) -> dict[str, ImageFiles]:
    """Returns the images of a folder by split: `train`, and `test` and `val` if they exist.

    Args:
        root: the folder.
        image_column: of files in lists; None finds it.
        label_column: of classes in lists; None finds it.

    Returns:
        Empty if there are no images.

    Raises:
        UserError: there are no classes, no train split, two folders or lists of one split, a list
            is damaged, or a link leads back to a folder above it.
    """
    if (lists := _lists(root, image_column, label_column)) is not None:
        return _listed_images(root, lists)
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


def image_in_a_split(root: Path) -> Path | None:
    """Returns a file in a split's folder that has the ending of an image, or None."""
    splits = (p for p in sorted(root.iterdir()) if p.name.lower() in SPLITS and p.is_dir())
    files = (path.relative_to(root) for folder in splits for path in _files(folder))
    return next((p for p in files if p.suffix.lower() in IMAGE_ENDINGS and not is_hidden(p)), None)


def _images_of(folder: Path) -> ImageFiles:
    """Returns the images of one split's folder."""
    by_metadata = read_metadata(folder)
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


def _lists(
    root: Path, image_column: str | None, label_column: str | None
) -> dict[str, tuple[Path, dict[str, str]]] | None:
    """Returns the list of each split and the class of each of its files; None without any."""
    here = sorted(root.iterdir())
    folders = [p.name for p in here if p.name.lower() in SPLITS and p.is_dir()]
    if any(SPLITS[name.lower()] == "train" for name in folders):
        return None
    found: dict[str, tuple[Path, dict[str, str]]] = {}
    for path in here:
        split = SPLITS.get(path.stem.lower())
        if split is None or path.suffix.lower() not in LISTS or not path.is_file():
            continue
        classes = read_list(path, image_column, label_column)
        if classes is None:
            continue  # somebody's own
        if split in found:
            raise UserError(
                f"{root} has two lists of one split, {found[split][0].name} and {path.name}: join"
                " them, or remove one"
            )
        found[split] = path, classes
    if found and folders:
        raise UserError(
            f"{root} has the list {next(iter(found.values()))[0].name} and the folder"
            f" {folders[0]}/: give all splits as lists, or all as folders"
        )
    if found and "train" not in found:
        raise UserError(f"{root} has lists of {', '.join(found)} only: add train.csv")
    return found or None


def _listed_images(
    root: Path, lists: dict[str, tuple[Path, dict[str, str]]]
) -> dict[str, ImageFiles]:
    """Returns the images of lists by split.

    Raises:
        UserError: a file is not there, or is listed in two splits.
    """
    found = {split: ImageFiles() for split in lists}
    left, own = Counter[str](), {path.name for path, _ in lists.values()}
    missing = {split: _below(root, classes) for split, (_, classes) in lists.items()}
    for path in _files(root):
        where = path.relative_to(root)
        splits = [split for split, classes in missing.items() if str(where) in classes]
        if len(splits) > 1:
            one, other = (lists[split][0].name for split in splits[:2])
            raise UserError(f"{root}: {where} is in {one} and in {other}: drop one of its rows")
        if splits:
            found[splits[0]].files.append(str(path))
            found[splits[0]].classes.append(missing[splits[0]].pop(str(where)))
        elif str(where) not in own:
            left["hidden" if is_hidden(where) else _no_image(path) or "in no list"] += 1
    for split, classes in missing.items():
        if classes:
            path, all_of_it = lists[split]
            raise UserError(
                f"{path}: {len(classes)} of {len(all_of_it)} files are not in {root}, such as"
                f" {next(iter(classes))}: paths are relative to that folder; put the files there,"
                " or a link to their folder"
            )
    found["train"].left_out += left
    return found


def _below(root: Path, classes: dict[str, str]) -> dict[str, str]:
    """Returns classes by path relative to a folder, where that is possible."""
    tops = {os.path.abspath(root) + os.sep, os.path.realpath(root) + os.sep}

    def relative(name: str) -> str:
        return next((name.removeprefix(top) for top in tops if name.startswith(top)), name)

    return {relative(name): value for name, value in classes.items()}


def _count_files(root: Path, but: set[str]) -> int:
    """Counts the files of a folder beside some of its subfolders."""
    beside = [root / name for name in sorted(os.listdir(root)) if name not in but]
    return sum(1 if not p.is_dir() else sum(1 for _ in _files(p)) for p in beside)

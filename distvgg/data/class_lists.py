"""Files that name the classes of images: metadata.csv of a split, and lists such as train.csv.

Invariant: all values are text, as it is written, without spaces around it.
"""

import csv
import json
import os
from itertools import zip_longest
from pathlib import Path
from typing import Any

from distvgg.errors import UserError, one_line

METADATA = ("metadata.csv", "metadata.jsonl")
LISTS = {".csv": ",", ".tsv": "\t"}  # the separator of columns
PATH_COLUMNS = ("image", "img", "file_name", "filename", "file", "path")
CLASS_COLUMNS = ("label", "labels", "class")


def read_metadata(folder: Path) -> dict[str, str] | None:
    """Returns the class of each file by a metadata file, or None if there is none to use.

    Raises:
        UserError: the file names classes, but is damaged, lacks one, or gives a file two of them.
    """
    path = next((folder / name for name in METADATA if (folder / name).is_file()), None)
    if path is None:
        return None
    header, rows = _table(path)
    if not rows or "file_name" not in header:
        return None  # somebody's own
    columns = [name for name in header if name != "file_name"]
    labels = [c for c in columns if c in ("label", "class")] or columns
    return _classes(path, rows, "file_name", labels[0]) if len(labels) == 1 else None


def read_list(
    path: Path, image_column: str | None, label_column: str | None
) -> dict[str, str] | None:
    """Returns the class of each file in a list; None if it names no files.

    Args:
        path: of a CSV or TSV file.
        image_column: of the files; None finds it.
        label_column: of the classes; None finds it.

    Raises:
        UserError: it names files, but not one class for each.
    """
    header, rows = _table(path)
    separator = "tabs" if path.suffix.lower() == ".tsv" else "commas"
    if len(header) == 1 and (other := next((c for c in ";\t|," if c in header[0]), None)):
        raise UserError(
            f"{path} has the columns {header[0]!r}: separate them by {separator}, not by {other!r}"
        )
    files = [c for c in header if c in ([image_column] if image_column else PATH_COLUMNS)]
    if not files:
        return None
    if not rows:
        raise UserError(f"{path} has no rows: list the images with their classes, or remove it")
    others = [c for c in header if c not in files]
    labels = [c for c in others if c in ([label_column] if label_column else CLASS_COLUMNS)]
    labels = labels or ([] if label_column else others)
    if not labels:
        raise UserError(
            f"{path} has no column of classes, only {', '.join(header)}: add one named label, name"
            " one with --data.label_column, or move the file away"
        )
    for field_name, choice in (("image", files), ("label", labels)):
        if len(choice) != 1:
            raise UserError(
                f"{path} has {len(choice)} columns that may be the {field_name}, of"
                f" {', '.join(header)}: choose one with --data.{field_name}_column"
            )
    return _classes(path, rows, files[0], labels[0])


def _table(path: Path) -> tuple[list[str], list[dict[str | None, Any]]]:
    """Returns the columns and rows of a CSV, TSV or JSON lines file.

    Names and values have no spaces around them. Values without a column have the name None.

    Raises:
        UserError: it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
            if not all(isinstance(row, dict) for row in rows):
                return [], []
            return list(rows[0]) if rows else [], rows
        delimiter = LISTS[path.suffix.lower()]
        lines = csv.reader(text.splitlines(), delimiter=delimiter, skipinitialspace=True)
        header, *values = [[cell.strip() for cell in line] for line in lines if line] or [[]]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(
            f"{path} cannot be read ({one_line(error)}): write it as UTF-8 with"
            " file_name and label, or rename it if it is no list of classes"
        ) from error
    return header, [dict(zip_longest(header, row)) for row in values]


def _classes(
    path: Path, rows: list[dict[str | None, Any]], file: str, label: str
) -> dict[str, str]:
    """Returns the class of each file that rows name.

    Raises:
        UserError: a row lacks a file or a class, or has more values than there are columns, or a
            file has two classes.
    """
    classes: dict[str, str] = {}
    for n, row in enumerate(rows, start=1):
        if None in row:
            raise UserError(
                f"{path}: row {n} has more values than columns: put quotes around a value with a"
                " separator in it"
            )
        name, value = row.get(file), row.get(label)
        if not name or not isinstance(name, str):
            raise UserError(f"{path}: row {n} has no {file}: fix or drop that row")
        if value in (None, "") or isinstance(value, list | dict):
            raise UserError(f"{path}: row {n} has no {label} of a file: fix or drop that row")
        if classes.setdefault(os.path.normpath(name), str(value)) != str(value):
            raise UserError(f"{path}: {name} has two classes: drop one of its rows")
    return classes

"""The choice of a reader for a local folder or hub id: original CIFAR files, images, or tables.

It is imported only when the cache is cold. Invariant: no file is in two splits.
"""

import os
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow as pa

from distvgg.config import DataConfig
from distvgg.data import tables
from distvgg.data.cifar_files import CifarFiles, find_cifar
from distvgg.data.folders import (
    ImageFiles,
    describe_without_images,
    endings,
    find_images,
    image_in_a_split,
)
from distvgg.data.rows import SUPERCLASS_COLUMN, Labels, Rows
from distvgg.errors import UserError

TABLES = {".parquet", ".arrow"}
TEXT_TABLES = {".csv", ".tsv", ".json", ".jsonl"}


def read(config: DataConfig, source: str, scratch: Path) -> dict[str, Rows]:
    """Reads a folder or hub id by split: `train`, and `test` and `val` if the source has them.

    Args:
        config: The columns to take, if any are set.
        source: A folder that holds Parquet files or images, or a hub id.
        scratch: An existing directory for the library's copy of the data, which the rows need.

    Raises:
        UserError: The source cannot be read, lacks a train split, an image or a label column, or
            has a file in two splits.
    """
    if not Path(source).is_dir():
        splits = tables.read_hub_id(config, source)
    else:
        splits = _read_folder(config, source, scratch)
    for one, other in combinations(splits.values(), 2):
        if shared := sorted(one.files & other.files):
            raise UserError(
                f"{source}: {shared[0]} is in the {one.where} and in the {other.where}: drop"
                " it from one, or give the folder that train/ and test/ stand in as data.path"
            )
    return splits


def _read_folder(config: DataConfig, source: str, scratch: Path) -> dict[str, Rows]:
    """Reads the original CIFAR files, tables, or images."""
    root = Path(source)
    if (cifar := find_cifar(root)) is not None:
        return _rows_of_cifar(source, cifar)
    found = endings(root)
    if not TABLES.isdisjoint(found) and (image := image_in_a_split(root)):
        raise UserError(
            f"data.path {source} holds both tables ({', '.join(sorted(TABLES & found))}) and images"
            f" ({image}): move one of them to another folder"
        )
    if TABLES.isdisjoint(found):
        if images := find_images(root, config.image_column, config.label_column):
            return {split: _rows_of_files(source, split, files) for split, files in images.items()}
        if TEXT_TABLES.isdisjoint(found):
            raise UserError(f"data.path {source} holds no data: {describe_without_images(root)}")
    return tables.read_folder(config, source, scratch)


def _rows_of_cifar(source: str, cifar: CifarFiles) -> dict[str, Rows]:
    def labels(column: str, values: np.ndarray, names: list[str]) -> Labels:
        return Labels(column, pa.chunked_array([pa.array(values)]), names)

    return {
        split: Rows(
            f"{source} ({split} split)",
            labels("label", data.labels, cifar.class_names),
            None
            if data.coarse is None
            else labels(SUPERCLASS_COLUMN, data.coarse, cifar.superclass_names),
            partial(iter, data.images),
        )
        for split, data in cifar.splits.items()
    }


def _rows_of_files(source: str, split: str, found: ImageFiles) -> Rows:
    for name in sorted(set(found.classes)):
        if not name.isprintable() or name != name.encode(errors="replace").decode():
            raise UserError(
                f"{source}: the class {name!r} has characters that no name has: rename it"
            )
    return Rows(
        f"{source} ({split} split)",
        Labels("class folder", pa.chunked_array([pa.array(found.classes, pa.string())]), []),
        None,
        lambda: ({"bytes": None, "path": file} for file in found.files),
        frozenset(map(os.path.realpath, found.files)),
        found.left_out,
    )

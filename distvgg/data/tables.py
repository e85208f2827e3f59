"""Rows of tables, read by the `datasets` library: Parquet, Arrow, CSV, JSON lines, and hub ids.

This module owns the use of that library and of the network, the choice of columns by name and
type, and the messages about both. It is imported only when the cache is cold.
"""

import glob
import io
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, suppress
from errno import EDQUOT, ENOSPC
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from distvgg.config import DataConfig
from distvgg.data.folders import SPLITS, is_hidden
from distvgg.data.rows import SUPERCLASS_COLUMN, Encoded, Labels, Rows
from distvgg.errors import UserError, reason, root_cause
from distvgg.reachability import within

# Names of these columns in existing datasets, which are taken without a look at their types.
LABEL_COLUMNS = ("fine_label", "label", "labels")
IMAGE_PATH_COLUMNS = ("img", "image", "file_name", "path")
PROBE_SECONDS = 5
T = TypeVar("T")


def read_hub_id(config: DataConfig, source: str) -> dict[str, Rows]:
    """Reads a dataset of the hub by split.

    Raises:
        UserError: it cannot be fetched, or lacks a train split, an image or a label column.
    """
    return _rows_of_tables(config, source, _load_hub_id(source))


def read_folder(config: DataConfig, source: str, scratch: Path) -> dict[str, Rows]:
    """Reads the tables of a folder by split.

    Args:
        config: the columns to take, if any are set.
        source: the folder, as the user gave it.
        scratch: an existing directory for the library's copy of the data, which the rows need.

    Raises:
        UserError: a table cannot be read, or lacks a train split, an image or a label column.
    """
    # Absolute, because `csv` alone names a reader of the library.
    folder = Path(source).resolve()
    if glob.has_magic(str(folder)):
        raise UserError(
            f"data.path {source}: the library that reads tables takes {folder} for a pattern: give"
            " the folder a name without *, ? and ["
        )
    return _rows_of_tables(config, source, _load_folder(source, folder, scratch), folder)


def _rows_of_tables(
    config: DataConfig, source: str, tables: dict[str, Any], folder: Path | None = None
) -> dict[str, Rows]:
    named = {
        SPLITS[name.lower()]: table for name, table in tables.items() if name.lower() in SPLITS
    }
    if "train" not in named:
        raise UserError(
            f"{source} has no train split, only {', '.join(tables)}: put its files in a folder"
            " train/, or name them train-*.parquet"
        )
    return {
        split: _rows(config, f"{source} ({split} split)", table, folder)
        for split, table in named.items()
    }


def check_hub_id(source: str) -> None:
    """Checks that `read` could fetch a hub id, and fetches only the description of the dataset.

    Raises:
        UserError: The hub id cannot be fetched.
    """
    import datasets

    _from_hub(source, datasets.load_dataset_builder)


def _load_folder(source: str, folder: Path, scratch: Path) -> dict[str, Any]:
    # By default, the library takes any folder with a split's name for that split. It would put
    # test/train/, where `train` is a class of CIFAR-100, into two splits.
    split_folders = {
        split: f"{path.name}/**"
        for path in sorted(folder.iterdir())
        if (split := SPLITS.get(path.name.lower())) and _has_files(path)
    }
    try:
        return _load_tables(folder, split_folders if "train" in split_folders else None, scratch)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(
            f"data.path {source} holds no data: it needs Parquet files, or one folder of images"
            " per class below train/ and test/"
        ) from error
    except Exception as error:  # any type: the library propagates its readers' errors
        bottom = root_cause(error)
        if isinstance(bottom, OSError) and bottom.errno in (ENOSPC, EDQUOT):
            raise bottom from error  # the scratch directory is on a full disk
        if file := _damaged_parquet(folder):
            raise UserError(
                f"data.path {source} cannot be read: {file}; copy or create it again"
            ) from error
        raise UserError(f"data.path {source} cannot be read: {reason(error)}") from error


def _load_tables(folder: Path, data_files: dict[str, str] | None, scratch: Path) -> dict[str, Any]:
    """Loads the tables of a folder by split.

    The library gives all splits the class names of the first file. Parquet files whose own metadata
    differ are therefore loaded split by split.
    """
    import datasets

    where: dict[str, Any] = {"cache_dir": str(scratch), "data_files": data_files}
    builder = _silently(datasets.load_dataset_builder, str(folder), **where)
    files = {
        str(split): list(map(str, group)) for split, group in builder.config.data_files.items()
    }
    _check_each_file_has_a_split(folder, files)
    parquet = [file for group in files.values() for file in group if file.endswith(".parquet")]
    if len({_features(file) for file in parquet}) <= 1:
        # A card may describe more than this copy has.
        found = _silently(
            datasets.load_dataset, str(folder), **where, verification_mode="no_checks"
        )
        return dict(found)
    return {
        split: _silently(
            datasets.load_dataset,
            "parquet",
            cache_dir=str(scratch),
            data_files={split: group},
            split=split,
            verification_mode="no_checks",
        )
        for split, group in files.items()
    }


def _check_each_file_has_a_split(folder: Path, files: dict[str, list[str]]) -> None:
    """Checks that each Parquet file is in one split, as the library shares them out by name.

    A card that lists the files of each split may leave some to other configurations.
    """
    card = folder / "README.md"
    may_be_unread = card.is_file() and "data_files" in card.read_text(errors="replace")
    counts = Counter(os.path.realpath(file) for group in files.values() for file in set(group))
    for path in sorted(folder.rglob("*.parquet")):
        where, found = path.relative_to(folder), counts[os.path.realpath(path)]
        if not is_hidden(where) and (found > 1 or not (found or may_be_unread)):
            named = "train, test or val" if found else "none of train, test and val"
            raise UserError(
                f"data.path {folder}: {where} is in {found} splits, since its name has {named}:"
                " name each file after its split, as train-0.parquet, or move it away"
            )


def _features(file: str) -> bytes | None:
    """Returns the features that `datasets` wrote into a Parquet file, class names among them."""
    return (pq.read_schema(file).metadata or {}).get(b"huggingface")


def _load_hub_id(source: str) -> dict[str, Any]:
    import datasets

    load = partial(datasets.load_dataset, verification_mode="no_checks")
    return dict(_from_hub(source, load))


def _from_hub(source: str, load: Callable[..., T]) -> T:
    import datasets
    import huggingface_hub

    if source.startswith((".", "/")) or source.count("/") != 1:
        raise UserError(
            f"data.path {source} is not a folder: give one that holds Parquet files or one folder"
            " of images per class, or a hub id such as uoft-cs/cifar100"
        )
    if not _hub_answers():
        # Online, the client retries before it reads its own cache: for 23 s, or for minutes if the
        # hub sends no reply.
        datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        return _silently(load, source)
    except Exception as error:  # any type, as above
        raise UserError(
            f"dataset not found: {source} is no local folder, and not available on the hub"
            f" ({reason(error)}): run distvgg doctor RECIPE --prepare on a machine with a network"
            " that shares DISTVGG_CACHE, give a local copy with --data.path FOLDER, set HF_HOME to"
            " a cache that holds it, or use --data.name synthetic"
        ) from error


def _silently(load: Callable[..., T], path: str, **arguments: Any) -> T:
    """Calls a function of `datasets` and suppresses its output."""
    import datasets
    import huggingface_hub

    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(logging.CRITICAL)
    huggingface_hub.utils.logging.set_verbosity(logging.CRITICAL)
    with redirect_stderr(io.StringIO()):
        return load(path, **arguments)


def _rows(config: DataConfig, where: str, table: Any, folder: Path | None) -> Rows:
    """Returns the rows of a `datasets.Dataset` after finding its columns.

    Paths of images are those of files below `folder`, if one is given.

    Raises:
        UserError: it has no column of images or of labels, or a file is outside of the folder.
    """
    import datasets

    image = _image_column(config, where, table)
    label = _label_column(config, where, table, image)
    if not len(table):
        raise UserError(f"{where} holds no images: add some")

    def column(name: str) -> Labels:
        values = table.select_columns([name]).with_format("arrow")[:][name]
        return Labels(name, values, getattr(table.features[name], "names", None) or [])

    encoded = table.select_columns([image])
    try:
        encoded = encoded.cast_column(image, datasets.Image(decode=False))
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise UserError(
            f"{where}: column {image} holds no image files ({reason(error)}): store the bytes"
            " of PNG or JPEG there"
        ) from error
    encoded = encoded.with_format("arrow")

    def found(path: str) -> str:
        return os.path.join(folder, path) if folder and "://" not in path else path

    def images() -> Iterator[Encoded]:
        for batch in encoded.iter(batch_size=1000):
            for image in batch.column(0).to_pylist():
                outside = image and image["bytes"] is None and image["path"]
                yield image | {"path": found(image["path"])} if outside else image

    stored = encoded[:].column(0)
    outside = pc.is_null(pc.struct_field(stored, "bytes"))
    paths = set(pc.struct_field(stored, "path").filter(outside).to_pylist()) - {None}
    files = {os.path.normpath(found(path)) for path in paths}
    for file in sorted(files) if folder else ():
        if "://" in file or not file.startswith(f"{folder}{os.sep}"):
            raise UserError(
                f"{where}: {file} is outside of data.path, where a change of it would not be"
                " noticed: put the file, or a link to its folder, below data.path"
            )
    has_superclass = SUPERCLASS_COLUMN in table.column_names and label != SUPERCLASS_COLUMN
    superclass = column(SUPERCLASS_COLUMN) if has_superclass else None
    return Rows(where, column(label), superclass, images, frozenset(map(os.path.realpath, files)))


def _image_column(config: DataConfig, where: str, table: Any) -> str:
    """Returns the name of the column of images: the one that is set, else the only one by type."""
    import datasets

    def is_image(feature: Any) -> bool:
        if isinstance(feature, datasets.Image):
            return True
        # Parquet not written by `datasets` has no Image feature.
        if isinstance(feature, dict):
            return {"bytes", "path"} <= set(feature)
        return getattr(feature, "dtype", None) in ("binary", "large_binary")

    if config.image_column is not None:
        return _existing(table, where, "image_column", config.image_column)
    found: list[str] = [n for n, feature in table.features.items() if is_image(feature)]
    found = found or [name for name in IMAGE_PATH_COLUMNS if name in table.column_names]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(
            f"{where} has the image columns {' and '.join(found)}: choose one with"
            f" --data.image_column {found[-1]}"
        )
    raise UserError(
        f"{where} has no image column, only {', '.join(table.column_names)}: store the bytes of PNG"
        " or JPEG in one, or name it with --data.image_column"
    )


def _label_column(config: DataConfig, where: str, table: Any, image: str) -> str:
    """Returns the name of the column of labels: set, known by its name, or the only one by type."""
    import datasets

    if config.label_column is not None:
        return _existing(table, where, "label_column", config.label_column)
    features = {n: f for n, f in table.features.items() if n != image}
    named = [name for name in LABEL_COLUMNS if name in features]
    classes = [n for n, f in features.items() if isinstance(f, datasets.ClassLabel)]
    values = [
        n
        for n, f in features.items()
        if re.fullmatch(r"u?int\d+|bool|(large_)?string|float\d+", getattr(f, "dtype", ""))
    ]
    found: list[str] = next((names for names in (named, classes, values) if names), [])
    if len(found) == 1:
        return found[0]
    has = f"only {', '.join(table.column_names)}" if not found else f"{' and '.join(found)} may be"
    raise UserError(
        f"{where} has no single label column ({has}): choose one with --data.label_column, or put"
        " the images of each class in one folder each below train/ and test/"
    )


def _existing(table: Any, where: str, field_name: str, column: str) -> str:
    if column in table.column_names:
        return column
    raise UserError(
        f"{where} has no column {column}, only {', '.join(table.column_names)}: change"
        f" data.{field_name}"
    )


def _hub_answers() -> bool:
    """Returns True if the hub answers within PROBE_SECONDS.

    The request uses the hub client's session, and so its proxies.
    """
    import huggingface_hub

    def ask() -> bool:
        with suppress(Exception):  # any type: the client's HTTP library varies by version
            url = huggingface_hub.constants.ENDPOINT
            huggingface_hub.get_session().head(url, timeout=PROBE_SECONDS)
            return True
        return False

    return within(PROBE_SECONDS, ask)


def _damaged_parquet(folder: Path) -> str | None:
    """Returns the first Parquet file that is corrupt or has no rows, with the reason, or None.

    The errors of the library name no file.
    """
    for file in sorted(folder.rglob("*.parquet")):
        try:
            rows = sum(batch.num_rows for batch in pq.ParquetFile(file).iter_batches())
        except (OSError, pa.ArrowException) as error:
            return f"{file.relative_to(folder)} is damaged ({reason(error)})"
        if not rows:
            return f"{file.relative_to(folder)} has no rows"
    return None


def _has_files(folder: Path) -> bool:
    return any(files for _, _, files in os.walk(folder, followlinks=True))

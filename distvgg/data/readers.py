"""Readers of the train and test rows of a local folder or hub id, with undecoded images.

This module owns the use of the `datasets` library and of the network: file locations, column names
and error messages. It is imported only when the cache is cold. Invariant: no file is in both
splits.
"""

import io
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass
from errno import EDQUOT, ENOSPC
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from distvgg.errors import UserError
from distvgg.reachability import within

# Names of these columns in existing datasets.
IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("fine_label", "label", "labels")
SUPERCLASS_COLUMN = "coarse_label"
# Names of held-out splits and top-level folders. The first that exists becomes the test split.
HELD_OUT = ("test", "validation", "valid", "val")
PROBE_SECONDS = 5
T = TypeVar("T")


class Labels(NamedTuple):
    """Unchecked column of labels, as in the source.

    Attributes:
        class_names: Names of the classes in the column's metadata; empty if it has none.
    """

    column: str
    values: pa.ChunkedArray
    class_names: list[str]


@dataclass(frozen=True)
class Rows:
    """One split of a source.

    Attributes:
        where: Name of the split in messages.
    """

    where: str
    label: Labels
    superclass: Labels | None
    _images: Any

    def __len__(self) -> int:
        return len(self.label.values)

    def images(self) -> Iterator[dict[str, Any] | None]:
        """Yields each image, unchecked: its encoded `bytes`, else the `path` of its file."""
        for batch in self._images.iter(batch_size=1000):
            yield from batch.column(0).to_pylist()

    def files(self) -> set[str]:
        """Returns the files of the images that are not stored in the table itself."""
        images = self._images[:].column(0)
        outside = pc.is_null(pc.struct_field(images, "bytes"))
        return set(pc.struct_field(images, "path").filter(outside).to_pylist()) - {None}


def read(source: str, scratch: Path) -> dict[str, Rows]:
    """Reads a folder or hub id by split: `train`, and `test` if there is a held-out split.

    Args:
        source: A folder that holds Parquet files or images, or a hub id.
        scratch: An existing directory for the library's copy of the data, which the rows need.

    Raises:
        UserError: The source cannot be read, lacks a train split, an image or a label column, or
            has a file in both splits.
    """
    splits = _load_folder(source, scratch) if Path(source).is_dir() else _load_hub_id(source)
    if "train" not in splits:
        raise UserError(
            f"{source} has no train split, only {', '.join(splits)}: put its files in a folder"
            " train/, or name them train-*.parquet"
        )
    held_out = next((splits[name] for name in HELD_OUT if name in splits), None)
    train = _rows(f"{source} (train split)", splits["train"])
    if held_out is None:
        return {"train": train}
    test = _rows(f"{source} (test split)", held_out)
    if shared := sorted(train.files() & test.files()):
        raise UserError(
            f"{source}: {shared[0]} is in the train and in the test split: give the folder that"
            " train/ and test/ stand in as data.path"
        )
    return {"train": train, "test": test}


def check_hub_id(source: str) -> None:
    """Checks that `read` could fetch a hub id, and fetches only the description of the dataset.

    Raises:
        UserError: The hub id cannot be fetched.
    """
    import datasets

    _from_hub(source, datasets.load_dataset_builder)


def _load_folder(source: str, scratch: Path) -> dict[str, Any]:
    import datasets

    folder = Path(source).resolve()  # absolute, because `csv` alone names a reader of the library
    # By default, the library takes any folder with a split's name for that split. It would put
    # test/train/, where `train` is a class of CIFAR-100, into both splits.
    split_folders = {n: f"{n}/**" for n in ("train", *HELD_OUT) if _has_files(folder / n)}
    try:
        return dict(
            _silently(
                datasets.load_dataset,
                str(folder),
                cache_dir=str(scratch),
                data_files=split_folders if "train" in split_folders else None,
            )
        )
    except FileNotFoundError as error:
        raise UserError(
            f"data.path {source} holds no data: it needs Parquet files, or one folder of images"
            " per class below train/ and test/"
        ) from error
    except Exception as error:  # any type: the library propagates its readers' errors
        bottom = _bottom(error)
        if isinstance(bottom, OSError) and bottom.errno in (ENOSPC, EDQUOT):
            raise bottom from error  # the scratch directory is on a full disk
        if file := _damaged_parquet(folder):
            raise UserError(
                f"data.path {source} cannot be read: {file}; copy or create it again"
            ) from error
        raise UserError(f"data.path {source} cannot be read: {reason(error)}") from error


def _load_hub_id(source: str) -> dict[str, Any]:
    import datasets

    return dict(_from_hub(source, datasets.load_dataset))


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


def _rows(where: str, table: Any) -> Rows:
    """Returns the rows of a `datasets.Dataset` after finding its columns."""
    import datasets

    # Parquet not written by `datasets` has no Image feature, so the column is found by name.
    images = [n for n, f in table.features.items() if isinstance(f, datasets.Image)]
    images += [n for n in IMAGE_COLUMNS if n in table.column_names]
    labels = [n for n in LABEL_COLUMNS if n in table.column_names]
    has = f"only {', '.join(table.column_names)}"
    if not images:
        raise UserError(f"{where} has no image column, {has}: name it {' or '.join(IMAGE_COLUMNS)}")
    if not labels:
        raise UserError(
            f"{where} has no label column, {has}: name it {' or '.join(LABEL_COLUMNS)}, or put the"
            " images of each class in one folder each below train/ and test/"
        )
    if not len(table):
        raise UserError(f"{where} holds no images: add some")

    def column(name: str) -> Labels:
        values = table.select_columns([name]).with_format("arrow")[:][name]
        return Labels(name, values, getattr(table.features[name], "names", None) or [])

    encoded = table.select_columns([images[0]])
    try:
        encoded = encoded.cast_column(images[0], datasets.Image(decode=False))
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise UserError(
            f"{where}: column {images[0]} holds no image files ({reason(error)}): store the bytes"
            " of PNG or JPEG there"
        ) from error
    return Rows(
        where,
        column(labels[0]),
        column(SUPERCLASS_COLUMN) if SUPERCLASS_COLUMN in table.column_names else None,
        encoded.with_format("arrow"),
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


def _bottom(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def reason(error: BaseException) -> str:
    """Returns the message of an error's root cause, on one line."""
    bottom = _bottom(error)
    return " ".join(str(bottom).split())[:200] or type(bottom).__name__

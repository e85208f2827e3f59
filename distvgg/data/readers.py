"""A local folder or a hub id -> its train and test rows, images undecoded, through `datasets`.

Owns the `datasets` library and the network: where files are, what their columns are called, how a
failure reads. Imported only when the cache is cold. Invariant: no file is in both splits.
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

# What sets call these columns.
IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("fine_label", "label", "labels")
SUPERCLASS_COLUMN = "coarse_label"
# Splits, and folders at the top, of these names; the first that there is becomes the test split.
HELD_OUT = ("test", "validation", "valid", "val")
PROBE_SECONDS = 5
T = TypeVar("T")


class Labels(NamedTuple):
    """A column of labels as the source has it, unchecked.

    `class_names` is what its metadata calls the classes, empty where it has none.
    """

    column: str
    values: pa.ChunkedArray
    class_names: list[str]


@dataclass(frozen=True)
class Rows:
    """One split of a source; `where` names it in messages."""

    where: str
    label: Labels
    superclass: Labels | None
    _images: Any

    def __len__(self) -> int:
        return len(self.label.values)

    def images(self) -> Iterator[dict[str, Any] | None]:
        """Each image as its encoded `bytes`, else the `path` of its file, unchecked."""
        for batch in self._images.iter(batch_size=1000):
            yield from batch.column(0).to_pylist()

    def files(self) -> set[str]:
        """The files of the images that are not in the table itself."""
        images = self._images[:].column(0)
        outside = pc.is_null(pc.struct_field(images, "bytes"))
        return set(pc.struct_field(images, "path").filter(outside).to_pylist()) - {None}


def read(source: str, scratch: Path) -> dict[str, Rows]:
    """A folder or hub id by split: `train`, and `test` where something is held out.

    Args:
        source: a folder that holds Parquet files or images, or a hub id.
        scratch: an existing folder for the library's own copy; the rows need it.

    Raises:
        UserError: it cannot be read, or lacks a train split, an image or a label column.
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
    """Asks for what `read` would fetch, and fetches only its description.

    Raises:
        UserError: as `read`.
    """
    import datasets

    _from_hub(source, datasets.load_dataset_builder)


def _load_folder(source: str, scratch: Path) -> dict[str, Any]:
    import datasets

    folder = Path(source).resolve()  # absolute: `csv` would otherwise name a reader of the library
    # Left to itself, the library takes any folder of a split's name for that split: it would put
    # test/train/, a class of CIFAR-100, into both.
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
    except Exception as error:  # of any type: the library lets pass what its readers raise
        bottom = _bottom(error)
        if isinstance(bottom, OSError) and bottom.errno in (ENOSPC, EDQUOT):
            raise bottom from error  # the scratch folder's fault
        if file := _damaged_parquet(folder):
            raise UserError(
                f"data.path {source} cannot be read: {file}; copy or make it anew"
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
        # The client would retry for 23 s, for minutes where the hub is mute, before it looks in its
        # own cache.
        datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        return _silently(load, source)
    except Exception as error:  # of any type, as above
        raise UserError(
            f"no data set {source}: there is no such folder, and as a hub id it is neither cached"
            f" nor to be had ({reason(error)}): where there is a network, run distvgg doctor RECIPE"
            " --prepare, with DISTVGG_CACHE a folder that this machine sees too; or give a local"
            " copy with --data.path FOLDER, point HF_HOME at a cache that holds it, or take"
            " --data.name synthetic"
        ) from error


def _silently(load: Callable[..., T], path: str, **arguments: Any) -> T:
    """A function of `datasets`, without what it prints."""
    import datasets
    import huggingface_hub

    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(logging.CRITICAL)
    huggingface_hub.utils.logging.set_verbosity(logging.CRITICAL)
    with redirect_stderr(io.StringIO()):
        return load(path, **arguments)


def _rows(where: str, table: Any) -> Rows:
    """Finds the columns of a `datasets.Dataset`."""
    import datasets

    # Parquet that was not written by `datasets` has no Image feature: there, only the name tells.
    images = [n for n, f in table.features.items() if isinstance(f, datasets.Image)]
    images += [n for n in IMAGE_COLUMNS if n in table.column_names]
    labels = [n for n in LABEL_COLUMNS if n in table.column_names]
    has = f"only {', '.join(table.column_names)}"
    if not images:
        raise UserError(f"{where} has no image column, {has}: name it {' or '.join(IMAGE_COLUMNS)}")
    if not labels:
        raise UserError(
            f"{where} has no label column, {has}: name it {' or '.join(LABEL_COLUMNS)}, or put the"
            " images of each class in a folder of its own below train/ and test/"
        )
    if not len(table):
        raise UserError(f"{where} holds no images: add some")

    def column(name: str) -> Labels:
        values = table.select_columns([name]).with_format("arrow")[:][name]
        return Labels(name, values, getattr(table.features[name], "names", None) or [])

    encoded = table.select_columns([images[0]])
    try:
        encoded = encoded.cast_column(images[0], datasets.Image(decode=False))
    except Exception as error:  # of any type, as above
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
    """Whether the hub answers within seconds, by the client's own way through proxies."""
    import huggingface_hub

    def ask() -> bool:
        with suppress(Exception):  # of any type: the client changes its HTTP library
            url = huggingface_hub.constants.ENDPOINT
            huggingface_hub.get_session().head(url, timeout=PROBE_SECONDS)
            return True
        return False

    return within(PROBE_SECONDS, ask)


def _damaged_parquet(folder: Path) -> str | None:
    """The first Parquet file that cannot be read, and why: the library's errors name no file."""
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
    """What went wrong at the bottom, on one line."""
    bottom = _bottom(error)
    return " ".join(str(bottom).split())[:200] or type(bottom).__name__

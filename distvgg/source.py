"""A local folder or a hub id -> its train and test rows, images undecoded, through `datasets`.

Owns the `datasets` library and the network: where files are, what their columns are called, how a
failure reads. Imported only when the cache is cold. Invariant: no file is in two splits, and the
rows of every split have the same columns by the same names.
"""

import io
import os
import socket
import urllib.request
from concurrent.futures import Future
from contextlib import redirect_stderr
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

from distvgg.config import UserError

# What other sets call the columns that are named image, label and superclass from here on.
IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("fine_label", "label", "labels")
SUPERCLASS_COLUMN = "coarse_label"
# Folders that say which split the files below them belong to; the first held-out split found is
# the test split.
SPLIT_FOLDERS = {
    "train": "train",
    "test": "test",
    "validation": "val",
    "valid": "val",
    "val": "val",
}
HELD_OUT = ("test", "val", "validation", "valid")
PROBE_SECONDS = 5


def read(source: str, scratch: Path) -> dict[str, Any]:
    """The rows of a folder or hub id by split: `train`, and `test` where something is held out.

    Returns:
        `datasets.Dataset`s in Arrow format with the columns image (struct of bytes and path), label
        and, where the source has it, superclass; as the source types them, unchecked.

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
    named = {"train": splits["train"]} | ({} if held_out is None else {"test": held_out})
    return {name: _with_our_columns(source, rows) for name, rows in named.items()}


def _load_folder(source: str, scratch: Path) -> dict[str, Any]:
    folder = Path(source).resolve()  # absolute: `csv` would otherwise name a reader of the library
    # The library takes any folder of a split's name for that split, also CIFAR-100's class `train`
    # below test/, whose images it would then put in both.
    split_folders = {
        split: f"{f}/**" for f, split in SPLIT_FOLDERS.items() if _has_files(folder / f)
    }
    try:
        return _load(
            str(folder),
            cache_dir=str(scratch),
            data_files=split_folders if "train" in split_folders else None,
        )
    except FileNotFoundError as error:
        raise UserError(
            f"data.path {source} holds no data: it needs Parquet files, or one folder of images"
            " per class below train/ and test/"
        ) from error
    except Exception as error:  # of any type: the library lets pass what its readers raise
        if file := _damaged_parquet(folder):
            raise UserError(f"data.path {source} cannot be read: {file}; copy it anew") from error
        raise UserError(f"data.path {source} cannot be read: {_reason(error)}") from error


def _load_hub_id(source: str) -> dict[str, Any]:
    import datasets
    import huggingface_hub

    if source.startswith((".", "/")) or source.count("/") != 1:
        raise UserError(
            f"data.path {source} is not a folder: give one that holds Parquet files or one folder"
            " of images per class, or a hub id such as uoft-cs/cifar100"
        )
    if not huggingface_hub.constants.HF_HUB_OFFLINE and not _answers(
        huggingface_hub.constants.ENDPOINT
    ):
        # The client would retry for 23 s before it looks in its own cache.
        datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        return _load(source)
    except Exception as error:  # of any type, as above
        raise UserError(
            f"there is no folder {source}, and the hub's data set of that name is neither cached"
            f" nor to be had ({_reason(error)}): give a local copy with --data.path FOLDER, point"
            " HF_HOME at a cache that holds it, or take --data.name synthetic"
        ) from error


def _load(path: str, **arguments: Any) -> dict[str, Any]:
    """`datasets.load_dataset`, silent."""
    import datasets
    import huggingface_hub

    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    huggingface_hub.utils.logging.set_verbosity_error()
    with redirect_stderr(io.StringIO()):
        return dict(datasets.load_dataset(path, **arguments))


def _with_our_columns(source: str, rows: Any) -> Any:
    """The rows with the columns image, label and superclass under these names, and no others."""
    import datasets

    # Parquet that was not written by `datasets` has no Image feature: there, only the name tells.
    images = [n for n, f in rows.features.items() if isinstance(f, datasets.Image)]
    images += [n for n in IMAGE_COLUMNS if n in rows.column_names]
    labels = [n for n in LABEL_COLUMNS if n in rows.column_names]
    if not images or not labels:
        missing = (
            f"label column ({', '.join(LABEL_COLUMNS)}) and no folders of at least two classes"
            if images
            else f"image column ({', '.join(IMAGE_COLUMNS)})"
        )
        raise UserError(
            f"{source} has no {missing}: its columns are {', '.join(rows.column_names)}; rename or"
            " add one"
        )
    ours = {images[0]: "image", labels[0]: "label"}
    if SUPERCLASS_COLUMN in rows.column_names:
        ours[SUPERCLASS_COLUMN] = "superclass"
    rows = rows.select_columns(list(ours)).rename_columns(ours)
    try:
        rows = rows.cast_column("image", datasets.Image(decode=False))
    except Exception as error:  # of any type, as above
        raise UserError(
            f"{source}: column {images[0]} holds no encoded images ({_reason(error)}): store the"
            " bytes of PNG or JPEG files there"
        ) from error
    return rows.with_format("arrow")


def _answers(url: str) -> bool:
    """Whether the host of a URL, or the proxy before it, takes connections, within seconds."""
    parts = urlsplit(url)
    if not urllib.request.proxy_bypass(parts.hostname or ""):
        parts = urlsplit(urllib.request.getproxies().get(parts.scheme, url))
    address = (parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443))
    answer: Future[bool] = Future()

    def probe() -> None:
        try:
            socket.create_connection(address, timeout=PROBE_SECONDS).close()
        except OSError:
            answer.set_result(False)
        else:
            answer.set_result(True)

    # In a thread, for name resolution heeds no timeout.
    Thread(target=probe, daemon=True).start()
    try:
        return answer.result(PROBE_SECONDS)
    except TimeoutError:
        return False


def _damaged_parquet(folder: Path) -> str | None:
    """The first Parquet file that cannot be read, and why: the library's errors name no file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for file in sorted(folder.rglob("*.parquet")):
        try:
            rows = sum(batch.num_rows for batch in pq.ParquetFile(file).iter_batches())
        except (OSError, pa.ArrowException) as error:
            return f"{file.relative_to(folder)} is damaged ({_reason(error)})"
        if not rows:
            return f"{file.relative_to(folder)} has no rows"
    return None


def _has_files(folder: Path) -> bool:
    return any(files for _, _, files in os.walk(folder, followlinks=True))


def _reason(error: BaseException) -> str:
    """What went wrong at the bottom, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:200] or type(error).__name__

"""Cache of datasets: maps a name or path to memory-mapped uint8 arrays, or to shards of files.

Invariant: a cache entry is complete or does not exist. An entry is built under a file lock in a
temporary directory, which is then renamed. One process of a node decodes while the others wait, and
two runs may start at the same time. A killed build leaves nothing that is read later: the kernel
releases the lock of a dead process, and the next build removes temporary directories that are not
locked. All processes of a node share the mapped pages.
"""

import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from distvgg.config import MAX_PIXELS, DataConfig
from distvgg.data.dataset import Dataset, Split
from distvgg.data.encoded import EncodedImages
from distvgg.data.moments import count_values, moments
from distvgg.data.stamps import MIN_FILES, read_stamp, write_stamp
from distvgg.errors import UserError
from distvgg.file_lock import lock

# Part of every fingerprint. Increase it when a code change alters the decoded arrays.
FORMAT = 4
HUB_IDS = {"cifar100": "uoft-cs/cifar100", "cifar10": "uoft-cs/cifar10"}


def load_dataset(config: DataConfig, entry: Path | None = None) -> Dataset:
    """Returns the dataset of a config, after decoding it into the cache if it is missing.

    Args:
        config: The data section of a run's config.
        entry: The result of `cache_entry(config)` if known, because that function reads the status
            of every file.

    Raises:
        UserError: The folder is missing or empty, the hub is unreachable, an image is corrupt or
            has another size, a label is out of range, or the cache cannot be written. The message
            names the cause and the fix.
    """
    entry = entry or cache_entry(config)
    try:
        # Also checked before locking, because a cache that another user fills may be read-only.
        if not is_complete(entry):
            with _locked(entry.with_suffix(".lock")) as exclusive:
                if not is_complete(entry):
                    _build(config, entry, exclusive=exclusive)
    except OSError as error:
        raise UserError(
            f"cannot write the data cache {entry.parent} ({error.strerror or error}): make room"
            " there, or set DISTVGG_CACHE to a writable folder"
        ) from error
    return open_entry(entry)


def cache_entry(config: DataConfig) -> Path:
    """Returns the cache directory for the decoded arrays of a config, which may not exist yet."""
    return cache_dir() / f"{config.name}-{_fingerprint(config)}"


def cache_dir() -> Path:
    """Returns the root of the cache: DISTVGG_CACHE, else distvgg/ in the user's cache directory.

    Raises:
        UserError: the user has no home directory, which the command line provides.
    """
    if path := os.environ.get("DISTVGG_CACHE"):
        return Path(path)
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if caches.startswith("~"):
        raise UserError("no home directory for the data cache: set HOME, or DISTVGG_CACHE")
    return Path(caches) / "distvgg"


def channel_moments(images: np.ndarray) -> tuple[list[float], list[float]]:
    """Computes the per-channel mean and standard deviation of images, scaled to 0..1.

    The images are [n, height, width, 3] uint8. Both results come from exact histograms.
    """
    return moments(count_values(images))


def source_of(config: DataConfig) -> str | None:
    """Returns the folder or hub id of a config's dataset, or None for generated data."""
    source = config.path or HUB_IDS.get(config.name)
    return source and os.path.expanduser(source)


def _fingerprint(config: DataConfig) -> str:
    """Returns the hash that names a cache entry.

    The hash covers everything that the arrays depend on. For a folder, this includes the names,
    sizes and modification times of its files; of many files, a stamp says that they are the same. A
    hub id counts by name only, so a warm start needs no network.
    """
    columns = config.image_column, config.label_column
    facts: list[Any] = [FORMAT, config.name, config.resize, *columns]
    if config.on_error == "skip":
        facts.append("skip")
    if config.store != "auto":
        facts.append(config.store)
    if config.max_pixels != MAX_PIXELS:
        facts.append(f"max_pixels {config.max_pixels}")
    source = source_of(config)
    if source is None:
        from distvgg.data import synthetic

        facts.append(synthetic.VERSION)
    elif Path(source).is_dir():
        root = Path(source).resolve()
        facts.append(str(root))
        stamp = cache_dir() / "stamps" / f"{_hash(facts)}.json"
        if (known := read_stamp(stamp, root)) is not None:
            return known
        began, before, directories = time.time(), len(facts), {}
        above: dict[str, frozenset[str]] = {str(root): frozenset()}
        circles: list[str] = []
        for folder, folders, files in os.walk(root, followlinks=True):
            directories[os.path.relpath(folder, root)] = os.stat(folder).st_mtime_ns
            # A link to a folder above is an error of the readers; here it must end.
            chain = above.pop(folder) | {os.path.realpath(folder)}
            paths = {name: os.path.join(folder, name) for name in sorted(folders)}
            folders[:] = [n for n, path in paths.items() if os.path.realpath(path) not in chain]
            above.update((paths[name], chain) for name in folders)
            circles += [path for name, path in paths.items() if name not in folders]
            for name in sorted(files):
                with suppress(OSError):  # a dangling link
                    stat = os.stat(os.path.join(folder, name))
                    where = os.path.relpath(os.path.join(folder, name), root)
                    facts.append((where, stat.st_size, stat.st_mtime_ns))
        if len(facts) - before >= MIN_FILES:
            write_stamp(stamp, _hash(facts + circles), directories, facts[before:], began)
        facts += circles
    else:
        facts.append(source)
    return _hash(facts)


def _hash(facts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _build(config: DataConfig, entry: Path, *, exclusive: bool) -> None:
    """Decodes into a temporary directory, flushes the files, and renames the directory to `entry`.

    Args:
        config: of the dataset.
        entry: the directory to make.
        exclusive: the entry's lock is held. Else another process may build the same entry.
    """
    tmp_dir = entry.with_suffix(".building")
    if exclusive:
        _remove_stale_builds(entry.parent)
    else:
        tmp_dir = entry.with_suffix(f".{socket.gethostname()}-{os.getpid()}.building")
    shutil.rmtree(tmp_dir, ignore_errors=True)
    tmp_dir.mkdir()
    try:
        if source := source_of(config):
            from distvgg.data import decode

            meta = decode.write(config, source, tmp_dir)
        else:
            from distvgg.data import synthetic

            meta = synthetic.write(tmp_dir)
        if "mean" not in meta:
            images = np.load(tmp_dir / "train_images.npy", "r")
            meta["mean"], meta["std"] = channel_moments(images)
        meta["files"] = {f.name: f.stat().st_size for f in tmp_dir.iterdir()}
        (tmp_dir / "meta.json").write_text(json.dumps(meta))
        for file in tmp_dir.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        if not exclusive and is_complete(entry):
            return  # another process was faster
        shutil.rmtree(entry, ignore_errors=True)  # rejected by is_complete
        tmp_dir.rename(entry)
    finally:
        shutil.rmtree(tmp_dir, ignore_errors=True)


def _remove_stale_builds(cache: Path) -> None:
    """Removes the temporary directories that killed builds of any entry left.

    A running build holds its lock, so its directory is kept.
    """
    for tmp_dir in cache.glob("*.building"):
        with suppress(OSError), _locked(tmp_dir.with_suffix(".lock"), wait=False) as exclusive:
            if exclusive:
                shutil.rmtree(tmp_dir)


def is_complete(entry: Path) -> bool:
    """Returns True if every file of an entry has the size recorded at the build."""
    try:
        files = json.loads((entry / "meta.json").read_text())["files"]
        return "train_labels.npy" in files and all(
            (entry / name).stat().st_size == size for name, size in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def open_entry(entry: Path) -> Dataset:
    """Returns the dataset of a complete entry."""
    meta = json.loads((entry / "meta.json").read_text())
    of = meta["superclass_of"]
    superclass_of = None if of is None else np.array(of, dtype=np.int64)

    def split(name: str) -> Split:
        labels = np.load(entry / f"{name}_labels.npy")
        images: np.ndarray | EncodedImages
        if encoded := meta.get("encoded"):
            images = EncodedImages(entry, name, tuple(encoded["size"]), encoded["max_pixels"])
        else:
            # Copy-on-write: torch needs a writable array, and pages are shared until written.
            images = np.load(entry / f"{name}_images.npy", mmap_mode="c")
        superclasses = None if superclass_of is None else superclass_of[labels]
        files = entry / f"{name}_files.json"
        return Split(images, labels, superclasses, files if files.name in meta["files"] else None)

    return Dataset(
        train=split("train"),
        test=split("test") if "test_labels.npy" in meta["files"] else None,
        class_names=meta["class_names"],
        superclass_names=meta["superclass_names"],
        superclass_of=superclass_of,
        mean=tuple(meta["mean"]),
        std=tuple(meta["std"]),
        fingerprint=entry.name.rpartition("-")[2],
        val=split("val") if "val_labels.npy" in meta["files"] else None,
        notes=tuple(meta.get("notes", ())),
        card=tuple(meta.get("card", ())),
    )


@contextmanager
def _locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Holds a lock file, which is created if it is missing; yields False if locks do not work."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        yield lock(handle.fileno(), wait=wait)

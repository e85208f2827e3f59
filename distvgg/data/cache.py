"""The cache of decoded datasets: a name or a path -> memory-mapped uint8 arrays.

Invariant: an entry of the cache is complete or does not exist. It is built under a file lock in a
temporary folder and renamed, so that one process of a node decodes while the others wait, and two
runs may start at once. A killed build leaves nothing that is read later: the kernel releases the
lock of a dead process, and the next build removes temporary folders that are not locked. All
processes of a node share the mapped pages.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from distvgg.config import DataConfig
from distvgg.data.dataset import Dataset, Split
from distvgg.errors import UserError

# Part of every fingerprint: raise it when the decoded arrays come out otherwise than before.
FORMAT = 2
HUB_IDS = {"cifar100": "uoft-cs/cifar100", "cifar10": "uoft-cs/cifar10"}


def load_dataset(config: DataConfig, entry: Path | None = None) -> Dataset:
    """The dataset of a config, decoding it into the cache if it is not there.

    Args:
        entry: `cache_entry(config)` where it is known already, since it looks at every file.

    Raises:
        UserError: no such folder, nothing in it, no network, a damaged or misshapen image, a label
            out of range; the message says which and what to change.
    """
    entry = entry or cache_entry(config)
    try:
        # Looked at before locking too, so that a cache that others fill may be read-only.
        if not is_complete(entry):
            with _locked(entry.with_suffix(".lock"), fcntl.LOCK_EX):
                if not is_complete(entry):
                    _build(config, entry)
    except OSError as error:
        raise UserError(
            f"cannot write the data cache {entry.parent} ({error.strerror or error}): make room"
            " there, or set DISTVGG_CACHE to a writable folder"
        ) from error
    return open_entry(entry)


def cache_entry(config: DataConfig) -> Path:
    """The folder in the cache where the decoded arrays of a config are, or will be."""
    return cache_dir() / f"{config.name}-{_fingerprint(config)}"


def cache_dir() -> Path:
    """Where decoded arrays live: DISTVGG_CACHE, else distvgg/ in the user's cache folder."""
    if path := os.environ.get("DISTVGG_CACHE"):
        return Path(path)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distvgg"


def channel_moments(images: np.ndarray) -> tuple[list[float], list[float]]:
    """Per-channel mean and standard deviation in 0..1 of [n, height, width, 3] uint8, from exact
    histograms."""
    counts = np.zeros((3, 256), dtype=np.int64)
    # Half-megabyte blocks stay in a processor's cache: twice as fast as large ones.
    for block in np.array_split(images, -(-images.size // 2**19)):
        for channel in range(3):
            counts[channel] += np.bincount(block[..., channel].ravel(), minlength=256)
    levels = np.arange(256) / 255
    mean = counts @ levels / counts.sum(1)
    std = np.sqrt(counts @ levels**2 / counts.sum(1) - mean**2)
    return mean.tolist(), std.tolist()


def source_of(config: DataConfig) -> str | None:
    """The folder or hub id that a config means; None for a set that is made in code."""
    source = config.path or HUB_IDS.get(config.name)
    return source and os.path.expanduser(source)


def _fingerprint(config: DataConfig) -> str:
    """Names a cache entry by all that its arrays depend on: for a folder the names, sizes and times
    of its files. A hub id counts by its name alone, so that a warm start asks no network."""
    facts: list[Any] = [FORMAT, config.name, config.resize]
    source = source_of(config)
    if source is None:
        from distvgg.data import synthetic

        facts.append(synthetic.VERSION)
    elif Path(source).is_dir():
        root = Path(source).resolve()
        facts.append(str(root))
        for folder, folders, files in os.walk(root, followlinks=True):
            folders.sort()
            for name in sorted(files):
                with suppress(OSError):  # a link to nothing
                    stat = os.stat(os.path.join(folder, name))
                    where = os.path.relpath(os.path.join(folder, name), root)
                    facts.append((where, stat.st_size, stat.st_mtime_ns))
    else:
        facts.append(source)
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _build(config: DataConfig, entry: Path) -> None:
    """Decodes into a folder aside, flushes, renames. Called with the entry's lock held."""
    aside = entry.with_suffix(".building")
    _remove_stale_builds(entry.parent)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        if source := source_of(config):
            from distvgg.data import decode

            meta = decode.write(config, source, aside)
        else:
            from distvgg.data import synthetic

            meta = synthetic.write(aside)
        meta["mean"], meta["std"] = channel_moments(np.load(aside / "train_images.npy", "r"))
        meta["files"] = {f.name: f.stat().st_size for f in aside.iterdir()}
        (aside / "meta.json").write_text(json.dumps(meta))
        for file in aside.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        shutil.rmtree(entry, ignore_errors=True)  # what is_complete refused
        aside.rename(entry)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _remove_stale_builds(cache: Path) -> None:
    """Removes what killed builds of any entry left; the lock of a living one is held."""
    for aside in cache.glob("*.building"):
        with suppress(OSError), _locked(aside.with_suffix(".lock"), fcntl.LOCK_EX | fcntl.LOCK_NB):
            shutil.rmtree(aside)


def is_complete(entry: Path) -> bool:
    """Whether every file of an entry has the size that it was written with."""
    try:
        files = json.loads((entry / "meta.json").read_text())["files"]
        return all((entry / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def open_entry(entry: Path) -> Dataset:
    """The dataset in an entry that is whole."""
    meta = json.loads((entry / "meta.json").read_text())
    of = meta["superclass_of"]
    superclass_of = None if of is None else np.array(of, dtype=np.int64)

    def split(name: str) -> Split:
        # Copy-on-write mapping: pages are shared until written; torch asks for a writable array.
        images = np.load(entry / f"{name}_images.npy", mmap_mode="c")
        labels = np.load(entry / f"{name}_labels.npy")
        return Split(images, labels, None if superclass_of is None else superclass_of[labels])

    return Dataset(
        train=split("train"),
        test=split("test") if "test_labels.npy" in meta["files"] else None,
        class_names=meta["class_names"],
        superclass_names=meta["superclass_names"],
        superclass_of=superclass_of,
        mean=tuple(meta["mean"]),
        std=tuple(meta["std"]),
        fingerprint=entry.name.rpartition("-")[2],
    )


@contextmanager
def _locked(path: Path, how: int) -> Iterator[None]:
    """Holds a lock (flock's flags) that dies with its process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        fcntl.flock(handle, how)
        yield

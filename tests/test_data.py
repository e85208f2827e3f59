"""Data: every layout gives the same arrays, a cache entry is whole or not there, and a mistake in
the data is one line that names it.

Made images are noise, so that no two look alike. Processes that must die do so by SIGKILL, at
points of the build that the test chooses.
"""

import fcntl
import io
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from distvgg.config import DataConfig
from distvgg.data import cache, cifar, decode, synthetic
from distvgg.data.cache import load_dataset
from distvgg.data.dataset import Dataset, train_val_indices
from distvgg.errors import UserError

# As the hub's metadata has them: sorted, with the misspelling of crab.
CIFAR100_NAMES = sorted(cifar.CIFAR100_SUPERCLASS_OF)
HUB_NAMES = ["cra" if n == "crab" else n for n in CIFAR100_NAMES]
Rows = dict[str, list[Any]]


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def noise(n: int, seed: int, side: int = 32) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def made_rows(n: int = 20, seed: int = 0, side: int = 32, **columns: list[Any]) -> Rows:
    """Parquet columns in the hub's form: noise in ten classes, and any column in place of these."""
    images = [{"bytes": png(i), "path": None} for i in noise(n, seed, side)]
    return {"img": images, "label": [i % 10 for i in range(n)]} | columns


def with_names(table: pa.Table, names: list[str]) -> pa.Table:
    """The table with the metadata that `datasets` writes into Parquet, class names among them."""
    import datasets

    features = {"img": datasets.Image(), "label": datasets.ClassLabel(names=names)}
    return table.cast(datasets.Features(features).arrow_schema)


def write_parquet(folder: Path, train: Rows | pa.Table, test: Rows | pa.Table | None) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in {"train": train, "test": test}.items():
        if rows is not None:
            table = rows if isinstance(rows, pa.Table) else pa.table(rows)
            pq.write_table(table, folder / f"{name}-00000-of-00001.parquet")
    return str(folder)


def write_folders(folder: Path, names: list[str], splits: dict[str, np.ndarray]) -> str:
    """One folder of PNG files per class: split/CLASS/0.png, images in turn over the classes."""
    for split, images in splits.items():
        for i, image in enumerate(images):
            path = folder / split / names[i % len(names)] / f"{i // len(names)}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(image))
    return str(folder)


def custom(path: str, **fields: Any) -> DataConfig:
    return DataConfig(name="custom", path=path, **fields)


@pytest.fixture
def cold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("DISTVGG_CACHE", str(folder))
    return folder


@pytest.fixture
def parquet(tmp_path: Path) -> str:
    """A small set without fault: ten classes, 20 train and 10 test images."""
    return write_parquet(tmp_path / "set", made_rows(20, 1), made_rows(10, 2))


@pytest.fixture(scope="module")
def real(cache: Path, cifar100: str) -> Dataset:
    return load_dataset(DataConfig(path=cifar100))


# The real set


def test_the_real_set_is_decoded_to_the_pixel(real: Dataset, cifar100: str) -> None:
    assert real.test is not None
    assert real.superclass_of is not None
    for split, name, n in ((real.train, "train", 50_000), (real.test, "test", 10_000)):
        assert split.images.shape == (n, 32, 32, 3)
        assert split.images.dtype == np.uint8
        table = pa.concat_tables(pq.read_table(f) for f in sorted(Path(cifar100).glob(f"{name}*")))
        assert np.array_equal(split.labels, table["fine_label"])
        assert split.superclasses is not None
        assert np.array_equal(split.superclasses, table["coarse_label"])
        for i in np.random.default_rng(0).integers(0, n, 200).tolist():
            independent = Image.open(io.BytesIO(table["img"][i]["bytes"].as_py()))
            assert np.array_equal(split.images[i], np.asarray(independent)), (name, i)
    assert real.class_names == CIFAR100_NAMES
    assert real.class_names[26] == "crab"
    assert real.superclass_names == list(cifar.CIFAR100_SUPERCLASSES)
    for name, superclass in zip(real.class_names, real.superclass_of, strict=True):
        assert real.superclass_names[superclass] == cifar.CIFAR100_SUPERCLASS_OF[name]
    assert np.round(real.mean, 4).tolist() == [0.5071, 0.4865, 0.4409]
    assert np.round(real.std, 4).tolist() == [0.2673, 0.2564, 0.2762]


def test_a_warm_start_is_instant_and_imports_no_decoder(real: Dataset, cifar100: str) -> None:
    code = f"""
import sys, time
from distvgg.config import DataConfig
from distvgg.data import load_dataset
start = time.perf_counter()
dataset = load_dataset(DataConfig(path={cifar100!r}))
print(len(dataset.train), time.perf_counter() - start)
assert not sys.modules.keys() & {{"datasets", "pyarrow", "PIL", "distvgg.data.decode"}}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    n, seconds = done.stdout.split()
    assert int(n) == 50_000
    assert float(seconds) < 1


def test_the_real_split_holds_out_50_of_each_class(real: Dataset) -> None:
    train, val = train_val_indices(real.train.labels, DataConfig())
    assert np.bincount(real.train.labels[train]).tolist() == [450] * 100
    assert np.bincount(real.train.labels[val]).tolist() == [50] * 100
    subset, _ = train_val_indices(real.train.labels, DataConfig(train_size=1000))
    assert np.bincount(real.train.labels[subset]).tolist() == [10] * 100


# Layouts


@pytest.mark.parametrize("layout", ["named", "nameless", "bytes", "folders"])
def test_every_layout_gives_the_same_arrays(layout: str, cold: Path, tmp_path: Path) -> None:
    names = [f"class_{c}" for c in "abcde"]
    sizes = {"train": 15, "test": 5}
    images = {split: noise(n, n) for split, n in sizes.items()}
    if layout == "folders":
        path = write_folders(tmp_path / "set", names, images)
    else:
        tables = {}
        for split, n in sizes.items():
            encoded: list[Any] = [png(i) for i in images[split]]
            if layout != "bytes":
                encoded = [{"bytes": e, "path": None} for e in encoded]
            tables[split] = pa.table({"img": encoded, "label": [i % 5 for i in range(n)]})
            if layout == "named":
                tables[split] = with_names(tables[split], names)
        path = write_parquet(tmp_path / "set", tables["train"], tables["test"])

    dataset = load_dataset(custom(path))
    assert dataset.class_names == (names if layout in ("named", "folders") else list("01234"))
    assert dataset.superclass_of is None
    for split, loaded in (("train", dataset.train), ("test", dataset.test)):
        assert loaded is not None
        # A folder's images come class by class.
        order = np.argsort(np.arange(sizes[split]) % 5, kind="stable")
        order = order if layout == "folders" else np.arange(sizes[split])
        assert np.array_equal(loaded.images, images[split][order])
        assert np.array_equal(loaded.labels, order % 5)


@pytest.mark.parametrize("names", [HUB_NAMES, CIFAR100_NAMES], ids=["cra", "crab"])
def test_cifar100_as_folders_keeps_its_splits_apart_and_gets_its_superclasses(
    names: list[str], cold: Path, tmp_path: Path
) -> None:
    """One of its classes is `train`, which `datasets` takes for a split wherever it stands."""
    splits = {"train": noise(100, 0), "test": noise(100, 1)}
    dataset = load_dataset(DataConfig(path=write_folders(tmp_path / "set", names, splits)))
    assert dataset.class_names == CIFAR100_NAMES
    assert dataset.superclass_of is not None
    for name, superclass in zip(dataset.class_names, dataset.superclass_of, strict=True):
        assert dataset.superclass_names[superclass] == cifar.CIFAR100_SUPERCLASS_OF[name]
    for split, loaded in (("train", dataset.train), ("test", dataset.test)):
        assert loaded is not None
        assert np.array_equal(loaded.images, splits[split])
        assert loaded.superclasses is not None
        assert np.array_equal(loaded.superclasses, dataset.superclass_of[loaded.labels])


def test_any_image_becomes_rgb_and_one_size_on_demand(cold: Path, tmp_path: Path) -> None:
    gray = noise(10, 0, side=28)[..., 0]
    images = [{"bytes": png(g), "path": None} for g in gray]
    path = write_parquet(tmp_path / "set", made_rows(10, img=images), None)
    dataset = load_dataset(custom(path))
    assert dataset.test is None
    assert np.array_equal(dataset.train.images, np.repeat(gray[..., None], 3, axis=3))
    assert load_dataset(custom(path, resize=16)).train.images.shape == (10, 16, 16, 3)


# The split


@st.composite
def labels_and_sizes(draw: st.DrawFn) -> tuple[np.ndarray, int, int]:
    labels = np.array(draw(st.lists(st.integers(0, 6) | st.just(0), min_size=3, max_size=200)))
    val_size = draw(st.integers(1, len(labels) - 1))
    return labels, val_size, draw(st.integers(1, len(labels) - val_size))


@given(labels_and_sizes(), st.integers(0, 99))
def test_a_split_is_stratified_disjoint_exhaustive_and_seeded(
    drawn: tuple[np.ndarray, int, int], seed: int
) -> None:
    labels, val_size, train_size = drawn
    config = DataConfig(val_size=val_size, split_seed=seed)
    train, val = train_val_indices(labels, config)
    assert len(val) == val_size
    assert sorted([*train, *val]) == list(range(len(labels)))
    again, _ = train_val_indices(labels, config)
    assert np.array_equal(train, again)

    subset, same_val = train_val_indices(
        labels, DataConfig(val_size=val_size, split_seed=seed, train_size=train_size)
    )
    assert len(subset) == train_size
    assert set(subset) <= set(train)
    assert np.array_equal(val, same_val)
    for part, whole in ((val, np.arange(len(labels))), (subset, train)):
        for label in np.unique(labels):
            fair = len(part) * np.mean(labels[whole] == label)
            assert abs(np.sum(labels[part] == label) - fair) < 1


def test_another_split_seed_is_another_split() -> None:
    labels = np.arange(1000) % 10
    splits = [train_val_indices(labels, DataConfig(val_size=100, split_seed=s))[1] for s in (0, 1)]
    assert len(np.intersect1d(*splits)) < 30


def test_sizes_beyond_the_data_are_refused() -> None:
    labels = np.arange(100) % 10
    with pytest.raises(UserError, match=r"data\.val_size 100 leaves nothing.* 100 images"):
        train_val_indices(labels, DataConfig(val_size=100))
    with pytest.raises(UserError, match=r"data\.train_size 91 is more than the 90 .*val_size 10"):
        train_val_indices(labels, DataConfig(val_size=10, train_size=91))


# The cache


def child(
    path: str, cache: Path, *, before: str = "", prefix: tuple[str, ...] = ()
) -> "subprocess.Popen[str]":
    """A process that runs `before`, waits for a line, loads a set and prints its digest."""
    code = f"""
import hashlib, os, signal, sys
import numpy as np
from distvgg.config import DataConfig
from distvgg.data import cache
from distvgg.errors import UserError

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

{before}
sys.stdin.readline()
try:
    dataset = cache.load_dataset(DataConfig(name="custom", path={path!r}))
except UserError as error:
    sys.exit(str(error))
print(hashlib.sha256(np.array(dataset.train.images)).hexdigest(), len(dataset.test))
"""
    return subprocess.Popen(
        [*prefix, sys.executable, "-c", code],
        env=os.environ | {"DISTVGG_CACHE": str(cache)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_processes_on_a_cold_cache_decode_once(
    parquet: str, cold: Path, tmp_path: Path
) -> None:
    log = tmp_path / "builds"
    before = f"""
build = cache._build
def logged(*args):
    with open({str(log)!r}, "a") as file:
        file.write("built\\n")
    build(*args)
cache._build = logged
"""
    processes = [child(parquet, cold, before=before) for _ in range(2)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [p.returncode for p in processes] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0] != ""
    assert log.read_text() == "built\n"


@pytest.mark.parametrize("moment", ["cache.channel_moments", "os.fsync"])
def test_a_killed_build_is_never_read_and_does_not_stay(
    moment: str, parquet: str, cold: Path
) -> None:
    """Killed with images but no metadata written, and with all written but nothing in its place."""
    process = child(parquet, cold, before=f"{moment} = die")
    output = process.communicate("go\n", timeout=60)
    assert process.returncode == -9, output
    assert len(list(cold.glob("*.building"))) == 1
    # A later build removes it, also when it is that of another entry.
    os.utime(next(Path(parquet).iterdir()))
    assert np.array_equal(load_dataset(custom(parquet)).train.images, noise(20, 1))
    assert sorted(p.suffix for p in cold.iterdir()) == ["", ".lock", ".lock"]


def test_a_build_that_still_runs_elsewhere_is_left_alone(parquet: str, cold: Path) -> None:
    cold.mkdir()
    (cold / "other.building").mkdir()
    with cache._locked(cold / "other.lock", fcntl.LOCK_EX):
        load_dataset(custom(parquet))
    assert (cold / "other.building").exists()


@pytest.mark.parametrize("file", ["train_images.npy", "test_labels.npy", "meta.json"])
def test_a_truncated_entry_is_built_again(file: str, parquet: str, cold: Path) -> None:
    load_dataset(custom(parquet))
    (entry,) = (p for p in cold.iterdir() if p.is_dir())
    os.truncate(entry / file, (entry / file).stat().st_size // 2)
    assert np.array_equal(load_dataset(custom(parquet)).train.images, noise(20, 1))


def test_a_changed_file_is_decoded_again(parquet: str, cold: Path) -> None:
    before = load_dataset(custom(parquet))
    write_parquet(Path(parquet), made_rows(20, 3), made_rows(10, 2))
    after = load_dataset(custom(parquet))
    assert after.fingerprint != before.fingerprint
    assert np.array_equal(after.train.images, noise(20, 3))


def test_images_are_mapped_and_a_write_to_them_stays_private(parquet: str, cold: Path) -> None:
    images = load_dataset(custom(parquet)).train.images
    assert isinstance(images, np.memmap)
    images[:] = 0
    assert np.array_equal(load_dataset(custom(parquet)).train.images, noise(20, 1))


def test_a_whole_entry_is_read_without_writing(
    parquet: str, cold: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a cache that somebody else filled may be read-only."""
    load_dataset(custom(parquet))
    monkeypatch.setattr(cache, "_locked", None)
    load_dataset(custom(parquet))


def test_an_unwritable_cache_is_one_clear_line(
    parquet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DISTVGG_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"cannot write .*/file/cache \(Not a dir.*DISTVGG_CACHE"):
        load_dataset(custom(parquet))


@pytest.mark.parametrize("kilobytes", [24, 150])
def test_a_full_disk_is_one_clear_line(parquet: str, tmp_path: Path, kilobytes: int) -> None:
    """A file system in memory, in a namespace of the child's own, fills up while `datasets` copies
    92 kB, and while as much is written as pixels after that."""
    cache = tmp_path / "cache"
    cache.mkdir()
    mount = f"mount -t tmpfs -o size={kilobytes}k tmpfs {cache}"
    unshare = ("unshare", "--user", "--map-root-user", "--mount")
    if not shutil.which("unshare") or subprocess.run([*unshare, "sh", "-c", mount]).returncode:
        pytest.skip("this kernel lets a user mount nothing")
    process = child(parquet, cache, prefix=(*unshare, "sh", "-c", f'{mount} && exec "$@"', "sh"))
    out, err = process.communicate("go\n", timeout=60)
    assert process.returncode == 1, out
    assert err.count("\n") == 1, err
    assert err.startswith(f"cannot write the data cache {cache} (")
    assert "No space left on device" in err


# Bad input


def cut_in_half(folder: Path) -> str:
    path = write_parquet(folder, made_rows(), made_rows())
    file = folder / "test-00000-of-00001.parquet"
    os.truncate(file, file.stat().st_size // 2)
    return path


def empty(folder: Path) -> str:
    folder.mkdir()
    return str(folder)


def labelled(*labels: int | str | None, names: list[str] | None = None) -> Callable[[Path], str]:
    """A set whose first labels are these."""

    def write(folder: Path) -> str:
        rows = [*labels, *(type(labels[0] or 0)(i % 10) for i in range(len(labels), 20))]
        table = pa.table(made_rows(label=rows))
        return write_parquet(folder, with_names(table, names) if names else table, None)

    return write


TEN = [f"class_{i}" for i in range(10)]
BOTH = {"train": noise(2, 0), "test": noise(2, 1)}
HUB_LIKE = made_rows() | {"coarse_label": [i % 10 // 5 for i in range(20)]}


def train_only(rows: Rows) -> Callable[[Path], str]:
    return lambda folder: write_parquet(folder, rows, None)


def first_image(image: bytes | None) -> Callable[[Path], str]:
    rows = made_rows()
    rows["img"][0] = {"bytes": image, "path": "a.png"}
    return train_only(rows)


BAD: dict[str, tuple[Callable[[Path], str], str]] = {
    "missing folder": (str, "{path} is not a folder: give one that holds"),
    "empty folder": (empty, "{path} holds no data: it needs Parquet files, or"),
    "parquet cut in half": (cut_in_half, "test-00000-of-00001.parquet is damaged"),
    "no rows": (train_only(made_rows(0)), "train-00000-of-00001.parquet has no rows"),
    "no train split": (
        lambda folder: write_parquet(folder, None, made_rows()),
        "{path} has no train split, only test: put its files in a folder train/",
    ),
    "no image column": (
        train_only({"picture": ["a"], "label": [0]}),
        "no image column, only picture, label: name it img or image",
    ),
    "no label column": (
        train_only({"img": made_rows()["img"]}),
        "no label column, only img: name it fine_label or label or labels",
    ),
    "image column of numbers": (
        train_only({"img": [1, 2], "label": [0, 1]}),
        "column img holds no image files",
    ),
    "corrupted PNG": (
        first_image(png(noise(1, 0)[0])[:900]),
        "(train split): image 0 (a.png) cannot be decoded: ",
    ),
    "not an image": (first_image(b"<html>"), "(a.png) cannot be decoded: not an image; mend or"),
    "null image": (
        train_only(made_rows(img=[*made_rows(19)["img"], None])),
        "image 19 cannot be decoded: there is none",
    ),
    "16-bit image": (first_image(png(np.full((32, 32), 999, "u2"))), "more than 8 bits a channel"),
    "another shape": (
        lambda folder: write_parquet(
            folder, made_rows(), made_rows(img=made_rows(20, 0, 28)["img"])
        ),
        "(test split): image 0 is 28x28 pixels, expected 32x32: mend it, or bring all to one size"
        " with --data.resize 32",
    ),
    "named label too high": (labelled(0, 10, names=TEN), "image 1 has label 10, out of range 0 to"),
    "named label negative": (labelled(-1, names=TEN), "image 0 has label -1, out of range 0 to 9"),
    "bare label too high": (labelled(0, 20), "image 1 has label 20, out of range 0 to 19"),
    "bare label negative": (labelled(-1, 0), "image 0 has label -1, out of range 0 to 19"),
    "null label": (labelled(0, 1, None), "(train split): image 2 has no label: mend or drop"),
    "null named label": (labelled(0, None, names=TEN), "image 1 has no label: mend or drop"),
    "text label": (labelled("cat", "dog"), "column label is of type string: number the"),
    "class of the test split only": (
        lambda folder: write_parquet(folder, made_rows(), made_rows(1, label=[10])),
        "(test split): image 0 has label 10, out of range 0 to 9",
    ),
    "superclasses at odds": (
        lambda folder: write_parquet(folder, HUB_LIKE, HUB_LIKE | {"coarse_label": [1] * 20}),
        "(test split): image 0 puts class 0 in superclass 1, others are in 0",
    ),
    "split folders further down": (
        lambda folder: str(Path(write_folders(folder / "data", ["train", "x"], BOTH)).parent),
        "data/test/train/0.png is in the train and in the test split: give the folder that",
    ),
    "superclass unknown": (
        train_only(HUB_LIKE | {"label": [0, 2] * 10, "coarse_label": [0] * 20}),
        "no image of class 1 tells its superclass",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_that_names_it(case: str, cold: Path, tmp_path: Path) -> None:
    write, message = BAD[case]
    path = write(tmp_path / "set")
    with pytest.raises(UserError) as raised:
        load_dataset(custom(path))
    line = str(raised.value)
    assert message.format(path=path) in line
    assert path in line
    assert "\n" not in line
    assert not any(p.is_dir() for p in cold.iterdir())


def test_cifar100_is_not_taken_from_a_set_of_ten_classes(cold: Path, tmp_path: Path) -> None:
    path = write_folders(tmp_path / "set", TEN, {"train": noise(20, 0)})
    with pytest.raises(UserError, match=r"has 10 classes, cifar100 has 100: .*--data\.name custom"):
        load_dataset(DataConfig(path=path))


@given(st.integers(0, 2**16))
def test_a_flipped_bit_changes_no_pixel_unnoticed(bit: int) -> None:
    # Of flat areas, where Pillow alone lets many pass.
    image = np.repeat(noise(1, 0, side=4)[0], 8, axis=0).repeat(8, axis=1)
    damaged = bytearray(png(image))
    damaged[bit // 8 % len(damaged)] ^= 1 << bit % 8
    rows: Any = SimpleNamespace(
        where="set", images=lambda: iter([{"bytes": bytes(damaged), "path": None}])
    )
    with suppress(UserError):
        assert np.array_equal(np.asarray(next(decode._decoded(rows, None))), image)


def test_no_network_is_one_quick_line_with_three_ways_out(cold: Path, tmp_path: Path) -> None:
    """The hub's address is a closed port of this machine, so that no machine finds it."""
    code = (
        "import sys; from distvgg.config import DataConfig\n"
        "from distvgg.data.cache import load_dataset\n"
        "from distvgg.errors import UserError\n"
        "try: load_dataset(DataConfig())\n"
        "except UserError as error: sys.exit(str(error))"
    )
    offline = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | offline, capture_output=True, text=True
    )
    assert time.perf_counter() - start < 10
    assert done.stderr.startswith("no data set uoft-cs/cifar100: ")
    assert done.stderr.count("\n") == 1
    for way_out in ("--data.path FOLDER", "HF_HOME", "--data.name synthetic"):
        assert way_out in done.stderr


# The synthetic set


def test_the_synthetic_set_is_balanced_reproducible_and_no_cifar(
    cache: Path, tmp_path: Path
) -> None:
    dataset = load_dataset(DataConfig(name="synthetic"))
    assert dataset.test is not None
    assert dataset.superclass_of is not None
    assert (dataset.num_classes, len(dataset.superclass_names)) == (100, 20)
    assert np.bincount(dataset.superclass_of).tolist() == [5] * 20
    for split, n in ((dataset.train, 100), (dataset.test, 20)):
        assert split.images.shape[1:] == (32, 32, 3)
        assert np.bincount(split.labels).tolist() == [n] * 100
        assert split.superclasses is not None
        assert np.array_equal(split.superclasses, dataset.superclass_of[split.labels])
    names = {*dataset.class_names, *dataset.superclass_names}
    assert len(names) == 120
    assert not names & {*CIFAR100_NAMES, *cifar.CIFAR100_SUPERCLASSES}

    (entry,) = (p for p in cache.glob("synthetic-*") if p.is_dir())
    synthetic.write(tmp_path)
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (entry / file.name).read_bytes(), file.name

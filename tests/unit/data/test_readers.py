"""Reading and decoding: every layout gives the same arrays, and a mistake in the data is one line
that names it.
"""

import io
import os
import subprocess
import sys
import time
from collections.abc import Callable
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
from distvgg.data import cifar, decode
from distvgg.data.cache import load_dataset
from distvgg.data.card import Card
from distvgg.data.dataset import Dataset
from distvgg.errors import UserError
from made_data import (
    CIFAR100_NAMES,
    HUB_NAMES,
    Rows,
    custom,
    made_rows,
    noise,
    png,
    with_names,
    write_folders,
    write_parquet,
)


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


def cut_in_half(folder: Path) -> str:
    path = write_parquet(folder, made_rows(), made_rows())
    file = folder / "test-00000-of-00001.parquet"
    os.truncate(file, file.stat().st_size // 2)
    return path


def empty(folder: Path) -> str:
    folder.mkdir()
    return str(folder)


def labelled(*labels: float | str | None, names: list[str] | None = None) -> Callable[[Path], str]:
    """A set whose first labels are these."""

    def write(folder: Path) -> str:
        rows = [*labels, *(type(labels[0] or 0)(i % 10) for i in range(len(labels), 20))]
        table = pa.table(made_rows(label=rows))
        return write_parquet(folder, with_names(table, names) if names else table, None)

    return write


def train_only(rows: Rows) -> Callable[[Path], str]:
    return lambda folder: write_parquet(folder, rows, None)


def first_image(image: bytes | None) -> Callable[[Path], str]:
    rows = made_rows()
    rows["img"][0] = {"bytes": image, "path": "a.png"}
    return train_only(rows)


def tiff_of_floats() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((32, 32), 0.5, np.float32)).save(file, "TIFF")
    return file.getvalue()


def without_class_1(folder: Path) -> str:
    """Three names, images of two of the classes only, and a column of superclasses."""
    import datasets

    rows = HUB_LIKE | {"label": [0, 2] * 10, "coarse_label": [0] * 20}
    features = {
        "img": datasets.Image(),
        "label": datasets.ClassLabel(names=["a", "b", "c"]),
        "coarse_label": datasets.Value("int64"),
    }
    table = pa.table(rows).cast(datasets.Features(features).arrow_schema)
    return write_parquet(folder, table, None)


BOTH = {"train": noise(2, 0), "test": noise(2, 1)}
TEN = [f"class_{i}" for i in range(10)]
HUB_LIKE = made_rows() | {"coarse_label": [i % 10 // 5 for i in range(20)]}
BAD: dict[str, tuple[Callable[[Path], str], str]] = {
    "missing folder": (str, "{path} is not a folder: give one that holds"),
    "empty folder": (empty, "{path} holds no data: it is empty; it needs Parquet files, or"),
    "parquet cut in half": (cut_in_half, "test-00000-of-00001.parquet is damaged"),
    "no rows": (train_only(made_rows(0)), "train-00000-of-00001.parquet has no rows"),
    "no train split": (
        lambda folder: write_parquet(folder, None, made_rows()),
        "{path} has no train split, only test: put its files in a folder train/",
    ),
    "no image column": (
        train_only({"picture": ["a"], "label": [0]}),
        "no image column, only picture, label: store the bytes of PNG or JPEG in one, or name it",
    ),
    "no label column": (
        train_only({"img": made_rows()["img"]}),
        "no single label column (only img): choose one with --data.label_column, or put",
    ),
    "image column of numbers": (
        train_only({"img": [1, 2], "label": [0, 1]}),
        "column img holds no image files",
    ),
    "corrupted PNG": (
        first_image(png(noise(1, 0)[0])[:900]),
        "(train split): image 0 (a.png) cannot be decoded: ",
    ),
    "not an image": (first_image(b"<html>"), "(a.png) cannot be decoded: not an image; fix or"),
    "null image": (
        train_only(made_rows(img=[*made_rows(19)["img"], None])),
        "image 19 cannot be decoded: there is none",
    ),
    "image of floats": (first_image(tiff_of_floats()), "its pixels are floats of unknown range"),
    "another shape": (
        lambda folder: write_parquet(
            folder, made_rows(), made_rows(img=made_rows(20, 0, 28)["img"])
        ),
        "(test split): image 0 is 28x28 pixels, expected 32x32: fix it, or bring all to one size"
        " with --data.resize 32",
    ),
    "named label too high": (labelled(0, 10, names=TEN), "image 1 has label 10, out of range 0 to"),
    "named label negative": (labelled(-1, names=TEN), "image 0 has label -1, out of range 0 to 9"),
    "bare label negative": (labelled(-1, 0), "image 0 has label -1: fix or drop that row"),
    "null label": (labelled(0, 1, None), "(train split): image 2 has no label: fix or drop"),
    "null named label": (labelled(0, None, names=TEN), "image 1 has no label: fix or drop"),
    "one class": (labelled(*[0] * 20), "has one class, 0, which teaches nothing: put the"),
    "label of broken numbers": (labelled(*[0.5] * 20), "column label is of type double: number"),
    "class of the test split only": (
        lambda folder: write_parquet(folder, made_rows(), made_rows(1, label=[10])),
        "(test split) has class 10, which the train split lacks: give it the name that it has",
    ),
    "superclasses at odds": (
        lambda folder: write_parquet(folder, HUB_LIKE, HUB_LIKE | {"coarse_label": [1] * 20}),
        "(test split): image 0 puts class 0 in superclass 1, others are in 0",
    ),
    "split folders further down": (
        lambda folder: str(Path(write_folders(folder / "data", ["train", "x"], BOTH)).parent),
        "{path} has its splits in {path}/data: give that folder as data.path",
    ),
    "superclass unknown": (
        without_class_1,
        "no image of class b tells its superclass",
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
    card = Card(["a"])
    decoder = decode.Decoder(DataConfig(), rows, card)
    found = [decoded.pixels for decoded in decoder._decoded("decoded")]
    assert len(found) + len(decoder.damaged) == 1
    assert all(pixels == image.tobytes() for pixels in found)


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
    assert time.perf_counter() - start < 30  # the hub client retries for minutes
    assert done.stderr.startswith("dataset not found: uoft-cs/cifar100 is no local folder")
    assert done.stderr.count("\n") == 1
    for way_out in ("--data.path FOLDER", "HF_HOME", "--data.name synthetic"):
        assert way_out in done.stderr

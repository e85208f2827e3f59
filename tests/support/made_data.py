"""Small datasets of noise, so that no two images look alike, in the layouts that users have."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from distvgg.config import DataConfig
from distvgg.data import cifar

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

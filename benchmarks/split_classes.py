"""Two sets of disjoint classes from CIFAR-100, for measurements of fine-tuning.

    python -m benchmarks.split_classes CIFAR100_FOLDER --out FOLDER --images 50

FOLDER/first has all images of classes 0 to 49. FOLDER/second has the first `--images` training
images of each of the classes 50 to 99, the next 100 as validation split, and all their test images.
Invariant: no image is in both sets, or in two splits.
"""

import argparse
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

CLASSES = 100
VAL_IMAGES = 100
LABEL = "fine_label"


def split(cifar100: Path, out: Path, images: int) -> None:
    """Writes both sets as Parquet files, with labels from 0.

    Args:
        cifar100: folder of CIFAR-100 as Parquet, one file for each split.
        out: gets the folders `first` and `second`.
        images: training images of each class in `second`.
    """
    train, test = (_read(cifar100, split) for split in ("train", "test"))
    half = CLASSES // 2
    first, second = range(half), range(half, CLASSES)
    _write(train, first, slice(None), out / "first" / "train.parquet")
    _write(test, first, slice(None), out / "first" / "test.parquet")
    _write(train, second, slice(images), out / "second" / "train.parquet")
    _write(train, second, slice(images, images + VAL_IMAGES), out / "second" / "val.parquet")
    _write(test, second, slice(None), out / "second" / "test.parquet")


def _read(cifar100: Path, split: str) -> pa.Table:
    (file,) = cifar100.glob(f"{split}-*.parquet")
    return pq.read_table(file, columns=["img", LABEL])


def _write(table: pa.Table, classes: range, images: slice, path: Path) -> None:
    """Writes so many images of each of the classes, which become 0, 1 and so on."""
    rows = [pc.indices_nonzero(pc.equal(table[LABEL], label))[images] for label in classes]
    chosen = table.take(pa.concat_arrays(rows))
    labels = pc.subtract(chosen[LABEL], classes.start)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"img": chosen["img"], "label": labels}), path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("cifar100", type=Path, metavar="CIFAR100_FOLDER")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--images", type=int, default=50, metavar="N")
    options = parser.parse_args()
    split(options.cifar100, options.out, options.images)

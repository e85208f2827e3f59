"""The confusion matrix of a run, with its counts by confidence: file, statistics, text form.

Invariant: only integer counts are stored; statistics are computed on request. Imports no torch.
"""

import json
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from distvgg.config import SplitName
from distvgg.runs.files import atomic_write, read_json
from distvgg.runs.layout import CONFUSION_FILE

if TYPE_CHECKING:
    from distvgg.data.dataset import Dataset


@dataclass(frozen=True)
class Confusion:
    """The confusion matrix of one split.

    Attributes:
        counts: [classes][classes], images by true class (row) and predicted class (column).
        superclass_of: [classes], the superclass of each class; None if there are no superclasses.
        reliability: [bins][2], images and correct predictions by confidence. Bin `b` of `M` holds
            the confidences in `(b/M, (b+1)/M]`. None in the files of older versions.
    """

    split: SplitName
    class_names: list[str]
    counts: list[list[int]]
    superclass_names: list[str]
    superclass_of: list[int] | None
    reliability: list[list[int]] | None = None

    def __post_init__(self) -> None:
        n = len(self.class_names)
        if [len(row) for row in self.counts] != [n] * n:
            raise ValueError(f"{n} classes need a square matrix of that side")

    @staticmethod
    def of(
        dataset: "Dataset", split: SplitName, counts: np.ndarray, reliability: np.ndarray
    ) -> "Confusion":
        of = dataset.superclass_of
        return Confusion(
            split=split,
            class_names=dataset.class_names,
            counts=counts.tolist(),
            superclass_names=dataset.superclass_names,
            superclass_of=None if of is None else of.tolist(),
            reliability=reliability.tolist(),
        )


def by_superclass(confusion: Confusion) -> Confusion | None:
    """Returns the confusion matrix of the superclasses, or None if there are no superclasses."""
    if confusion.superclass_of is None:
        return None
    n = len(confusion.superclass_names)
    of, counts = np.array(confusion.superclass_of), np.zeros((n, n), dtype=np.int64)
    np.add.at(counts, (of[:, None], of[None, :]), np.array(confusion.counts))
    return Confusion(confusion.split, confusion.superclass_names, counts.tolist(), [], None)


def worst_pairs(confusion: Confusion, n: int = 10) -> list[tuple[str, str, int]]:
    """Returns the most frequent errors, at most `n`, as (true class, predicted class, images).

    Ties are in the order of the classes. Pairs that never occur are omitted.
    """
    counts, names = np.array(confusion.counts), confusion.class_names
    np.fill_diagonal(counts, 0)
    worst = np.argsort(-counts, axis=None, kind="stable")[:n]
    pairs = zip(*np.unravel_index(worst, counts.shape), strict=True)
    return [(names[t], names[p], int(counts[t, p])) for t, p in pairs if counts[t, p]]


def class_accuracy(confusion: Confusion) -> dict[str, float]:
    """Returns the share of correct predictions for each class, the worst class first.

    Classes without an image are omitted.
    """
    counts = np.array(confusion.counts)
    images = counts.sum(1)
    share = {
        name: int(counts[i, i]) / int(images[i])
        for i, name in enumerate(confusion.class_names)
        if images[i]
    }
    return dict(sorted(share.items(), key=lambda item: item[1]))


def describe_pairs(confusion: Confusion, what: str, n: int = 10) -> str:
    """Formats the worst pairs in two columns, the worst first, left column before right."""
    pairs = {f"{true} as {predicted}": k for true, predicted, k in worst_pairs(confusion, n)}
    if not pairs:
        return f"no {what} was taken for another"
    width = max(map(len, pairs))
    cells = [f"  {pair:<{width}} {k:5,}" for pair, k in pairs.items()]
    half = -(-len(cells) // 2)
    lines = ["".join(pair) for pair in zip_longest(cells[:half], cells[half:], fillvalue="")]
    return "\n".join([f"{what} taken for another, and how many images:", *lines])


def save_confusion(confusion: Confusion, run_dir: Path) -> None:
    """Writes `confusion.json` atomically."""
    atomic_write(run_dir / CONFUSION_FILE, json.dumps(asdict(confusion)).encode() + b"\n")


def read_confusion(run_dir: Path) -> Confusion | None:
    """Returns the confusion matrix of a run folder, or None if there is no such file.

    Raises:
        UserError: the file is corrupt.
    """
    remedy = f"distvgg evaluate {run_dir} prints the same numbers"
    return read_json(run_dir / CONFUSION_FILE, Confusion, remedy)

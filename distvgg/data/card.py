"""The data card: what was read, by split, class, size and mode, and what was left out.

Invariant: every file of the source is counted, as an image or as left out with a reason.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

from distvgg.wording import counted

IMBALANCE = 5
"""Ratio of the largest to the smallest class of the train split from which a note is made."""
COPIES = 0.01
"""Share of the train split that are copies of other images in it, above which a note is made."""
SHOWN = 3  # sizes; more are described by their range
DAMAGED_SHOWN = 10


def pixel_digest(pixels: bytes) -> bytes:
    """Returns 8 bytes that tell the pixels of an image from others."""
    return hashlib.blake2b(pixels, digest_size=8).digest()


class Card:
    """Counts of a data set, filled while it is decoded.

    Args:
        class_names: by label.
    """

    def __init__(self, class_names: Sequence[str]) -> None:
        self._names = class_names
        self._sizes: Counter[tuple[int, int]] = Counter()
        self._modes: Counter[str] = Counter()
        self._digests: dict[str, set[bytes]] = {}
        self._decoding: set[bytes] = set()
        self._copies = 0
        self._lines: list[str] = []
        self._notes: list[str] = []

    def add_image(self, width: int, height: int, mode: str, digest: bytes) -> None:
        """Counts an image.

        Args:
            width: before any resize.
            height: before any resize.
            mode: before its conversion to RGB, as Pillow calls it.
            digest: `pixel_digest` of the stored pixels, to find the image in another split.
        """
        self._sizes[width, height] += 1
        self._modes[mode] += 1
        self._copies += digest in self._decoding
        self._decoding.add(digest)

    def add_split(
        self, name: str, labels: np.ndarray, left_out: Mapping[str, int], damaged: Sequence[str]
    ) -> None:
        """Ends a split.

        Args:
            name: of the split.
            labels: [n] of the images that were decoded.
            left_out: number of files by reason.
            damaged: a line for each damaged image that was left out.
        """
        self._digests[name], self._decoding = self._decoding, set()
        copies, self._copies = self._copies, 0
        counts = np.bincount(labels, minlength=len(self._names))
        small, large = int(counts.argmin()), int(counts.argmax())
        range_of_sizes = f"{counts[small]:,} each"
        if counts[small] < counts[large]:
            range_of_sizes = (
                f"from {counts[small]:,} ({self._names[small]}) to {counts[large]:,}"
                f" ({self._names[large]}) each"
            )
        self._lines.append(
            f"{name}: {counted(len(labels), 'image')} of {counted((counts > 0).sum(), 'class')},"
            f" {range_of_sizes}"
        )
        if copies:
            self._lines.append(f"copies of others in {name}: {counted(copies, 'image')}")
        if name == "train" and copies > COPIES * len(labels):
            self._notes.append(
                f"copies of other images in train: {copies:,} of {len(labels):,}; validation, if it"
                " is held out of train, has images that are trained on"
            )
        reasons = dict(left_out) | ({"damaged": len(damaged)} if damaged else {})
        if reasons:
            listed = ", ".join(f"{n:,} {reason}" for reason, n in sorted(reasons.items()))
            self._notes.append(f"left out of {name}: {listed}")
        if damaged:
            more = "; ..." if len(damaged) > DAMAGED_SHOWN else ""
            self._lines.append(f"damaged in {name}: {'; '.join(damaged[:DAMAGED_SHOWN])}{more}")
        if name == "train" and counts[small] * IMBALANCE < counts[large]:
            self._notes.append(
                f"classes are not balanced: {self._names[small]} has"
                f" {counted(counts[small], 'image')}, {self._names[large]} {counts[large]:,}"
            )

    def notes(self) -> list[str]:
        """Returns what a user must know: files left out, unbalanced classes, many copies."""
        return self._notes

    def lines(self) -> list[str]:
        """Returns the counts by split, sizes, modes, and the images that two splits share."""
        shared = [
            f"in {one} and in {other}: {counted(len(both), 'image')}"
            for one, other in combinations(self._digests, 2)
            if (both := self._digests[one] & self._digests[other])
        ]
        modes = ", ".join(f"{n:,} {mode}" for mode, n in self._modes.most_common())
        sizes = f"sizes: {self._describe_sizes()}"
        return [*self._lines, sizes, f"modes before conversion to RGB: {modes}", *shared]

    def _describe_sizes(self) -> str:
        if len(self._sizes) <= SHOWN:
            by_count = self._sizes.most_common()
            return ", ".join(f"{n:,} of {width}x{height}" for (width, height), n in by_count)
        parts = []
        for name, axis in (("width", 0), ("height", 1)):
            sides = np.repeat([size[axis] for size in self._sizes], list(self._sizes.values()))
            parts.append(
                f"{name} from {sides.min()} to {sides.max()}, median {int(np.median(sides))}"
            )
        return f"{len(self._sizes):,} different; {'; '.join(parts)}"

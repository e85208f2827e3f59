"""The rows of one split as a reader hands them on: undecoded images and unchecked labels."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

SUPERCLASS_COLUMN = "coarse_label"
# An encoded image with its `bytes`, else the `path` of its file; or pixels, [height, width, 3]
# uint8.
Encoded = dict[str, Any] | np.ndarray | None


class Labels(NamedTuple):
    """Unchecked column of labels, as in the source.

    Attributes:
        class_names: Names of the classes in the column's metadata; empty if it has none.
    """

    column: str
    values: pa.ChunkedArray
    class_names: list[str]


@dataclass(frozen=True)
class Rows:
    """One split of a source.

    Attributes:
        where: Name of the split in messages.
        images: Yields each image, unchecked.
        files: Files of the images that are not stored in the source itself.
        left_out: Number of files that are no images of a class, by reason.
    """

    where: str
    label: Labels
    superclass: Labels | None
    images: Callable[[], Iterator[Encoded]]
    files: frozenset[str] = frozenset()
    left_out: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.label.values)

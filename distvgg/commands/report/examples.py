"""Example images of classes, from the data cache, as PNG within the page."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np

from distvgg.config import SplitName
from distvgg.runs.confusion import Confusion, class_accuracy, worst_pairs

A_CLASS = 5
HEIGHT = 64  # pixels; larger images are reduced to this height


@dataclass(frozen=True)
class Examples:
    """Strips of images.

    Attributes:
        strips: URL of a PNG by class name.
        note: what the strips show, or why there are none.
    """

    note: str
    strips: dict[str, str] = field(default_factory=dict)

    def cell(self, name: str) -> str:
        """Returns a class as HTML: its name and, if known, its images, which report.js inserts."""
        text = escape(name)
        if name not in self.strips:
            return text
        return f'{text}<img alt="images of {text}" data-class="{text}">'


def read_examples(
    entry_name: str, confusions: Sequence[Confusion], n_pairs: int, n_classes: int
) -> Examples:
    """Returns images of the classes that the tables of some confusion matrices name.

    Args:
        entry_name: of the cache entry that the runs read. Its source may be slow to list.
        confusions: the matrices.
        n_pairs: rows of the table of pairs.
        n_classes: rows of the table of hardest classes.
    """
    from distvgg.data.cache import cache_dir, is_complete, open_entry

    try:
        entry = cache_dir() / entry_name
    except RuntimeError:  # there is no home directory
        return Examples("No example images: DISTVGG_CACHE is not set.")
    if not is_complete(entry):
        return Examples(
            "No example images: the data is not in the cache of this machine (DISTVGG_CACHE)."
        )
    dataset = open_entry(entry)
    if dataset.class_names != confusions[0].class_names:
        return Examples("No example images: the data in the cache has other classes.")
    wanted: dict[str, None] = {}
    for confusion in confusions:
        for true, predicted, _ in worst_pairs(confusion, n_pairs):
            wanted |= {true: None, predicted: None}
        wanted |= dict.fromkeys(list(class_accuracy(confusion))[:n_classes])
    name: SplitName = "train" if dataset.test is None else "test"
    split = dataset.test or dataset.train
    of_class = {c: i for i, c in enumerate(dataset.class_names)}
    strips = {
        c: _strip(split.images[np.flatnonzero(split.labels == of_class[c])[:A_CLASS]])
        for c in wanted
    }
    note = f"The images are the first {A_CLASS} of each class in {name}, right or wrong."
    return Examples(note, {c: strip for c, strip in strips.items() if strip})


def _strip(images: np.ndarray) -> str:
    """Returns images side by side as the URL of a PNG; empty if there is no image.

    Args:
        images: [n, height, width, 3] uint8.
    """
    from PIL import Image

    if not len(images):
        return ""
    picture = Image.fromarray(np.concatenate(list(images), axis=1))
    if picture.height > HEIGHT:
        width = round(picture.width * HEIGHT / picture.height)
        picture = picture.resize((width, HEIGHT), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    picture.save(content, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"

"""`distvgg predict`: the most likely classes of image files.

Reads only the run folder and the images. Invariant: an image that cannot be read costs one line,
and the others are classified. Rows are printed as soon as their batch is computed.
"""

import io
import json
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from distvgg.distributed.device import device_here
from distvgg.errors import RunError, UserError
from distvgg.models.classifier import Classifier, Prediction, UnknownFormatError, load
from distvgg.wording import counted

_HEADER = "image", "class", "probability"


@dataclass(frozen=True)
class _Source:
    """A file to classify.

    Attributes:
        folder: the given folder that holds the file; None for a file that was given itself.
    """

    path: str
    folder: str | None


@dataclass
class _Unread:
    """Files that gave no prediction.

    Attributes:
        failures: the error of each image.
        left_out: number of files that are no images, by the given folder.
    """

    failures: list[UserError] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    def add(self, source: _Source, error: UserError, *, say: bool) -> None:
        """Records the error of a file, and prints the error of an image if `say`."""
        if source.folder and isinstance(error, UnknownFormatError) and not _is_named(source.path):
            self.left_out[source.folder] += 1
            return
        self.failures.append(error)
        if say:
            print(f"distvgg: error: {error}", file=sys.stderr, flush=True)


def predict(run: Path, images: Sequence[str], *, top: int, as_json: bool) -> None:
    """Prints the most likely classes of images, as a table or as a JSON array.

    Computes in float32, on the accelerator if there is one. Notes and errors go to stderr.

    Args:
        run: folder of a finished run, a checkpoint, or a folder with `model.safetensors`.
        images: files, and folders whose files are taken recursively, in sorted order.
        top: number of classes of each image.
        as_json: print a JSON array.

    Raises:
        UserError: the run cannot be used, or no image could be read.
        RunError: some images could not be read.
    """
    if top < 1:
        raise UserError(f"--top must be at least 1 (got {top})")
    sources = [source for given in images for source in _sources(given)]
    if not sources:
        raise UserError(f"no files in {', '.join(images)}: give images, or folders of images")
    model = load(run).to(device_here())
    if not model.preprocessing.class_names:
        _note(f"{run} has no class names: classes are numbers from 0")
    if isinstance(sys.stdout, io.TextIOWrapper):  # names need not fit the terminal's encoding
        sys.stdout.reconfigure(errors="backslashreplace")
    unread = _Unread()
    with warnings.catch_warnings(action="ignore"):  # Pillow's, about images that it can read
        rows = _classified(model, sources, top, unread)
        classified = (
            _print_json(rows) if as_json else _print_table(rows, sources, model.class_names)
        )
    for folder, count in unread.left_out.items():
        _note(f"left out in {_shown(folder)}: {counted(count, 'file')} without an image")
    failed = len(unread.failures)
    if failed == len(sources) == 1:
        raise unread.failures[0]
    if not classified:
        raise UserError(f"none of {len(sources)} files could be read as an image")
    if failed:
        raise RunError(f"{failed} of {classified + failed} images could not be read")


def _sources(given: str) -> Iterator[_Source]:
    """Yields a given file, or the files of a given folder. Links to folders are not followed."""
    if not os.path.isdir(given):
        yield _Source(given, None)
        return
    files = [os.path.join(at, name) for at, _, names in os.walk(given) for name in names]
    # A pipe or a socket in a folder would be waited for. A dangling link is an error.
    regular = (path for path in files if os.path.isfile(path) or not os.path.exists(path))
    yield from (_Source(path, given) for path in sorted(regular))


def _classified(
    model: Classifier, sources: Sequence[_Source], top: int, unread: _Unread
) -> Iterator[tuple[str, Prediction]]:
    """Yields path and classes of each image that can be read, and records the other files."""
    found = model.classify_all((source.path for source in sources), top)
    for source, outcome in zip(sources, found, strict=True):
        if isinstance(outcome, UserError):
            unread.add(source, outcome, say=len(sources) > 1)
        else:
            yield source.path, outcome


def _print_json(rows: Iterator[tuple[str, Prediction]]) -> int:
    """Prints rows as one JSON array with an object on each line, and returns their number."""
    count = 0
    for path, classes in rows:
        found = [{"class": name, "probability": p} for name, p in classes]
        row = json.dumps({"image": path, "classes": found})
        print(",\n" if count else "[\n", row, sep="", end="")
        count += 1
    print("\n]" if count else "[]", flush=True)
    return count


def _print_table(
    rows: Iterator[tuple[str, Prediction]], sources: Sequence[_Source], class_names: Sequence[str]
) -> int:
    """Prints rows as a table with a line for each class, and returns the number of images.

    The widths follow from all paths and class names, so that a line need not wait for the next.
    """
    first, second, third = _HEADER
    left = max(len(first), *(len(_shown(source.path)) for source in sources))
    middle = max(len(second), *map(len, class_names))
    count = 0
    for path, classes in rows:
        if not count:
            print(f"{first:<{left}}  {second:<{middle}}  {third}")
        for i, (name, probability) in enumerate(classes):
            label = "" if i else _shown(path)
            print(f"{label:<{left}}  {name:<{middle}}  {probability:{len(third)}.2%}")
        count += 1
    sys.stdout.flush()
    return count


def _is_named(path: str) -> bool:
    """Returns True if a file has the name of an image that Pillow reads."""
    kind = Image.registered_extensions().get(Path(path).suffix.lower())
    return kind in Image.OPEN


def _shown(path: str) -> str:
    """Returns a path as text that can be printed, whatever bytes its name has."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _note(text: str) -> None:
    print(f"distvgg: note: {text}", file=sys.stderr, flush=True)

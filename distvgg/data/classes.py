"""Classes of a source: names, and the labels of all splits by these names.

Invariant: a label is joined with a class by its name or value, never by its place in a split's own
list. A split that cannot be joined is refused.
"""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from distvgg.config import DataConfig
from distvgg.data.cifar import CIFAR100_SUPERCLASS_OF, CLASSES, SPELLING
from distvgg.data.rows import Labels, Rows
from distvgg.errors import UserError


class Classes(NamedTuple):
    """The classes of a source.

    Attributes:
        names: by index.
        labels: [n] int64 of each split; splits whose labels are hidden are left out.
        notes: lines for the user.
    """

    names: list[str]
    labels: dict[str, np.ndarray]
    notes: list[str]


def join_classes(config: DataConfig, source: str, splits: dict[str, Rows]) -> Classes:
    """Numbers the classes of the train split, and finds those of the other splits among them.

    Raises:
        UserError: a label is missing, unknown, or not a class; or two names differ only in case.
    """
    notes = []
    known = {"train": splits["train"]}
    for name, rows in splits.items():
        if name != "train" and _hidden(rows.label):
            notes.append(f"the labels of the {name} split are all -1 (hidden): it is not used")
        else:
            known[name] = rows
    train = known["train"]
    names, values = _names_and_values(config, train)
    expected = CLASSES.get(config.name)
    if expected is not None and len(names) != expected:
        raise UserError(
            f"{source} has {len(names)} classes, {config.name} has {expected}: give that set's"
            " folder as --data.path, or take --data.name custom"
        )
    if len(names) < 2:
        raise UserError(
            f"{train.where} has one class, {names[0]}, which teaches nothing: put the images of"
            " each class in a folder of their own, as train/CLASS/*.png"
        )
    _refuse_alike(train.where, names)
    numbered = values is not None and list(values) != list(range(len(names)))
    if numbered and all(isinstance(value, int) for value in values or ()):
        notes.append(
            f"labels {_listed(values or ())} are numbered 0 to {len(names) - 1}; class names keep"
            " their values"
        )
    labels = {name: _labels(rows, names, values, train) for name, rows in known.items()}
    return Classes(names, labels, notes)


def _names_and_values(config: DataConfig, train: Rows) -> tuple[list[str], list[Any] | None]:
    """Returns the class names of the train split, and the values in its column in that order.

    Values are None if the column has numbers of the metadata's names.
    """
    if train.label.class_names:
        return _spelled(train.label.class_names), None
    found = _plain(train.where, train.label)
    values = sorted(set(found))
    if config.name == "cifar100" and values and isinstance(values[0], int):
        return sorted(CIFAR100_SUPERCLASS_OF), None
    if isinstance(values[0], int) and values[0] < 0:
        i = found.index(values[0])
        raise UserError(
            f"{train.where}: image {i} has {train.label.column} {values[0]}: fix or drop that row"
        )
    return _spelled([str(value) for value in values]), values


def _labels(rows: Rows, names: list[str], values: list[Any] | None, train: Rows) -> np.ndarray:
    """Returns the labels of a split as [n] int64."""
    own = rows.label.class_names
    if values is None and not (own or rows is train or not train.label.class_names):
        raise UserError(
            f"{rows.where} has no class names, but the train split has: write both the same way"
        )
    if values is None and not own:
        return integers(rows.where, rows.label, len(names))
    if own:
        index = {name: i for i, name in enumerate(names)}
        numbers = integers(rows.where, rows.label, len(own))
        plain = [unicodedata.normalize("NFC", name) for name in own]
        spelled = [name if name in index else SPELLING.get(name, name) for name in plain]
        used = sorted({spelled[i] for i in set(numbers.tolist())} - index.keys())
        if used:
            raise _unknown(rows, used)
        of_train: np.ndarray = np.array([index.get(name, -1) for name in spelled], dtype=np.int64)
        joined: np.ndarray = of_train[numbers]
        return joined
    assert values is not None
    places = {value: i for i, value in enumerate(values)}
    found = _plain(rows.where, rows.label)
    if unknown := sorted({str(value) for value in found} - {str(value) for value in values}):
        raise _unknown(rows, unknown)
    try:
        return np.array([places[value] for value in found], dtype=np.int64)
    except KeyError as error:
        raise UserError(
            f"{rows.where}: column {rows.label.column} is of type {rows.label.values.type}, that of"
            f" the train split of {train.label.values.type}: write both the same way"
        ) from error


def _plain(where: str, column: Labels) -> list[Any]:
    """Returns the values of a column: strings, integers or booleans."""
    values = _without_gaps(where, column)
    kind = values.type
    found: list[Any] = values.to_pylist()
    if pa.types.is_floating(kind) and all(value.is_integer() for value in found):
        return [int(value) for value in found]
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return [unicodedata.normalize("NFC", value) for value in found]
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        return found
    raise UserError(
        f"{where}: column {column.column} is of type {kind}: number or name the classes"
    )


def integers(where: str, column: Labels, n: int) -> np.ndarray:
    """Returns a column as [rows] int64.

    Raises:
        UserError: a value is missing, no integer, or not in 0..n-1.
    """
    values = _without_gaps(where, column)
    if not pa.types.is_integer(values.type):
        raise UserError(
            f"{where}: column {column.column} is of type {values.type}: number the classes from 0"
        )
    labels: np.ndarray = values.to_numpy().astype(np.int64)
    if (wrong := np.flatnonzero((labels < 0) | (labels >= n))).size:
        i = int(wrong[0])
        raise UserError(
            f"{where}: image {i} has {column.column} {labels[i]}, out of range 0 to {n - 1}: fix"
            " or drop that row"
        )
    return labels


def _without_gaps(where: str, column: Labels) -> pa.ChunkedArray:
    values = column.values
    if values.null_count:
        i = int(np.flatnonzero(values.is_null().to_numpy())[0])
        raise UserError(f"{where}: image {i} has no {column.column}: fix or drop that row")
    return values


def number_names(where: str, column: Labels, limit: int) -> list[str]:
    """Returns the numbers from 0 to the largest in a column, as names; at most `limit`."""
    return [str(i) for i in range(int(integers(where, column, limit).max()) + 1)]


def _hidden(column: Labels) -> bool:
    values = column.values
    if not pa.types.is_integer(values.type) or values.null_count or not len(values):
        return False
    return bool((values.to_numpy() == -1).all())


def _refuse_alike(where: str, names: list[str]) -> None:
    """Refuses names that differ only in case."""
    folded = Counter(name.casefold() for name in names)
    alike = [name for name in names if folded[name.casefold()] > 1]
    if alike:
        raise UserError(
            f"{where} has classes that differ only in case, {' and '.join(sorted(alike)[:4])}: give"
            " them one name, or names that differ"
        )


def _unknown(rows: Rows, unknown: list[str]) -> UserError:
    return UserError(
        f"{rows.where} has class {', '.join(unknown[:5])}{', ...' if len(unknown) > 5 else ''},"
        " which the train split lacks: give it the name that it has there, or remove it"
    )


def _spelled(names: Sequence[str]) -> list[str]:
    """Returns names in one Unicode form, and those of CIFAR-100 as its paper spells them."""
    plain = [unicodedata.normalize("NFC", name) for name in names]
    spelled = [SPELLING.get(name, name) for name in plain]
    return spelled if set(spelled) == set(CIFAR100_SUPERCLASS_OF) else plain


def _listed(values: Iterable[Any]) -> str:
    shown = [str(value) for value in values]
    return ", ".join(shown if len(shown) <= 6 else [*shown[:3], "...", shown[-1]])

"""Data of the report's curves: decimation, bands over seeds, differences of configs.

Functions of arrays alone; they read no file and draw nothing.
"""

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple

import numpy as np

from distvgg import metrics

Columns = Mapping[str, np.ndarray]
TIME, WALL = "time", "wall"
AXES = (metrics.STEP, metrics.EPOCH, TIME, WALL)


class Line(NamedTuple):
    """One curve, decimated.

    Attributes:
        step, epoch, time, wall: [points] float64, positions on the four axes. Times are in seconds.
        value: [points] float64.
        low, high: [points] float64, the least and the greatest value of any seed between this
            point and the next; None for a single run.
    """

    step: np.ndarray
    epoch: np.ndarray
    time: np.ndarray
    wall: np.ndarray
    value: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None

    def scaled(self, value: float, time: float, wall: float) -> "Line":
        """Returns the curve with its values and its times multiplied."""
        return self._replace(
            time=self.time * time,
            wall=self.wall * wall,
            value=self.value * value,
            low=None if self.low is None else self.low * value,
            high=None if self.high is None else self.high * value,
        )

    def outline(self) -> "Line":
        """Returns the outline of the band: its upper side, then its lower side backwards."""
        assert self.low is not None
        assert self.high is not None
        step, epoch, time, wall = (
            np.concatenate([axis, axis[::-1]])
            for axis in (self.step, self.epoch, self.time, self.wall)
        )
        return Line(step, epoch, time, wall, np.concatenate([self.high, self.low[::-1]]))


def line_of(columns: Columns, metric: str, limit: int) -> Line | None:
    """Returns the curve of one metric of one run, or None if no row has the metric."""
    has = rows_with(columns, metric)
    if not has.size:
        return None
    keep = has[decimate(columns[metric][has], limit)]
    return Line(*(columns[name][keep] for name in (*AXES, metric)))


def band_of(runs: Sequence[Columns], metric: str, limit: int) -> Line | None:
    """Returns the mean of several runs, with the least and the greatest value.

    Only steps that every run has a value for are taken, since a mean over fewer runs would jump.
    None if there is no such step.
    """
    rows = [rows_with(columns, metric) for columns in runs]
    steps = [columns[metrics.STEP][has] for columns, has in zip(runs, rows, strict=True)]
    common = reduce(np.intersect1d, steps)
    if not common.size:
        return None

    def at_common(name: str) -> np.ndarray:
        found = []
        for columns, has, step in zip(runs, rows, steps, strict=True):
            _, first = np.unique(step, return_index=True)
            found.append(columns[name][has[first[np.isin(step[first], common)]]])
        return np.stack(found)

    values = at_common(metric)
    mean = values.mean(0)
    keep = decimate(mean, limit)
    return Line(
        common[keep],
        at_common(metrics.EPOCH).mean(0)[keep],
        at_common(TIME).mean(0)[keep],
        at_common(WALL).mean(0)[keep],
        mean[keep],
        np.minimum.reduceat(values.min(0), keep),
        np.maximum.reduceat(values.max(0), keep),
    )


def rows_with(columns: Columns, metric: str) -> np.ndarray:
    """Returns the indices of the rows that have a metric, in order.

    A value that is not finite is NaN, as is one that is missing. Such rows count as missing.
    """
    return np.flatnonzero(np.isfinite(columns[metric]))


def decimate(values: np.ndarray, limit: int) -> np.ndarray:
    """Returns the indices of about `limit` points that show the shape of a curve.

    The points are divided into buckets of equal length. The least and the greatest value of each
    bucket stay, so that a spike of a single point stays visible. First and last point stay.

    Args:
        values: [n] float, finite.
        limit: all points are kept if there are no more.

    Returns:
        [at most limit] int64, ascending, beginning with 0.
    """
    n = len(values)
    if n <= limit:
        return np.arange(n)
    buckets = max(1, (limit - 2) // 2)
    length = -(-n // buckets)
    begins = np.arange(0, n, length)
    padded = np.full(len(begins) * length, np.inf)
    padded[:n] = values
    least = begins + padded.reshape(-1, length).argmin(1)
    padded[n:] = -np.inf
    greatest = begins + padded.reshape(-1, length).argmax(1)
    return np.unique(np.concatenate([least, greatest, [0, n - 1]]))


def differences(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lists the fields whose values are not the same in all configs."""
    names = dict.fromkeys(name for config in configs for name in config)
    return [n for n in names if len({str(config.get(n)) for config in configs}) > 1]


def points_of_a_line(lines: int, total: int = 38_000) -> int:
    """Returns the points that each of some lines may have, so that the report stays small."""
    return min(2000, max(50, total // max(1, lines)))

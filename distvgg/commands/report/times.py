"""Training time and wall time of a run, computed from its rows.

`time` is the time of training steps alone. `wall` is all that passed since the first launch was
ready to train. Invariant: wall is never less than training, ascends, and counts each pause once,
between the two rows that it lies between.
"""

from typing import NamedTuple

import numpy as np

from distvgg import metrics
from distvgg.commands.report.series import TIME, WALL, Columns, rows_with

# Unix times outside are those of a clock that was never set.
EARLIEST, LATEST = 1.5e9, 4e9


class WallClock(NamedTuple):
    """Wall time of the rows of a run, and of its starts and pauses.

    Attributes:
        wall: [rows] float64, seconds.
        begins: rows that are the first of a launch after another.
        starts: seconds of pauses, starts, and steps that were not saved.
        is_complete: every row has a time; rows of older versions have none.
    """

    wall: np.ndarray
    begins: np.ndarray
    starts: float
    is_complete: bool


def training_time(columns: Columns) -> np.ndarray:
    """Computes the seconds that the steps up to each row took.

    A row has the mean time of a step since the row before it. NaN if no row has a time.

    Returns:
        [rows] float64.
    """
    timed = rows_with(columns, metrics.STEP_MS)
    if not timed.size:
        return np.full(len(columns[metrics.STEP]), np.nan)
    step = np.concatenate([[0], columns[metrics.STEP][timed]])
    seconds = np.diff(step) * columns[metrics.STEP_MS][timed] / 1000
    until = np.concatenate([[0], np.cumsum(seconds)])
    time: np.ndarray = np.interp(columns[metrics.STEP], step, until)
    return time


def wall_clock(columns: Columns) -> WallClock:
    """Computes the time that passed until each row.

    Within a launch, seconds are those since its start, which no change of the machine's clock
    moves. Between the last row of a launch and the first of the next, the clock counts. A row
    without a time adds the time of its steps.

    Args:
        columns: with `time`, of `training_time`.
    """
    launch, unix = columns[metrics.LAUNCH_SECONDS], columns[metrics.UNIX_TIME]
    known = (launch >= 0) & (launch < LATEST)
    clocked = known & (unix > EARLIEST) & (unix < LATEST)
    steps_took = np.diff(np.nan_to_num(columns[TIME]), prepend=0)
    within = np.diff(launch, prepend=0)
    by_clock = np.where(clocked & _before(clocked), np.diff(unix, prepend=0), 0)
    # More time on the clock than in the launch: another launch began.
    other = ~_before(known) | (within < 0) | (by_clock > 1.01 * within + 1)
    begins = known & other
    begins[:1] = False
    passed = np.where(begins, np.maximum(by_clock, launch), np.where(known, within, steps_took))
    passed = np.maximum(passed, steps_took)
    first = begins.copy()
    first[:1] = True
    return WallClock(
        wall=np.cumsum(passed),
        begins=np.flatnonzero(begins),
        starts=float((passed - steps_took)[first].sum()),
        is_complete=bool(known.all()),
    )


def _before(flags: np.ndarray) -> np.ndarray:
    """Returns the flag of the row before each row; of the first row, True."""
    return np.concatenate([[True], flags[:-1]])


def seconds_waiting(columns: Columns) -> float:
    """Computes the seconds that steps waited for data, of all steps that have a row."""
    timed = rows_with(columns, metrics.DATA_WAIT_MS)
    steps = np.diff(np.concatenate([[0], columns[metrics.STEP][timed]]))
    return float((steps * columns[metrics.DATA_WAIT_MS][timed]).sum() / 1000)


def at_launch(columns: Columns, begins: np.ndarray, step: int) -> tuple[float, float, float]:
    """Returns epoch, training time and wall time at which a launch went on from a step.

    Epoch and training time lie between those of two rows, as on a line. Wall time is that of the
    launch's start, after any pause; if no row tells it, it lies on a line as well.

    Args:
        columns: with `time` and `wall`.
        begins: as in `WallClock`.
        step: done steps at the start of the launch.
    """
    steps = columns[metrics.STEP]
    from_0 = np.concatenate([[0], steps])
    epoch, time, wall = (
        float(np.interp(step, from_0, np.concatenate([[0], columns[name]])))
        for name in (metrics.EPOCH, TIME, WALL)
    )
    for row in begins:
        if steps[row - 1] <= step <= steps[row]:
            began = columns[WALL][row] - columns[metrics.LAUNCH_SECONDS][row]
            return epoch, time, float(max(began, columns[WALL][row - 1]))
    return epoch, time, wall

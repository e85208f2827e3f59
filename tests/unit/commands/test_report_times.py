"""Where the time of a run went: training, evaluation, starts and pauses, whatever the clock did."""

import json
from typing import Any

import numpy as np
import pytest

from distvgg.commands.report.runs import METRICS
from distvgg.commands.report.times import (
    WallClock,
    at_launch,
    seconds_waiting,
    training_time,
    wall_clock,
)
from distvgg.runs.metrics_file import read_columns

STEP_MS, WAIT_MS = "perf/step_ms", "perf/data_wait_ms"
NOON = 1.8e9
Columns = dict[str, np.ndarray]


def columns(rows: list[dict[str, float]]) -> tuple[Columns, WallClock]:
    content = "".join(json.dumps({"epoch": row["step"] / 10} | row) + "\n" for row in rows)
    found = read_columns(content.encode(), METRICS)
    found["time"] = training_time(found)
    clock = wall_clock(found)
    return found | {"wall": clock.wall}, clock


def row(step: int, launch: float, unix: float, ms: float | None = 100.0, **more: Any) -> Any:
    """A row of training, or of validation if it has no time of a step."""
    clock = {"perf/launch_seconds": launch, "perf/unix_time": NOON + unix}
    return {"step": step, **clock, **({} if ms is None else {STEP_MS: ms}), **more}


def test_training_time_is_that_of_the_steps_between_the_rows() -> None:
    found, clock = columns(
        [
            {"step": 1},  # the first step has no time
            {"step": 10, STEP_MS: 100.0, WAIT_MS: 10.0},
            {"step": 10, "val/loss": 1.0},
            {"step": 20, STEP_MS: 300.0, WAIT_MS: 0.0},
        ]
    )
    assert found["time"].tolist() == pytest.approx([0.1, 1.0, 1.0, 4.0])
    assert seconds_waiting(found) == pytest.approx(0.1)
    assert at_launch(found, clock.begins, 15) == pytest.approx((1.5, 2.5, 2.5))
    assert at_launch(found, clock.begins, 0) == (0, 0, 0)
    # Of an older version, without a clock.
    assert clock.wall.tolist() == pytest.approx([0.1, 1.0, 1.0, 4.0])
    assert not clock.is_complete
    assert np.isnan(columns([{"step": 1}])[0]["time"]).all()


def test_wall_time_has_the_start_and_evaluation() -> None:
    found, clock = columns(
        [row(10, 3.0, 3.0), row(10, 5.0, 5.0, None), row(20, 6.0, 6.0), row(20, 8.5, 8.5, None)]
    )
    assert found["wall"].tolist() == pytest.approx([3, 5, 6, 8.5])
    assert clock.starts == pytest.approx(2)  # until the first step
    assert clock.begins.tolist() == []
    assert clock.is_complete


@pytest.mark.parametrize(
    ("rows", "starts"),
    [
        # A pause of an hour after step 10, and 5 s until the next row, of which 1 s is training.
        ([row(10, 1, 1), row(20, 5, 3606)], 3604),
        # The launch first validates step 10, whose row is then after the pause.
        ([row(10, 1, 1), row(10, 4, 3605, None), row(20, 5, 3606)], 3604),
        # The run stopped at its last step, before the test.
        ([row(10, 1, 1), row(20, 2, 2), row(20, 4, 3606, None)], 3604),
        # Two launches lie between two rows: step 12 to 14 of the first has no row.
        ([row(10, 1, 1), row(20, 0.5, 3606)], 3604),
    ],
)
def test_a_pause_counts_once_wherever_it_lies(rows: list[Any], starts: float) -> None:
    found, clock = columns(rows)
    assert clock.begins.size == 1
    assert clock.starts == pytest.approx(starts)
    assert clock.wall[-1] == pytest.approx(3606)
    for step in (10, 20):
        assert found["wall"][0] <= at_launch(found, clock.begins, step)[2] <= 3606
    (begins,) = clock.begins
    done = int(found["step"][begins - 1])
    began = rows[begins]["perf/unix_time"] - rows[begins]["perf/launch_seconds"] - NOON
    assert at_launch(found, clock.begins, done)[2] == pytest.approx(began)


def test_a_clock_that_is_set_moves_nothing_within_a_launch() -> None:
    expected = [1, 2, 3, 4]
    for at_each in (
        [-1.8e9, 2, 3, 4],  # 1970, until the network is there
        [7201, 2, 3, 4],
        [1, 2, -3597, -3596],
        [1e300, 2, 3, 4],
    ):
        rows = [row(10 * n, float(n), unix) for n, unix in enumerate(at_each, start=1)]
        _, clock = columns(rows)
        assert clock.wall.tolist() == pytest.approx(expected), at_each
        assert clock.starts == pytest.approx(0), at_each


def test_rows_of_older_versions_count_their_steps() -> None:
    new = [row(30, 2, 5000), row(40, 3, 5001)]
    old = [{"step": 10, STEP_MS: 100.0}, {"step": 20, STEP_MS: 100.0}]
    _, clock = columns(old + new)
    assert clock.wall.tolist() == pytest.approx([1, 2, 4, 5])
    assert clock.starts == pytest.approx(1)
    _, clock = columns(
        [row(10, 1, 1), row(20, 2, 2), *({**r, "step": r["step"] + 20} for r in old)]
    )
    assert clock.wall.tolist() == pytest.approx([1, 2, 3, 4])
    assert not clock.is_complete

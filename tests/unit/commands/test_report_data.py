"""The data behind the report's curves: decimation, bands, differences, hashes, columns."""

import hashlib
import json
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from distvgg.commands.report.runs import METRICS, read_runs, rows_digest
from distvgg.commands.report.series import (
    band_of,
    decimate,
    differences,
    line_of,
    points_of_a_line,
)
from distvgg.commands.report.times import training_time, wall_clock
from distvgg.recipe import load
from distvgg.runs.metrics_file import parse_rows, read_columns

LOSS = "train/loss"


def columns(rows: list[dict[str, float]]) -> dict[str, np.ndarray]:
    found = read_columns("".join(json.dumps(row) + "\n" for row in rows).encode(), METRICS)
    found = {**found, "time": training_time(found)}
    return {**found, "wall": wall_clock(found).wall}


def losses(values: dict[int, float]) -> dict[str, np.ndarray]:
    return columns([{"step": s, "epoch": s / 10, LOSS: v} for s, v in values.items()])


@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=400),
    st.integers(4, 100),
)
def test_fewer_points_keep_both_ends_and_the_extremes_of_every_interval(
    numbers: list[float], limit: int
) -> None:
    values = np.array(numbers)
    keep = decimate(values, limit)
    assert len(keep) <= max(limit, 1)
    assert (np.diff(keep) > 0).all()
    assert (keep[0], keep[-1]) == (0, len(values) - 1)
    if len(values) <= limit:
        assert len(keep) == len(values)
    for width in (len(values), -(-len(values) // max(1, (limit - 2) // 2))):
        for begin in range(0, len(values), width):
            kept = values[keep[(keep >= begin) & (keep < begin + width)]]
            part = values[begin : begin + width]
            assert (kept.min(), kept.max()) == (part.min(), part.max())


def test_a_spike_of_one_row_in_ten_thousand_stays_visible() -> None:
    values = np.sin(np.arange(10_000) / 1000)
    values[6789] = 50.0
    assert 6789 in decimate(values, 100)


def test_more_lines_have_fewer_points_each() -> None:
    assert points_of_a_line(1) == 2000
    assert points_of_a_line(600) == 63
    assert points_of_a_line(10_000) == 50


def test_a_curve_has_only_the_rows_that_have_its_metric() -> None:
    line = line_of(
        columns(
            [
                {"step": 1, "epoch": 0.5, LOSS: 4.0},
                {"step": 1, "epoch": 0.5, "val/loss": 3.0},
                {"step": 2, "epoch": 1.0, LOSS: 2.0},
            ]
        ),
        LOSS,
        100,
    )
    assert line is not None
    assert line.step.tolist() == [1, 2]
    assert line.value.tolist() == [4.0, 2.0]
    assert line_of(losses({1: 1.0}), "val/loss", 100) is None


def test_a_band_is_the_range_at_the_steps_that_all_seeds_have() -> None:
    band = band_of([losses({1: 4.0, 2: 2.0, 3: 1.0}), losses({2: 4.0, 3: 2.0, 4: 9.0})], LOSS, 100)
    assert band is not None
    assert band.low is not None
    assert band.high is not None
    assert band.step.tolist() == [2, 3]
    assert band.value.tolist() == [3.0, 1.5]
    assert band.low.tolist() == [2.0, 1.0]
    assert band.high.tolist() == [4.0, 2.0]
    assert band.outline().value.tolist() == [4.0, 2.0, 1.0, 2.0]
    assert band.outline().step.tolist() == [2, 3, 3, 2]
    assert band_of([losses({1: 4.0}), losses({2: 4.0})], LOSS, 100) is None


def test_a_decimated_band_still_spans_every_value() -> None:
    steps = range(1, 3001)
    values = [{s: float(np.sin(s * k)) for s in steps} for k in (1, 2)]
    values[1][1234] = 77.0
    seeds = [losses(of_steps) for of_steps in values]
    band = band_of(seeds, LOSS, 50)
    assert band is not None
    assert band.high is not None
    assert len(band.step) <= 50
    assert band.high.max() == 77.0


def test_differences_of_configs() -> None:
    first = load("quickstart")
    other = first.replace(seed=1, optim__lr=0.5)
    assert differences([first.flat(), other.flat(), first.flat()]) == ["seed", "optim.lr"]
    assert differences([first.flat()]) == []


def test_columns_are_those_of_the_rows_whatever_is_damaged() -> None:
    whole = b'{"step": 1, "a": 2}\n{"step": 2, "a": null, "b": "text"}\n{"step": 3, "a": 1.5}\n'
    half = b'{"step": 4, "a": 9'
    for content in (whole, whole + half, half + b"\n" + whole, b"\0\0\n" + whole + half):
        found = read_columns(content, ("step", "a"))
        assert found["step"].tolist() == [1, 2, 3]
        assert found["a"].tolist()[::2] == [2, 1.5]
        assert np.isnan(found["a"][1])
        assert [row["step"] for row in parse_rows(content)][:3] == [1, 2, 3]
    assert read_columns(half, ("step",))["step"].size == 0


def test_the_hash_of_rows_leaves_out_what_was_timed() -> None:
    rows = [
        {"step": 1, LOSS: 4.5, "perf/step_ms": 1.25e-05, "train/lr": 0.1, "perf/tflops": 3},
        {"step": 2, "val/top1": None},
    ]
    kept = [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows]
    expected = hashlib.sha256("\n".join(map(json.dumps, kept)).encode()).hexdigest()
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    assert rows_digest(content) == expected
    assert rows_digest(content + b'{"step": 3, "tr') == expected


def test_the_launches_of_an_unfinished_run_are_those_of_its_newest_checkpoint(
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    for step, starts in ((4, [[0, 1]]), (8, [[0, 1], [4, 2]])):
        folder = run / "checkpoints" / f"step_{step:08}"
        folder.mkdir(parents=True)
        manifest = {"body": {"progress": {"starts": starts}}}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    (run / "config.yaml").write_text(load("quickstart").to_yaml())
    (run / "metrics.jsonl").write_text('{"step": 9, "epoch": 0.5, "train/loss": 3.0}\n')
    (found,) = read_runs([run, run], print)
    assert found.starts == [(0, 1), (4, 2)]
    assert found.weights_sha256 is None

"""Curves of the report: metrics of rows over steps, epochs or time, with the launches marked."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from bokeh.models import (
    ColumnDataSource,
    DataRange1d,
    HoverTool,
    MultiLine,
    Patches,
    Range1d,
    Scatter,
    Segment,
    Text,
)
from bokeh.plotting import figure

from distvgg import metrics
from distvgg.commands.report import series, times
from distvgg.commands.report.figures import Figures, Unit, add_renderer, new_figure
from distvgg.commands.report.runs import TEST, VAL
from distvgg.wording import counted

# At most this many runs have the number of processes written beside each start.
MOST_LABELLED_RUNS = 4


class Curve(NamedTuple):
    """A metric within a panel."""

    metric: str
    label: str
    style: str  # solid, dashed with points, or point


class Panel(NamedTuple):
    """A plot of the report."""

    key: str
    title: str
    legend: str
    curves: tuple[Curve, ...]
    scale: float = 1.0


PANELS = (
    Panel(
        "loss",
        "Loss",
        "solid: train; dashed: val; diamond: test",
        (
            Curve(metrics.TRAIN_LOSS, "train loss", "solid"),
            Curve(VAL + metrics.LOSS, "val loss", "dashed"),
            Curve(TEST + metrics.LOSS, "test loss", "point"),
        ),
    ),
    Panel(
        "top1",
        "Top-1 accuracy, %",
        "solid: train, with augmentation; dashed: val; diamond: test",
        (
            Curve(metrics.TRAIN_TOP1, "train top-1", "solid"),
            Curve(VAL + metrics.TOP1, "val top-1", "dashed"),
            Curve(TEST + metrics.TOP1, "test top-1", "point"),
        ),
        100.0,
    ),
    Panel(
        "top5",
        "Top-5 and superclass accuracy, %",
        "solid: val top-5; dashed: val superclass top-1",
        (
            Curve(VAL + metrics.TOP5, "val top-5", "solid"),
            Curve(VAL + metrics.SUPERCLASS_TOP1, "val superclass top-1", "dashed"),
        ),
        100.0,
    ),
    Panel(
        "lr",
        "Learning rate",
        "of the row's step",
        (Curve(metrics.TRAIN_LR, "learning rate", "solid"),),
    ),
    Panel(
        "speed",
        "Throughput, images/s",
        "training steps, without evaluation and checkpoints",
        (Curve(metrics.IMAGES_PER_SEC, "images/s", "solid"),),
    ),
    Panel(
        "norm",
        "Gradient norm",
        "before clipping",
        (Curve(metrics.TRAIN_GRAD_NORM, "gradient norm", "solid"),),
    ),
)


class Start(NamedTuple):
    """The place of a launch on each horizontal axis; times are in seconds."""

    unit: Unit
    processes: int
    step: int
    epoch: float
    time: float
    wall: float


def draw_curves(units: Sequence[Unit], found: Figures) -> None:
    """Adds the plots of the metrics that some run has.

    One renderer draws a metric of all units: with one for each, a hundred runs would take minutes.
    """
    shared = DataRange1d(range_padding=0.02)
    drawn = [p for p in PANELS if any(_has(unit, curve) for unit in units for curve in p.curves)]
    # Means and single runs are seldom shown together, so that each kind may have all points.
    limits = {}
    for kind in (True, False):
        of_kind = [unit for unit in units if unit.is_mean == kind]
        lines = sum(_has(unit, curve) for unit in of_kind for p in drawn for curve in p.curves)
        limits[kind] = series.points_of_a_line(lines)
    starts = [
        Start(unit, w, s, *times.at_launch(run.columns, run.clock.begins, s))
        for unit in units
        for run in unit.runs
        for s, w in run.starts
    ]
    for panel in drawn:
        y_range = DataRange1d(range_padding=0.06)
        plot = new_figure(panel.title, x_range=shared, y_range=y_range)
        plot.extra_y_ranges = {"marks": Range1d(0, 1)}
        plot.xaxis.axis_label = metrics.STEP
        for curve in panel.curves:
            _draw_curve(plot, units, panel, curve, found, limits)
        y_range.renderers = plot.renderers[:]  # not the marks, which have a range of their own
        _draw_starts(plot, units, starts, found, text=panel is drawn[0])
        found.plots[panel.key] = plot
        found.curves.append(plot.id)


UnitLine = tuple[Unit, series.Line]


def _has(unit: Unit, curve: Curve) -> bool:
    return any(series.rows_with(run.columns, curve.metric).size for run in unit.runs)


def _draw_curve(
    plot: figure,
    units: Sequence[Unit],
    panel: Panel,
    curve: Curve,
    found: Figures,
    limits: Mapping[bool, int],
) -> None:
    lines: list[UnitLine] = []
    for unit in units:
        columns = [run.columns for run in unit.runs]
        line = (
            series.band_of(columns, curve.metric, limits[True])
            if unit.is_mean
            else series.line_of(columns[0], curve.metric, limits[False])
        )
        if line is not None:
            times = (1 / found.time_units[axis][1] for axis in (series.TIME, series.WALL))
            lines.append((unit, line.scaled(panel.scale, *times)))
    if not lines:
        return
    if bands := [(unit, line) for unit, line in lines if line.low is not None]:
        outlines = [(unit, line.outline()) for unit, line in bands]
        band = Patches(xs="step", ys="y", fill_color="colour", fill_alpha=0.18, line_color=None)
        add_renderer(plot, _source_of_lines(outlines), band, [unit for unit, _ in bands], found)
    if curve.style != "point":
        _draw_path(plot, lines, panel, curve, found)
    single = [pair for pair in lines if curve.style != "solid" or len(pair[1].step) < 5]
    if single:
        _draw_points(plot, single, panel, curve, found)


def _draw_path(
    plot: figure, lines: Sequence[UnitLine], panel: Panel, curve: Curve, found: Figures
) -> None:
    dashed = curve.style == "dashed"
    path = MultiLine(
        xs="step",
        ys="y",
        line_color="colour",
        line_width=2 if dashed else 1.5,
        line_dash=[7, 4] if dashed else "solid",
    )
    renderer = add_renderer(plot, _source_of_lines(lines), path, [unit for unit, _ in lines], found)
    if dashed:  # its points have tooltips
        return
    value = ("value", f"$snap_y{_number_format(panel)}")
    hover = HoverTool(
        renderers=[renderer],
        tooltips=[("", f"@name: {curve.label}"), value, (metrics.STEP, "$snap_x{0,0.[00]}")],
        formatters={"$snap_y": "printf"},
        line_policy="nearest",
        visible=False,
    )
    plot.add_tools(hover)
    found.hovers.append(hover.id)


def _draw_points(
    plot: figure, lines: Sequence[UnitLine], panel: Panel, curve: Curve, found: Figures
) -> None:
    point = curve.style == "point"
    dot = Scatter(
        x="step",
        y="y",
        marker="diamond" if point else "circle",
        size=13 if point else 5,
        line_color="colour",
        fill_color="colour",
    )
    owners = [unit for unit, line in lines for _ in line.step]
    renderer = add_renderer(plot, _source_of_points(lines), dot, owners, found)
    tooltips = [
        ("", f"@name: {curve.label}"),
        ("value", f"@y{_number_format(panel)}"),
        ("step, epoch", "@step{0,0}, @epoch{0.00}"),
        (f"{found.time_units[series.TIME][0]} of training", "@time{0.00}"),
        (f"{found.time_units[series.WALL][0]} of wall time", "@wall{0.00}"),
    ]
    plot.add_tools(
        HoverTool(
            renderers=[renderer], tooltips=tooltips, formatters={"@y": "printf"}, visible=False
        )
    )


def _number_format(panel: Panel) -> str:
    return "{%.5g}" + "%" * (panel.scale == 100)


def _source_of_lines(lines: Sequence[tuple[Unit, series.Line]]) -> ColumnDataSource:
    """Returns a source with a row for each curve, whose cells are arrays."""
    return ColumnDataSource(
        {
            **{axis: [_small(getattr(line, axis)) for _, line in lines] for axis in series.AXES},
            "y": [_small(line.value) for _, line in lines],
            "colour": [unit.colour for unit, _ in lines],
            "name": [unit.name for unit, _ in lines],
        }
    )


def _source_of_points(lines: Sequence[tuple[Unit, series.Line]]) -> ColumnDataSource:
    """Returns a source with a row for each point."""
    return ColumnDataSource(
        {
            **{
                axis: _small(np.concatenate([getattr(line, axis) for _, line in lines]))
                for axis in series.AXES
            },
            "y": _small(np.concatenate([line.value for _, line in lines])),
            "colour": [unit.colour for unit, line in lines for _ in line.step],
            "name": [unit.name for unit, line in lines for _ in line.step],
        }
    )


def _draw_starts(
    plot: figure, units: Sequence[Unit], starts: Sequence[Start], found: Figures, *, text: bool
) -> None:
    """Marks each restart by a dotted line, and writes the number of processes beside it.

    For a mean over seeds, only restarts are marked. The axis of the marks runs from 0 to 1.
    """
    if again := [start for start in starts if start.step > 0]:
        dotted = Segment(
            **{"x0": "step", "x1": "step", "y0": {"value": 0}, "y1": {"value": 1}},
            line_color="colour",
            line_dash="dotted",
            line_width=1.5,
        )
        owners = [start.unit for start in again]
        add_renderer(
            plot, _source_of_starts(again, found), dotted, owners, found, y_range_name="marks"
        )
    alone = len(units) == 1
    restarted = [start.unit.key for start in again if not start.unit.is_mean]
    labelled = list(dict.fromkeys([units[0].key] if alone else restarted))[:MOST_LABELLED_RUNS]
    if text and labelled:
        told = [start for start in starts if start.unit.key in labelled]
        source = _source_of_starts(told, found)
        source.data["text"] = [counted(start.processes, "process") for start in told]
        source.data["y"] = [0.08 * labelled.index(start.unit.key) for start in told]
        words = Text(
            x="step",
            y="y",
            text="text",
            text_color="colour",
            text_font_size="11px",
            text_baseline="bottom",
            x_offset=4,
        )
        owners = [start.unit for start in told]
        add_renderer(plot, source, words, owners, found, y_range_name="marks")


def _source_of_starts(starts: Sequence[Start], found: Figures) -> ColumnDataSource:
    of_training, of_wall = (found.time_units[axis][1] for axis in (series.TIME, series.WALL))
    return ColumnDataSource(
        {
            "step": [start.step for start in starts],
            "epoch": [start.epoch for start in starts],
            "time": [start.time / of_training for start in starts],
            "wall": [start.wall / of_wall for start in starts],
            "colour": [start.unit.colour for start in starts],
        }
    )


def _small(values: np.ndarray) -> np.ndarray:
    """Returns float32, half the bytes of a file and more digits than a plot shows."""
    return values.astype(np.float32)

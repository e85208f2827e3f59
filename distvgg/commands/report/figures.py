"""Plots of the report, made with Bokeh.

Imported only when Bokeh is there. Colours of axes and grids are set in the browser, by the colour
scheme; see report.js.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np
from bokeh.models import (
    BoxZoomTool,
    CDSView,
    ColumnDataSource,
    DataRange1d,
    FactorRange,
    Glyph,
    GlyphRenderer,
    HoverTool,
    IndexFilter,
    Line,
    MultiLine,
    PanTool,
    Patches,
    Plot,
    Range1d,
    Rect,
    ResetTool,
    SaveTool,
    Scatter,
    Segment,
    Text,
    Tool,
    WheelZoomTool,
)
from bokeh.plotting import figure

from distvgg import metrics
from distvgg.commands.report import series, times
from distvgg.commands.report.runs import TEST, VAL, RunData
from distvgg.runs.confusion import Confusion
from distvgg.wording import counted

# Distinguishable on white and on near-black, also for most colour-blind readers.
COLOURS = (
    *("#3b82d6", "#e07b18", "#2c9f5b", "#d64560", "#8f6bd0"),
    *("#9c7a4b", "#d468b4", "#1aa5ab", "#929a1e", "#7d8794"),
)
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


@dataclass(frozen=True)
class Unit:
    """Entry of the legend: a run, or the mean of runs that differ in their seed."""

    key: str
    name: str
    runs: Sequence[RunData]
    colour: str

    @property
    def is_mean(self) -> bool:
        return len(self.runs) > 1


class Start(NamedTuple):
    """The place of a launch on each horizontal axis; times are in seconds."""

    unit: Unit
    processes: int
    step: int
    epoch: float
    time: float
    wall: float


class Shown(NamedTuple):
    """A renderer of several units. The browser chooses the visible rows of its source.

    Attributes:
        filter: id of the filter of rows.
        rows: unit of each row.
    """

    filter: str
    rows: list[str]


@dataclass
class Figures:
    """The plots, and what report.js has to know of their models.

    Attributes:
        time_units: name and seconds of the unit of training time, and of wall time.
        plots: by their key.
        shown: the renderers whose rows belong to units.
        glyphs: ids of the glyphs whose position follows the chosen axis.
        curves: ids of the plots that have this axis.
        hovers: ids of the tools whose tooltips end with the place on this axis.
    """

    time_units: dict[str, tuple[str, float]]
    plots: dict[str, figure] = field(default_factory=dict)
    shown: list[Shown] = field(default_factory=list)
    glyphs: list[str] = field(default_factory=list)
    curves: list[str] = field(default_factory=list)
    hovers: list[str] = field(default_factory=list)


def unit_of_time(runs: Sequence[RunData], axis: str) -> tuple[str, float]:
    """Returns the unit of a time axis, and its length in seconds."""
    seconds = np.concatenate([run.columns[axis] for run in runs])
    longest = np.nanmax(seconds) if np.isfinite(seconds).any() else 0.0
    if longest > 3 * 3600:
        return "hours", 3600.0
    return ("minutes", 60.0) if longest > 180 else ("seconds", 1.0)


def coloured(named: Sequence[tuple[str, str, Sequence[RunData]]]) -> list[Unit]:
    """Returns units of (key, name, runs), each with the next colour."""
    return [Unit(*unit, colour) for unit, colour in zip(named, cycle(COLOURS), strict=False)]


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
        plot = _figure(panel.title, x_range=shared, y_range=y_range)
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
        _add(plot, _source_of_lines(outlines), band, [unit for unit, _ in bands], found)
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
    renderer = _add(plot, _source_of_lines(lines), path, [unit for unit, _ in lines], found)
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
    renderer = _add(plot, _source_of_points(lines), dot, owners, found)
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
        _add(plot, _source_of_starts(again, found), dotted, owners, found, y_range_name="marks")
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
        _add(plot, source, words, owners, found, y_range_name="marks")


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


def _add(
    plot: figure,
    source: ColumnDataSource,
    glyph: Glyph,
    owners: Sequence[Unit],
    found: Figures,
    *,
    on_axis: bool = True,
    **how: Any,
) -> GlyphRenderer:
    """Adds a glyph to a plot. `owners` has the unit of each row of the source."""
    rows = IndexFilter(indices=list(range(len(owners))))
    renderer: GlyphRenderer = plot.add_glyph(source, glyph, view=CDSView(filter=rows), **how)
    found.shown.append(Shown(rows.id, [unit.key for unit in owners]))
    if on_axis:
        found.glyphs.append(glyph.id)
    return renderer


def _small(values: np.ndarray) -> np.ndarray:
    """Returns float32, half the bytes of a file and more digits than a plot shows."""
    return values.astype(np.float32)


def _figure(title: str, **how: Any) -> figure:
    box, wheel = BoxZoomTool(), WheelZoomTool()
    tools: list[Tool] = [box, PanTool(), wheel, ResetTool(), SaveTool()]
    plot = figure(
        tools=tools,
        active_drag=box,
        active_scroll=None,  # the page scrolls; a click on the tool zooms by the wheel
        height=290,
        sizing_mode="stretch_width",
        background_fill_color=None,
        border_fill_color=None,
        outline_line_color=None,
        toolbar_location="above",
        output_backend="canvas",
        name=title,
        **how,
    )
    plot.toolbar.logo = None
    plot.min_border_right = 12
    plot.toolbar.stylesheets = [":host .bk-divider { opacity: 0.3; }"]
    return plot


def draw_confusion(first: Confusion, key: str, found: Figures) -> ColumnDataSource:
    """Adds the plot of a confusion matrix; returns its source, whose cells report.js replaces."""
    names = first.class_names
    plot = _figure("confusion", x_range=FactorRange(*names), y_range=FactorRange(*reversed(names)))
    plot.height = 240 + 18 * len(names)
    plot.grid.visible = False
    source = ColumnDataSource({**cells_of(first), **_places(names)})
    cell = Rect(
        x="predicted",
        y="true",
        width=1,
        height=1,
        fill_color="colour",
        fill_alpha="alpha",
        line_color=None,
    )
    renderer = plot.add_glyph(source, cell)
    plot.xaxis.major_label_orientation = 1.0
    plot.xaxis.axis_label, plot.yaxis.axis_label = "predicted", "true"
    tips = [("true", "@true"), ("predicted", "@predicted"), ("images", "@images{0,0}")]
    tips.append(("of the true class", "@share{0.0}%"))
    plot.add_tools(HoverTool(renderers=[renderer], tooltips=tips, visible=False))
    found.plots[key] = plot
    return source


def _places(names: Sequence[str]) -> Mapping[str, Any]:
    true = [name for name in names for _ in names]
    right = [i == j for i in range(len(names)) for j in range(len(names))]
    return {
        "true": true,
        "predicted": [name for _ in names for name in names],
        "colour": [COLOURS[0] if same else COLOURS[1] for same in right],
    }


def cells_of(confusion: Confusion) -> dict[str, list[float]]:
    """Returns images, share of the true class in percent and opacity of each cell, by rows."""
    counts = np.array(confusion.counts)
    share = counts / np.maximum(1, counts.sum(1, keepdims=True))
    return {
        "images": counts.flatten().tolist(),
        "share": (100 * share).round(2).flatten().tolist(),
        "alpha": np.sqrt(share).round(3).flatten().tolist(),  # rare confusions stay visible
    }


def draw_reliability(units: Sequence[Unit], found: Figures) -> bool:
    """Adds the reliability diagram; returns False if no run has counts by confidence."""
    curves = [(unit, counts) for unit in units if (counts := _by_confidence(unit)) is not None]
    if not curves:
        return False
    plot = _figure("calibration", x_range=Range1d(0, 100), y_range=Range1d(0, 104))
    plot.xaxis.axis_label, plot.yaxis.axis_label = "confidence, %", "correct, %"
    diagonal = ColumnDataSource({"x": [0, 100], "y": [0, 100]})
    ideal = Line(x="x", y="y", line_color="#808890", line_dash="dotted", line_width=1.5)
    plot.add_glyph(diagonal, ideal)
    columns = ("x", "y", "images", "size")
    points = {name: [values[name] for _, values in curves] for name in columns}
    owners = [unit for unit, _ in curves]
    colours = {"colour": [unit.colour for unit in owners]}
    line = MultiLine(xs="x", ys="y", line_color="colour", line_width=1.5)
    source = ColumnDataSource({"x": points["x"], "y": points["y"]} | colours)
    _add(plot, source, line, owners, found, on_axis=False)
    dots = Scatter(x="x", y="y", size="size", fill_color="colour", line_color=None, fill_alpha=0.7)
    each = [unit for unit, values in curves for _ in values["x"]]
    source = ColumnDataSource(
        {name: np.concatenate(values).tolist() for name, values in points.items()}
        | {"colour": [unit.colour for unit in each], "name": [unit.name for unit in each]}
    )
    renderer = _add(plot, source, dots, each, found, on_axis=False)
    tips = [("", "@name"), ("confidence about", "@x{0}%"), ("correct", "@y{0.0}%")]
    tips.append(("images", "@images{0,0}"))
    plot.add_tools(HoverTool(renderers=[renderer], tooltips=tips, visible=False))
    found.plots["calibration"] = plot
    return True


def _by_confidence(unit: Unit) -> dict[str, list[float]] | None:
    """Returns the points of a unit's curve, one for each bin that has images."""
    bins = [run.confusion.reliability for run in unit.runs if run.confusion]
    known = [np.array(b) for b in bins if b]
    if not known:
        return None
    images, right = np.sum(known, axis=0).T
    has = images > 0
    return {
        "x": (100 * (np.flatnonzero(has) + 0.5) / len(images)).tolist(),
        "y": (100 * right[has] / images[has]).tolist(),
        "images": images[has].tolist(),
        "size": (4 + 22 * np.sqrt(images[has] / images.sum())).tolist(),
    }


def themed(plots: Sequence[Plot]) -> dict[str, list[str]]:
    """Returns the ids of plots, and of the axes and grids that take the colours of the page."""
    return {
        "plots": [plot.id for plot in plots],
        "axes": [axis.id for plot in plots for axis in plot.axis],
        "grids": [grid.id for plot in plots for grid in plot.grid],
    }

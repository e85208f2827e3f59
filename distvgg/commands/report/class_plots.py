"""Plots of what a network confuses, and of how well its confidence is calibrated."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from bokeh.models import (
    ColumnDataSource,
    FactorRange,
    HoverTool,
    Line,
    MultiLine,
    Range1d,
    Rect,
    Scatter,
)

from distvgg.commands.report.figures import COLOURS, Figures, Unit, add_renderer, new_figure
from distvgg.runs.confusion import Confusion


def draw_confusion(first: Confusion, key: str, found: Figures) -> ColumnDataSource:
    """Adds the plot of a confusion matrix; returns its source, whose cells report.js replaces."""
    names = first.class_names
    plot = new_figure(
        "confusion", x_range=FactorRange(*names), y_range=FactorRange(*reversed(names))
    )
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
    plot = new_figure("calibration", x_range=Range1d(0, 100), y_range=Range1d(0, 104))
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
    add_renderer(plot, source, line, owners, found, on_axis=False)
    dots = Scatter(x="x", y="y", size="size", fill_color="colour", line_color=None, fill_alpha=0.7)
    each = [unit for unit, values in curves for _ in values["x"]]
    source = ColumnDataSource(
        {name: np.concatenate(values).tolist() for name, values in points.items()}
        | {"colour": [unit.colour for unit in each], "name": [unit.name for unit in each]}
    )
    renderer = add_renderer(plot, source, dots, each, found, on_axis=False)
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

"""Makes Bokeh plots for the report, and holds the runs of its legend.

Imported only when Bokeh is there. Colours of axes and grids are set in the browser, by the colour
scheme; see report.js.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np
from bokeh.models import (
    BoxZoomTool,
    CDSView,
    ColumnDataSource,
    Glyph,
    GlyphRenderer,
    IndexFilter,
    PanTool,
    Plot,
    ResetTool,
    SaveTool,
    Tool,
    WheelZoomTool,
)
from bokeh.plotting import figure

from distvgg.commands.report.runs import RunData

# Distinguishable on white and on near-black, also for most colour-blind readers.
COLOURS = (
    *("#3b82d6", "#e07b18", "#2c9f5b", "#d64560", "#8f6bd0"),
    *("#9c7a4b", "#d468b4", "#1aa5ab", "#929a1e", "#7d8794"),
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


def add_renderer(
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


def new_figure(title: str, **how: Any) -> figure:
    """Returns an empty plot with its tools. `how` are further options of Bokeh's `figure`."""
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


def themed(plots: Sequence[Plot]) -> dict[str, list[str]]:
    """Returns the ids of plots, and of the axes and grids that take the colours of the page."""
    return {
        "plots": [plot.id for plot in plots],
        "axes": [axis.id for plot in plots for axis in plot.axis],
        "grids": [grid.id for plot in plots for grid in plot.grid],
    }

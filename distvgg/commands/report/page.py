"""The report as one HTML page: tables, plots, and all that they need, within the file.

Invariant: the page requests nothing. Its content security policy makes the browser refuse to.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from html import escape
from importlib.resources import files
from typing import Any

import numpy as np
from bokeh.embed import components
from bokeh.resources import Resources

from distvgg import __version__
from distvgg.commands.compare import (
    SEED,
    Group,
    columns_of,
    group_rows,
    grouped,
    notes_on,
    run_rows,
)
from distvgg.commands.report import class_plots, curve_plots, figures, series, tables
from distvgg.commands.report.examples import Examples, read_examples
from distvgg.commands.report.figures import Figures, Unit
from distvgg.commands.report.runs import RunData, label_of
from distvgg.commands.report.tables import table
from distvgg.runs.confusion import Confusion, by_superclass, class_accuracy, worst_pairs

N_PAIRS = N_CLASSES = 10
# A matrix of more classes is too fine for a page; its pairs and hardest classes are listed.
MOST_CELLS_A_SIDE = 40
# Examples are of the classes that these many first groups of runs confuse.
GROUPS_WITH_EXAMPLES = 4
# Marks a place within HTML whose other content is escaped.
PLOT = "<!--plot-->"
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline';"
    " img-src data: blob:; font-src data:"
)


def page(runs: Sequence[RunData], *, reload_seconds: int | None = None) -> str:
    """Returns the report of some runs of one dataset.

    Args:
        runs: at least one.
        reload_seconds: the page reloads itself after this time; None: never.
    """
    groups = grouped([run.entry for run in runs])
    of_entry = {id(run.entry): run for run in runs}
    ordered = [of_entry[id(entry)] for group in groups for entry in group.entries]
    differ = series.differences([run.entry.config for run in runs])
    units, modes = _units(ordered, groups, differ, of_entry)
    found = Figures({a: figures.unit_of_time(runs, a) for a in (series.TIME, series.WALL)})
    curve_plots.draw_curves(units, found)
    calibrated = class_plots.draw_reliability(units, found)
    classes, cells = _classes(groups, differ, of_entry, found)
    script, places = components(found.plots)
    spec = {
        "modes": modes,
        "shown": found.shown,
        "glyphs": found.glyphs,
        "curves": found.curves,
        "hovers": found.hovers,
        "labels": _axis_labels(found),
        "themed": figures.themed(list(found.plots.values())),
        "cells": cells,
        "confusion": found.plots["confusion"].id if "confusion" in found.plots else None,
    }
    sections = [
        ("summary", "Summary", _summary(ordered, groups, differ)),
        ("curves", "Curves", _curves(found, places)),
        ("classes", "Classes", classes.replace(PLOT, places.get("confusion", ""))),
        ("calibration", "Calibration", _calibration(places) if calibrated else _NO_CALIBRATION),
        ("time", "Time", tables.time(ordered)),
        ("network", "Network", tables.network(ordered)),
        ("config", "Config", tables.config(ordered)),
        ("provenance", "Provenance", tables.provenance(ordered)),
    ]
    title = escape(f"{runs[0].name} \N{MIDDLE DOT} distvgg" if len(runs) == 1 else "distvgg report")
    links = "".join(f'<a href="#{key}">{heading}</a>' for key, heading, _ in sections)
    body = "".join(
        f'<section id="{key}"><h2>{heading}</h2>{content}</section>'
        for key, heading, content in sections
    )
    header = f"<h1>{title}</h1>{_subtitle(runs)}<nav>{links}</nav>"
    controls = _controls(units, modes, found)
    return _document(title, header, controls, body, script, _json(spec), reload_seconds)


def _document(
    title: str,
    header: str,
    controls: str,
    body: str,
    script: str,
    spec: str,
    reload_seconds: int | None,
) -> str:
    """Returns the page around its content, with all styles and scripts inline."""
    css, js = ((files(__package__) / name).read_text() for name in ("report.css", "report.js"))
    reload = f'<meta http-equiv="refresh" content="{reload_seconds}">' if reload_seconds else ""
    inline = Resources(mode="inline", components=["bokeh"])
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
{reload}
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{css}</style>
{inline.render_js()}
</head>
<body>
<header>{header}</header>
{controls}
<main>{body}</main>
<footer>Written {datetime.now():%Y-%m-%d %H:%M:%S} by distvgg {__version__}.
The page is one file and requests nothing.</footer>
<script type="application/json" id="spec">{spec}</script>
{script}
<script>{js}</script>
</body>
</html>
"""


def _units(
    ordered: Sequence[RunData],
    groups: Sequence[Group],
    differ: Sequence[str],
    of_entry: Mapping[int, RunData],
) -> tuple[list[Unit], dict[str, list[str]]]:
    """Returns what can be drawn, and the keys of what is drawn in each mode.

    The mode `each` has all runs. The mode `mean` has the mean of each group that has several seeds,
    and the other runs. There is no such mode if no group has several seeds.
    """
    runs = figures.coloured([(f"run{n}", run.name, [run]) for n, run in enumerate(ordered)])
    of_run = {id(unit.runs[0].entry): unit for unit in runs}
    units: list[Unit] = []
    mean_mode = []
    for n, group in enumerate(groups):
        members = [of_run[id(entry)] for entry in group.entries]
        by_seed = {e.config[SEED]: of_entry[id(e)] for e in reversed(group.entries)}
        if len(by_seed) < 2:
            mean_mode += [unit.key for unit in members]
        else:
            name, same = label_of(group, differ), list(by_seed.values())
            units.append(Unit(f"mean{n}", name, same, members[0].colour))
            mean_mode.append(units[-1].key)
        units += members
    modes = {"each": [unit.key for unit in runs]}
    if len(units) > len(runs):
        modes = {"mean": mean_mode, **modes}
    return units, modes


def _subtitle(runs: Sequence[RunData]) -> str:
    data = runs[0].config.data
    state = runs[0].entry.state if len(runs) == 1 else f"{len(runs)} runs"
    what = [state, f"{data.name}{f' from {data.path}' if data.path else ''}"]
    return f"<p>{escape(f' {chr(0xB7)} '.join(what))}</p>"


def _controls(units: Sequence[Unit], modes: Mapping[str, Any], found: Figures) -> str:
    names = ("step", "epoch", "training time", "wall time")
    parts = [_choice("axis", "Against", dict(zip(series.AXES, names, strict=True)))]
    if "mean" in modes:
        parts.append(_choice("mode", "Seeds", {"mean": "mean and range", "each": "each run"}))
    legend = "".join(
        f'<button type="button" class="unit" data-unit="{unit.key}" aria-pressed="true"'
        f' title="click: hide or show; double-click: only this one">'
        f'<i style="background:{unit.colour}"></i>{escape(unit.name)}</button>'
        for unit in units
    )
    return (
        f'<div id="controls">{"".join(parts)}<div id="legend" role="group" aria-label="runs">'
        f'{legend}</div><button type="button" id="all">show all</button></div>'
    )


def _axis_labels(found: Figures) -> dict[str, str]:
    """Returns the label of each horizontal axis."""
    of_training, wall = (found.time_units[axis][0] for axis in (series.TIME, series.WALL))
    labels = ("step", "epoch", f"training time ({of_training})", f"wall time ({wall})")
    return dict(zip(series.AXES, labels, strict=True))


def _choice(name: str, label: str, values: Mapping[str, str]) -> str:
    radios = "".join(
        f'<label><input type="radio" name="{name}" value="{value}"{" checked" * (n == 0)}>'
        f"<span>{text}</span></label>"
        for n, (value, text) in enumerate(values.items())
    )
    return f'<fieldset><legend class="quiet">{label}</legend>{radios}</fieldset>'


def _summary(runs: Sequence[RunData], groups: Sequence[Group], differ: Sequence[str]) -> str:
    keys = [key for key in differ if key != SEED]
    shown, seed = columns_of(keys), [SEED] if SEED in differ else []
    header, *rows = run_rows([run.entry for run in runs], [*shown, *seed])
    parts = [table(header, rows)]
    if any(group.seeds > 1 for group in groups):
        header, *rows = group_rows(groups, shown)
        parts.append(table(header, rows))
    parts += [f'<p class="note">{escape(note)}</p>' for note in notes_on(groups, keys, shown)]
    return "".join(parts)


def _curves(found: Figures, places: Mapping[str, str]) -> str:
    drawn = [panel for panel in curve_plots.PANELS if panel.key in places]
    plots = "".join(
        f'<figure class="plot" data-plot="{panel.key}"><figcaption>{escape(panel.title)}'
        f"<small>{escape(panel.legend)}</small></figcaption>{places[panel.key]}</figure>"
        for panel in drawn
    )
    return (
        f'<div class="plots">{plots}</div><p class="note">Drag: zoom into a box. All curves zoom'
        " together. A dotted line is a restart. Training time is that of steps alone; wall time"
        " also has evaluation, checkpoints, starts and pauses. A band is the"
        " range over seeds, at steps that all of them have. Long curves keep the least and the"
        " greatest value of each interval.</p>"
    )


def _classes(
    groups: Sequence[Group],
    differ: Sequence[str],
    of_entry: Mapping[int, RunData],
    found: Figures,
) -> tuple[str, dict[str, Any]]:
    """Returns the section on classes, and the cells of each matrix for report.js."""
    totals: list[tuple[str, Confusion]] = []
    for group in groups:
        members = [of_entry[id(entry)] for entry in group.entries]
        same = [run.confusion for run in members if run.confusion]
        if not same:
            continue
        name = label_of(group, differ) if group.seeds > 1 else members[0].name
        same = [c for c in same if c.split == same[0].split]
        totals.append((name, summed(same)))
    if not totals:
        return _NO_CONFUSION, {}
    with_examples = [total for _, total in totals[:GROUPS_WITH_EXAMPLES]]
    digests = [e.result.data_fingerprint for g in groups for e in g.entries if e.result]
    data = next(iter(of_entry.values())).config.data.name
    entry = f"{data}-{digests[0] if digests else 'unknown'}"
    examples = read_examples(entry, with_examples, N_PAIRS, N_CLASSES)
    matrices = {f"classes{n}": _matrix(total) for n, (_, total) in enumerate(totals)}
    drawn = {key: matrix for key, matrix in matrices.items() if matrix is not None}
    cells: dict[str, Any] = {}
    plot = ""
    if drawn:
        source = class_plots.draw_confusion(next(iter(drawn.values())), "confusion", found)
        of_key = {key: class_plots.cells_of(matrix) for key, matrix in drawn.items()}
        cells = {"source": source.id, "of": of_key}
        what = "superclass" if totals[0][1].superclass_of else "class"
        plot = (
            f'<figure class="plot" data-plot="confusion"><figcaption>By {what}<small>blue: right;'
            " orange: wrong; the deeper, the larger the share of the true class (square root)"
            f"</small></figcaption>{PLOT}</figure>"
        )
    options = "".join(
        f'<option value="classes{n}">{escape(f"{name}: {total.split}, {images(total):,} images")}'
        "</option>"
        for n, (name, total) in enumerate(totals)
    )
    choice = f'<label>Runs <select id="of-classes">{options}</select></label>'
    tables = "".join(
        f'<div class="classes" data-classes="classes{n}"{" hidden" * (n > 0)}>'
        f"{_pairs_and_classes(total, examples)}</div>"
        for n, (_, total) in enumerate(totals)
    )
    pictures = f'<script type="application/json" id="examples">{_json(examples.strips)}</script>'
    note = f'<p class="note">{escape(examples.note)}</p>'
    return f"{choice}{plot}{tables}{note}{pictures}", cells


def summed(same: Sequence[Confusion]) -> Confusion:
    """Returns the sum of matrices over the same classes of the same split."""
    return replace(same[0], counts=np.sum([c.counts for c in same], axis=0).tolist())


def images(confusion: Confusion) -> int:
    """Returns the number of images of a confusion matrix."""
    return sum(map(sum, confusion.counts))


def _matrix(confusion: Confusion) -> Confusion | None:
    """Returns the matrix to draw: that of the superclasses if there are any."""
    drawn = by_superclass(confusion) or confusion
    return drawn if len(drawn.class_names) <= MOST_CELLS_A_SIDE else None


def _pairs_and_classes(confusion: Confusion, examples: Examples) -> str:
    of_class = dict(zip(confusion.class_names, map(sum, confusion.counts), strict=True))
    pairs = [
        [
            *(examples.cell(name) for name in (true, predicted)),
            *(f"{k:,}", f"{100 * k / of_class[true]:.1f}%"),
        ]
        for true, predicted, k in worst_pairs(confusion, N_PAIRS)
    ]
    hardest = [
        [examples.cell(name), f"{100 * share:.1f}%", f"{of_class[name]:,}"]
        for name, share in list(class_accuracy(confusion).items())[:N_CLASSES]
    ]
    return (
        '<div class="columns"><div><h3>Most confused pairs</h3>'
        + table(["true class", "predicted as", "images", "of the true class"], pairs, html=True)
        + "</div><div><h3>Hardest classes</h3>"
        + table(["class", "recognised", "images"], hardest, html=True)
        + "</div></div>"
    )


def _calibration(places: Mapping[str, str]) -> str:
    return (
        '<figure class="plot square" data-plot="calibration"><figcaption>Reliability<small>at the'
        " middle of each bin of confidence; the area of a dot is its share of images</small>"
        f'</figcaption>{places["calibration"]}</figure><p class="note">On the dotted line,'
        " predictions are right as often as their confidence says. Below the line, the network is"
        " too sure. The split is that of the confusion matrix.</p>"
    )


_NO_CALIBRATION = (
    '<p class="note">A finished run of this version has the counts for a reliability diagram. None'
    " of these runs has them.</p>"
)
_NO_CONFUSION = (
    '<p class="note">A run writes its confusion matrix at its end. None of these runs has it yet.'
    "</p>"
)


def _json(value: Any) -> str:
    """Returns JSON that cannot end the element that holds it."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")

"""Tables of the report: time, networks, configs, provenance."""

import math
import re
from collections.abc import Sequence
from html import escape

from distvgg import metrics
from distvgg.commands.compare import typed
from distvgg.commands.report import series, times
from distvgg.commands.report.runs import RunData

MOST_NETWORKS = 5


def network(runs: Sequence[RunData]) -> str:
    """Returns the layers of each network, at most `MOST_NETWORKS`; imports torch."""
    from distvgg.models.flops import training_flops
    from distvgg.models.summary import layers_of, network_name

    known = {
        (run.config.model.model_copy(update={"weights": None}), len(run.class_names)): run
        for run in reversed(runs)
        if run.class_names
    }
    if not known:
        return '<p class="note">The classes of these runs are not known, nor their networks.</p>'
    parts = []
    for (model, classes), run in [*reversed(known.items())][:MOST_NETWORKS]:
        layers = layers_of(model, classes)
        rows = [
            [
                *(layer.name, layer.kind, " \N{MULTIPLICATION SIGN} ".join(map(str, layer.shape))),
                *(f"{n:,}" if n else "" for n in (layer.parameters, layer.flops)),
            ]
            for layer in layers
        ]
        total = sum(layer.parameters for layer in layers)
        flops = training_flops(model, classes, run.config.optim.frozen)
        side = model.image_size
        heading = escape(
            f"{network_name(model)} for {side}\N{MULTIPLICATION SIGN}{side} pixels and {classes}"
            f" classes, {total:,} parameters, {flops / 1e9:.3g} GFLOP to train on an image"
            + (f" ({run.name})" if len(known) > 1 else "")
        )
        header = ["layer", "kind", "output", "parameters", "forward FLOP"]
        parts.append(f"<details><summary>{heading}</summary>{table(header, rows)}</details>")
    if (left := len(known) - MOST_NETWORKS) > 0:
        parts.append(f'<p class="note">{left} more networks are left out.</p>')
    return "".join(parts)


def time(runs: Sequence[RunData]) -> str:
    """Returns where the time of each run went, and its launches."""
    longest = max(float(run.clock.wall[-1]) for run in runs)
    rows = []
    for run in runs:
        wall, training = float(run.clock.wall[-1]), float(run.columns[series.TIME][-1])
        starts = run.clock.starts if run.clock.is_complete else math.nan
        waiting = times.seconds_waiting(run.columns)
        launches = " \N{RIGHTWARDS ARROW} ".join(
            f"{w} at step {s:,}".replace(" ", "\N{NO-BREAK SPACE}") for s, w in run.starts
        )
        rows.append(
            [
                escape(run.name),
                f"{int(run.columns[metrics.STEP][-1]):,}",
                _duration(wall if run.clock.is_complete else math.nan),
                _duration(training),
                f"{min(100, 100 * waiting / training):.1f}%" if training > 0 else "-",
                _duration(wall - training - starts),
                _duration(starts),
                _bar(wall, training, longest),
                escape(launches or "no checkpoint yet"),
            ]
        )
    header = ["run", "steps", "wall time", "training", "of that, waiting for data"]
    header += ["evaluation, checkpoints", "starts, pauses", "training, all"]
    return table([*header, "launches: processes at step"], rows, html=True) + (
        '<p class="note">From the first launch, when it is ready to train, to the last row.'
        " Training is the time of steps, the full colour of a bar. Starts and pauses have the steps"
        " that were not saved, too.</p>"
    )


def _duration(seconds: float) -> str:
    """Returns hours, minutes and seconds; a dash if the time is not known."""
    if not math.isfinite(seconds):
        return "-"
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    return f"{minutes // 60:,}:{minutes % 60:02}:{rest:02}"


def _bar(wall: float, training: float, longest: float) -> str:
    """Returns a bar for the wall time, whose full colour is the time of training."""
    width = 100 * wall / longest if longest else 0
    full = 100 * min(1.0, training / wall) if wall and training > 0 else 0
    return f'<span class="bar" style="width:{width:.2f}%"><i style="width:{full:.2f}%"></i></span>'


def config(runs: Sequence[RunData]) -> str:
    """Returns the differences between the configs of runs, and the fields that are equal."""
    flats = [run.config.flat() for run in runs]
    differ = series.differences(flats)
    parts = []
    if len(runs) > 1:
        rows = [
            [run.name, *(typed(flat.get(key)) for key in differ)]
            for run, flat in zip(runs, flats, strict=True)
        ]
        parts.append(
            "<h3>Differences</h3>" + table(["run", *differ], rows)
            if differ
            else "<p>The configs are equal.</p>"
        )
    same = [[key, typed(value)] for key, value in flats[0].items() if key not in differ]
    heading = "The fields that are equal in all runs" if len(runs) > 1 else "All fields"
    parts.append(
        f"<details><summary>{heading} ({len(same)})</summary>{table(['field', 'value'], same)}"
        "</details>"
    )
    return "".join(parts)


def provenance(runs: Sequence[RunData]) -> str:
    """Returns hardware, versions and hashes of each run."""
    rows, hashes = [], []
    for run in runs:
        weights = run.weights_sha256 or "no weights yet"
        hashes.append([run.name, run.rows_sha256, weights])
        if (result := run.entry.result) is None:
            continue
        versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
        rows.append(
            [
                run.name,
                f"{result.num_processes} \N{MULTIPLICATION SIGN} {result.hardware}",
                result.precision,
                versions,
                result.commit or "installed package",
                result.data_fingerprint,
            ]
        )
    header = ["run", "hardware", "precision", "versions", "commit", "data"]
    known = (
        table(header, rows, kind="prose") if rows else '<p class="note">No run is finished yet.</p>'
    )
    return (
        f"{known}<h3>SHA-256</h3>"
        + table(["run", "rows, without timings", "final weights"], hashes, kind="hashes")
        + '<p class="note">On one kind of machine, runs of one config have equal hashes on any'
        " number of processes and over any kills.</p>"
    )


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, html: bool = False, kind: str = ""
) -> str:
    """Returns an HTML table in a box that scrolls. The cells are text, or HTML if `html`."""

    columns = list(zip(*rows, strict=True))
    numeric = [" class=number" * all(map(_is_number, column)) for column in columns]

    def row_of(cells: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{kind}>{cell if html and tag == 'td' else escape(cell.strip())}</{tag}>"
            for cell, kind in zip(cells, numeric, strict=True)
        )

    head = row_of(header, "th")
    body = "".join(f"<tr>{row_of(row, 'td')}</tr>" for row in rows)
    return (
        f'<div class="table {kind}"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[-\d.,:e+%\s\N{PLUS-MINUS SIGN}]+", text) is not None

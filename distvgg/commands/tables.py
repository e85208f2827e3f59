"""`distvgg tables`: the final numbers of finished runs as Markdown, from their folders alone."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np

from distvgg import metrics
from distvgg.commands.compare import grouped, read
from distvgg.commands.text_tables import markdown_table
from distvgg.config import Config
from distvgg.errors import UserError
from distvgg.models.flops import training_flops
from distvgg.recipe import load
from distvgg.runs.confusion import Confusion, class_accuracy, read_confusion, worst_pairs
from distvgg.runs.layout import CONFIG_FILE
from distvgg.runs.result import Result
from distvgg.wording import counted

SHARES = {
    metrics.TOP1: "top-1",
    metrics.TOP5: "top-5",
    metrics.SUPERCLASS_TOP1: "superclass top-1",
    metrics.TTA_TOP1: "top-1 with the mirror image",
}
# What the tutorial trains on: CIFAR-100's train split and classes.
TUTORIAL_IMAGES, TUTORIAL_CLASSES = 50_000, 100
N_PAIRS = N_CLASSES = 10


def tables(run_dirs: Sequence[Path]) -> str:
    """Returns all tables of one run, or of one config over its seeds.

    Raises:
        UserError: a run is not finished, or runs differ in more than their seed.
    """
    entries = [read(path, path.name) for path in run_dirs]
    for path, entry in zip(run_dirs, entries, strict=True):
        if entry.result is None:
            raise UserError(f"{path}: {entry.state}")
    results = [e.result for e in entries if e.result is not None]
    if len(grouped(entries)) > 1:
        raise UserError("these runs differ in more than their seed: see distvgg compare")
    if len({r.seed for r in results}) < len(results):
        raise UserError("a seed is there twice, and is no second sample: give each once")
    config = load(str(run_dirs[0] / CONFIG_FILE))
    found = [c for path in run_dirs if (c := read_confusion(path)) is not None]
    parts = [accuracies(split, results) for split in ("val", "test")]
    parts.append(cost(config, results, found))
    # Runs of one config confuse the same classes or do not: their images count alike.
    for split in ("val", "test"):
        if same := [c for c in found if c.split == split]:
            parts += confusions(same)
    return "\n\n".join(part for part in parts if part)


def accuracies(split: str, results: Sequence[Result]) -> str:
    """Returns a table of metrics by seed, with the spread over seeds if there are several."""
    measured = [r.val if split == "val" else r.test for r in results]
    rows = [row for row in measured if row is not None]
    if len(rows) < len(results):
        return f"{split.capitalize()} was not read by {len(results) - len(rows)} of these runs."
    count = int(rows[0][metrics.COUNT])
    header = [f"{split}, {count:,} images", *(f"seed {r.seed}" for r in results)]
    body = []
    if several := len(rows) > 1:
        header += ["mean", "standard deviation", "standard error"]
    for name, label in SHARES.items():
        if all(name in row for row in rows):
            shares = [float(row[name]) for row in rows]
            cells = [f"{100 * p:.2f} ± {100 * binomial_error(p, count):.2f}%" for p in shares]
            body.append([label, *cells, *spread(shares, several)])
    if all(metrics.CALIBRATION_ERROR in row for row in rows):
        errors = [float(row[metrics.CALIBRATION_ERROR]) for row in rows]
        cells = [f"{100 * e:.2f}%" for e in errors]
        body.append(["calibration error", *cells, *spread(errors, several)])
    notes = "±: binomial standard error over images, sqrt(p (1 - p) / n)."
    if several:
        notes += " Standard deviation: of the sample of seeds; standard error: of their mean."
    return f"{markdown_table(header, body)}\n\n{notes}"


def spread(values: Sequence[float], several: bool) -> list[str]:
    """Returns the mean, its sample standard deviation and its standard error, if `several`."""
    if not several:
        return []
    deviation = statistics.stdev(values)
    cells = (statistics.mean(values), deviation, deviation / math.sqrt(len(values)))
    return [f"{100 * cell:.2f}%" for cell in cells]


def binomial_error(share: float, n: int) -> float:
    """Returns the standard error of a share of `n` images."""
    return math.sqrt(share * (1 - share) / n)


def cost(config: Config, results: Sequence[Result], confusions: Sequence[Confusion]) -> str:
    """Returns a table of the images, time and arithmetic of one training, equal for all seeds."""
    images = results[0].steps * config.train.global_batch_size
    speeds = [r.images_per_sec for r in results if r.images_per_sec]
    body = [["images trained on", f"{images:,}"]]
    if speeds:
        speed = statistics.median(speeds)
        body.append(["images/s, without evaluation (median)", f"{speed:,.0f}"])
        seconds = timedelta(seconds=round(images / speed))
        body.append(["time in training steps at that speed", str(seconds)])
    if confusions:
        flops = training_flops(config.model, len(confusions[0].class_names), config.optim.frozen)
        spent = results[0].steps * config.train.global_batch_size * flops
        body.append(["floating-point operations of training", f"{spent:.3g}"])
        body.append(["of those that recipe `tutorial` takes", f"{spent / tutorial_flops():.4f}"])
    hardware = ", ".join(sorted({f"{r.num_processes} x {r.hardware}" for r in results}))
    body.append(["processes and hardware", f"{hardware}; {results[0].precision}"])
    return markdown_table(["cost of a run", ""], body)


def tutorial_flops() -> float:
    """Returns the floating-point operations of training the recipe `tutorial`."""
    config = load("tutorial")
    images = config.train.epochs * (TUTORIAL_IMAGES - config.data.val_size)
    return images * training_flops(config.model, TUTORIAL_CLASSES)


def confusions(same: Sequence[Confusion]) -> list[str]:
    """Returns tables of the most confused pairs, and of the worst and best classes."""
    counts = np.sum([c.counts for c in same], axis=0)
    total = replace(same[0], counts=counts.tolist())
    title = f"{total.split}, {counts.sum():,} images of {counted(len(same), 'run')}"
    pairs = [[f"{t} as {p}", str(k)] for t, p, k in worst_pairs(total, N_PAIRS)]
    classes = [(name, f"{100 * share:.1f}%") for name, share in class_accuracy(total).items()]
    worst, best = classes[:N_CLASSES], classes[::-1][:N_CLASSES]
    return [
        markdown_table([f"taken for another in {title}", "images"], pairs),
        markdown_table(
            ["worst class", "recognised", "best class", "recognised"],
            [[*w, *b] for w, b in zip(worst, best, strict=True)],
        ),
    ]

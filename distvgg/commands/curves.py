"""`distvgg curves`: the curves of run folders in one picture, from their metrics.jsonl."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distvgg.errors import UserError
from distvgg.metrics import STEP
from distvgg.runs.layout import METRICS_FILE
from distvgg.runs.metrics_file import read_rows
from distvgg.wording import counted

PANELS = {
    "loss": ("train/loss", "val/loss"),
    "top-1": ("train/top1", "val/top1", "val/superclass_top1"),
    "learning rate": ("train/lr",),
    "images/s": ("perf/images_per_sec",),
}


def draw(run_dirs: Sequence[Path], out: Path) -> str:
    """Draws loss, accuracy, learning rate and throughput against the step.

    Args:
        run_dirs: folders of runs.
        out: file to write; its ending says the format, such as .svg or .png.

    Returns:
        A line for the user.

    Raises:
        UserError: a folder has no rows, matplotlib is missing, or the file cannot be written.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("matplotlib is not installed: pip install matplotlib") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    if not out.suffix:
        raise UserError(f"cannot write {out}: give a name with an ending, such as .svg or .png")
    if missing := [str(path) for path in run_dirs if not (path / METRICS_FILE).exists()]:
        raise UserError(f"{missing[0]} has no {METRICS_FILE}: give folders of runs")
    figure, axes = plt.subplots(1, len(PANELS), figsize=(15, 3.6), layout="constrained")
    for run_dir in run_dirs:
        table = read_rows(run_dir / METRICS_FILE)
        for axis, (title, names) in zip(axes, PANELS.items(), strict=True):
            axis.set(title=title, xlabel="step")
            axis.grid(alpha=0.3)
            for name in names:
                points = [(row[STEP], row[name]) for row in table if name in row]
                label = name if len(run_dirs) == 1 else f"{run_dir.name} {name}"
                # A value measured once or twice is a point; many make a line.
                style: dict[str, Any] = {"marker": "o"} if len(points) < 5 else {}
                axis.plot(*zip(*points, strict=True), label=label, **style)
            axis.set_ylim(bottom=0)
            if axis.get_legend_handles_labels()[0]:
                axis.legend(fontsize=8)
    try:
        figure.savefig(out)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {out}: {error}") from error
    return f"curves of {counted(len(run_dirs), 'run')}: {out}"

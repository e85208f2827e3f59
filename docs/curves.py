"""AugmentParams the curves of run folders, from their metrics.jsonl, into one picture.

python docs/curves.py RUN_DIR... --out docs/curves.svg
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PANELS = {
    "loss": ("train/loss", "val/loss"),
    "top-1": ("train/top1", "val/top1", "val/superclass_top1"),
    "learning rate": ("train/lr",),
    "images/s": ("perf/images_per_sec",),
}


def draw(run_dirs: list[Path], out: Path) -> None:
    figure, axes = plt.subplots(1, len(PANELS), figsize=(15, 3.6), layout="constrained")
    for run_dir in run_dirs:
        table = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
        for axis, (title, names) in zip(axes, PANELS.items(), strict=True):
            axis.set(title=title, xlabel="step")
            axis.grid(alpha=0.3)
            for name in names:
                points = [(row["step"], row[name]) for row in table if name in row]
                label = name if len(run_dirs) == 1 else f"{run_dir.name} {name}"
                # A value measured once or twice is a point; many make a line.
                style: dict[str, Any] = {"marker": "o"} if len(points) < 5 else {}
                axis.plot(*zip(*points, strict=True), label=label, **style)
            axis.set_ylim(bottom=0)
            axis.legend(fontsize=8)
    figure.savefig(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dirs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("curves.svg"))
    arguments = parser.parse_args()
    draw(arguments.run_dirs, arguments.out)

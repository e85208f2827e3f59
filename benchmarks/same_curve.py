"""Draws the loss of runs on several numbers of processes, and of a run that is killed.

    python -m benchmarks.same_curve [--kills 9] [--out same_curve.svg] [RECIPE --option ...]

Trains once on each of 1, 2 and 4 processes. One more run gets SIGKILL in all of its processes at
steps drawn at random, and is launched again on 1, 2 or 4 processes. Prints the first digits of the
SHA-256 of each run's rows without perf/* and of its weights. The exit code is 1 if runs differ; the
picture is drawn all the same. Without a recipe: `quickstart`, with a row for each step.
"""

import argparse
import hashlib
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.runs import ROW_TIMEOUT, Training, measured
from distvgg.commands.text_tables import markdown_table
from distvgg.metrics import STEP, TRAIN_LOSS, Row
from distvgg.runs.layout import WEIGHTS_FILE
from distvgg.wording import counted

COUNTS = (1, 2, 4)
CPU = {"ACCELERATE_USE_CPU": "true"}
OPTIONS = ("--track.every_steps", "1", "--track.wandb", "false", "--checkpoint.every_steps", "10")
Launches = list[tuple[int, int]]  # (processes, last step before the kill or the end)


def main() -> int:
    """Trains, compares and draws."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--out", type=Path, default=Path("same_curve.svg"))
    options, words = parser.parse_known_args()
    words = ["train", *(words or ["quickstart"]), *OPTIONS]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        names = [counted(n, "process") for n in COUNTS]
        folders = [folder / str(n) for n in COUNTS]
        for n, run_dir in zip(COUNTS, folders, strict=True):
            train(run_dir, words, n)
        names.append(f"killed {options.kills} times")
        folders.append(folder / "killed")
        steps = measured(folders[0])[-1][STEP]
        launches = train_with_kills(folders[-1], words, options.kills, int(steps), options.seed)
        rows = [measured(run_dir) for run_dir in folders]
        sums = [
            (digest(json.dumps(r).encode()), digest((f / WEIGHTS_FILE).read_bytes()))
            for r, f in zip(rows, folders, strict=True)
        ]
    cells = [[name, *both] for name, both in zip(names, sums, strict=True)]
    print(markdown_table(["run", "rows", WEIGHTS_FILE], cells))
    print("launches of the last run:", " -> ".join(str(n) for n, _ in launches))
    draw(dict(zip(names, rows, strict=True)), launches, options.out)
    return 1 if len(set(sums)) > 1 else 0


def digest(content: bytes) -> str:
    """Returns the first 16 digits of the SHA-256."""
    return hashlib.sha256(content).hexdigest()[:16]


def train(run_dir: Path, words: Sequence[str], processes: int) -> None:
    """Trains to the end."""
    with Training(run_dir, words, processes=processes, env=CPU) as training:
        training.process.wait()
        training.ended()


def train_with_kills(
    run_dir: Path, words: Sequence[str], kills: int, steps: int, seed: int
) -> Launches:
    """Trains to the end, with SIGKILL at random steps; returns the launches."""
    rng = random.Random(seed)
    launches: Launches = []
    for step in sorted(rng.sample(range(2, steps), kills)):
        processes = rng.choice(COUNTS)
        with Training(run_dir, words, processes=processes, env=CPU) as training:
            training.until(lambda: " parameters, " in training.output(), ROW_TIMEOUT)
            training.until_step(step, ROW_TIMEOUT)
            training.kill()
        launches.append((processes, int(training.rows()[-1][STEP])))
    processes = rng.choice(COUNTS)
    train(run_dir, words, processes)
    return [*launches, (processes, steps)]


def draw(runs: dict[str, list[Row]], launches: Launches, out: Path) -> None:
    """Draws the losses on top of each other, and below them how far each is from the first."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "distvgg"  # equal runs, equal files
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(9, 4.4), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    losses = {
        name: {int(r[STEP]): r[TRAIN_LOSS] for r in rows if TRAIN_LOSS in r}
        for name, rows in runs.items()
    }
    first, equal = next(iter(losses.values())), True
    for width, (name, loss) in zip((9, 6, 3.5, 1.2), losses.items(), strict=True):
        top.plot(list(loss), list(loss.values()), linewidth=width, label=name)
        gap = [loss[step] - first[step] for step in loss if step in first]
        equal &= not any(gap)
        bottom.plot([step for step in loss if step in first], gap, linewidth=width)
    for _, step in launches[:-1]:
        top.axvline(step, color="0.6", linewidth=0.8, linestyle=":", zorder=0)
    begin = 0
    for processes, step in launches:
        top.annotate(
            str(processes),
            ((begin + step) / 2, 1.01),
            ha="center",
            fontsize=8,
            xycoords=("data", "axes fraction"),
            color="0.35",
        )
        begin = step
    top.set(ylabel="train/loss")
    top.set_title(
        "dotted: SIGKILL to every process; above: processes of each launch of the killed run",
        fontsize=9,
        pad=16,
    )
    top.legend(fontsize=9)
    bottom.set(xlabel="step", ylabel="loss less\nthe first run's")
    if equal:
        bottom.set(ylim=(-2e-16, 2e-16), yticks=(-1e-16, 0, 1e-16))
    for axis in (top, bottom):
        axis.grid(alpha=0.25)
    figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    sys.exit(main())

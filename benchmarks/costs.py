"""Costs of evaluation, rows and input, and growth with processes, batch and dataset.

    python -m benchmarks.costs [--data.path FOLDER] [--parts processes cadence growth]
        [--rounds 3] [--quick] [--plot FILE] [--out FILE]

- **processes**: images/s by the rows of real trainings, one process with all cores against two that
  share them (gloo): the price of being two.
- **cadence**: the seconds of a validation and of a row (with W&B offline, and without) as a share
  of an epoch's steps, as often as the recipe has them, and the cadence at which a validation would
  cost 2%. W&B's own process is counted by the processor time that it takes of all cores. On a GPU
  the pause that a row makes in the device's queue is not seen.
- **growth**: step time and input time by the size of the dataset (the input alone over whole
  epochs, the drawing of each included), images/s by the global batch at one micro-batch, seconds of
  an evaluation by its images. Nothing but the last may grow.
"""

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import psutil

from benchmarks.checkpoint_cost import synchronize
from benchmarks.input_path import noise
from benchmarks.measure import in_turns, ratio, report, save, spread
from benchmarks.runs import ROW_TIMEOUT, training, words_of
from distvgg.commands.text_tables import markdown_table
from distvgg.config import Config
from distvgg.data.cache import load_dataset
from distvgg.data.loader import DeviceImages, EvalLoader
from distvgg.distributed.device import device_here
from distvgg.metrics import IMAGES_PER_SEC
from distvgg.recipe import load
from distvgg.runs.layout import CONFIG_FILE
from distvgg.tracking.trackers import Tracking
from distvgg.training.setup import build
from distvgg.training.state import Run, of_global_batch
from distvgg.training.step import train_step
from distvgg.training.trainer import measure, train_row, validate

PARTS = ("processes", "cadence", "growth")
# Images in a dataset, micro-batches in a global batch, images in an evaluation.
COUNTS = [2_000, 10_000, 50_000, 200_000], [1, 4, 16], [1_000, 5_000, 10_000]
QUICK_COUNTS = [500, 2_000], [1, 4], [500, 1_000]
BLOCK = 2048  # images in a timed block of steps
QUICK: dict[str, Any] = {"data.name": "synthetic", "model.width": 0.05, "train.precision": "no"}
TARGET = 0.02  # the share of training time that a validation may take
LR = 0.01


def main() -> int:
    """Runs the measurements."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data.path", dest="path", help="default: CIFAR-100 of the hub")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="synthetic set, narrow network")
    parser.add_argument("--plot", type=Path, help="an SVG or PNG file; needs all parts")
    parser.add_argument("--out", type=Path, help="a JSON file")
    options = parser.parse_args()
    if options.plot and set(options.parts) != set(PARTS):
        parser.error("--plot needs all parts: leave out --parts")
    overrides = {"data.path": options.path} if options.path else {}
    overrides = QUICK if options.quick else overrides
    config, rounds = load("fast", overrides), 1 if options.quick else options.rounds
    os.environ["WANDB_MODE"] = "offline"
    load_dataset(config.data)  # warms the cache

    findings: dict[str, Any] = {}
    if "processes" in options.parts:
        findings["processes"] = processes(overrides, rounds, rows=1 if options.quick else 3)
    if {"cadence", "growth"} & set(options.parts):
        with tempfile.TemporaryDirectory() as folder:
            run = build(config, Path(folder) / "run")
            if "cadence" in options.parts:
                findings["cadence"] = cadence(run, Path(folder), rounds)
            if "growth" in options.parts:
                findings["growth"] = growth(run, rounds, options.quick)
            run.accelerator.end_training()
    if options.plot:
        draw(findings, options.plot)
    save(report(device_here(), **findings), options.out)
    return 0


def processes(overrides: dict[str, Any], rounds: int, rows: int) -> dict[str, Any]:
    """Images/s of one process and of two on the same cores, over so many rows."""
    cores = os.cpu_count() or 1
    config = load("fast", overrides)
    steps = max(1, BLOCK // config.train.global_batch_size)
    words = ["fast", "--track.wandb", "false", "--track.every_steps", str(steps)]
    words += words_of(overrides)

    def images_per_sec(n: int) -> float:
        threads = ("--train.cpu_threads", str(max(1, cores // n)))
        with training([*words, *threads], n, {"ACCELERATE_USE_CPU": "true"}) as started:
            seen = started.until_step(steps * (rows + 1), ROW_TIMEOUT)
        # The first row lacks the first step, in which memory is laid out.
        return statistics.mean([row[IMAGES_PER_SEC] for row in seen if IMAGES_PER_SEC in row][1:])

    samples = in_turns({str(n): partial(images_per_sec, n) for n in (1, 2)}, rounds)
    found = {n: spread(values) for n, values in samples.items()}
    two_to_one = ratio(samples, "2", "1")
    cells = [[n, str(max(1, cores // int(n))), f"{s['median']:,.1f}"] for n, s in found.items()]
    print(markdown_table(["processes", "threads of each", "images/s"], cells))
    print(f"two processes / one: {two_to_one}\n")
    return {"images_per_sec": found, "ratio": two_to_one}


def cadence(run: Run, folder: Path, rounds: int) -> dict[str, Any]:
    """Measures the share of training time of validations and rows at the recipe's intervals."""
    plan, config = run.plan, run.config
    trackings = {
        name: tracking(run, config.replace(track__wandb=name == "row, W&B offline"), folder / name)
        for name in ("row", "row, W&B offline")
    }
    cases: dict[str, Callable[[], float]] = {
        "step": partial(step_seconds, run, BLOCK // plan.global_batch_size),
        "validation": partial(seconds, run, partial(validate, run, trackings["row"])),
    }
    cases |= {name: partial(row_seconds, run, to) for name, to in trackings.items()}
    step_seconds(run, 2)
    began, before = perf_counter(), children_cpu_seconds()
    with redirect_stdout(sys.stderr):  # the console's lines
        samples = in_turns(cases, rounds)
    wandb_cores = (children_cpu_seconds() - before) / (perf_counter() - began)

    took = {name: spread(values) for name, values in samples.items()}
    epoch = plan.steps(1) * took["step"]["median"]
    rows = plan.steps(1) / config.track.every_steps
    shares = {
        "validation": took["validation"]["median"] / config.eval.every_epochs / epoch,
        "rows": took["row"]["median"] * rows / epoch,
        "rows, W&B offline": took["row, W&B offline"]["median"] * rows / epoch,
        "W&B's process, of all cores": wandb_cores / (os.cpu_count() or 1),
    }
    enough = took["validation"]["median"] / (TARGET * epoch)
    cells = [[name, f"{1000 * s['median']:,.2f}"] for name, s in took.items()]
    print(markdown_table(["what", "ms"], cells))
    cells = [[name, f"{100 * share:.3f}"] for name, share in shares.items()]
    print(markdown_table(["share of an epoch's steps", "%"], cells))
    print(f"a validation costs {100 * TARGET:.0f}% every {enough:.2f} epochs\n")
    return {
        "seconds": took,
        "epoch_seconds": round(epoch, 2),
        "every_epochs": config.eval.every_epochs,
        "every_steps": config.track.every_steps,
        "shares": {name: float(f"{share:.3g}") for name, share in shares.items()},
        "every_epochs_for_2_percent": round(enough, 2),
    }


def tracking(run: Run, config: Config, folder: Path) -> Tracking:
    """Destinations of rows in a folder of their own."""
    folder.mkdir()
    (folder / CONFIG_FILE).write_text(config.to_yaml())  # for the process that serves W&B
    run.accelerator.trackers = []  # init_trackers adds to the list that the last Tracking holds
    with redirect_stdout(sys.stderr):
        return Tracking(run.accelerator, config, folder, run.steps)


def growth(run: Run, rounds: int, quick: bool) -> dict[str, Any]:
    """Cost by dataset size, global batch and evaluation size."""
    sizes, accumulations, evaluations = QUICK_COUNTS if quick else COUNTS
    run.gradients.detach()
    usual = run.plan.global_batch_size
    batches = [n * run.plan.micro_batch_size for n in accumulations]
    by_size = {n: on_noise(run, n, usual) for n in sizes}
    by_batch = {batch: on_noise(run, sizes[0], batch) for batch in batches}
    cases: dict[str, Callable[[], float]] = {}
    for n, of in by_size.items():
        cases[f"step_ms {n}"] = partial(step_ms, of)
        cases[f"input_ms {n}"] = partial(input_ms, of)
    for batch, of in by_batch.items():
        cases[f"images_per_sec {batch}"] = partial(images_per_sec, of)
    pixels = DeviceImages(
        run.dataset, run.dataset.train, run.config.model.image_size, run.accelerator.device
    )
    for n in evaluations:
        loader = EvalLoader(pixels, np.arange(n), run.config.eval.batch_size)
        cases[f"evaluation_s {n}"] = partial(seconds, run, partial(measure, run, loader))
    for of in by_batch.values():
        step_seconds(of, 1)
    samples = in_turns(cases, rounds)
    found: dict[str, Any] = {}
    for case, values in samples.items():
        what, _, of_what = case.partition(" ")
        found.setdefault(what, {})[of_what] = spread(values)
    axes = {
        "step_ms": "images in the dataset",
        "input_ms": "images in the dataset",
        "images_per_sec": "global batch",
        "evaluation_s": "images evaluated",
    }
    for what, by in found.items():
        cells = [[f"{int(x):,}", f"{s['median']:,.4g}"] for x, s in by.items()]
        print(markdown_table([axes[what], what], cells), end="\n\n")
    return found


def on_noise(run: Run, n: int, global_batch_size: int) -> Run:
    """Returns the same run on n random images, in global batches of another size."""
    dataset = noise(n)
    pixels = DeviceImages(
        dataset, dataset.train, run.config.model.image_size, run.accelerator.device
    )
    return of_global_batch(run, global_batch_size, pixels, np.arange(n))


def seconds(run: Run, what: Callable[[], Any]) -> float:
    """Measures the seconds of a function, including the device's work."""
    synchronize(run)
    began = perf_counter()
    what()
    synchronize(run)
    return perf_counter() - began


def step_seconds(run: Run, steps: int) -> float:
    """Measures the mean seconds of a training step."""

    def take() -> None:
        for _ in range(steps):
            micro_batches = run.loader.micro_batches(run.state.step)
            train_step(run, run.state.step, micro_batches, LR)
            run.state.step += 1
            run.clock.step_done()

    run.gradients.attach()
    taken = seconds(run, take) / steps
    run.gradients.detach()
    return taken


def images_per_sec(run: Run) -> float:
    """Measures the throughput of training over a block of images."""
    batch = run.plan.global_batch_size
    return batch / step_seconds(run, BLOCK // batch)


def step_ms(run: Run) -> float:
    """Measures the milliseconds of a training step over a block of images."""
    return 1000 * step_seconds(run, BLOCK // run.plan.global_batch_size)


def input_ms(run: Run) -> float:
    """Measures the mean milliseconds of a step's input over an epoch, its drawing included."""
    first, steps = run.state.step, run.plan.steps(1)

    def take() -> None:
        for step in range(first, first + steps):
            run.loader.micro_batches(step)

    return 1000 * seconds(run, take) / steps


def row_seconds(run: Run, tracking: Tracking) -> float:
    """Of a row of training metrics, after a step without which it would be empty."""
    step_seconds(run, 1)

    def take() -> None:
        run.monitor.drain()
        tracking.log(train_row(run, LR))

    return seconds(run, take)


def children_cpu_seconds() -> float:
    """The processor time of this process's living children, W&B's among them."""
    spent = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return sum(times.user + times.system for times in spent)


def draw(findings: dict[str, Any], out: Path) -> None:
    """Draws how costs grow: medians, with smallest and largest as bars."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    growth, by_processes = findings["growth"], findings["processes"]["images_per_sec"]
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.6), layout="constrained")
    panels: Sequence[tuple[str, str, str, dict[str, Any]]] = [
        ("dataset", "images", "ms a step", {n: growth[n] for n in ("step_ms", "input_ms")}),
        ("processes on the same cores", "processes", "images/s", {"": by_processes}),
        ("accumulation", "global batch", "images/s", {"": growth["images_per_sec"]}),
        ("evaluation", "images", "s", {"": growth["evaluation_s"]}),
    ]
    for axis, (title, x_label, y_label, series) in zip(axes, panels, strict=True):
        axis.set(title=title, xlabel=x_label, ylabel=y_label)
        axis.grid(alpha=0.3)
        for label, by in series.items():
            x, middle = [int(n) for n in by], [s["median"] for s in by.values()]
            below = [s["median"] - s["min"] for s in by.values()]
            above = [s["max"] - s["median"] for s in by.values()]
            axis.errorbar(x, middle, (below, above), marker="o", capsize=3, label=label)
        axis.set_ylim(bottom=0)
        if len(series) > 1:
            axis.legend(fontsize=8)
    axes[0].set_xscale("log")
    axes[1].set_xticks([int(n) for n in by_processes])
    axes[2].set_xscale("log", base=2)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)


if __name__ == "__main__":
    sys.exit(main())

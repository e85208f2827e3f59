"""What a checkpoint costs training, as a ratio measured in one run.

    python -m benchmarks.checkpoint_cost [--recipe fast] [--data.path FOLDER] [--pairs 6]
    accelerate launch ... -m benchmarks.checkpoint_cost ...      over several processes

Blocks of steps that begin with a save alternate with blocks that do not. The difference between
their times is what a save costs: the copy to host memory that the loop waits for, and what writing,
hashing and reading back take from the steps meanwhile. Divided by the time of as many steps as lie
between two saves (checkpoint.every_steps), it is the share of training time. Prints JSON.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from distvgg.recipe import load
from distvgg.tracking.trackers import Tracking
from distvgg.training.setup import build
from distvgg.training.state import Run
from distvgg.training.step import train_step
from distvgg.training.trainer import save_checkpoint


def main() -> int:
    """Runs the measurement."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", default="fast")
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--steps", type=int, default=10, help="in a block")
    parser.add_argument("--data.path", dest="path", default=None)
    parser.add_argument("--dir", type=Path, help="where checkpoints go; default: a temporary one")
    options = parser.parse_args()
    threads = {"train.cpu_threads": os.cpu_count() or 1}
    overrides = (
        {"track.wandb": False} | threads | ({"data.path": options.path} if options.path else {})
    )
    with tempfile.TemporaryDirectory() as temporary:
        run = build(load(options.recipe, overrides), options.dir or Path(temporary) / "run")
        tracking = Tracking(run.accelerator, run.config, run.folder, run.steps)
        report = measure(run, tracking, options.pairs, options.steps)
        if run.accelerator.is_main_process:
            print(json.dumps(report, indent=2))
        run.accelerator.end_training()
    return 0


def measure(run: Run, tracking: Tracking, pairs: int, steps: int) -> dict[str, object]:
    """Times blocks with and without a save, in turns, after one of each that does not count."""
    times: dict[bool, list[float]] = {True: [], False: []}
    waited: list[float] = []
    for nth in range(2 * (pairs + 1)):
        saves = nth % 2 == 1
        synchronize(run)
        started = time.perf_counter()
        if saves:
            save_checkpoint(run, tracking)
            waited.append(time.perf_counter() - started)
        for _ in range(steps):
            train_step(run, run.state.step, run.loader.micro_batches(run.state.step), lr=0.01)
            run.state.step += 1
        synchronize(run)
        times[saves].append(time.perf_counter() - started)
        if run.checkpoints is not None:
            run.checkpoints.wait()  # outside the clock: a block of the default cadence is longer
            assert run.checkpoints.failure() is None
    with_save, without = times[True][1:], times[False][1:]
    costs = [a - b for a, b in zip(with_save, without, strict=True)]
    step = statistics.median(without) / steps
    every = run.config.checkpoint.every_steps or run.steps
    files = list((run.folder / "checkpoints").glob("step_*/*"))
    return {
        "recipe": run.config.data.name,
        "processes": run.plan.world_size,
        "device": str(run.accelerator.device),
        "step_ms": round(1000 * step, 2),
        "loop_waits_ms": round(1000 * statistics.median(waited[1:]), 2),
        "save_costs_ms": round(1000 * statistics.mean(costs), 2),
        "standard_error_ms": round(1000 * statistics.stdev(costs) / len(costs) ** 0.5, 2),
        "every_steps": every,
        "share_of_training_percent": round(100 * statistics.mean(costs) / (every * step), 3),
        "megabytes": round(sum(f.stat().st_size for f in files) / 1e6 / run.config.checkpoint.keep),
    }


def synchronize(run: Run) -> None:
    """Waits for the device, so that a block's time is its own."""
    if run.accelerator.device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())

"""The model of step time (`distributed.cost_model`) against real runs on one and two processes.

    python -m benchmarks.scaling [--recipe fast] [--rounds 3] [--out FILE.json] [--quick]
    python -m benchmarks.scaling --levels [--recipe fast]

One thread a process, gloo, each run started by `accelerate launch`; steps are distvgg's own, on
synthetic images. Nothing is fitted: what a micro-batch and a step by itself take is measured on one
process, latency and bandwidth by exchanges of one number and of 16 MiB between two, and the model
predicts the steps of two. A process beside another has less of the caches, the memory and the
clock; so the constants are measured twice, alone and beside a second run that computes the same
and talks to nobody. The difference between the two predictions is what sharing a machine costs;
GPUs share none of that. gloo has no core of its own here: nothing overlaps.

`--levels` measures nothing: it prints what the model says of the exchange in one level and in more,
on an H100's assumed links.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.measure import in_turns, report, save
from distvgg.commands.bench import (
    FEW,
    MANY,
    Times,
    benchmark_config,
    describe_workload,
    fit_gpu,
    shared_seconds,
    step_times,
)
from distvgg.commands.bench_options import BenchOptions, gpu_spec, interconnect
from distvgg.commands.text_tables import markdown_table
from distvgg.config import Config
from distvgg.distributed.cost_model import Fabric, Gpu, Link, Setup, exchange, levels, step
from distvgg.distributed.reduction_plan import MIB, TreePlan, levels_of
from distvgg.distributed.tree_sum import TreeSum
from distvgg.recipe import load
from distvgg.training.setup import build
from distvgg.training.state import Run

ROOT = Path(__file__).parent.parent
LARGE = 16 * MIB
LENGTHS = (FEW, 2, MANY)
QUICK = {"train.global_batch_size": 64, "train.micro_batch_size": 16}
# The radices of the exchange among so many GPUs, 8 a node.
LEVELS: dict[str, Callable[[int], tuple[int, ...]]] = {
    "one level": lambda n: (n,),
    "node, all nodes": lambda n: levels_of(n, 8, largest=n),
    "at most 4": lambda n: levels_of(n, 8, largest=4),
    "as runs do": lambda n: levels(n, 8),
    "at most 16": lambda n: levels_of(n, 8, largest=16),
}
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
HEADER = [
    "processes",
    "micro-batches each",
    "measured ms",
    "predicted: constants beside another (error)",
    "constants alone (error)",
]


def main() -> int:
    """Runs the measurement, or one rank of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", default=None, help="default: fast, quickstart if quick")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind, in turns")
    parser.add_argument("--steps", type=int, default=8, help="of each length, in a run")
    parser.add_argument("--quick", action="store_true", help="small, once: to see that it works")
    parser.add_argument("--levels", action="store_true", help="the model alone, by levels")
    parser.add_argument("--out", type=Path, help="write everything as JSON")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    recipe = options.recipe or ("quickstart" if options.quick else "fast")
    config = load(recipe, QUICK if options.quick else {})
    if options.worker:
        work(config, options.steps, options.worker)
        return 0
    if options.levels:
        print(markdown_table(["GPUs", *LEVELS], by_levels(config)))
        return 0
    words = ["--recipe", recipe, "--steps", str(options.steps), *(["--quick"] * options.quick)]
    runs = measure(words, 1 if options.quick else options.rounds)
    rows = compare(config, runs)
    link = gloo(runs["together"]).inside
    print(markdown_table(HEADER, list(map(cells, rows))))
    print(f"gloo: {1e6 * link.hop:.0f} us a message, {link.bandwidth / 1e9:.2f} GB/s")
    found = report(torch.device("cpu"), recipe=recipe, gloo=link._asdict(), rows=rows, runs=runs)
    save(found, options.out)
    return 0


def measure(words: list[str], rounds: int) -> dict[str, list[Any]]:
    """Runs on one process, on two, and two apart at the same time, in turns: what they wrote."""
    runs: dict[str, list[Any]] = {"alone": [], "beside": [], "together": []}

    def case(name: str, *processes: int) -> float:
        found = launch(words, *processes)
        runs[name].append(found[0])
        return 1000 * float(statistics.median(found[0]["times"][str(MANY)]))

    cases = {
        "alone": lambda: case("alone", 1),
        "beside": lambda: case("beside", 1, 1),
        "together": lambda: case("together", 2),
    }
    in_turns(cases, rounds)
    return runs


def launch(words: list[str], *processes: int) -> list[Any]:
    """Starts a run for each number of processes, all at once; what each wrote."""
    with TemporaryDirectory() as folder:
        files = [Path(folder) / f"{nth}.json" for nth in range(len(processes))]
        started = [
            subprocess.Popen(
                [
                    *(sys.executable, "-m", "accelerate.commands.launch"),
                    *("--config_file", str(ROOT / "accelerate_config.yaml")),
                    *("--main_process_port", "0", "--num_processes", str(n)),
                    *("-m", "benchmarks.scaling", *words, "--worker", str(file)),
                ],
                cwd=ROOT,
                env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
                stdout=subprocess.DEVNULL,
            )
            for n, file in zip(processes, files, strict=True)
        ]
        for process in started:
            if process.wait():
                raise RuntimeError(
                    f"one of the runs on {processes} processes ended with an error, above"
                )
        return [json.loads(file.read_text()) for file in files]


def work(config: Config, steps: int, file: Path) -> None:
    """One rank of a run: times steps and, with a second rank, exchanges; the main one writes."""
    with TemporaryDirectory() as folder:
        ranks = int(os.environ.get("WORLD_SIZE", 1))
        run = build(benchmark_config(config, ranks), Path(folder) / "run")
        step_times(run, 1, lengths=LENGTHS)  # allocation
        found: dict[str, Any] = {"times": step_times(run, steps, lengths=LENGTHS)}
        if run.accelerator.num_processes == 1:
            found["shared"] = shared_seconds(run)
        if run.accelerator.num_processes > 1:
            found |= {"small": exchange_seconds(run, 2), "large": exchange_seconds(run, LARGE // 4)}
        if run.accelerator.is_main_process:
            file.write_text(json.dumps(found))
        # gloo now and then aborts a rank that leaves while another still talks to it.
        run.accelerator.wait_for_everyone()
        run.accelerator.end_training()


def exchange_seconds(run: Run, numbers: int, rounds: int = 20) -> float:
    """The median time of the exchange of a sum of so many float32."""
    plan = TreePlan(run.plan.world_size, run.tree.ranks)
    values, seconds = torch.zeros(numbers), []
    total = TreeSum(plan, [values], torch.float32)
    for _ in range(rounds + 3):
        total.add([values])
        dist.barrier()
        started = time.perf_counter()
        run.queue.start(total.exchange())
        run.queue.finish()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[3:])


def compare(config: Config, runs: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Measured against predicted: a row for each number of processes and length of a step."""
    pooled = {name: pool(found) for name, found in runs.items()}
    beside, alone = (
        fit_gpu(pooled[n], shared=statistics.median(r["shared"] for r in runs[n]))
        for n in ("beside", "alone")
    )
    job, fabric = describe_workload(config), gloo(runs["together"])

    def row(kind: str, ranks: int, accumulation: int, **gpus: Gpu) -> dict[str, Any]:
        measured = statistics.median(pooled[kind][accumulation])
        found: dict[str, Any] = {"processes": ranks, "micro_batches": accumulation}
        found["measured_s"] = measured
        for name, gpu in gpus.items():
            predicted = step(Setup(job, gpu, fabric), ranks, accumulation)
            found[name] = predicted._asdict() | {
                "seconds": predicted.seconds,
                "error": predicted.seconds / measured - 1,
            }
        return found

    # One process's own constants come from the other two lengths.
    return [
        row("alone", 1, 2, alone=alone),
        *(row("together", 2, length, beside=beside, alone=alone) for length in LENGTHS),
    ]


def pool(runs: list[Any]) -> Times:
    """The times of several runs together."""
    return {length: [t for run in runs for t in run["times"][str(length)]] for length in LENGTHS}


def gloo(runs: list[Any]) -> Fabric:
    """Computes the links of two processes by equation 3.

    Latency follows from the small exchange, and bandwidth from the extra time of the large one.
    """
    small, large = (statistics.median(run[size] for run in runs) for size in ("small", "large"))
    hop = small / 2
    link = Link(LARGE / (large - small), ring_hop=hop, tree_hop=hop, hop=hop, post=0.0)
    return Fabric(2, launch=0.0, send=0.0, inside=link, between=link, overlaps=False)


def by_levels(config: Config, images_per_sec: float = 20_000) -> list[list[str]]:
    """Returns predicted times of the exchange in ms, by number of GPUs and by radices.

    A cell has the time of all gradients in one piece, with nothing else running. In brackets is the
    time of a step in which a rank only waits for other ranks' sums, Muon's results included. A step
    has four micro-batches of the recipe.
    """
    job = describe_workload(config)
    options = BenchOptions(gpu="h100", images_per_sec=images_per_sec)
    setup = Setup(job, gpu_spec(options, job, MANY), interconnect(options))
    size = sum(sum(layer.gradients) for layer in job.layers)

    def cell(ranks: int, radices: tuple[int, ...]) -> str:
        there, back = exchange(size, radices, (1,) * len(radices), setup.fabric)
        exposed = step(setup, ranks, MANY, radices).exposed
        return f"{1000 * sum(there + back):.2f} ({1000 * exposed:.2f})"

    return [[f"{n:,}", *(cell(n, of(n)) for of in LEVELS.values())] for n in GPUS]


def cells(row: dict[str, Any]) -> list[str]:
    """A line of the table."""
    predictions = [
        f"{1000 * row[name]['seconds']:.1f} ({row[name]['error']:+.1%})" if name in row else ""
        for name in ("beside", "alone")
    ]
    measured = f"{1000 * row['measured_s']:.1f}"
    return [str(row["processes"]), str(row["micro_batches"]), measured, *predictions]


if __name__ == "__main__":
    sys.exit(main())

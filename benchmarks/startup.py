"""What it costs to start: to the first step, to the help text, to the first decode, in memory.

    python -m benchmarks.startup [--data.path FOLDER] [--rounds 5] [--quick] [--out FILE]
        [--parts first_step imports help decode memory]

- **first step**: from the start of `python -m distvgg train fast`, plain as peers train it, with a
  warm cache until its metrics.jsonl holds the first step's row, against the bare minimum
  (`benchmarks.bare_start`), with and without a step, until that prints. The same with the seconds
  of the bare step itself taken off, so that a large network does not hide the start. Once more
  under `-X importtime`: whose imports those are.
- **help**: until `--help` and `train fast --help` have ended.
- **decode**: until an empty DISTVGG_CACHE is filled, by one process and by two at once. Who decodes
  burns processor time, who waits for the other does not.
- **memory**: the proportional set size of the mapped cache files in each of 1, 2 and 4 processes
  that train, after an epoch: a page that n processes map counts 1/n in each (proc_pid_smaps(5)).
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import in_turns, ratio, report, save, spread
from benchmarks.runs import PLAIN, ROOT, ROW_TIMEOUT, training, words_of
from distvgg.commands.text_tables import markdown_table
from distvgg.data.cache import cache_entry, load_dataset
from distvgg.distributed.device import device_here, resolve_precision
from distvgg.metrics import EPOCH, STEP
from distvgg.recipe import load

FIRST, WANDB = "first step", "first step, W&B offline"
MODEL, STEPPED = "bare model", "bare model and step"
LESS = " less what the bare step takes"
PARTS = ("first_step", "imports", "help", "decode", "memory")
HELPS = {"--help": ["--help"], "train fast --help": ["train", "fast", "--help"]}
# Small networks of the recipe, where the network is not what is measured.
NARROW = ("--model.width", "0.05", "--train.precision", "no")
# torch's own optimizers import torch._dynamo (torch 2.14): told apart from the rest of torch.
DYNAMO = "torch._dynamo"
LOAD = (
    "import sys; from distvgg.commands.arguments import resolve, train_parser\n"
    "from distvgg.config import Config; from distvgg.data.cache import load_dataset\n"
    "load_dataset(resolve(train_parser(Config()).parse(sys.argv[1:]))[1].data)"
)


def main() -> int:
    """Runs the measurements."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data.path", dest="path", help="default: CIFAR-100 of the hub")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="synthetic set, narrow network")
    parser.add_argument("--out", type=Path, help="a JSON file")
    options = parser.parse_args()
    words = ["fast", *words_of(PLAIN), *(["--data.path", options.path] if options.path else [])]
    if options.quick:
        words = ["fast", *words_of(PLAIN), "--data.name", "synthetic", *NARROW]
    # As many threads as the bare minimum has.
    words += ["--train.cpu_threads", str(torch.get_num_threads())]
    rounds = 1 if options.quick else options.rounds
    load_dataset(config_of(words).data)  # warms the cache

    parts: dict[str, Callable[[], Any]] = {
        "first_step": partial(first_step, words, rounds, options.quick),
        "imports": partial(imports, words),
        "help": partial(help_texts, rounds),
        "decode": partial(decode, words, (2,) if options.quick else (1, 2)),
        "memory": partial(memory, words, (2,) if options.quick else (1, 2, 4)),
    }
    findings = {name: part() for name, part in parts.items() if name in options.parts}
    save(report(device_here(), **findings), options.out)
    return 0


def config_of(words: Sequence[str]) -> Any:
    """The config that words of the command line mean."""
    recipe, *rest = words
    options = dict(zip(rest[::2], rest[1::2], strict=True))
    return load(recipe, {name.removeprefix("--"): value for name, value in options.items()})


def first_step(words: Sequence[str], rounds: int, quick: bool) -> dict[str, Any]:
    """Seconds to the first step, and their ratios to the bare minimum."""
    config = config_of(words)
    precision = resolve_precision(config.train.precision, device_here())
    bare = ["--width", str(config.model.width), "--precision", precision]
    steps: list[float] = []

    def stepped() -> float:
        seconds, step = bare_start([*bare, "--step"])
        steps.append(step)
        return seconds

    cases: dict[str, Callable[[], float]] = {
        FIRST: lambda: to_first_step([*words, "--track.wandb", "false"]),
        MODEL: lambda: bare_start(bare)[0],
        STEPPED: stepped,
    }
    if not quick:
        cases[WANDB] = lambda: to_first_step(words)
        for measured in cases.values():
            measured()  # brings every file into the page cache
        steps.clear()
    samples = in_turns(cases, rounds)
    for case in (FIRST, STEPPED):
        samples[f"{case}{LESS}"] = [a - b for a, b in zip(samples[case], steps, strict=True)]
    ratios = {
        f"{of} / {to}": ratio(samples, of, to)
        for of, to in (
            (FIRST, STEPPED),
            (FIRST + LESS, STEPPED + LESS),
            (FIRST + LESS, MODEL),
            (FIRST, MODEL),
        )
    }
    found = {name: spread(values) for name, values in samples.items()}
    print(
        markdown_table(["start", "s"], [[name, f"{s['median']:.2f}"] for name, s in found.items()]),
        end="\n\n",
    )
    print(
        markdown_table(["ratio", ""], [[name, f"{value:.2f}"] for name, value in ratios.items()]),
        end="\n\n",
    )
    return {"seconds": found, "bare_step_seconds": spread(steps), "ratios": ratios}


def to_first_step(words: Sequence[str]) -> float:
    """Seconds until a training has written the row of its first step."""
    offline = {"WANDB_MODE": "offline"}
    with training([*words, "--track.every_steps", "1"], env=offline) as started:
        started.until_step(1, ROW_TIMEOUT)
        return time.perf_counter() - started.began


def bare_start(words: Sequence[str]) -> tuple[float, float]:
    """Seconds until the bare minimum says that it is done, and what it says its step took."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.bare_start", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        seconds = time.perf_counter() - began
    return seconds, float(line)


def imports(words: Sequence[str]) -> dict[str, float]:
    """Measures milliseconds of imports by package, until a training's first step.

    The interpreter's own profiler measures them; it slows the imports.
    """
    env = {"PYTHONPROFILEIMPORTTIME": "1"}
    words = [*words, "--track.wandb", "false", "--track.every_steps", "1"]
    with training(words, env=env) as started:
        started.until_step(1, ROW_TIMEOUT)
        text = started.log.read_text()
    spent = by_package(text)
    cells = [[name, f"{ms:,.0f}"] for name, ms in spent.items()]
    print(markdown_table(["imports of train fast", "ms"], cells), end="\n\n")
    return spent


def by_package(text: str, most: int = 8) -> dict[str, float]:
    """Parses the output of `-X importtime` to milliseconds by top-level package, largest first.

    All modules that torch._dynamo imports count as torch._dynamo, whatever their package.
    """
    line = r"^import time: +(\d+) \| +\d+ \|( +)(\S+)$"
    spent: Counter[str] = Counter()
    dynamo: int | None = None  # how deep below it we are
    # A module is written after those that it imports: backwards, it comes first.
    for own, indent, name in reversed(re.findall(line, text, re.MULTILINE)):
        if dynamo is not None and len(indent) <= dynamo:
            dynamo = None
        if name == DYNAMO:
            dynamo = len(indent)
        spent[DYNAMO if dynamo is not None else name.partition(".")[0]] += int(own)
    top = {name: us / 1000 for name, us in spent.most_common(most)}
    return top | {"all others": sum(spent.values()) / 1000 - sum(top.values())}


def help_texts(rounds: int) -> dict[str, Any]:
    """Seconds until a help text is printed and its process gone."""

    def seconds(words: list[str]) -> float:
        began = time.perf_counter()
        command = [sys.executable, "-m", "distvgg", *words]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - began

    samples = in_turns({name: partial(seconds, words) for name, words in HELPS.items()}, rounds)
    found = {name: spread(values) for name, values in samples.items()}
    print(
        markdown_table(["help", "s"], [[name, f"{s['median']:.2f}"] for name, s in found.items()]),
        end="\n\n",
    )
    return found


def decode(words: Sequence[str], counts: Sequence[int]) -> list[dict[str, Any]]:
    """Fills an empty cache, by as many processes at once."""
    found: list[dict[str, Any]] = []
    for processes in counts:
        with tempfile.TemporaryDirectory() as cache:
            began = time.perf_counter()
            cpu_seconds = fill(Path(cache), words, processes)
            seconds = time.perf_counter() - began
            entries = sum(path.is_dir() for path in Path(cache).iterdir())
        found.append(
            {
                "processes": processes,
                "seconds": round(seconds, 2),
                "cpu_seconds": [round(cpu, 2) for cpu in cpu_seconds],
                "entries": entries,
            }
        )
    cells = [
        [str(f["processes"]), f"{f['seconds']:.1f}", " ".join(f"{c:.1f}" for c in f["cpu_seconds"])]
        for f in found
    ]
    print(markdown_table(["processes on an empty cache", "s", "CPU s of each"], cells), end="\n\n")
    return found


def fill(cache: Path, words: Sequence[str], processes: int) -> list[float]:
    """Loads a dataset through a cache in processes that start together.

    Returns:
        Processor seconds of each process, including its threads and children.
    """
    started = [
        subprocess.Popen(
            [sys.executable, "-c", LOAD, *words],
            env=os.environ | {"DISTVGG_CACHE": str(cache)},
            cwd=ROOT,
        )
        for _ in range(processes)
    ]
    seconds = []
    for process in started:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"loading ended with {process.returncode}")
        seconds.append(usage.ru_utime + usage.ru_stime)
    return seconds


def memory(words: Sequence[str], counts: Sequence[int]) -> list[dict[str, Any]]:
    """How much of the mapped cache files processes that train hold, by how many they are."""
    found = [mapped(words, processes) for processes in counts]
    cells = [
        [
            *(str(f["processes"]), f"{f['set_mib']:.1f}", " ".join(map(str, f["pss_mib"]))),
            *(f"{sum(f['pss_mib']):.1f}", f"{sum(f['rss_mib']):.1f}"),
        ]
        for f in found
    ]
    header = ["processes", "images in the cache, MiB", "PSS of each", "sum", "sum if not shared"]
    print(markdown_table(header, cells), end="\n\n")
    return found


def mapped(words: Sequence[str], processes: int) -> dict[str, Any]:
    """Measures the cache's images, and their pages in each process after an epoch, in MiB.

    Pages are counted proportionally (`pss`), and as all that a process has mapped (`rss`).
    """
    entry = cache_entry(config_of(words).data)
    images = list(entry.glob("*_images.npy"))
    words = [*words, *NARROW, "--track.wandb", "false", "--track.every_steps", "20"]
    with training(words, processes, {"OMP_NUM_THREADS": "1"}) as started:
        rows = started.until_step(1, ROW_TIMEOUT)
        while rows[-1][EPOCH] < 1:
            rows = started.until_step(int(rows[-1][STEP]) + 1, ROW_TIMEOUT)
        of_workers = [
            [m for m in worker.memory_maps() if Path(m.path) in images]
            for worker in started.workers()
        ]
    return {
        "processes": processes,
        "set_mib": mib(sum(file.stat().st_size for file in images)),
        "pss_mib": [mib(sum(m.pss for m in maps)) for maps in of_workers],
        "rss_mib": [mib(sum(m.rss for m in maps)) for maps in of_workers],
    }


def mib(size: int) -> float:
    """Bytes in mebibytes."""
    return round(size / 2**20, 1)


if __name__ == "__main__":
    torch.set_num_threads(1)  # this process only watches
    sys.exit(main())

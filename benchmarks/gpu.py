"""All that needs a GPU, measured by one command.

    python -m benchmarks.gpu [--data.path FOLDER] [--out FILE.json] [--only rate,graphs,...]
    python -m benchmarks.gpu --quick        toy sizes on the device that is there, a CPU as well

The sections, in order of value:

rate        the best rate of large matrix products in bf16: the yardstick of what follows
graphs      the training step with and without CUDA graphs: speed, time in kernels, same bytes
target      how long a recipe trains until validation reaches an accuracy
variants    forward and backward under changes that may make the kernels faster, and Muon's
            iteration batched
throughput  the real training step, eager and compiled, by micro-batch size, beside plain loops
            on one fixed batch (eager, cuDNN's fastest kernels, compiled, a CUDA graph: the limit)
            and behind a DataLoader
traffic     copies between host and device in a step, kernels, how busy they keep the device; does
            anything in a step make the host wait?
first_step  from the start of the process to the end of the first step
equal_bytes launch/prove.py in each precision: one run on 1, 2 and 4 processes, and one with kills;
            on one GPU they share it, over gloo

Prints Markdown tables. Each section has a process of its own, at most two minutes, and --out is
written after it: what was measured stays measured. No section starts after --limit seconds.
`benchmarks.peers` and `benchmarks.checkpoint_cost` run on a GPU as they are.
"""

import argparse
import gc
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from accelerate.state import AcceleratorState
from torch.profiler import ProfilerActivity, profile

from benchmarks.fixed_batch import (
    PREFETCH,
    Step,
    captured,
    cudnn,
    data_loader,
    fixed_batch,
    synchronize,
)
from benchmarks.measure import Samples, in_turns, ratio, report, save, spread
from benchmarks.network_variants import VARIANTS, micro_batch, newton_schulz
from benchmarks.runs import ROW_TIMEOUT, Training, words_of
from distvgg.commands.text_tables import markdown_table
from distvgg.config import Config
from distvgg.data.cache import load_dataset
from distvgg.data.plan import BatchPlan
from distvgg.distributed.device import device_here
from distvgg.metrics import STEP_MS
from distvgg.models.blocks import use_kernels
from distvgg.models.flops import training_flops
from distvgg.recipe import load
from distvgg.runs.layout import RESULT_FILE
from distvgg.training.setup import build
from distvgg.training.state import Run
from distvgg.training.step import train_step

ROOT = Path(__file__).parent.parent
Findings = dict[str, Any]
LR = 0.01  # small: what is timed must not diverge
WARMUP = 5  # steps that do not count: allocation, compilation, cuDNN's choice
REFERENCE = "fixed batch"
COMPARED = 20  # steps after which the weights with and without CUDA graphs are compared
SECTION_TIMEOUT = 120  # seconds
LAUNCHERS = "cuda_runtime", "cuda_driver"

FURTHER = (
    "python -m benchmarks.peers",
    "python -m benchmarks.checkpoint_cost --recipe fast",
    "pytest -m gpu",
)


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        matrices: sides of the square matrices. flops: of a block of their products.
        images: in a block of steps. accumulation: micro-batches in a step, beside 1.
        profiled: steps in a profile. starts: rounds of whole processes.
    """

    matrices: tuple[int, ...]
    flops: float
    micro_batches: tuple[int, ...]
    images: int
    accumulation: int
    profiled: int
    rounds: int
    starts: int


FULL = Sizes((4096, 8192, 16384), 4e13, (128, 512), 16384, 4, 10, 3, 2)
QUICK = Sizes((64, 128), 1e8, (8,), 32, 2, 4, 1, 1)
# A network and a set of data that a CPU trains in seconds.
TOY: dict[str, Any] = {
    "data.name": "synthetic",
    "data.train_size": 600,
    "data.val_size": 103,
    "model.depth": 11,
    "model.width": 0.05,
    "train.global_batch_size": 16,
    "train.micro_batch_size": 8,
}


@dataclass(frozen=True)
class Setting:
    """What is measured: a recipe with overrides, on a device."""

    device: torch.device
    recipe: str
    overrides: dict[str, Any]
    sizes: Sizes
    compile: bool
    workers: int

    def config(self, **dotted: Any) -> Config:
        """The recipe with `overrides`, and more of them, dots written as double underscores."""
        return load(self.recipe, self.overrides).replace(**dotted)

    def words(self) -> list[str]:
        """The command line of distvgg that trains it, without a run folder."""
        return ["train", self.recipe, *words_of(self.overrides)]


def main() -> int:
    """Measures the sections that were asked for."""
    options = parse()
    device = device_here()
    if device.type != "cuda" and not options.quick:
        raise SystemExit("there is no CUDA GPU here: --quick tries the program out on a CPU")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise SystemExit("this measures one GPU: start it with python, not accelerate launch")
    overrides = {"track.wandb": False} | (TOY if options.quick else {})
    if options.path:
        overrides["data.path"] = options.path
    sizes = QUICK if options.quick else FULL
    setting = Setting(device, options.recipe, overrides, sizes, options.compile, options.workers)
    target, epochs = options.target, options.epochs
    sections: dict[str, Callable[[], Findings]] = {
        "rate": lambda: measure_rate(setting),
        "graphs": lambda: measure_graphs(setting, options.rate),
        "target": lambda: measure_target(setting, target, epochs),
        "variants": lambda: measure_variants(setting, options.rate),
        "throughput": lambda: measure_throughput(setting, options.rate),
        "traffic": lambda: measure_traffic(setting),
        "first_step": lambda: measure_first_step(setting),
        "equal_bytes": lambda: measure_equal_bytes(setting, options.quick),
    }
    unknown = set(options.only) - set(sections)
    if unknown:
        raise SystemExit(f"no section {', '.join(unknown)}: take some of {', '.join(sections)}")
    findings = report(device, card=card(device), quick=options.quick)
    if len(options.only) == 1:
        (name,) = options.only
        findings[name] = sections[name]()
        save(findings, options.out)
        return 0
    print(f"{findings['hardware']}  {json.dumps(findings['card'])}\n", flush=True)
    began, failed = time.monotonic(), 0
    for name in options.only or sections:
        if (elapsed := time.monotonic() - began) > options.limit:
            print(f"{name}: left out after {elapsed:.0f} s\n", flush=True)
            continue
        findings[name] = in_own_process(name, findings.get("rate"))
        seconds = time.monotonic() - began - elapsed
        failed += findings[name] is None
        print(f"{name}: {'failed' if findings[name] is None else 'took'} {seconds:.0f} s\n")
        save(findings, options.out)
    print("To be run on the same card:\n\n" + "\n".join(f"    {words}" for words in FURTHER))
    return min(failed, 1)


def in_own_process(section: str, rate: Findings | None) -> Findings | None:
    """Measures one section, whose failure then leaves the others a working GPU.

    Returns:
        Its findings; None if it failed or took longer than `SECTION_TIMEOUT`.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "section.json"
        words = [*sys.argv[1:], "--only", section, "--out", str(out)]
        if rate is not None:
            words += ["--rate", str(rate["best_tflops"])]
        process = psutil.Popen([sys.executable, "-m", "benchmarks.gpu", *words])
        try:
            code = process.wait(SECTION_TIMEOUT)
        except psutil.TimeoutExpired:
            for child in (*process.children(recursive=True), process):
                with suppress(psutil.NoSuchProcess):
                    child.kill()
            code = process.wait()
        if code:
            return None
        findings: Findings = json.loads(out.read_text())[section]
        return findings


def parse() -> argparse.Namespace:
    """The words of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", type=lambda text: text.split(","), default=[])
    parser.add_argument("--quick", "--dry-run", action="store_true", help="toy sizes, any device")
    parser.add_argument("--recipe", default="fast")
    parser.add_argument("--data.path", dest="path")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--target", type=float, default=0.75, help="validation top-1")
    parser.add_argument("--epochs", type=float, default=12, help="of the target's run")
    parser.add_argument(
        "--rate", type=float, help="TFLOP/s of the section rate, if measured before"
    )
    parser.add_argument("--limit", type=float, default=420, help="seconds")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def card(device: torch.device) -> Findings:
    """A GPU with its driver, CUDA and cuDNN; empty for a CPU."""
    if device.type != "cuda":
        return {}
    properties = torch.cuda.get_device_properties(device)
    asked = "driver_version", "power.limit", "clocks.max.sm"
    try:
        answer = subprocess.run(
            [
                "nvidia-smi",
                f"--query-gpu={','.join(asked)}",
                "--format=csv,noheader",
                f"--id=GPU-{properties.uuid}",
            ],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):  # not in every container
        answer = ""
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
    } | dict(zip(asked, answer.strip().split(", "), strict=False))


def measure_rate(setting: Setting) -> Findings:
    """TFLOP/s of n x n by n x n matrix products in bf16 (2 n^3 operations each)."""
    device, sizes = setting.device, setting.sizes

    def rate(n: int) -> Callable[[], float]:
        a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
        out = torch.empty_like(a)
        products = max(3, int(sizes.flops / (2 * n**3)))

        def block() -> float:
            torch.mm(a, b, out=out)
            with Stopwatch(device) as stopwatch:
                for _ in range(products):
                    torch.mm(a, b, out=out)
            return products * 2 * n**3 / stopwatch.seconds / 1e12

        return block

    samples = in_turns({f"{n} x {n}": rate(n) for n in sizes.matrices}, sizes.rounds)
    rows = [[name, f"{max(values):.4g}"] for name, values in samples.items()]
    print(markdown_table(["bf16 matrix product", "TFLOP/s, best"], rows) + "\n")
    best = max(map(max, samples.values()))
    return {"best_tflops": float(f"{best:.4g}")} | {k: spread(v) for k, v in samples.items()}


def measure_graphs(setting: Setting, best: float | None) -> Findings:
    """The recipe's training step with and without CUDA graphs, in turns."""
    cases = {"with graphs": True, "without": False}
    plain = "with graphs, torch's BatchNorm"
    findings: Findings = {}
    with tempfile.TemporaryDirectory() as temporary:
        runs = {
            name: fresh_run(setting.config(train__cuda_graphs=on), Path(temporary) / name)
            for name, on in cases.items()
        }
        runs[plain] = fresh_run(setting.config(), Path(temporary) / "plain")
        use_kernels(runs[plain].vgg, on=False)
        steps = {name: real_step(run) for name, run in runs.items()}
        for step in steps.values():
            for _ in range(COMPARED):
                step()
        digests = {name: digest(run) for name, run in runs.items()}
        images = setting.config().train.global_batch_size
        blocks = {name: speed(setting, Loop(step, images)) for name, step in steps.items()}
        samples = in_turns(blocks, setting.sizes.rounds)
        flops = training_flops(setting.config().model, runs["without"].dataset.num_classes)
        for name, step in steps.items():
            events = device_events(step, setting.sizes.profiled, setting.device)
            found = describe_speed(samples, name, images, flops, best, reference="without")
            found |= in_kernels(events, setting.sizes.profiled)
            found["longest_kernels"] = longest_kernels(events, setting.sizes.profiled)
            failure = (graphs := runs[name].graphs) and graphs.failure()
            findings[name] = found | {"digest": digests[name], "failure": failure}
    equal = len({digests[name] for name in cases}) == 1
    header = ["step", "images/s", "step, ms", "in kernels, ms", "kernels", "of the rate", "bytes"]
    rows = [
        [
            *(name, f"{f['images_per_sec']['median']:,.0f}", f"{f['step_ms']:.2f}"),
            *(f"{f['kernel_ms']:.2f}", f"{f['kernels']:,.0f}", _cell(f["of_rate"])),
            "others" if name == plain else "equal" if equal else "DIFFERENT",
        ]
        for name, f in findings.items()
    ]
    print(markdown_table(header, rows) + "\n")
    return findings | {"equal_after_steps": COMPARED if equal else None}


def digest(run: Run) -> str:
    """SHA-256 of the weights and BatchNorm's statistics."""
    found = hashlib.sha256()
    for name, value in run.vgg.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            found.update(value.cpu().numpy().tobytes())
    return found.hexdigest()


def in_kernels(events: Sequence[Mapping[str, Any]], steps: int) -> Findings:
    """Kernels and their milliseconds a step, and the calls by which the host launched them.

    Args:
        events: in the format of chrome://tracing, times in microseconds.
        steps: number of steps that `events` cover.
    """
    kernels = [e for e in events if e.get("cat") == "kernel"]
    launches = [e for e in events if "Launch" in e.get("name", "") and e.get("cat") in LAUNCHERS]
    return {
        "kernels": len(kernels) / steps,
        "kernel_ms": sum(e["dur"] for e in kernels) / steps / 1000,
        "launches": len(launches) / steps,
    }


def longest_kernels(
    events: Sequence[Mapping[str, Any]], steps: int, most: int = 40
) -> dict[str, list[float]]:
    """Returns launches and milliseconds a step of the kernels that take the longest, by name."""
    found: dict[str, list[float]] = {}
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            of_name = found.setdefault(event["name"][:160], [0.0, 0.0])
            of_name[0] += 1 / steps
            of_name[1] += event["dur"] / steps / 1000
    longest = sorted(found.items(), key=lambda item: -item[1][1])[:most]
    return {name: [round(value, 4) for value in values] for name, values in longest}


def measure_variants(setting: Setting, best: float | None) -> Findings:
    """Forward and backward of a micro-batch under changes of the network, and Muon's iteration."""
    config, device, sizes = setting.config(), setting.device, setting.sizes
    classes = load_dataset(config.data).num_classes
    flops = training_flops(config.model, classes)
    findings: Findings = {}
    rows = []
    for size in sizes.micro_batches:
        names = [n for n in VARIANTS if setting.compile or "compiled" not in n]
        blocks = {
            name: speed(
                setting, Loop(micro_batch(config, classes, device, size, VARIANTS[name]), size)
            )
            for name in names
        }
        samples = in_turns(blocks, sizes.rounds)
        found = {
            name: describe_speed(samples, name, size, flops, best, reference=names[0])
            for name in names
        }
        findings[str(size)] = found
        rows += [speed_row(name, size, f) for name, f in found.items()]
        forget()
    header = ["forward and backward", "images", "images/s", "ms", "TFLOP/s", "of the rate", "ratio"]
    print(markdown_table(header, rows) + "\n")
    ways = {"layer by layer": (False, True), "in fp32": (False, False), "batched": (True, True)}
    iterations = {
        name: speed(setting, Loop(newton_schulz(config, device, batched=batched, tf32=tf32), 1024))
        for name, (batched, tf32) in ways.items()
    }
    samples = in_turns(iterations, sizes.rounds)
    ms = {name: 1024e3 / spread(values)["median"] for name, values in samples.items()}
    print(
        markdown_table(["Muon's iterations", "ms"], [[n, f"{v:.3f}"] for n, v in ms.items()]) + "\n"
    )
    return findings | {"newton_schulz_ms": ms}


def measure_throughput(setting: Setting, best: float | None) -> Findings:
    """Images a second of every loop at every micro-batch size."""
    classes = load_dataset(setting.config().data).num_classes
    flops = training_flops(setting.config().model, classes)
    findings: Findings = {"flops_per_image": flops}
    header = [
        *("loop", "images a step", "images/s", "step, ms"),
        *("TFLOP/s", "of the rate", "of fixed batch"),
    ]
    rows: list[list[str]] = []
    for size in setting.sizes.micro_batches:
        try:
            samples, images = throughput(setting, size, classes)
        except torch.OutOfMemoryError:
            print(f"micro-batches of {size} do not fit into memory\n")
            break
        finally:
            forget()
        found = {name: describe_speed(samples, name, images[name], flops, best) for name in samples}
        findings[str(size)] = found
        rows += [speed_row(name, images[name], f) for name, f in found.items()]
    if rows:
        print(markdown_table(header, rows) + "\n")
    return findings


def throughput(setting: Setting, size: int, classes: int) -> tuple[Samples, dict[str, int]]:
    """Images a second of each loop at one micro-batch size, and how many images its step takes."""
    with tempfile.TemporaryDirectory() as temporary:
        found = loops(setting, size, classes, Path(temporary))
        blocks = {name: speed(setting, loop) for name, loop in found.items()}
        samples = in_turns(blocks, setting.sizes.rounds)
    return samples, {name: loop.images for name, loop in found.items()}


class Loop(NamedTuple):
    """A loop to be timed.

    Attributes:
        images: in a step.
        fastest: with cuDNN's fastest kernels, not the reproducible ones.
        skip: steps whose input is made while other loops are timed, and which do not count.
    """

    step: Step
    images: int
    fastest: bool = False
    skip: int = 0


def loops(setting: Setting, size: int, classes: int, folder: Path) -> dict[str, Loop]:
    """Every loop that this device can run, at one micro-batch size."""
    device, many, workers = setting.device, setting.sizes.accumulation, setting.workers
    one = setting.config(train__micro_batch_size=size, train__global_batch_size=size)
    more = one.replace(train__global_batch_size=many * size)

    def fixed(mode: str | None = None) -> Loop:
        return Loop(fixed_batch(one, classes, device, mode=mode), size)

    def real(config: Config) -> Loop:
        run = fresh_run(config, Path(tempfile.mkdtemp(dir=folder)) / "run")
        return Loop(real_step(run), config.train.global_batch_size)

    behind_loader = data_loader(one, load_dataset(one.data), device, workers)
    found = {
        REFERENCE: fixed(),
        "fixed batch, cudnn.benchmark": fixed()._replace(fastest=True),
        "distvgg": real(one),
        f"distvgg, {many} micro-batches": real(more),
        f"DataLoader, {workers} workers": Loop(behind_loader, size, skip=PREFETCH * workers),
    }
    if device.type == "cuda":
        cudnn(deterministic=True)
        found["fixed batch, CUDA graph"] = Loop(captured(fixed().step), size)
    if setting.compile:
        found["fixed batch, compiled"] = fixed("default")
        found["distvgg, compiled"] = real(one.replace(train__compile=True))
        compiled = real(more.replace(train__compile=True))
        found[f"distvgg, {many} micro-batches, compiled"] = compiled
    if setting.compile and device.type == "cuda":
        found["fixed batch, reduce-overhead"] = fixed("reduce-overhead")
    return found


def speed(setting: Setting, loop: Loop) -> Callable[[], float]:
    """A function that times a block of steps, in images a second."""
    steps = max(1, setting.sizes.images // loop.images)

    def take(steps: int) -> None:
        cudnn(deterministic=not loop.fastest)
        for _ in range(steps):
            loop.step()

    def block() -> float:
        take(1 + loop.skip)
        with Stopwatch(setting.device) as stopwatch:
            take(steps)
        return steps * loop.images / stopwatch.seconds

    take(WARMUP)
    return block


def fresh_run(config: Config, folder: Path) -> Run:
    """A run in a process that had others before."""
    # accelerate keeps its state for a process's lifetime, and would compile what the first did.
    AcceleratorState._reset_state(reset_partial_state=True)
    return build(config, folder)


def real_step(run: Run) -> Step:
    """What the training loop does in a step that is due for nothing else."""

    def step() -> None:
        train_step(run, run.state.step, run.loader.micro_batches(run.state.step), LR)
        run.state.step += 1
        run.monitor.poll()

    return step


def describe_speed(
    samples: Samples,
    name: str,
    images: int,
    flops: int,
    rate: float | None,
    reference: str = REFERENCE,
) -> Findings:
    """A loop's speed in all the units that it is compared by."""
    speeds = spread(samples[name])
    tflops = speeds["median"] * flops / 1e12
    return {
        "images_per_sec": speeds,
        "step_ms": float(f"{1000 * images / speeds['median']:.4g}"),
        "tflops": float(f"{tflops:.4g}"),
        "of_rate": None if rate is None else round(tflops / rate, 4),
        "of_fixed_batch": ratio(samples, name, reference),
    }


def speed_row(name: str, images: int, found: Findings) -> list[str]:
    """A loop's line of the table."""
    share = found["of_rate"]
    return [
        *(name, str(images), f"{found['images_per_sec']['median']:,.0f}"),
        *(f"{found['step_ms']:.2f}", f"{found['tflops']:.4g}"),
        *("" if share is None else f"{share:.1%}", f"{found['of_fixed_batch']:.3f}"),
    ]


def forget() -> None:
    """Frees what the loops of one size held; the next is compiled for its own shapes alone."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


COLUMNS = {
    "kernels": "kernels",
    "HtoD": "to device",
    "HtoD_bytes": "bytes",
    "DtoH": "to host",
    "DtoH_bytes": "bytes",
    "busy": "device busy",
    "sync": "the host waits",
}


def measure_traffic(setting: Setting) -> Findings:
    """What the real step moves, and where it makes the host wait, if it does."""
    findings: Findings = {}
    for compiled in (False, True) if setting.compile else (False,):
        with tempfile.TemporaryDirectory() as temporary:
            run = fresh_run(setting.config(train__compile=compiled), Path(temporary) / "run")
            for place in windows(run.plan, 0, 1):
                label = f"{place}, compiled" if compiled else place
                findings[label] = traffic_of(run, place, setting.sizes.profiled)
        forget()
    rows = [[label, *(_cell(f[name]) for name in COLUMNS)] for label, f in findings.items()]
    print(markdown_table(["a step of the training loop", *COLUMNS.values()], rows) + "\n")
    return findings


def traffic_of(run: Run, place: str, steps: int) -> Findings:
    """Traffic of some steps of one epoch, and host synchronisation of the like steps of another."""
    device = run.accelerator.device
    step = warmed_up(run, windows(run.plan, 0, steps)[place])
    device_events(step, 1, device)  # the profiler starts up, too
    found = traffic(device_events(step, steps, device), steps)
    step = warmed_up(run, windows(run.plan, 2, steps)[place])
    return found | {"sync": host_sync(step, steps, device)}


def windows(plan: BatchPlan, epoch: int, steps: int) -> dict[str, int]:
    """Returns the first step of two windows of `steps` steps.

    One window lies within an epoch. In the middle of the other, the epoch ends and the next one is
    drawn, whose augmentation parameters are not on the device yet.
    """
    begin, end = (e * plan.n_samples // plan.global_batch_size for e in (epoch, epoch + 1))
    assert end - begin > 2 * (WARMUP + steps), f"{plan.n_samples} images are too few"
    return {"within an epoch": begin + 2 + WARMUP, "across its end": end - steps // 2}


def warmed_up(run: Run, first: int) -> Step:
    """The real step, brought to a number: a step is a function of it, and any can come next."""
    step = real_step(run)
    run.state.step = first - WARMUP
    for _ in range(WARMUP):
        step()
    return step


def device_events(step: Step, steps: int, device: torch.device) -> list[dict[str, Any]]:
    """Kineto's events of some steps, in the format of chrome://tracing."""
    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    synchronize(device)
    with profile(activities=[activity]) as profiler:
        for _ in range(steps):
            step()
        synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return events


def traffic(events: Sequence[Mapping[str, Any]], steps: int) -> Findings:
    """Computes kernels, copies and their bytes a step, and the share of time the device was busy.

    Args:
        events: in the format of chrome://tracing, times in microseconds.
        steps: number of steps that `events` cover.
    """
    work = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    found: Findings = {"kernels": sum(e["cat"] == "kernel" for e in work) / steps}
    for way in ("HtoD", "DtoH", "DtoD"):
        copies = [e for e in work if f"Memcpy {way}" in e["name"]]
        found[way] = len(copies) / steps
        found[f"{way}_bytes"] = sum(e["args"]["bytes"] for e in copies) / steps
    found["busy"] = None
    if work:
        begin, end = min(e["ts"] for e in work), max(e["ts"] + e["dur"] for e in work)
        found["busy"] = round(sum(e["dur"] for e in work) / (end - begin), 4)
    return found


def host_sync(step: Step, steps: int, device: torch.device) -> str | None:
    """Finds the first place where a step makes the host wait for the device.

    Returns:
        `file:line`, or "no"; None without a GPU.
    """
    if device.type != "cuda":
        return None
    try:
        with no_host_sync():
            for _ in range(steps):
                step()
    except RuntimeError as error:
        if "synchronizing CUDA operation" not in str(error):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f for f in frames if "distvgg" in f.filename] or frames
        return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
    return "no"


@contextmanager
def no_host_sync() -> Iterator[None]:
    """Turns operations that make the host wait for the device into a RuntimeError.

    Waiting for an event is allowed; the result of an earlier step is read that way.
    """
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def measure_first_step(setting: Setting) -> Findings:
    """Seconds from the start of a process until its first step is done."""
    imports = (
        "import accelerate, torch\n"
        "from distvgg.recipe import load\n"
        "from distvgg.models.vgg import build_vgg\n"
        f"config = load({setting.recipe!r}, {setting.overrides!r})\n"
        f"model = build_vgg(config.model, 100, 0).to({str(setting.device)!r})\n"
    )
    backward = (
        "side = config.model.image_size\n"
        "shape = config.train.micro_batch_size, 3, side, side\n"
        f"model(torch.randn(shape, device={str(setting.device)!r})).sum().backward()\n"
        "next(model.parameters()).grad.sum().item()\n"
    )
    with tempfile.TemporaryDirectory() as kernels:
        cases = {
            "imports, and the network on the device": lambda: until_printed(imports),
            "the same, forward and backward": lambda: until_printed(imports + backward),
            "distvgg train": lambda: until_first_row(setting),
        }
        if setting.compile:
            words = "--train.compile", "true"
            cases["distvgg train, compiled"] = lambda: until_first_row(setting, *words)
            warm = {"TORCHINDUCTOR_CACHE_DIR": kernels}
            cases["distvgg train, compiled before"] = lambda: until_first_row(
                setting, *words, env=warm
            )
            until_first_row(setting, *words, env=warm)
        until_first_row(setting)  # the data are decoded, the files of the libraries in memory
        samples = in_turns(cases, setting.sizes.starts)
    rows = [[name, f"{spread(values)['median']:.2f}"] for name, values in samples.items()]
    print(markdown_table(["from the start of the process", "seconds"], rows) + "\n")
    return {name: spread(values) for name, values in samples.items()}


def until_printed(program: str) -> float:
    """Seconds until a Python program has done its work."""
    started = time.perf_counter()
    words = [sys.executable, "-c", program + "print('done', flush=True)"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = process.stdout.readline()
        seconds = time.perf_counter() - started
    assert said == "done\n", f"{words} failed"
    return seconds


def until_first_row(setting: Setting, *words: str, env: Mapping[str, str] | None = None) -> float:
    """Measures the seconds until a training has written the row of its first step.

    Unless `env` sets a kernel cache, no kernel that was compiled before is found.
    """
    with tempfile.TemporaryDirectory() as temporary:
        env = env or {"TORCHINDUCTOR_CACHE_DIR": f"{temporary}/kernels"}
        words = (*setting.words(), *words, "--track.every_steps", "1")
        with Training(Path(temporary) / "run", words, env=env) as training:
            training.until_step(1, ROW_TIMEOUT)
            seconds = time.perf_counter() - training.began
    return seconds


def measure_target(setting: Setting, target: float, epochs: float) -> Findings:
    """Trains the recipe to its end, and notes when validation first reached a top-1 accuracy."""
    words = "--train.epochs", str(epochs)
    seen: dict[int, float] = {}  # seconds since the start of the process, by step of validation
    with tempfile.TemporaryDirectory() as temporary:
        training = Training(Path(temporary) / "run", [*setting.words(), *words])
        ended = False
        while not ended:
            ended = training.ended()  # asked before the last look
            for row in validations(training.rows()):
                seen.setdefault(row["step"], time.perf_counter() - training.began)
            time.sleep(0.05)
        rows = training.rows()
        result = json.loads((training.run_dir / RESULT_FILE).read_text())
    best = max(row["val/top1"] for row in validations(rows))
    reached = next((r for r in validations(rows) if r["val/top1"] >= target), None)
    findings: Findings = {"target": target, "best_val_top1": best, "test": result["test"]}
    if reached is None:
        epochs_taken, steps = rows[-1]["epoch"], int(rows[-1]["step"])
        taken = {
            "training_s": round(training_seconds(rows, steps), 2),
            "wall_s": max(seen.values()),
        }
        print(
            f"val/top1 {target}: not reached in {epochs_taken:g} epochs, best {best:.4f};"
            f" {taken['training_s']} s of training, the last validation after"
            f" {taken['wall_s']:.1f} s\n"
        )
        return findings | {"reached": None, "epochs": epochs_taken} | taken
    when = {
        "val_top1": reached["val/top1"],
        "step": reached["step"],
        "epoch": reached["epoch"],
        "training_s": round(training_seconds(rows, reached["step"]), 2),
        "wall_s": round(seen[reached["step"]], 2),
    }
    header = [f"val/top1 {target}", "epochs", "seconds of training", "since the process began"]
    cells = [f"{when['val_top1']:.4f}", f"{when['epoch']:.2f}"]
    print(markdown_table(header, [[*cells, str(when["training_s"]), str(when["wall_s"])]]) + "\n")
    return findings | {"reached": when}


def measure_equal_bytes(setting: Setting, quick: bool) -> Findings:
    """The last word of the proof, `equal` or `DIFFERENT`, and what it printed, by precision."""
    precisions = ["bf16", "no"] + ["fp16"] * (setting.device.type == "cuda")
    found: Findings = {}
    for precision in precisions[:1] if quick else precisions:
        words = ["--processes", "1,2" if quick else "1,2,4", "--train.precision", precision]
        done = subprocess.run(
            [sys.executable, str(ROOT / "launch" / "prove.py"), *words],
            stdout=subprocess.PIPE,
            text=True,
        )
        print(f"{precision}\n{done.stdout}")
        verdict = (done.stdout.splitlines() or ["failed"])[-1]
        found[precision] = {"verdict": verdict, "printed": done.stdout}
    return found


def validations(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that have a validation."""
    return [row for row in rows if "val/top1" in row]


def training_seconds(rows: Sequence[Mapping[str, Any]], step: int) -> float:
    """Seconds that a run's steps took up to `step`, without evaluations, from its rows.

    A row has the mean since the row before it; steps that no row has yet are taken as the nearest.
    """
    timed = [row for row in rows if STEP_MS in row]
    seconds, before = 0.0, 0
    for nth, row in enumerate(timed):
        last = row["step"] if nth + 1 < len(timed) else max(step, row["step"])
        taken = min(last, step) - before
        seconds += max(0, taken) * row[STEP_MS] / 1000
        before = row["step"]
    return seconds


class Stopwatch:
    """Seconds of a block, whose beginning and end wait for the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds = 0.0

    def __enter__(self) -> "Stopwatch":
        synchronize(self._device)
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        synchronize(self._device)
        self.seconds = time.perf_counter() - self._started


def _cell(value: float | str | None) -> str:
    return "-" if value is None else value if isinstance(value, str) else f"{value:,.4g}"


if __name__ == "__main__":
    sys.exit(main())

"""What works on this machine, and what to fix, before a run finds out.

A check asks the code that a run would trip over, and tells a mistake in that code's own words: what
is `fix` here, `train` would refuse. Invariant: nothing is trained, nothing waits for a network for
more than seconds, and nothing stays behind but what `--prepare` decodes.
"""

import os
import platform
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import accelerate
import torch
import torch.distributed as dist
from accelerate.utils import parse_flag_from_env

from distvgg import environment
from distvgg.config import Config, DataConfig, TrainConfig
from distvgg.data.cache import (
    cache_dir,
    cache_entry,
    is_complete,
    load_dataset,
    open_entry,
    source_of,
)
from distvgg.data.dataset import train_val_indices
from distvgg.data.plan import BatchPlan, valid_world_sizes
from distvgg.distributed.device import device_here, has_nvidia_hardware, resolve_precision
from distvgg.errors import RunError, UserError
from distvgg.models.vgg import VGG
from distvgg.runs.files import free_space
from distvgg.runs.folder import check_is_run_dir, check_same_config
from distvgg.runs.layout import CHECKPOINTS
from distvgg.tracking.trackers import require_tensorboard
from distvgg.tracking.wandb_tracker import upload_command, wandb_mode

# What a check finds; it raises UserError where there is something to fix.
Finding = tuple[Literal["ok", "note"], str]


def run_checks(recipe: Config | None, run_dir: Path, *, prepare: bool) -> str:
    """Prints a line for each check of the machine and, where there is a recipe, of its run in
    `run_dir`, whose data it decodes if told to `prepare`.

    Raises:
        RunError: there is something to fix.
    """
    config = recipe or Config()
    entry = cache_entry(config.data) if recipe else None  # once: it looks at every file
    checks: dict[str, Callable[[], Finding]] = {
        "versions": versions,
        "devices": devices,
        "precision": partial(precision, config.train.precision),
        "backend": backend,
        "environment": variables,
    }
    if entry:
        checks["processes"] = partial(processes, config.train)
        checks["data"] = partial(images, config.data, entry, prepare)
    checks["cache"] = partial(cache, entry)
    checks["run folder"] = partial(run_folder, run_dir, recipe, entry)
    checks["W&B"] = partial(wandb, config, run_dir if recipe else Path("RUN_DIR"))
    if config.track.tensorboard:
        checks["TensorBoard"] = lambda: ("ok", f"{require_tensorboard()} is installed")
    verdict, to_fix = "", 0
    for name, check in checks.items():
        try:
            verdict, text = check()
        except UserError as error:
            verdict, text = "fix", str(error)
            to_fix += 1
        print(f"{verdict:<4}  {name:<11}  {text}", flush=True)
    if to_fix:
        raise RunError(f"{to_fix} of {len(checks)} checks found something to fix")
    return "nothing to fix"


def versions() -> Finding:
    """Of Python and the libraries that compute."""
    python, theirs = platform.python_version(), accelerate.__version__
    return "ok", f"Python {python}, torch {torch.__version__}, accelerate {theirs}"


def devices() -> Finding:
    """The GPUs, each tried out; else the CPU, unless there is a GPU that torch cannot use."""
    device = device_here().type
    if device == "cuda":
        gpus = Counter(_gpu(number) for number in range(torch.cuda.device_count()))
        return "ok", ", ".join(f"{count} x {gpu}" for gpu, count in gpus.items())
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if hidden or parse_flag_from_env("ACCELERATE_USE_CPU") or not has_nvidia_hardware():
        return "ok", f"{device}, {os.cpu_count()} cores"
    why = "it finds none"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (AssertionError, RuntimeError) as error:  # a build without CUDA; no driver, an old one
        why = str(error).splitlines()[0]
    raise UserError(
        f"there is an NVIDIA GPU that torch {torch.__version__} cannot use ({why}): install a build"
        " with CUDA (https://pytorch.org/get-started) and a driver with which nvidia-smi lists the"
        " GPU, or set ACCELERATE_USE_CPU=true to do without"
    )


def _gpu(number: int) -> str:
    gpu = torch.cuda.get_device_properties(number)
    try:
        torch.ones(1, device=f"cuda:{number}").add(1).item()
    except RuntimeError as error:  # no kernels for its architecture; taken by another process
        raise UserError(
            f"GPU {number}, {gpu.name}, does not compute ({str(error).splitlines()[0]}): see"
            " nvidia-smi, or leave it out with CUDA_VISIBLE_DEVICES"
        ) from error
    return f"{gpu.name}, {_size(gpu.total_memory)}"


def precision(asked: str) -> Finding:
    """What `train.precision` comes to here."""
    device = device_here()
    found = resolve_precision(asked, device, os.environ.get("ACCELERATE_MIXED_PRECISION"))
    return "ok", f"{found} (train.precision {asked} on {device.type})"


def backend() -> Finding:
    """What processes talk to each other by."""
    name = "nccl" if device_here().type == "cuda" else "gloo"
    if dist.is_available() and dist.is_backend_available(name):
        return "ok", f"{name} between processes"
    raise UserError(f"this torch has no {name}: install a build that has, or train on one process")


def variables() -> Finding:
    """What the environment holds that would change the numbers of a run."""
    environment.refuse()
    threads = None if device_here().type == "cuda" else 1
    found = environment.notes([{"device": ""}], None, threads)
    return ("note", "; ".join(found)) if found else ("ok", "nothing that changes numbers")


def processes(train: TrainConfig) -> Finding:
    """The numbers of processes that a config allows, among them the launcher's."""
    whole, micro = train.global_batch_size, train.micro_batch_size
    BatchPlan(whole, whole, micro, environment.world_size())  # of any number of samples
    allowed, gpus = valid_world_sizes(whole // micro), torch.cuda.device_count()
    text = f"{' or '.join(map(str, allowed))} (global batch {whole} / micro-batch {micro})"
    if gpus < 2 or gpus in allowed:
        return "ok", text
    most = max(n for n in allowed if n < gpus)
    return "note", f"{text}; {most} of the {gpus} GPUs here are used"


def images(config: DataConfig, entry: Path, prepare: bool) -> Finding:
    """Whether they are decoded, or can be, and suffice for the split that is asked for."""
    if prepare:
        load_dataset(config)
    if is_complete(entry):
        dataset = open_entry(entry)
        train, val = train_val_indices(dataset.train.labels, config)
        counts = f"{len(train):,} train, {len(val):,} val, {len(dataset.test or ()):,} test"
        taken = _size(sum(file.stat().st_size for file in entry.iterdir()))
        return "ok", f"decoded in {entry}, {taken}: {counts}, {dataset.num_classes} classes"
    source = source_of(config)
    if source is None:
        return "ok", f"{config.name}, made in code at the first start"
    if not Path(source).is_dir():
        from distvgg.data.readers import check_hub_id

        check_hub_id(source)
    return "note", f"{source} is not decoded yet: the first start does so, or --prepare now"


def cache(entry: Path | None) -> Finding:
    """Whether it can take decoded arrays, unless it has those that are asked for."""
    folder = cache_dir()
    try:
        return "ok", f"{folder}, {_size(free_space(folder))} free; DISTVGG_CACHE moves it"
    except OSError as error:
        if entry and is_complete(entry):
            return "ok", f"{folder}, read only"
        raise UserError(
            f"cannot write the data cache {folder} ({error.strerror}): set DISTVGG_CACHE to a"
            " writable folder"
        ) from error


def run_folder(run_dir: Path, recipe: Config | None, entry: Path | None) -> Finding:
    """Whether a run may write to its folder, and has room there for all that it keeps."""
    try:
        free = free_space(run_dir)
        if recipe is not None and run_dir.exists():
            check_is_run_dir(run_dir)
            check_same_config(run_dir, recipe)
        there = sum(f.stat().st_size for f in (run_dir / CHECKPOINTS).glob("step_*/*"))
    except OSError as error:
        raise UserError(
            f"cannot write run folder {run_dir} ({error.strerror}): choose another with --run-dir"
        ) from error
    text = f"{run_dir}, {_size(free)} free"
    if recipe is None:
        return "ok", text
    # Where the classes are not known yet, a guess will do: they count in the last layer only.
    known = open_entry(entry).num_classes if entry and is_complete(entry) else None
    need = run_bytes(recipe, known or 100)
    if free + there < need:
        raise UserError(
            f"run folder {text}, and checkpoints take {_size(need)}: make room, lower"
            " checkpoint.keep, or choose another with --run-dir"
        )
    return "ok", f"{text}; checkpoints take {_size(need)}"


def run_bytes(config: Config, classes: int) -> int:
    """What a run keeps on disk at most: `checkpoint.keep` of the newest, the best, the one that is
    being written, and the final weights."""
    with torch.device("meta"):
        vgg = VGG(config.model, classes)
    weights: int = sum(t.nbytes for t in vgg.state_dict().values())
    optim = config.optim
    momentum = max(optim.momentum, optim.muon_momentum if optim.name == "muon" else 0)
    moments = 2 if optim.name == "adamw" else int(momentum > 0)
    state: int = moments * sum(p.nbytes for p in vgg.parameters())
    if optim.ema_decay:  # the trained weights beside their average
        state += weights
    return (config.checkpoint.keep + 2) * (weights + state) + weights


def wandb(config: Config, run_dir: Path) -> Finding:
    """Where W&B would have the curves."""
    mode, why = wandb_mode() if config.track.wandb else ("disabled", "")
    if mode == "offline":
        return "note", f"offline ({why}), in the run folder; to upload: {upload_command(run_dir)}"
    return "ok", "off, as set" if mode == "disabled" else "online: a key, and a way to its server"


def _size(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"

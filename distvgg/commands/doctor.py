"""`distvgg doctor`: checks of this machine and of a run before it starts, with what to fix.

A check calls the code that a run would call, and reports the error message of that code. What is
`fix` here, `train` would refuse. Invariant: nothing is trained, no check waits for a network for
more than seconds, and nothing is left on disk except what `--prepare` decodes.
"""

import os
import platform
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import accelerate
import numpy as np
import torch
import torch.distributed as dist
from accelerate.utils import parse_flag_from_env

from distvgg import environment
from distvgg.config import Config, DataConfig, TrainConfig
from distvgg.cores import describe_cores
from distvgg.data.cache import (
    cache_dir,
    cache_entry,
    is_complete,
    load_dataset,
    open_entry,
    source_of,
)
from distvgg.data.dataset import train_and_val
from distvgg.data.plan import BatchPlan, valid_world_sizes
from distvgg.distributed.device import device_here, has_nvidia_hardware, resolve_precision
from distvgg.errors import RunError, UserError
from distvgg.models.blocks import kernels_fail
from distvgg.models.freezing import describe_frozen
from distvgg.models.transfer import preview
from distvgg.models.vgg import VGG
from distvgg.models.weight_sources import is_cached
from distvgg.requirements import unmet
from distvgg.runs.files import free_space
from distvgg.runs.folder import check_is_run_dir, check_same_config
from distvgg.runs.layout import CHECKPOINTS, checkpoint_dirs
from distvgg.tracking.others import require_others
from distvgg.tracking.trackers import require_tensorboard
from distvgg.tracking.wandb_sync import OfflineError, check_online, sync_command

# The result of a check. A check raises UserError if there is something to fix.
INDENT = 19  # columns before the text of a line
Finding = tuple[Literal["ok", "note"], str]


def run_checks(recipe: Config | None, run_dir: Path, *, prepare: bool) -> str:
    """Prints a line for each check of the machine and, with a recipe, of its run.

    Args:
        recipe: config of the run. None: check the machine only.
        run_dir: folder of the run.
        prepare: decode the data of the recipe into the cache, and download torchvision's weights.

    Raises:
        RunError: there is something to fix.
    """
    config = recipe or Config()
    entry = cache_entry(config.data) if recipe else None  # computed once: stats every file
    checks: dict[str, Callable[[], Finding]] = {
        "versions": versions,
        "devices": devices,
        "precision": partial(precision, config.train.precision),
        "backend": backend,
        "environment": variables,
    }
    if device_here().type == "cuda":
        checks["kernels"] = kernels
    if entry:
        checks["processes"] = partial(processes, config.train)
        checks["data"] = partial(images, config.data, entry, prepare)
        if config.model.weights is not None or config.optim.frozen:
            checks["weights"] = partial(initial_weights, config, run_dir, entry, prepare)
    checks["cache"] = partial(cache, entry)
    checks["run folder"] = partial(run_folder, run_dir, recipe, entry)
    checks["W&B"] = partial(wandb, config, run_dir if recipe else Path("RUN_DIR"))
    if config.track.tensorboard:
        checks["TensorBoard"] = lambda: ("ok", f"{require_tensorboard()} is installed")
    if config.track.also:
        checks["other trackers"] = partial(other_trackers, config)
    verdict, to_fix = "", 0
    for name, check in checks.items():
        try:
            verdict, text = check()
        except UserError as error:
            verdict, text = "fix", str(error)
            to_fix += 1
        print(f"{verdict:<4}  {name:<{INDENT - 8}}  {text}", flush=True)
    if to_fix:
        raise RunError(f"{to_fix} of {len(checks)} checks found something to fix")
    return "nothing to fix"


def versions() -> Finding:
    """Reports the versions of Python and of the libraries that compute.

    Raises:
        UserError: a package is missing or too old.
    """
    if old := unmet():
        raise UserError("; ".join(old))
    python, theirs = platform.python_version(), accelerate.__version__
    return "ok", f"Python {python}, torch {torch.__version__}, accelerate {theirs}"


def devices() -> Finding:
    """Reports the GPUs, after a test computation on each, or else the CPU.

    Raises:
        UserError: there is a GPU that torch cannot use, or a GPU that does not compute.
    """
    device = device_here().type
    if device == "cuda":
        gpus = Counter(_gpu(number) for number in range(torch.cuda.device_count()))
        return "ok", ", ".join(f"{count} x {gpu}" for gpu, count in gpus.items())
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if hidden or parse_flag_from_env("ACCELERATE_USE_CPU") or not has_nvidia_hardware():
        return "ok", f"{device}, {describe_cores()}"
    why = "it finds none"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (AssertionError, RuntimeError) as error:  # a build without CUDA; no driver or an old one
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
    """Reports the precision to which `train.precision` resolves here."""
    device = device_here()
    found = resolve_precision(asked, device, os.environ.get("ACCELERATE_MIXED_PRECISION"))
    return "ok", f"{found} (train.precision {asked} on {device.type})"


def backend() -> Finding:
    """Reports the communication backend between processes."""
    name = "nccl" if device_here().type == "cuda" else "gloo"
    if dist.is_available() and dist.is_backend_available(name):
        return "ok", f"{name} between processes"
    raise UserError(f"this torch has no {name}: install a build that has, or train on one process")


def kernels() -> Finding:
    """Reports whether BatchNorm runs by kernels of this project, which a C compiler must build."""
    if failure := kernels_fail(device_here()):
        return "note", f"BatchNorm by torch's kernels, slower and with other last bits: {failure}"
    return "ok", "BatchNorm, ReLU and max-pool as one, by Triton"


def variables() -> Finding:
    """Reports environment variables that would change the numbers of a run."""
    environment.refuse(environment.for_training())
    threads = None if device_here().type == "cuda" else 1
    found = environment.notes([{"device": ""}], None, threads)
    return ("note", "; ".join(found)) if found else ("ok", "nothing that changes numbers")


def processes(train: TrainConfig) -> Finding:
    """Reports the numbers of processes that a config allows.

    Raises:
        UserError: the launcher's number of processes is not allowed.
    """
    whole, micro = train.global_batch_size, train.micro_batch_size
    started = environment.world_size(environment.for_training())
    BatchPlan(whole, whole, micro, started)  # any number of samples will do
    allowed, gpus = valid_world_sizes(whole // micro), torch.cuda.device_count()
    text = f"{' or '.join(map(str, allowed))} (global batch {whole} / micro-batch {micro})"
    if gpus < 2 or gpus in allowed:
        return "ok", text
    most = max(n for n in allowed if n < gpus)
    return "note", f"{text}; {most} of the {gpus} GPUs here are used"


def images(config: DataConfig, entry: Path, prepare: bool) -> Finding:
    """Reports the data: decoded and sufficient for the requested split, or ready to decode."""
    if prepare:
        load_dataset(config)
    if is_complete(entry):
        dataset = open_entry(entry)
        train, _, val = train_and_val(dataset, config)
        counts = f"{len(train):,} train, {len(val):,} val, {len(dataset.test or ()):,} test"
        taken = _size(sum(file.stat().st_size for file in entry.iterdir()))
        kept = "decoded" if isinstance(dataset.train.images, np.ndarray) else "encoded"
        lines = [f"{kept} in {entry}, {taken}: {counts}, {dataset.num_classes} classes"]
        lines += [*dataset.card, *(f"note: {note}" for note in dataset.notes)]
        return "ok", f"\n{' ' * INDENT}".join(lines)
    source = source_of(config)
    if source is None:
        return "ok", f"{config.name}, made in code at the first start"
    if not Path(source).is_dir():
        from distvgg.data.tables import check_hub_id

        check_hub_id(source)
    return "note", f"{source} is not decoded yet: the first start does so, or --prepare now"


def initial_weights(config: Config, run_dir: Path, entry: Path, prepare: bool) -> Finding:
    """Reports what a run starts from: weights that exist and fit, and frozen layers that exist."""
    name, text = config.model.weights, list[str]()
    verdict: Literal["ok", "note"] = "ok"
    if name is not None and checkpoint_dirs(run_dir / CHECKPOINTS):
        text, name = [f"{name} is not read again, since the run has a checkpoint"], None
    elif name is not None and not prepare and not is_cached(name):
        text = [f"{name} is not in torch's cache: the first start downloads it, or --prepare now"]
        verdict, name = "note", None
    dataset = open_entry(entry) if is_complete(entry) else None
    classes, names = (dataset.num_classes, dataset.class_names) if dataset else (100, [])
    vgg, record = preview(config.replace(model__weights=name), classes, names)
    if record is not None:
        text.append(record.text())
    if config.optim.frozen:
        text.append(f"frozen: {describe_frozen(vgg, config.optim.frozen)}")
    return verdict, f"\n{' ' * INDENT}".join(text)


def cache(entry: Path | None) -> Finding:
    """Reports the data cache: writable, or read-only with the requested arrays in it."""
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
    """Reports the run folder, which must be writable and have room for all that a run keeps."""
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
    # If the number of classes is unknown, a guess suffices: it matters in the last layer only.
    known = open_entry(entry).num_classes if entry and is_complete(entry) else None
    need = run_bytes(recipe, known or 100)
    if free + there < need:
        raise UserError(
            f"run folder {text}, and checkpoints take {_size(need)}: make room, lower"
            " checkpoint.keep, or choose another with --run-dir"
        )
    return "ok", f"{text}; checkpoints take {_size(need)}"


def run_bytes(config: Config, classes: int) -> int:
    """Returns the maximum number of bytes that a run keeps on disk.

    These are the `checkpoint.keep` newest checkpoints, the best, the one that is being written, and
    the final weights.
    """
    with torch.device("meta"):
        vgg = VGG(config.model, classes)
    weights: int = sum(t.nbytes for t in vgg.state_dict().values())
    optim = config.optim
    momentum = max(optim.momentum, optim.muon_momentum if optim.name == "muon" else 0)
    moments = 2 if optim.name == "adamw" else int(momentum > 0)
    state: int = moments * sum(p.nbytes for p in vgg.parameters())
    if optim.ema_decay:  # the trained weights in addition to their EMA
        state += weights
    return (config.checkpoint.keep + 2) * (weights + state) + weights


def wandb(config: Config, run_dir: Path) -> Finding:
    """Reports whether W&B is online, offline or off."""
    if not config.track.wandb:
        return "ok", "off, as set"
    try:
        check_online()
    except OfflineError as error:
        if not str(error):
            return "ok", "off, as set"
        return "note", f"offline ({error}); to upload: {sync_command(run_dir)}"
    return "ok", "online: a key, and a way to its server"


def other_trackers(config: Config) -> Finding:
    """Reports whether the trackers of `track.also` are installed."""
    require_others(config.track.also)
    return "ok", f"{', '.join(config.track.also)}: installed"


def _size(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"

"""Builds the parts of a run from a config and a run folder, and restores the newest checkpoint."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors.torch
import torch
from pydantic import ValidationError
from safetensors import SafetensorError

from distvgg import environment, preemption
from distvgg.config import Config
from distvgg.data.cache import cache_entry, is_complete, load_dataset
from distvgg.data.dataset import Dataset, train_and_val
from distvgg.data.loaders import Loaders, choose_loader
from distvgg.data.micro_batches import EvalSource, MicroBatchSource, RepeatedSteps
from distvgg.data.plan import BatchPlan
from distvgg.distributed.collectives import (
    any_rank,
    broadcast_bytes,
    broadcast_from_main,
    first_error,
    from_local_main,
    machines,
)
from distvgg.distributed.device import place
from distvgg.distributed.gradients import GradientReducer
from distvgg.distributed.process_group import prepare_model, ranks_of, start
from distvgg.distributed.reduction_plan import Ranks, TreePlan
from distvgg.distributed.step_sums import StepReducer
from distvgg.distributed.tree_sum import ExchangeQueue
from distvgg.errors import UserError, one_line
from distvgg.file_lock import FileLock
from distvgg.models.blocks import kernels_fail, use_kernels
from distvgg.models.ema import EMA
from distvgg.models.flops import training_flops
from distvgg.models.freezing import freeze, learned_parameters
from distvgg.models.vgg import VGG, batch_norm_layers, build_vgg
from distvgg.optim.build import build_optimizer
from distvgg.optim.muon import Muon
from distvgg.preemption import Preempted
from distvgg.rng import derive_seed
from distvgg.runs.folder import (
    ask_ranks_to_stop,
    claim_run_dir,
    forget_request_of_ranks,
    mark_stopped,
)
from distvgg.runs.layout import CHECKPOINTS, METRICS_FILE
from distvgg.runs.metrics_file import holds
from distvgg.runs.preprocessing import Preprocessing, save_preprocessing
from distvgg.training.checkpoint import (
    Checkpoint,
    CheckpointManager,
    directory_name,
    load_optimizer_tensors,
)
from distvgg.training.cuda_graphs import CudaRecorder, StepGraphs
from distvgg.training.initial_weights import check_start, load_initial_weights
from distvgg.training.meters import Clock, TrainMeter
from distvgg.training.nan_monitor import StepMonitor
from distvgg.training.state import METER, TRAINED, Run, TrainState, parameter_names
from distvgg.wording import counted

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class _Trainable:
    """The parts that a checkpoint restores: network, EMA, optimizer, sums of unwritten rows."""

    vgg: VGG
    ema: EMA | None
    optimizer: torch.optim.Optimizer
    meter: TrainMeter


def build(config: Config, folder: Path) -> Run:
    """Joins the process group, claims the run folder, and builds or restores the run.

    A collective operation, in this order on every rank.

    Raises:
        UserError: config, data, processes or run folder do not fit together.
        Preempted: a stop was requested meanwhile.
    """
    accelerator = start(config, folder)
    requested = config.train.precision
    config = config.replace(train__precision=accelerator.mixed_precision)
    locks: list[FileLock] = []  # on the main process only

    def claim() -> None:
        check_start(config, folder)
        locks.append(claim_run_dir(folder, config))

    broadcast_from_main(accelerator, claim)
    try:
        return _build(config, folder, accelerator, requested, locks[0] if locks else None)
    except BaseException:
        for lock in locks:  # the next training may be of the same process
            lock.release()
        raise


def _build(
    config: Config, folder: Path, accelerator: "Accelerator", requested: str, lock: FileLock | None
) -> Run:
    """Builds or restores the run in a claimed folder.

    Args:
        config: with the precision resolved.
        folder: the run folder.
        accelerator: the handle on the process group.
        requested: the precision before it was resolved.
        lock: of the folder, on the main process.
    """
    dataset, is_new = _load_dataset(config, accelerator, folder)
    loaders, notes_on_loader = open_loaders(config, dataset, accelerator)
    plan, loader, val_loader = _build_loaders(config, dataset, accelerator, loaders)
    ranks, queue = ranks_of(accelerator), ExchangeQueue(accelerator.device)
    preprocessing = Preprocessing.of(dataset, config)
    checkpoints = None
    if lock is not None:
        metadata, keep = preprocessing.metadata(), config.checkpoint.keep
        checkpoints = CheckpointManager(folder / CHECKPOINTS, keep, metadata)
    found = _newest(checkpoints, folder, accelerator)
    vgg = build_vgg(config.model, dataset.num_classes, derive_seed(config.seed, "weights"))
    freeze(vgg, config.optim.frozen)
    initial, notes_on_weights = load_initial_weights(
        vgg, config, preprocessing, folder, accelerator, resumed=found is not None
    )
    place(vgg, accelerator, config)
    notes_on_kernels = _choose_kernels(vgg, config, accelerator)
    trainable = _build_trainable(vgg, config, accelerator, ranks, queue)
    state = TrainState(data=_digest(dataset))
    if found is not None:
        state = _restore(found, state, trainable, accelerator)
    # After the digest of the data was compared: other data must not overwrite the file.
    broadcast_from_main(accelerator, lambda: _write_preprocessing(preprocessing, folder))
    notes = _note_launch(state, accelerator, config, requested, resumed=found is not None)
    is_first = config.data.name == "custom" and found is None
    notes += (*dataset.card, *dataset.notes) if is_new or is_first else dataset.notes
    notes += _notes_on_length(config, plan)
    notes += notes_on_kernels + notes_on_weights + notes_on_loader

    ema, device = trainable.ema, accelerator.device
    torch.autograd.set_detect_anomaly(config.train.detect_anomaly)
    model = prepare_model(accelerator, vgg)
    graphs = _build_graphs(config, device, notes)
    if graphs is not None and isinstance(trainable.optimizer, Muon):
        trainable.optimizer.launch = graphs.update
    optimizer = accelerator.prepare_optimizer(trainable.optimizer, device_placement=False)
    model.train()
    if ema is not None:
        prepare_model(accelerator, ema.network)
    tree = TreePlan(plan.micro_batches, ranks)
    gradients = GradientReducer(learned_parameters(vgg), tree, queue)
    gradients.attach()
    flops = training_flops(config.model, dataset.num_classes, config.optim.frozen)
    return Run(
        config=config,
        folder=folder,
        accelerator=accelerator,
        dataset=dataset,
        preprocessing=preprocessing,
        plan=plan,
        steps=plan.steps(config.train.epochs),
        loaders=loaders,
        loader=loader,
        val_loader=val_loader,
        vgg=vgg,
        initial_weights=initial,
        ema=ema,
        model=model,
        graphs=graphs,
        optimizer=optimizer,
        tree=tree,
        queue=queue,
        sums=StepReducer(accelerator, tree, batch_norm_layers(vgg), queue),
        gradients=gradients,
        failed=torch.zeros((), dtype=torch.float32, device=device),
        meter=trainable.meter,
        clock=Clock(plan.global_batch_size, flops, *state.timed),
        monitor=StepMonitor(
            lag=int(device.type == "cuda"),
            fp16=accelerator.scaler is not None,
            skipped=state.skipped,
            skipped_in_a_row=state.skipped_in_a_row,
        ),
        state=state,
        checkpoints=checkpoints,
        lock=lock,
        notes=notes,
    )


def open_loaders(
    config: Config, dataset: Dataset, accelerator: "Accelerator"
) -> tuple[Loaders, list[str]]:
    """Returns the loaders that the main process chooses for all ranks, and lines for the user.

    A collective operation.
    """
    choice = broadcast_from_main(
        accelerator, lambda: choose_loader(config, dataset, accelerator.device)
    )
    loaders = Loaders(config, dataset, accelerator.device, streams=choice.streams)
    return loaders, [choice.note] if choice.note else []


def _build_loaders(
    config: Config, dataset: Dataset, accelerator: "Accelerator", loaders: Loaders
) -> tuple[BatchPlan, MicroBatchSource, EvalSource]:
    """Splits the dataset, and builds the loaders of training and validation."""
    train_rows, val_split, val_rows = train_and_val(dataset, config.data)
    batch, world_size = config.train, accelerator.num_processes
    plan = BatchPlan(len(train_rows), batch.global_batch_size, batch.micro_batch_size, world_size)
    loader = loaders.training(train_rows, plan, accelerator.process_index)
    if batch.overfit_batches:
        loader = RepeatedSteps(loader, batch.overfit_batches)
    return plan, loader, loaders.evaluation(val_split, val_rows)


def _notes_on_length(config: Config, plan: BatchPlan) -> list[str]:
    """Returns lines on a training set or a run that is short for its steps."""
    notes, steps = [], plan.steps(config.train.epochs)
    if plan.global_batch_size > plan.n_samples:
        notes.append(
            f"each step takes {plan.global_batch_size} images, more than the"
            f" {plan.n_samples} to train on: lower train.global_batch_size and"
            " train.micro_batch_size"
        )
    if config.optim.warmup_epochs and steps <= plan.steps(config.optim.warmup_epochs):
        notes.append(
            f"the warm-up (optim.warmup_epochs {config.optim.warmup_epochs:g}) takes"
            f" {counted(steps, 'step')}, all of the run: none has the full learning rate for long"
        )
    return notes


def _build_trainable(
    vgg: VGG, config: Config, accelerator: "Accelerator", ranks: Ranks, queue: ExchangeQueue
) -> _Trainable:
    optimizer = build_optimizer(vgg, config.optim, config.train.precision, ranks, queue)
    ema = EMA(vgg, config.optim.ema_decay) if config.optim.ema_decay else None
    return _Trainable(vgg, ema, optimizer, TrainMeter(accelerator.device))


def _choose_kernels(vgg: VGG, config: Config, accelerator: "Accelerator") -> list[str]:
    """Lets BatchNorm run by the kernels of this project, if all ranks can; not compiled.

    Returns:
        Lines for the user.
    """
    if accelerator.device.type != "cuda" or config.train.compile or not config.model.batch_norm:
        return []
    failure = kernels_fail(accelerator.device)
    if any_rank(accelerator, failure is not None):
        reason = failure or "they cannot be used on another GPU of this run"
        return [f"BatchNorm by torch's kernels, slower and with other last bits: {reason}"]
    use_kernels(vgg)
    return []


def _build_graphs(config: Config, device: torch.device, notes: list[str]) -> StepGraphs | None:
    if device.type != "cuda" or not config.train.cuda_graphs:
        return None
    if config.train.detect_anomaly:
        notes.append("train.detect_anomaly: the step runs without CUDA graphs")
        return None
    return StepGraphs(CudaRecorder(device))


def _note_launch(
    state: TrainState, accelerator: "Accelerator", config: Config, requested: str, *, resumed: bool
) -> list[str]:
    """Records this launch in the state, and returns lines for the user.

    Args:
        state: of the run, at its newest checkpoint.
        accelerator: the handle on the process group.
        config: with the precision resolved.
        requested: the precision before that.
        resumed: the state comes from a checkpoint.
    """
    state.starts.append((state.step, accelerator.num_processes))
    found = machines(accelerator)
    threads = config.train.cpu_threads if accelerator.device.type == "cpu" else None
    notes = environment.notes(found, state.machine if resumed else None, threads)
    state.machine = found[0]
    if requested == "auto" and os.environ.get("ACCELERATE_MIXED_PRECISION") in ("bf16", "fp16"):
        notes.append(f"precision {config.train.precision}, as given to the launcher")
    return notes


def _load_dataset(config: Config, accelerator: "Accelerator", folder: Path) -> tuple[Dataset, bool]:
    """Loads the dataset on every rank, unless a stop is requested on any of them.

    Returns:
        The dataset, and on the main process whether it was decoded just now.

    Raises:
        Preempted: a stop was requested; every rank raises it.
        UserError: the data cannot be read; every rank raises the error of the first that has one.
    """
    entry = dataset = failure = None
    try:
        with preemption.interruptible():
            # Once a node: the name depends on the size and time of every file.
            entry = cache_entry(config.data) if accelerator.is_local_main_process else None
    except Preempted:
        pass
    except UserError as error:
        failure = error
    entry = from_local_main(accelerator, entry)
    is_new = accelerator.is_main_process and entry is not None and not is_complete(entry)
    try:
        with preemption.interruptible():
            if entry is not None:
                dataset = load_dataset(config.data, entry)
    except Preempted:
        ask_ranks_to_stop(folder)  # others may decode for minutes
    except UserError as error:
        failure = error
        if accelerator.num_processes > 1:
            ask_ranks_to_stop(folder)
    if (failure := first_error(accelerator, failure)) is not None:
        if accelerator.is_main_process:
            forget_request_of_ranks(folder)
        raise failure
    if any_rank(accelerator, preemption.requested()):
        if accelerator.is_main_process:
            mark_stopped(folder, requeue=True)
        accelerator.end_training()  # gloo aborts a process that exits with its group still up
        reason = preemption.stop_reason()
        raise Preempted(f"{reason}: stopped before the first step; the same command goes on")
    if not accelerator.is_main_process:
        preemption.stop_watching()
    assert dataset is not None
    return dataset, is_new


def _write_preprocessing(preprocessing: Preprocessing, folder: Path) -> None:
    try:
        save_preprocessing(preprocessing, folder)
    except OSError as error:
        raise UserError(
            f"cannot write run folder {folder} ({error.strerror}): make room, or choose another"
            " with --run-dir"
        ) from error


def _newest(
    checkpoints: CheckpointManager | None, folder: Path, accelerator: "Accelerator"
) -> Checkpoint | None:
    """Reads the newest checkpoint that fits the folder on the main process, for all ranks."""

    def refuse(checkpoint: Checkpoint) -> str | None:
        try:
            progress = TrainState.model_validate(checkpoint.progress)
        except ValidationError:
            return "its progress is not what this version notes"
        if checkpoint.name != directory_name(progress.step):
            return f"it is a copy of {directory_name(progress.step)}"
        if holds(folder / METRICS_FILE, progress.metrics):
            return None
        return f"{METRICS_FILE} no longer has the rows that it counts on"

    found = None
    if checkpoints is not None:
        found = checkpoints.newest(refuse, lambda line: print(line, flush=True))
    known = broadcast_from_main(
        accelerator, lambda: None if found is None else (found.name, found.progress)
    )
    if known is None:
        return None
    model, state = (
        broadcast_bytes(accelerator, content)
        for content in ((None, None) if found is None else (found.model, found.state))
    )
    return Checkpoint(known[0], model, state, known[1])


def _restore(
    checkpoint: Checkpoint, fresh: TrainState, trainable: _Trainable, accelerator: "Accelerator"
) -> TrainState:
    """Loads a checkpoint into the parts of a run, and returns its progress.

    Raises:
        UserError: the data are not those of the checkpoint, or its tensors do not fit the config.
    """
    state, vgg, ema = TrainState.model_validate(checkpoint.progress), trainable.vgg, trainable.ema
    if state.data != fresh.data:
        raise UserError(
            f"checkpoint {checkpoint.name} was trained on other data than is there now: bring the"
            " data back, or start again with another --run-dir"
        )
    try:
        weights = safetensors.torch.load(checkpoint.model)
        tensors = safetensors.torch.load(checkpoint.state)
        trainable.meter.sums.copy_(tensors.pop(METER))
        if ema is not None:
            ema.network.load_state_dict(weights)
            ema.measured_at = state.step
            kept = [name for name in tensors if name.startswith(TRAINED)]
            weights = {name.removeprefix(TRAINED): tensors.pop(name) for name in kept}
        vgg.load_state_dict(weights)
        # Version 0.1 trained biases before BatchNorm.
        untrained = {name for name, _ in vgg.named_buffers()}
        tensors = {k: v for k, v in tensors.items() if k.partition(".")[2] not in untrained}
        load_optimizer_tensors(trainable.optimizer, parameter_names(vgg), tensors)
    except (SafetensorError, RuntimeError, KeyError) as error:
        raise UserError(
            f"checkpoint {checkpoint.name} does not fit the config of its folder"
            f" ({one_line(error)}): start again with another --run-dir"
        ) from error
    if state.scaler is not None and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(state.scaler)
    return state


def _digest(dataset: Dataset) -> str:
    """Returns the SHA-256 of labels, class names, and per-channel mean and standard deviation.

    Cheap, and sensitive to almost any change of the training pixels; of test, to its labels.
    """
    digest = hashlib.sha256(repr((dataset.mean, dataset.std, dataset.class_names)).encode())
    for split in (dataset.train, dataset.val, dataset.test):
        if split is not None:
            digest.update(split.labels.tobytes())
    return digest.hexdigest()

"""Startup banner of a training: one line for each part of the run, before the first step."""

from collections.abc import Sequence

from distvgg.cores import describe_cores
from distvgg.models.freezing import describe_frozen
from distvgg.models.summary import network_name
from distvgg.runs.provenance import hardware, processor
from distvgg.training.state import Run, warmup_steps
from distvgg.wording import counted


def startup_banner(run: Run, curves: Sequence[str]) -> str:
    """Returns the lines that describe a run at its start.

    Args:
        run: before its first step of this launch.
        curves: the places where its curves will be.
    """
    lines = {
        "data": _data(run),
        "network": _network(run),
        **_start(run),
        "training": _training(run),
        "optimizer": _optimizer(run),
        "compute": _compute(run),
        "curves": "; ".join(curves),
    }
    text = "\n".join(f"{name:<9}  {line}" for name, line in lines.items())
    return text + (f"\nresumed after step {run.state.step:,}" if run.state.step else "")


def _data(run: Run) -> str:
    test, config = run.dataset.test, run.config
    parts = [f"{run.plan.n_samples:,} train", f"{run.val_loader.n_samples:,} val"]
    if test is not None:
        parts.append(f"{len(test):,} test" if config.eval.test else f"{len(test):,} test (unread)")
    return f"{config.data.name}: {', '.join(parts)} images, {run.dataset.num_classes} classes"


def _network(run: Run) -> str:
    model, side = run.config.model, run.config.model.image_size
    parameters = sum(p.numel() for p in run.vgg.parameters())
    return (
        f"{network_name(model)} at {side}x{side}, {parameters:,} parameters,"
        f" {run.clock.flops_per_image / 1e9:.3g} GFLOP to train on an image"
    )


def _start(run: Run) -> dict[str, str]:
    """Returns lines on initial weights and frozen layers, where there are any."""
    initial, frozen, lines = run.initial_weights, run.config.optim.frozen, {}
    if initial is not None:
        lines["weights"] = f"{initial.text()}; sha256 {initial.sha256[:12]}"
    if frozen:
        lines["frozen"] = describe_frozen(run.vgg, frozen)
    return lines


def _training(run: Run) -> str:
    plan, saves = run.plan, run.config.checkpoint.every_steps
    every = f"every {counted(saves, 'step')}" if saves else "at the best validation"
    return (
        f"{counted(run.steps, 'step')} of {plan.global_batch_size} ="
        f" {counted(plan.world_size, 'process')} x"
        f" {plan.accumulation} x {plan.micro_batch_size}; {plan.epoch(run.steps):.2f} epochs,"
        f" validation every {run.config.eval.every_epochs:g}; checkpoint {every}"
    )


def _optimizer(run: Run) -> str:
    optim, warmup = run.config.optim, warmup_steps(run)
    rate = f"lr {optim.lr:g}"
    if optim.name == "muon":
        rate = f"lr {optim.muon_lr:g} (others {optim.lr:g})"
    if optim.trunk_lr_ratio != 1:
        rate += f" (features: x {optim.trunk_lr_ratio:g})"
    average = f", EMA {optim.ema_decay:g}" if optim.ema_decay else ""
    schedule = f"{optim.schedule} after {counted(warmup, 'step')} of warm-up"
    return f"{optim.name}, {rate}, {schedule}{average}"


def _compute(run: Run) -> str:
    device, train = run.accelerator.device, run.config.train
    precision = run.accelerator.mixed_precision
    text = f"{'float32' if precision == 'no' else precision} on {device.type}, "
    if device.type == "cpu":
        text += f"{counted(train.cpu_threads, 'thread')} each; {processor()[0]}, {describe_cores()}"
    else:
        text += hardware(device)
    return text + ("; compiled" if train.compile else "")

"""All that depends on how many processes there are: the Accelerator, reductions, BatchNorm.

Invariant: what leaves this module is the same on every rank, and the same for every number of
processes up to the order of floating-point sums.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from distvgg.config import Config, UserError

if TYPE_CHECKING:
    from accelerate import Accelerator


BATCH_NORM_MOMENTUM = 0.1  # torch's and torchvision's default


def start(config: Config, run_dir: Path | None = None) -> "Accelerator":
    """Joins the process group that the launcher made and returns accelerate's handle on it.

    The gradient accumulation, the loader and the learning rate are ours: accelerate gets no
    scheduler (a prepared one steps once per process), no loader, and no accumulation count.

    Raises:
        UserError: several processes that know nothing of each other; a precision that the device
            does not have.
    """
    from accelerate import Accelerator, PartialState
    from accelerate.utils import (
        DistributedDataParallelKwargs,
        ProjectConfiguration,
        TorchDynamoPlugin,
        parse_flag_from_env,
    )

    # Accelerator reads this variable, PartialState alone does not.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched > 1 and state.num_processes == 1:
        raise UserError(
            f"WORLD_SIZE is {launched} but no process group was formed, so each process would train"
            " the same thing: set ACCELERATE_USE_CPU=true where there is no GPU, and start with"
            " accelerate launch"
        )
    # Batch shapes never change; the run must be the same when it is run again.
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    folders = run_dir and ProjectConfiguration(str(run_dir), str(run_dir / "tensorboard"))
    compiled = TorchDynamoPlugin(backend="inductor") if config.train.compile else None
    return Accelerator(
        mixed_precision=resolve_precision(
            config.train.precision, state.device, os.environ.get("ACCELERATE_MIXED_PRECISION")
        ),
        project_config=folders,
        dynamo_plugin=compiled,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )


def distribute(
    accelerator: "Accelerator", model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Lets accelerate wrap a model and its optimizer: mixed precision, all-reduce, compilation.

    The bare model stays usable and shares its weights with the wrapped one.
    """
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    for module in wrapped.modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            # Buffers are averaged when read (average_batch_norm), never broadcast from rank 0.
            module.broadcast_buffers = False
    return wrapped, optimizer


def resolve_precision(precision: str, device: torch.device, launched: str | None = None) -> str:
    """What `auto` means on a device; anything else is checked and returned.

    Args:
        launched: what `accelerate launch --mixed_precision` said. It wins over what the device is
            good at, but its `no` is also its default, and says nothing.

    Raises:
        UserError: fp16 without a GPU.
    """
    if precision == "auto" and launched in ("fp16", "bf16"):
        precision = launched
    if precision == "fp16" and device.type != "cuda":
        raise UserError(
            f"train.precision fp16 needs a CUDA GPU, this is {device.type}: take bf16, no or auto"
        )
    if precision != "auto":
        return precision
    if device.type == "cuda":
        # Emulated bf16 (before Ampere) is slower than fp32.
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu":
        has = torch.cpu.get_capabilities()
        return "bf16" if has.get("avx512_bf16") or has.get("amx_bf16") else "no"
    return "no"


def summing(accelerator: "Accelerator") -> Any:
    """A function that sums a tensor over ranks; every rank must call it alike."""
    return lambda tensor: accelerator.reduce(tensor, "sum")


def place(model: nn.Module, accelerator: "Accelerator", config: Config) -> None:
    """Moves a model to this process's device, in the memory order of the config."""
    layout = torch.channels_last if config.train.channels_last else torch.contiguous_format
    model.to(accelerator.device)
    model.to(memory_format=layout)


def batch_norm_layers(model: nn.Module) -> list[nn.BatchNorm2d]:
    """All BatchNorm layers of a model, in order."""
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def accumulation_momentum(momentum: float, nth: int, of: int) -> float:
    """The momentum for the `nth` (from 1) of `of` BatchNorm updates in a step.

    A running average r <- (1-q) r + q x weighs later updates more. With q = (p/A) / (1 - (A-a) p/A)
    for the a-th of A, all weigh p/A: the step equals one update of momentum p with the mean of the
    micro-batches' statistics, which is what A ranks with one micro-batch each average to.
    """
    return (momentum / of) / (1 - (of - nth) * momentum / of)


def set_batch_norm_momentum(layers: list[nn.BatchNorm2d], momentum: float) -> None:
    """Sets the momentum of the next forward."""
    for layer in layers:
        layer.momentum = momentum


@torch.no_grad()
def average_batch_norm(
    layers: list[nn.BatchNorm2d], accelerator: "Accelerator", micro_batches_seen: int
) -> None:
    """Replaces running statistics by their mean over ranks, in place; to be called by every rank
    before they are read.

    Averages are linear in what was averaged, so training on from the mean changes nothing later.
    `num_batches_tracked` becomes the number of micro-batches that the run has seen.
    """
    if not layers:
        return
    buffers = [b for m in layers for b in (m.running_mean, m.running_var) if b is not None]
    if accelerator.num_processes > 1:
        flat = torch.cat([b.double() for b in buffers])
        flat = accelerator.reduce(flat, "sum") / accelerator.num_processes
        for buffer, mean in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
            buffer.copy_(mean)
    for layer in layers:
        assert layer.num_batches_tracked is not None
        layer.num_batches_tracked.fill_(micro_batches_seen)

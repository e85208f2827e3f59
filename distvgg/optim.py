"""Parameter groups, the optimizer, and the learning rate as a pure function of the step.

Invariant: nothing here counts. `lr_at(step)` is computed, not advanced, so no scheduler has a state
to save or can be stepped once per process.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from distvgg.config import OptimConfig
from distvgg.muon import Muon


def lr_at(step: int, config: OptimConfig, steps: int, warmup_steps: int) -> float:
    """The learning rate of the step with this number (from 0) in a run of `steps`.

    Linear warm-up over `warmup_steps`, whose last step has the peak; then cosine decay
    (Loshchilov and Hutter, 2017, equation 5), linear decay, or none, towards 0 at `steps`.
    """
    if step < warmup_steps:
        return config.lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    decay = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
    }
    return config.lr * decay[config.schedule]


def build_optimizer(
    model: nn.Module,
    config: OptimConfig,
    muon_dtype: torch.dtype = torch.bfloat16,
    *,
    rank: int = 0,
    world_size: int = 1,
) -> torch.optim.Optimizer:
    """SGD or AdamW over two groups: matrices and filters, which decay, and vectors (BatchNorm
    weights, biases), which decay unless `decay_norm_and_bias` is off. Muon has a third, the
    filters, which it shares out among ranks."""
    parameters = list(model.parameters())
    if config.name == "muon":
        groups = _muon_groups(parameters, config)
        return Muon(groups, config.muon_steps, muon_dtype, rank=rank, world_size=world_size)
    groups = [
        {
            "params": [p for p in parameters if p.ndim > 1],
            "weight_decay": config.weight_decay,
        },
        {
            "params": [p for p in parameters if p.ndim <= 1],
            "weight_decay": config.weight_decay if config.decay_norm_and_bias else 0.0,
        },
    ]
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=(config.momentum, 0.999), fused=True)
    sgd = torch.optim.SGD(
        groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=True
    )
    if config.momentum:
        for p in parameters:
            # torch would take uninitialised memory here if the first step is skipped (fp16).
            sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return sgd


def _muon_groups(parameters: list[nn.Parameter], config: OptimConfig) -> list[dict[str, Any]]:
    sgd = {
        "orthogonalised": False,
        "lr": config.lr,
        "momentum": config.momentum,
        "nesterov": config.nesterov,
    }
    vector_decay = config.weight_decay if config.decay_norm_and_bias else 0.0
    return [
        {
            "params": [p for p in parameters if p.ndim == 4],
            "orthogonalised": True,
            "lr": config.muon_lr,
            "lr_ratio": config.muon_lr / config.lr,
            "momentum": config.muon_momentum,
            "nesterov": True,
        },
        sgd
        | {"params": [p for p in parameters if p.ndim == 2], "weight_decay": config.weight_decay},
        sgd | {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": vector_decay},
    ]


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_ratio", 1.0)


def skip_step_if(optimizer: torch.optim.Optimizer, flag: Tensor) -> None:
    """Lets the next step change nothing if a scalar on the device is 1, without asking the device:
    the protocol between torch.amp.GradScaler and fused optimizers."""
    bare: Any = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper holds it
    bare.found_inf, bare.grad_scale = flag, None

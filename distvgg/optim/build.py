"""Parameter groups and the optimizer."""

from typing import Any

import torch
from torch import Tensor, nn

from distvgg.config import OptimConfig
from distvgg.distributed.reduction_plan import Ranks
from distvgg.distributed.tree_sum import ExchangeQueue
from distvgg.models.freezing import learned_parameters
from distvgg.optim.eager import SGD, AdamW
from distvgg.optim.muon import Muon


def build_optimizer(
    model: nn.Module,
    config: OptimConfig,
    precision: str = "bf16",
    ranks: Ranks | None = None,
    queue: ExchangeQueue | None = None,
) -> torch.optim.Optimizer:
    """Builds the optimizer over the groups of `parameter_groups`.

    Muon partitions its work over `ranks` (None: a single process). Where all that Muon would
    orthogonalise is frozen, SGD trains the rest, as Muon does.
    """
    groups = parameter_groups(model, config)
    if any(group.get("orthogonalised") for group in groups):
        queue = queue or ExchangeQueue(next(model.parameters()).device)
        return Muon(groups, config.muon_steps, muon_dtype(precision), ranks or Ranks(), queue)
    if config.name == "adamw":
        return AdamW(groups, lr=config.lr, betas=(config.momentum, 0.999), fused=True)
    sgd = SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=True)
    if config.momentum:
        for p in learned_parameters(model):
            # torch would use uninitialised memory if the first step is skipped (fp16).
            sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return sgd


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Returns the parameter groups of the optimizer, without frozen parameters.

    One group holds matrices and filters, which decay. Another holds biases and BatchNorm's weights,
    which decay unless `decay_norm_and_bias` is off. Muon's group comes first and holds all matrices
    and filters except the last. With `trunk_lr_ratio`, each group is divided into the parameters of
    `features` and the others. `lr_ratio` is the ratio of a group's learning rate to `config.lr`.
    """
    last = [p for p in model.parameters() if p.ndim > 1][-1]
    matrices = [p for p in learned_parameters(model) if p.ndim > 1]
    vectors = [p for p in learned_parameters(model) if p.ndim <= 1]
    vector_decay = config.weight_decay if config.decay_norm_and_bias else 0.0
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": config.weight_decay, "lr_ratio": 1.0},
        {"params": vectors, "weight_decay": vector_decay, "lr_ratio": 1.0},
    ]
    if config.name == "muon":
        sgd = {"orthogonalised": False, "momentum": config.momentum, "nesterov": config.nesterov}
        groups = [group | sgd for group in groups]
        muon = {
            "orthogonalised": True,
            "params": [p for p in matrices if p is not last],
            "momentum": config.muon_momentum,
            "nesterov": True,
            "lr_ratio": config.muon_lr / config.lr,
        }
        groups[0]["params"] = [p for p in matrices if p is last]
        groups.insert(0, muon)
    if config.trunk_lr_ratio != 1:
        groups = [part for group in groups for part in _divided(model, group, config)]
    return [{"lr": config.lr * group["lr_ratio"]} | group for group in groups if group["params"]]


def _divided(
    model: nn.Module, group: dict[str, Any], config: OptimConfig
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divides a group into the trunk, with its own learning rate, and the rest."""
    trunk = {id(p) for name, p in model.named_parameters() if name.startswith("features.")}
    inside = [p for p in group["params"] if id(p) in trunk]
    outside = [p for p in group["params"] if id(p) not in trunk]
    ratio = group["lr_ratio"] * config.trunk_lr_ratio
    return group | {"params": inside, "lr_ratio": ratio}, group | {"params": outside}


def muon_dtype(precision: str) -> torch.dtype:
    """Returns the dtype in which Muon computes and sends: bf16 unless the precision is `no`."""
    return torch.get_default_dtype() if precision == "no" else torch.bfloat16


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_ratio"]


def skip_step_if(optimizer: torch.optim.Optimizer, flag: Tensor) -> None:
    """Makes the next step change nothing if `flag`, a scalar on the device, is 1.

    The host does not wait for the device. torch.amp.GradScaler and fused optimizers use the same
    protocol.
    """
    bare: Any = getattr(optimizer, "optimizer", optimizer)  # removes accelerate's wrapper
    bare.found_inf, bare.grad_scale = flag, None

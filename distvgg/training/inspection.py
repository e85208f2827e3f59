"""One micro-batch in detail: losses by sample, activations and gradients by layer.

Invariant: an inspection leaves a run as it was. The buffers of BatchNorm that it changes are
overwritten by the next forward (their momentum is 1).
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from distvgg.data.loader import MicroBatch
from distvgg.training.step import StepParts, forward, summed_loss


@dataclass(frozen=True)
class Activations:
    """Statistics of a layer's output, in float32 over its finite values.

    Attributes:
        layer: name and type.
        shape: of the output.
        mean, std, smallest, largest: 0 if no value is finite.
        zeros: share of exact zeros.
        non_finite: number of NaN and infinite values.
    """

    layer: str
    shape: tuple[int, ...]
    mean: float
    std: float
    smallest: float
    largest: float
    zeros: float
    non_finite: int


@dataclass(frozen=True)
class Inspection:
    """A micro-batch in detail.

    Attributes:
        loss: summed over samples, as the step adds it.
        logits: [m, classes] float32.
        sample_losses: [m] float32; their sum may differ from `loss` by rounding.
        activations: of each layer, in order.
        gradients: norm of the gradient of `loss / global_batch_size` by parameter, without frozen
            parameters.
    """

    loss: float
    logits: Tensor
    sample_losses: Tensor
    activations: list[Activations]
    gradients: dict[str, float]

    @property
    def gradient_norm(self) -> float:
        """Norm over all parameters."""
        return float(torch.tensor(list(self.gradients.values()), dtype=torch.float64).norm())


def inspect_micro_batch(parts: StepParts, network: nn.Module, batch: MicroBatch) -> Inspection:
    """Runs forward and backward of a micro-batch, and collects statistics.

    Args:
        parts: of the run, before the step.
        network: the bare network that `parts.model` runs.
        batch: the micro-batch.
    """
    found: list[Activations] = []
    leaves = [(n, m) for n, m in network.named_modules() if not list(m.children())]
    handles = [
        module.register_forward_hook(partial(_record, f"{name} {type(module).__name__}", found))
        for name, module in leaves
        if not isinstance(module, nn.Identity)
    ]
    smoothing = parts.config.train.label_smoothing
    try:
        loss, logits = forward(parts.model, batch, smoothing)
    finally:
        for handle in handles:
            handle.remove()
    learned = {name: p for name, p in network.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss / parts.plan.global_batch_size, list(learned.values()))
    norms = [float(g.float().norm()) for g in gradients]
    return Inspection(
        loss=loss.item(),
        logits=logits.detach().float(),
        sample_losses=summed_loss(logits.detach().float(), batch, smoothing, reduction="none"),
        activations=found,
        gradients=dict(zip(learned, norms, strict=True)),
    )


def _record(
    layer: str, found: list[Activations], _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
) -> None:
    values = output.detach().float()
    finite = values[torch.isfinite(values)]
    count = max(1, values.numel())
    found.append(
        Activations(
            layer,
            tuple(values.shape),
            *(
                (0.0, 0.0, 0.0, 0.0)
                if not len(finite)
                else (
                    *(finite.mean().item(), finite.std(correction=0).item()),
                    *(finite.min().item(), finite.max().item()),
                )
            ),
            zeros=int((values == 0).sum()) / count,
            non_finite=values.numel() - len(finite),
        )
    )

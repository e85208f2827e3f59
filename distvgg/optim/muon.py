"""Muon: orthogonalised momentum for filters and hidden matrices, SGD for the rest.

Owns the Newton-Schulz iteration and the step that uses it. Invariant: a step is a pure function of
(weights, gradients, momenta, learning rates), whichever rank computed which part. A step changes
nothing if `found_inf` is 1.

Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024
(kellerjordan.github.io/posts/muon). A momentum M = U S V^T is replaced by approximately U V^T. All
directions of a layer then learn at one rate. SGD learns the few directions that have large singular
values.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from distvgg.distributed.reduction_plan import Ranks
from distvgg.distributed.shared_results import PartitionedCompute
from distvgg.distributed.tree_sum import ExchangeQueue
from distvgg.optim.eager import EagerOptimizer

# Coefficients of the quintic a x + b x^3 + c x^5, chosen in the source for its slope at zero.
# Singular values end within 0.7 to 1.2 rather than at one.
A, B, C = 3.4445, -4.7750, 2.0315
OLD_SETTING = "allow_tf32", True  # torch 2.8


def orthogonalise(matrix: Tensor, steps: int) -> Tensor:
    """Returns approximately the nearest semi-orthogonal matrix.

    Runs `steps` of the quintic Newton-Schulz iteration x <- (a + b G + c G^2) x with G = x x^T,
    from x of norm one. All iterates are x times a polynomial in the first G, so that only a square
    matrix of the smaller side is iterated. For 512 filters of 512 channels this takes 48 ms on a
    CPU core, instead of 229 ms by the definition. The result is closer to that of exact arithmetic.

    Args:
        matrix: [rows, columns]. bf16 is enough for the two products with the matrix. Computations
            between these products are in fp32, whose products may be in TF32.
        steps: with 3, singular values below 0.1 of the largest do not reach one; with 5, few do
            not.

    Returns:
        [rows, columns] of the same dtype.
    """
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    # The Frobenius norm bounds the spectral norm, which must not exceed one.
    x = x / (x.norm() + 1e-7)
    gram = x @ x.T
    gram = gram.to(torch.promote_types(gram.dtype, torch.float32))
    product: Tensor | None = None
    for step in range(steps):
        factor = torch.addmm(gram, gram, gram, beta=B, alpha=C)
        factor.diagonal().add_(A)
        product = factor if product is None else factor @ product
        if step < steps - 1:
            gram = factor @ gram @ factor
    assert product is not None
    x = torch.mm(product.to(x.dtype), x)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def orthogonalise_flops(rows: int, columns: int, steps: int) -> int:
    """Returns the floating-point operations of `orthogonalise`, two for a multiply-add."""
    small, large = sorted((rows, columns))
    return 2 * small**2 * (2 * large + (4 * steps - 3) * small)


class Launch(Protocol):
    """Runs a function that changes tensors in place."""

    def __call__(
        self, function: Callable[[], None], reads: Sequence[Tensor], changes: Sequence[Tensor], /
    ) -> None:
        """Runs `function`.

        Args:
            function: a method without arguments, which is the same each time.
            reads: tensors that it reads and that may be at other addresses the next time.
            changes: all tensors that it changes, always at the same addresses.
        """


def _directly(function: Callable[[], None], *_: Sequence[Tensor]) -> None:
    function()


class Muon(EagerOptimizer):
    """Muon's step for groups with `orthogonalised=True`, and SGD's step for other groups.

    Orthogonalised groups hold filters [out, in, h, w] and matrices [out, in]. A step first scales
    them to norm sqrt(out), so that the learning rate is relative to the size of the weights. This
    is valid where BatchNorm makes that size meaningless, and it replaces weight decay.

    The update of each layer is orthogonalised by one rank and sent to all ranks.

    Args:
        groups: each with `lr`, `momentum`, `nesterov`, `weight_decay`, `orthogonalised`.
        newton_schulz_steps: of the iteration.
        dtype: in which updates are orthogonalised and sent.
        ranks: the rank of this process and the levels of the exchange.
        queue: runs the exchange of updates.

    Attributes:
        launch: runs the two parts of a step between which results are exchanged.
    """

    # As in fused optimizers: GradScaler sets `found_inf` and does not wait for the device.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        newton_schulz_steps: int,
        dtype: torch.dtype,
        ranks: Ranks,
        queue: ExchangeQueue,
    ) -> None:
        super().__init__(groups, {})
        self._newton_schulz_steps = newton_schulz_steps
        self.found_inf: Tensor | None = None
        self.grad_scale: Tensor | None = None
        self.launch: Launch = _directly
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        self._muon = [(p, g) for g in self.param_groups if g["orthogonalised"] for p in g["params"]]
        shapes = [(len(p), p[0].numel()) for p, _ in self._muon]
        costs = [orthogonalise_flops(*shape, newton_schulz_steps) for shape in shapes]
        device = self._muon[0][0].device
        self._updates = PartitionedCompute(shapes, costs, dtype, device, ranks)
        self._queue = queue
        # At fixed addresses: a CUDA graph reads them.
        self._failed = torch.zeros((), dtype=torch.bool, device=device)
        self._lr = torch.zeros(len(self._muon), 1, device=device)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Takes a step; all parameters must have gradients, which must be unscaled."""
        assert closure is None
        assert self.grad_scale is None
        if self.found_inf is not None:
            self._failed.copy_(self.found_inf > 0)
        for group in self.param_groups:
            if not group["orthogonalised"]:
                self._sgd_step(group)
        momenta = [self.state[p]["momentum_buffer"] for p, _ in self._muon]
        updates = [self._updates[i] for i in self._updates.mine]
        gradients = [p.grad for p, _ in self._muon if p.grad is not None]
        assert len(gradients) == len(self._muon)
        self.launch(self._compute_updates, gradients, momenta + updates)
        self._queue.start(self._updates.exchange())
        self._queue.finish()
        first = 0
        for group in self.param_groups:  # a launch for each group, not for each layer
            if group["orthogonalised"]:
                last = first + len(group["params"])
                self._lr[first:last].fill_(group["lr"])
                first = last
        self.launch(self._apply_updates, (), [p for p, _ in self._muon])

    def _compute_updates(self) -> None:
        """Updates the momenta, and orthogonalises those of this rank."""
        with products_in_tf32(self._updates.dtype, self._updates.device):
            for i, (p, group) in enumerate(self._muon):
                momentum = self._momentum(p, group)
                if i in self._updates.mine:
                    matrix = _rows(momentum).flatten(1).to(self._updates.dtype)
                    update = orthogonalise(matrix, self._newton_schulz_steps)
                    self._updates[i].copy_(torch.where(self._failed, 0.0, update))

    def _apply_updates(self) -> None:
        """Scales the weights to their norm and subtracts the updates of all ranks."""
        for i, (p, _) in enumerate(self._muon):
            weights = _rows(p)
            scale = torch.where(self._failed, 1.0, math.sqrt(len(p)) / p.norm())
            weights.mul_(scale).sub_(self._updates[i].view_as(weights) * self._lr[i])

    def rehearse(self) -> None:
        """Runs the orthogonalisations of this rank and discards the results, for timing."""
        with products_in_tf32(self._updates.dtype, self._updates.device):
            for i in self._updates.mine:
                orthogonalise(torch.randn_like(self._updates[i]), self._newton_schulz_steps)

    def _momentum(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """Adds a gradient to its momentum, unless the step failed, and returns the direction."""
        assert p.grad is not None
        buffer, factor = self.state[p]["momentum_buffer"], group["momentum"]
        new = torch.add(p.grad, buffer, alpha=factor)
        torch.where(self._failed, buffer, new, out=buffer)
        return torch.add(p.grad, new, alpha=factor) if group["nesterov"] else new

    def _sgd_step(self, group: dict[str, Any]) -> None:
        parameters = group["params"]
        sgd(
            parameters,
            [p.grad for p in parameters],
            [self.state[p]["momentum_buffer"] for p in parameters],
            fused=True,
            found_inf=self.found_inf,
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=0.0,
            nesterov=group["nesterov"],
            maximize=False,
        )


@contextmanager
def products_in_tf32(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Lets a GPU multiply fp32 matrices in TF32, if updates are bf16, which has fewer digits.

    Restores the setting of the process, which counts for all threads.
    """
    if device.type != "cuda" or dtype != torch.bfloat16:
        yield
        return
    setting: Any = torch.backends.cuda.matmul
    name, tf32 = ("fp32_precision", "tf32") if hasattr(setting, "fp32_precision") else OLD_SETTING
    before = getattr(setting, name)
    setattr(setting, name, tf32)
    try:
        yield
    finally:
        setattr(setting, name, before)


def _rows(x: Tensor) -> Tensor:
    """Returns filters [out, in, h, w] as [out, h, w, in]; a matrix is returned unchanged.

    The order within a filter does not matter here. Flattening makes no copy if `x` is NHWC in
    memory.
    """
    return x.permute(0, 2, 3, 1) if x.ndim == 4 else x

"""A step in CUDA graphs: micro-batches and the optimizer's parts are one launch of the host each.

Owns the capture, the buffers of its input and output, and the comparison that admits a graph.

Invariant: a replay gives the bytes of the eager computation. Each graph is compared with it before
its first use. A graph that differs or cannot be captured ends the use of graphs in this process.
The graph of a micro-batch depends on shapes alone, not on the rank or the number of processes.

A micro-batch is a pure function of weights, input and dropout seed: its gradients are not added to
others, and BatchNorm's buffers, whose momentum is 1, are overwritten. Capture and comparison
therefore need no snapshot. The optimizer's parts change weights and momenta; what they change is
copied before the first call. Gradients come from torch.autograd.grad, so that neither a `.grad` nor
a hook is part of a graph. torch.cuda.make_graphed_callables is not used: gradients accumulated from
its buffers were wrong (pytorch issue 181723).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from distvgg.data.loader import MicroBatch
from distvgg.models.freezing import learned_parameters
from distvgg.training.step import StepParts, summed_loss


class Computed(NamedTuple):
    """Result of a micro-batch. That of a graph is in buffers that its next replay overwrites.

    Attributes:
        loss: [] summed over samples.
        logits: [m, classes].
        gradients: one for each parameter that is not frozen, in the order of the network.
    """

    loss: Tensor
    logits: Tensor
    gradients: tuple[Tensor, ...]

    def tensors(self) -> tuple[Tensor, ...]:
        """All of them."""
        return self.loss, self.logits, *self.gradients


T = TypeVar("T")


class InputBuffers(NamedTuple):
    """The input of a micro-batch at fixed addresses; the fields are those of `MicroBatch`."""

    images: Tensor
    labels: Tensor
    partner_labels: Tensor | None
    loss_weights: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, batch: MicroBatch) -> "InputBuffers":
        """Allocates the buffers of micro-batches like this one, and loads it."""
        partner = batch.partner_labels
        weights = torch.empty(2, dtype=torch.get_default_dtype(), device=batch.images.device)
        buffers = cls(
            torch.empty_like(batch.images),
            torch.empty_like(batch.labels),
            None if partner is None else torch.empty_like(partner),
            (weights[0], weights[1]),
        )
        buffers.load(batch)
        return buffers

    def load(self, batch: MicroBatch) -> None:
        """Copies a micro-batch into the buffers."""
        self.images.copy_(batch.images)
        self.labels.copy_(batch.labels)
        if self.partner_labels is not None:
            assert batch.partner_labels is not None
            self.partner_labels.copy_(batch.partner_labels)
            for buffer, weight in zip(self.loss_weights, batch.loss_weights, strict=True):
                buffer.fill_(weight)  # a kernel with an argument, not a copy from the host


class CastWeights:
    """Filters and matrices in the dtype of autocast, cast once a step.

    Autocast would cast them in each micro-batch. Gradients by the cast weights are those that
    autocast casts back, so that the bits are the same.

    Args:
        model: the network.
        dtype: of autocast; float32 leaves all weights as they are.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._model = model
        self._originals = {
            name: p.detach()
            for name, p in model.named_parameters()
            if p.ndim > 1 and dtype != torch.float32
        }
        learned = {id(p) for p in learned_parameters(model)}
        self._cast = {
            name: self._originals[name].to(dtype, copy=True).requires_grad_(id(p) in learned)
            for name, p in model.named_parameters()
            if name in self._originals
        }

    @torch.no_grad()
    def update(self) -> None:
        """Casts the weights of this step."""
        if self._cast:
            torch._foreach_copy_(list(self._cast.values()), list(self._originals.values()))

    def __call__(self, images: Tensor) -> Tensor:
        """Runs the network on the cast weights."""
        if not self._cast:
            return self._model(images)  # type: ignore[no-any-return]
        from torch.func import functional_call

        return functional_call(self._model, self._cast, (images,))  # type: ignore[no-any-return]

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        """Returns the gradients of the trained parameters in their own dtypes, in order."""
        parameters = {n: p for n, p in self._model.named_parameters() if p.requires_grad}
        found = torch.autograd.grad(loss, [self._cast.get(n, p) for n, p in parameters.items()])
        if not self._cast:
            return found
        result = [torch.empty_like(p) for p in parameters.values()]
        torch._foreach_copy_(result, list(found))
        return tuple(result)


class Recorder(Protocol):
    """Records a computation on fixed buffers."""

    def warm_up(self, compute: Callable[[], T]) -> T:
        """Computes eagerly, and allocates what a capture must find: workspaces, plans."""

    def capture(self, compute: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """Records without computing.

        Returns:
            The replay, and the result, whose tensors it fills.

        Raises:
            RuntimeError: the computation cannot be recorded, or there is no memory for it.
        """


class CudaRecorder:
    """Records CUDA graphs, on one stream and in one memory pool.

    Graphs may share the pool because each one's output is read before the next replay.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, compute: Callable[[], T]) -> T:
        """Computes eagerly on the stream of the capture, where cuBLAS then has its workspace."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            computed = compute()
        current.wait_stream(self._stream)
        return computed

    def capture(self, compute: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """Records a graph; threads that copy a checkpoint meanwhile do not disturb it."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            computed = compute()
        return graph.replay, computed


class _Graph(NamedTuple):
    buffers: InputBuffers
    replay: Callable[[], None]
    computed: Computed


class StepGraphs:
    """The graphs of a run: of micro-batches by shape, mixed and not, and of the optimizer's parts.

    Args:
        recorder: of the device.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._graphs: dict[tuple[torch.Size, bool], _Graph] = {}
        self._updates: dict[tuple[str, tuple[int, ...]], Callable[[], None]] = {}
        self._weights: CastWeights | None = None
        self._failed = False
        self._failure: str | None = None

    def start_step(self, parts: StepParts) -> None:
        """Takes the weights of a step, before its first micro-batch."""
        if self._weights is None:
            self._weights = CastWeights(parts.model, autocast_dtype(parts.config.train.precision))
        elif not self._failed:
            self._weights.update()

    def run(self, parts: StepParts, batch: MicroBatch) -> Computed | None:
        """Computes a micro-batch, by a replay from the second of its kind on.

        Returns:
            The result; None if graphs are not used any more.
        """
        if self._failed:
            return None
        kind = batch.images.shape, batch.partner_labels is not None
        if kind not in self._graphs:
            return self._admit(parts, batch, kind)
        graph = self._graphs[kind]
        graph.buffers.load(batch)
        torch.manual_seed(batch.dropout_seed)  # a replay reads the generator's seed
        graph.replay()
        return graph.computed

    def update(
        self, function: Callable[[], None], reads: Sequence[Tensor], changes: Sequence[Tensor]
    ) -> None:
        """Runs a part of the optimizer's step, by a replay from its second call on.

        The arguments are those of `optim.muon.Launch`.
        """
        if self._failed:
            function()
            return
        key = function.__name__, tuple(tensor.data_ptr() for tensor in reads)
        if key in self._updates:
            self._updates[key]()
            return
        before = [tensor.clone() for tensor in changes]
        self._recorder.warm_up(function)
        expected = [tensor.clone() for tensor in changes]
        try:
            replay, _ = self._recorder.capture(function)
            torch._foreach_copy_(list(changes), before)
            replay()
            equal = same_bytes(expected, changes)
        except RuntimeError as error:
            self._give_up((str(error).splitlines() or [type(error).__name__])[0])
        else:
            if equal:
                self._updates[key] = replay
                return
            self._give_up("the graph of an update gives other bits than its operations")
        torch._foreach_copy_(list(changes), expected)

    def fresh(self) -> "StepGraphs":
        """Returns graphs for another batch size or loader, which must be recorded again."""
        return StepGraphs(self._recorder)

    def failure(self) -> str | None:
        """Returns a line for the user when graphs were given up, once."""
        line, self._failure = self._failure, None
        return line

    def _admit(
        self, parts: StepParts, batch: MicroBatch, kind: tuple[torch.Size, bool]
    ) -> Computed:
        """Computes a micro-batch eagerly, and records it for the later ones of its kind."""
        assert self._weights is not None, "start_step comes first"
        buffers = InputBuffers.of(batch)
        compute = partial(forward_backward, parts, self._weights, buffers)
        torch.manual_seed(batch.dropout_seed)
        expected = self._recorder.warm_up(compute)
        try:
            replay, computed = self._recorder.capture(compute)
            torch.manual_seed(batch.dropout_seed)
            replay()
            equal = same_bytes(expected.tensors(), computed.tensors())
        except RuntimeError as error:
            self._give_up((str(error).splitlines() or [type(error).__name__])[0])
        else:
            if equal:
                self._graphs[kind] = _Graph(buffers, replay, computed)
            else:
                self._give_up("the graph of a micro-batch gives other bits than its operations")
        return expected

    def _give_up(self, reason: str) -> None:
        self._failed = True
        self._graphs.clear()
        self._updates.clear()
        self._failure = f"no CUDA graphs, the step runs eagerly with the same bits: {reason}"


def autocast_dtype(precision: str) -> torch.dtype:
    """Returns the dtype in which autocast computes convolutions and products of matrices."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)


def forward_backward(parts: StepParts, weights: CastWeights, batch: InputBuffers) -> Computed:
    """Computes loss and gradients of a micro-batch, with the generator's dropout masks."""
    logits = weights(batch.images)
    loss = summed_loss(logits, batch, parts.config.train.label_smoothing)
    scaled = loss / parts.plan.global_batch_size
    if parts.accelerator.scaler is not None:
        scaled = parts.accelerator.scaler.scale(scaled)
    return Computed(loss.detach(), logits.detach(), weights.gradients(scaled))


def same_bytes(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Returns True if all pairs of tensors have the same bytes."""

    def bytes_of(tensor: Tensor) -> Tensor:
        return tensor.flatten().view(torch.uint8)

    pairs = zip(one, other, strict=True)
    return all(torch.equal(bytes_of(a), bytes_of(b)) for a, b in pairs)

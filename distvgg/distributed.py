"""All that depends on how many processes there are: the Accelerator, collectives, BatchNorm.

Invariant: what leaves this module is the same on every rank, and the same for every number of
processes, to the last bit. What is summed over ranks has a slot of its own for each micro-batch or
batch, to which others add zero, or goes along the tree of `tree_sum.py`.
"""

import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from distvgg import environment
from distvgg.config import Config, ContactError, RunError, UserError
from distvgg.memory import keep_freed_memory
from distvgg.provenance import machine
from distvgg.reduction_plan import Ranks, TreePlan, levels_of
from distvgg.sampling import share_out
from distvgg.tree_sum import ExchangeQueue, Messages, TreeSum, all_gather

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState


T = TypeVar("T")

_BROADCAST_BYTES = 64 * 2**20
BATCH_NORM_MOMENTUM = 0.1  # torch's and torchvision's default
# How gloo says that the other end of a connection is gone.
_BROKEN = (
    r"Connection (closed|reset) by peer|Broken pipe|[Cc]onnection refused|Socket closed"
    r"|Timed out waiting"
)


def device_here() -> torch.device:
    """The device that accelerate takes for one process, found without joining a group."""
    from accelerate.utils import parse_flag_from_env

    with warnings.catch_warnings(action="ignore"):  # of a driver that is too old
        found = torch.accelerator.current_accelerator(check_available=True)
    if found is None or parse_flag_from_env("ACCELERATE_USE_CPU"):
        return torch.device("cpu")
    return found


def start(config: Config, run_dir: Path | None = None) -> "Accelerator":
    """Joins the process group that the launcher made and returns accelerate's handle on it.

    The gradient accumulation, the loader and the learning rate are ours: accelerate gets no
    scheduler (a prepared one steps once per process), no loader, and no accumulation count.

    Raises:
        UserError: several processes that know nothing of each other; another kind of training; a
            precision that the device does not have.
    """
    from accelerate import Accelerator, PartialState
    from accelerate.utils import (
        GradientAccumulationPlugin,
        ProjectConfiguration,
        TorchDynamoPlugin,
        parse_flag_from_env,
    )

    environment.clear()
    environment.refuse()
    # Accelerator reads this variable, PartialState alone does not.
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
    state = PartialState(cpu=cpu, **_store_of_this_attempt())
    launched = environment.world_size()
    if launched > 1 and state.num_processes == 1:
        raise UserError(
            f"WORLD_SIZE is {launched} but no process group was formed, so each process would train"
            " the same thing: set ACCELERATE_USE_CPU=true where there is no GPU, and start with"
            " accelerate launch"
        )
    if state.distributed_type not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        raise UserError(
            f"accelerate starts {state.distributed_type.value} here, which distvgg does not have:"
            " launch with --config_file accelerate_config.yaml"
        )
    if state.device.type == "cpu":
        torch.set_num_threads(config.train.cpu_threads)
        keep_freed_memory()
    # Batch shapes never change; the run must be the same when it is run again.
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    folders = run_dir and ProjectConfiguration(str(run_dir), str(run_dir / "tensorboard"))
    launched_with = os.environ.get("ACCELERATE_MIXED_PRECISION")
    return Accelerator(
        # Devices of different kinds must not add gradients of different precisions.
        mixed_precision=from_main(
            state, lambda: resolve_precision(config.train.precision, state.device, launched_with)
        ),
        project_config=folders,
        # Said, so that accelerate does not ask the environment.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        dynamo_plugin=TorchDynamoPlugin(backend="inductor" if config.train.compile else "no"),
    )


def _store_of_this_attempt() -> dict[str, Any]:
    """Where the workers that `--max_restarts` started again find each other. The launcher's static
    rendezvous keeps its store (torch 2.14), in which the addresses of the dead still stand."""
    env = os.environ
    attempt = int(env.get("TORCHELASTIC_RESTART_COUNT", 0))
    if not attempt or env.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    store = TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False)
    return {
        "store": PrefixStore(f"attempt_{attempt}", store),
        "rank": int(env["RANK"]),
        "world_size": int(env["WORLD_SIZE"]),
    }


def distribute(
    accelerator: "Accelerator", model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Lets accelerate wrap a model and its optimizer: mixed precision, loss scaling, compilation.

    `evaluation_mode` leaves out DistributedDataParallel alone: gradients are summed by
    `gradients.GradientReducer`, in an order that does not depend on the ranks.
    """
    wrapped = accelerator.prepare_model(model, evaluation_mode=True)
    return wrapped, accelerator.prepare_optimizer(optimizer)


def ranks_of(accelerator: "Accelerator") -> Ranks:
    """This process among all, and how they exchange: within a node first."""
    world_size = accelerator.num_processes
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if world_size > 1 else 1
    levels = levels_of(world_size, from_main(accelerator, lambda: per_node))
    return Ranks(accelerator.process_index, world_size, levels)


def machines(accelerator: "Accelerator") -> list[dict[str, str]]:
    """Every rank's device and versions, by rank; all ranks must call it."""
    from accelerate.utils import gather_object

    found: list[dict[str, str]] = gather_object([machine(accelerator.device)])
    return found


def has_nvidia_hardware(root: Path = Path("/")) -> bool:
    """Whether this machine has an NVIDIA GPU, whatever the software knows of it (Linux)."""
    for vendor in (root / "sys/bus/pci/devices").glob("*/vendor"):
        is_display = vendor.with_name("class").read_text().startswith("0x03")
        if is_display and vendor.read_text().strip() == "0x10de":
            return True
    return (root / "dev/nvidiactl").exists()


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


def from_main(process: "Accelerator | PartialState", make: Callable[[], T]) -> T:
    """Calls `make` on the main process and returns its result on every rank. A UserError that it
    raises is raised on every rank, so that none is left waiting."""
    outcome: list[Any] = [None]
    if process.is_main_process:
        try:
            outcome = [make()]
        except UserError as error:
            outcome = [error]
    broadcast_object_list(outcome)
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    made: T = outcome[0]
    return made


def bytes_from_main(accelerator: "Accelerator", content: bytes | None) -> bytes:
    """Copies bytes of the main process to every rank, in parts of 64 MiB, without pickling.

    Args:
        content: on the main process, not empty; ignored on the others.
    """
    if accelerator.num_processes == 1:
        assert content is not None
        return content
    size = from_main(accelerator, lambda: len(content or b""))
    if accelerator.is_main_process:
        assert content is not None
        whole = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    else:
        whole = torch.empty(size, dtype=torch.uint8)
    for part in torch.split(whole, _BROADCAST_BYTES):
        there = part.to(accelerator.device)
        dist.broadcast(there, src=0)
        if there is not part:
            part.copy_(there)
    return whole.numpy().tobytes()


def from_node_leaders(accelerator: "Accelerator", here: T | None) -> T | None:
    """Returns on every rank what the first rank of its node passed; all ranks must call it."""
    from accelerate.utils import gather_object

    leader = accelerator.process_index - accelerator.local_process_index
    found: T | None = gather_object([here])[leader]
    return found


def any_rank(accelerator: "Accelerator", here: bool) -> bool:
    """Whether something holds on any rank. Every rank must call it, and waits for the others."""
    flag = torch.tensor(float(here), device=accelerator.device)
    return bool(accelerator.reduce(flag, "sum") > 0)


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


class StepSums:
    """What all ranks must know of a step: the loss and hits of each micro-batch and the wish to
    stop, in one small all-reduce, and the statistics that BatchNorm took, summed along the tree.
    Both hide behind backward.

    Invariant: after `finish` every rank holds the same bits, whichever of them ran what. BatchNorm
    takes one update a step, with the mean over all micro-batches: a function of the step alone, and
    so is a checkpoint at any step. The layers' own momentum is 1, which leaves in their buffers
    what a micro-batch measured; one that changed within a step would be compiled anew for each
    value, and not at all from the ninth on (torch 2.14).

    Args:
        queue: runs the exchanges of the step; others' may be in it.
    """

    def __init__(
        self,
        accelerator: "Accelerator",
        plan: TreePlan,
        layers: list[nn.BatchNorm2d],
        queue: ExchangeQueue,
    ) -> None:
        for layer in layers:
            layer.momentum = 1.0
        self._plan, self._queue = plan, queue
        self._buffers = [
            b for m in layers for b in (m.running_mean, m.running_var) if b is not None
        ]
        # Another rank's micro-batches are zero here, and adding zero is exact.
        parts = [plan.n, plan.n, 1]
        self._flat = torch.zeros(sum(parts), dtype=torch.float64, device=accelerator.device)
        self._losses, self._hits, self._stop = torch.split(self._flat, parts)
        self._pending: dist.Work | None = None
        if self._buffers:
            self._running = torch.cat(self._buffers)
            self._running_parts = torch.split(self._running, [b.numel() for b in self._buffers])
            self._statistics = TreeSum(plan, [self._running], torch.float64)

    @torch.no_grad()
    def add(self, k: int, summed_loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Adds a micro-batch after its forward: its loss summed over samples, [m, classes] logits,
        [m] labels, and what BatchNorm measured."""
        self._losses[k] = summed_loss
        self._hits[k] = (logits.argmax(1) == labels).sum()
        if self._buffers:
            self._statistics.add([torch.cat(self._buffers)])

    @torch.no_grad()
    def start(self, stop: bool) -> None:
        """Begins the reduction; to be called by every rank after its last forward of a step."""
        self._stop.fill_(float(stop))
        if self._plan.ranks.world_size > 1:
            self._pending = dist.all_reduce(self._flat, async_op=True)
        if self._buffers:
            self._queue.start(self._statistics.exchange())

    @torch.no_grad()
    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ends the reduction, updates BatchNorm's buffers, and makes ready for the next step. Not
        before backward, which reads what the buffers were.

        Returns:
            float64 on the device: [G/m] losses and [G/m] hits by micro-batch, and how many ranks
            wish to stop.
        """
        self._queue.finish()
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
        if self._buffers:
            mean = (self._statistics.total[0] / self._plan.n).to(self._running.dtype)
            self._running.lerp_(mean, BATCH_NORM_MOMENTUM)
            torch._foreach_copy_(self._buffers, self._running_parts)
        totals = self._losses.clone(), self._hits.clone(), self._stop.clone()
        self._flat.zero_()
        return totals


class SharedResults:
    """Matrices of which each is computed by one rank and wanted by all.

    Who computes which is a function of costs and ranks alone (`sampling.share_out`). Invariant:
    after `exchange` every rank holds the same bits, and what is computed for one matrix does not
    depend on who computes it, nor on what else that rank computes.

    Args:
        shapes: of the matrices, (rows, columns).
        costs: of computing them, in any one unit.
        ranks: this process among all.

    Attributes:
        mine: the numbers of those that this rank computes, into `self[i]`.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        costs: Sequence[float],
        dtype: torch.dtype,
        device: torch.device,
        ranks: Ranks,
    ) -> None:
        self.dtype, self.device, self._ranks = dtype, device, ranks
        owners = share_out(costs, ranks.world_size)
        self.mine = {i for i, owner in enumerate(owners) if owner == ranks.rank}
        # One after the other by owner: what a rank computes is one segment.
        order = sorted(range(len(shapes)), key=lambda i: owners[i])
        sizes = [math.prod(shapes[i]) for i in order]
        self._flat = torch.zeros(sum(sizes), dtype=dtype, device=device)
        views = dict(zip(order, torch.split(self._flat, sizes), strict=True))
        self._results = [views[i].view(shape) for i, shape in enumerate(shapes)]
        self._segments: dict[int, tuple[int, int]] = {}
        end = 0
        for i, size in zip(order, sizes, strict=True):
            first, _ = self._segments.get(owners[i], (end, end))
            end += size
            self._segments[owners[i]] = first, end
        others = [rank for rank in range(ranks.world_size) if rank != ranks.rank]
        sends = [(peer, self._common(ranks.rank, peer)) for peer in others]
        receives = [(peer, self._common(peer, ranks.rank)) for peer in others]
        # Of many ranks few have anything in common: each step would pass over the rest.
        self._to_shards = Messages(
            *([(peer, part) for peer, part in ends if part.numel()] for ends in (sends, receives))
        )

    def __getitem__(self, i: int) -> Tensor:
        return self._results[i]

    def exchange(self) -> Iterator[Messages]:
        """Hands this rank's results to all others: first to the ranks that hold their shards, then
        these to all. So results, and not ranks, decide how many bytes travel."""
        if self._ranks.world_size > 1:
            yield self._to_shards
        yield from all_gather(self._ranks, self._flat)

    def _common(self, owner: int, holder: int) -> Tensor:
        """The part of one rank's results that lies in the shard of another."""
        shard = self._ranks.shard(self._flat, holder)
        start = int(shard.storage_offset())
        first, end = self._segments.get(owner, (0, 0))
        first, end = max(first, start), min(end, start + shard.numel())
        return self._flat[first : max(first, end)]


class HostCopy:
    """A tensor on its way to the host, which waits for it only when it reads: for what the device
    was given before, not for what it was given since."""

    def __init__(self, values: Tensor) -> None:
        self._values, self._copied = values, None
        if values.is_cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values = host.copy_(values, non_blocking=True)
            self._copied = torch.Event(values.device)
            self._copied.record()

    def read(self) -> Any:
        """The values as Python numbers."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values.tolist()


class Agreement:
    """Whether any rank was told to stop, asked by all ranks equally often: an all-reduce that is
    read at the next asking, when it is long done. To be closed: one that is still under way when
    the process exits aborts it."""

    def __init__(self, accelerator: "Accelerator") -> None:
        self._accelerator = accelerator
        self._flag: HostCopy | None = None
        self._pending: dist.Work | None = None

    def asked(self, here: bool) -> bool:
        """The answer to the asking before this one; with one process, to this one."""
        if self._accelerator.num_processes == 1:
            return here
        self.close()
        if self._flag is not None and self._flag.read() > 0:
            return True
        # Filled on the device: a number that comes from the host would wait for what it computes.
        flag = torch.full((), float(here), device=self._accelerator.device)
        self._pending = dist.all_reduce(flag, async_op=True)
        if flag.is_cuda:
            self.close()  # for the stream, not the host: the copy must not wait for what comes next
        self._flag = HostCopy(flag)
        return False

    def close(self) -> None:
        """Ends what is under way."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None


@contextmanager
def left_in_order() -> Iterator[None]:
    """Takes down the process group where all ranks give up alike, by a UserError or a RunError of
    the run itself. gloo now and then aborts a process that exits with its group still up."""
    try:
        yield
    except (UserError, RunError) as error:
        if dist.is_initialized() and not isinstance(error, ContactError):
            dist.destroy_process_group()
        raise


@contextmanager
def lost_contact() -> Iterator[None]:
    """Says in a line what a broken connection to another process means.

    Raises:
        ContactError: instead of what torch.distributed raises.
    """
    try:
        yield
    except RunError:  # a RuntimeError too, whose text may quote such words
        raise
    except RuntimeError as error:  # gloo has no type of its own for it
        text = str(error)
        if isinstance(error, dist.DistError) or re.search(_BROKEN, text):
            raise ContactError(
                "lost contact with another process, which died or was killed"
                f" ({_reason(text)}); its own lines say why. The same command goes on from the last"
                " checkpoint"
            ) from error
        raise


def _reason(text: str) -> str:
    """What gloo or NCCL says, without the places in their sources."""
    found = re.search(_BROKEN, text)
    return found[0] if found else text.splitlines()[0][:200]

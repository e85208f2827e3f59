"""The process group, and accelerate's handle on the group.

Invariant: the results of this package are the same on every rank and at any world size, to the last
bit. A sum over ranks either has a slot for each micro-batch or batch, to which other ranks add
zero, or follows the tree of `tree_sum.py`.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from distvgg import environment
from distvgg.config import Config
from distvgg.distributed.collectives import broadcast_from_main
from distvgg.distributed.device import resolve_precision
from distvgg.distributed.host_memory import keep_freed_memory
from distvgg.distributed.reduction_plan import Ranks, levels_of
from distvgg.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState


def start(config: Config, run_dir: Path | None = None) -> "Accelerator":
    """Joins the launcher's process group and returns accelerate's handle on the group.

    distvgg implements gradient accumulation, the loader and the learning rate itself. accelerate
    gets no scheduler (a prepared one steps once per process), no loader, and no accumulation count.

    Raises:
        UserError: several processes were started without a process group; the distributed type is
            not supported; the device does not have the precision.
    """
    from accelerate import Accelerator, PartialState
    from accelerate.state import AcceleratorState
    from accelerate.utils import (
        GradientAccumulationPlugin,
        ProjectConfiguration,
        TorchDynamoPlugin,
        parse_flag_from_env,
    )

    environment.clear()
    environment.refuse()
    if note := environment.complete_launcher():
        print(note, flush=True)
    # Accelerator reads this variable, but PartialState does not.
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
    state = PartialState(cpu=cpu, **_store_of_this_attempt())
    _check_supported(state)
    if cpu and state.device.type != "cpu":  # ACCELERATE_TORCH_DEVICE: a GPU shared over gloo
        # accelerate 1.15 lets that variable overrule this one, and then refuses the pair.
        del os.environ["ACCELERATE_USE_CPU"]
    if state.device.type == "cpu":
        torch.set_num_threads(config.train.cpu_threads)
        keep_freed_memory()
    # Batch shapes never change. A repeated run must give the same results.
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    folders = run_dir and ProjectConfiguration(str(run_dir), str(run_dir / "tensorboard"))
    AcceleratorState._reset_state()  # of an earlier run in this process (accelerate 1.15)
    launched_with = os.environ.get("ACCELERATE_MIXED_PRECISION")
    return Accelerator(
        # From rank 0: devices of different kinds must not add gradients of different precisions.
        mixed_precision=broadcast_from_main(
            state, lambda: resolve_precision(config.train.precision, state.device, launched_with)
        ),
        project_config=folders,
        # Set explicitly, so that accelerate does not read the environment.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        dynamo_plugin=TorchDynamoPlugin(backend="inductor" if config.train.compile else "no"),
    )


def _check_supported(state: "PartialState") -> None:
    """Checks the process group and the device that accelerate has chosen.

    Raises:
        UserError: distvgg does not train on them.
    """
    launched = environment.world_size()
    if launched > 1 and state.num_processes == 1:
        raise UserError(
            f"WORLD_SIZE is {launched} but no process group was formed, so each process would train"
            " the same thing: set ACCELERATE_USE_CPU=true where there is no GPU, and start with"
            f" accelerate launch{'' if os.environ.get('LOCAL_RANK') else ', which sets LOCAL_RANK'}"
        )
    if state.distributed_type not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        raise UserError(
            f"accelerate starts {state.distributed_type.value} here, which distvgg does not have:"
            " launch with --config_file accelerate_config.yaml"
        )
    if state.device.type == "mps":
        raise UserError(
            "Apple's GPU (mps) lacks the float64 sums that exact metrics need: set"
            " ACCELERATE_USE_CPU=true"
        )


def _store_of_this_attempt() -> dict[str, Any]:
    """Returns the store for the rendezvous of workers that `--max_restarts` started again.

    The launcher's static rendezvous keeps its store (torch 2.14), which still holds the addresses
    of dead workers (as in pytorch/pytorch issue 135712).

    Returns:
        Arguments for PartialState; none at the first start, or without the launcher's store.
    """
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


def prepare_model(accelerator: "Accelerator", model: nn.Module) -> nn.Module:
    """Wraps a model, which must be on the device, for mixed precision and compilation.

    accelerate's `evaluation_mode` only leaves out DistributedDataParallel. Instead,
    `gradients.GradientReducer` sums the gradients, in an order that does not depend on the ranks.
    """
    # Otherwise accelerate imports torch.distributed.tensor, which takes 0.8 s (accelerate 1.15).
    wrapped: nn.Module = accelerator.prepare_model(
        model, device_placement=False, evaluation_mode=True
    )
    return wrapped


def ranks_of(accelerator: "Accelerator") -> Ranks:
    """Returns the rank, the world size and the levels of the exchange: within a node first."""
    world_size = accelerator.num_processes
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if world_size > 1 else 1
    levels = levels_of(world_size, broadcast_from_main(accelerator, lambda: per_node))
    return Ranks(accelerator.process_index, world_size, levels)

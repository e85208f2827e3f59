"""The process group and accelerate's handle on it.

Invariant of this package: what leaves it is the same on every rank, and the same for every number
of processes, to the last bit. What is summed over ranks has a slot of its own for each micro-batch
or batch, to which others add zero, or goes along the tree of `tree_sum.py`.
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
    from accelerate import Accelerator


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
        mixed_precision=broadcast_from_main(
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
    levels = levels_of(world_size, broadcast_from_main(accelerator, lambda: per_node))
    return Ranks(accelerator.process_index, world_size, levels)

"""`distvgg launch`: the processes of a run on one node.

Counts the devices or cores of the node and runs `accelerate launch` in this process. The scripts in
`launch/` call this command, with one node or many. Invariants: a user error is one line within
seconds; the exit code is that of the worker that failed first (2: an error that the user can fix).
`accelerate launch` itself turns every exit code into 1 and adds a traceback. Except for
SLURM_CPUS_ON_NODE, all information about SLURM comes from the options.
"""

import ipaddress
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from distvgg.commands.arguments import (
    Parser,
    add_model_options,
    asks_for_help,
    resolve,
    train_parser,
    validated,
)
from distvgg.config import Config, FrozenModel, TrainConfig
from distvgg.cores import granted_cores
from distvgg.errors import UserError
from distvgg.runs.layout import REQUEUE_FILE
from distvgg.wording import counted

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

ROOT = Path(__file__).resolve().parents[2]
ACCELERATE_CONFIG = ROOT / "accelerate_config.yaml"
NOWHERE = "192.0.2.1"  # RFC 5737; used only to look up the default route
# Signals that end the launcher and are forwarded to the workers, which then save. The launcher's
# default list lacks the last two, which would kill the launcher and with it the workers.
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"


DESCRIPTION = """Starts the processes of a run on this node, as the scripts in launch/ do.

The words after -- are those of `distvgg train`. The exit code is that of the process that failed
first; 2 is an error that the user can fix."""


class Node(FrozenModel):
    """The part of a run on one node."""

    nodes: int = Field(1, ge=1)
    """Number of nodes."""
    rank: int = Field(0, ge=0)
    """Rank of this node. 0: the head, where all nodes meet."""
    head: str = ""
    """Host name of the head, which every node can resolve."""
    port: int = Field(0, ge=0, le=65535)
    """A port that is free on the head. 0: any free port, for one node only."""
    id: str = "distvgg"
    """Identifier of this run. It separates runs whose nodes meet at the same port."""
    peer: str = ""
    """Any node except the head. The head finds its own address on the route to this node."""
    processes: int = Field(0, ge=0)
    """Processes on this node. 0: one per GPU, as far as they divide the micro-batches of a step."""
    granted: int = Field(0, ge=0)
    """GPUs that a scheduler granted on this node."""
    uniform: bool = False
    """Every node runs as many processes as this one."""
    max_restarts: int = Field(0, ge=0)
    """Maximum number of restarts of all workers after one died."""

    @model_validator(mode="after")
    def _several_nodes_need_a_head(self) -> "Node":
        if self.nodes > 1 and not (self.head and self.port):
            raise ValueError("--nodes needs --head and --port")
        return self


def main(words: list[str]) -> int:
    """Runs the workers of this node to their end and returns the exit code."""
    end = words.index("--") if "--" in words else len(words)
    parser = Parser("launch", DESCRIPTION, "[--option VALUE ...] -- RECIPE ... [as train]")
    add_model_options(parser, Node())
    if asks_for_help(words[:end]):
        print(parser.format_help().rstrip())
        return 0
    train, node = words[end + 1 :], Node()
    try:
        node = validated(Node, vars(parser.parse(words[:end])))
        if not ACCELERATE_CONFIG.exists():
            raise UserError(f"{ACCELERATE_CONFIG} does not exist: distvgg launch needs a checkout")
        _, config, run_dir = resolve(train_parser(Config()).parse(train))
    except UserError as error:
        return complain(node, error, everywhere=True)
    try:
        processes = count_processes(node)
    except UserError as error:
        return complain(node, error)
    if node.nodes == 1 or node.uniform:
        try:
            processes = fit_processes(node, processes, config.train)
        except UserError as error:
            return complain(node, error, everywhere=True)
    if node.nodes > 1:
        find_the_others(node)
    return launch(node, processes, train, run_dir)


def complain(node: Node, error: UserError | str, *, everywhere: bool = False) -> int:
    """Prints an error as one line and returns exit code 2.

    An error that every node finds (`everywhere`) is printed only on the head. The other nodes wait
    to be ended.
    """
    if everywhere and node.rank:
        time.sleep(5)
    else:
        where = f"{socket.gethostname()}: " if node.nodes > 1 and not everywhere else ""
        print(f"distvgg: error: {where}{error}", file=sys.stderr, flush=True)
    return 2


def count_processes(node: Node) -> int:
    """Returns the number of processes of this node: `node.processes`, else one per GPU.

    On a machine without GPUs, it is one for each GPU that a scheduler granted, else two, or one
    with a single core.

    Raises:
        UserError: the machine has GPUs, but torch sees none or fewer than expected.
    """
    with calm_launcher():
        import torch
    from accelerate.utils import parse_flag_from_env

    from distvgg.distributed.device import has_nvidia_hardware

    on_cpu = node.processes or node.granted or min(2, cores())
    if parse_flag_from_env("ACCELERATE_USE_CPU"):
        return on_cpu
    seen = torch.cuda.device_count()
    if seen == 0 and has_nvidia_hardware():
        raise UserError(
            "this machine has GPUs but torch sees none: ask for them (SLURM: --gpus-per-node),"
            " install a torch that is built for CUDA and this driver, or set"
            " ACCELERATE_USE_CPU=true"
        )
    if seen == 0:
        os.environ["ACCELERATE_USE_CPU"] = "true"
        if node.granted or node.nodes > 1:
            print(
                f"{socket.gethostname()} has no GPU: {counted(on_cpu, 'CPU process')}", flush=True
            )
        return on_cpu
    wanted = node.processes or max(seen, node.granted)
    if seen < wanted:
        raise UserError(
            f"{wanted} GPUs were requested but torch sees {seen}: check CUDA_VISIBLE_DEVICES, or"
            " exclude this machine (SLURM: --exclude)"
        )
    return wanted


def fit_processes(node: Node, available: int, train: TrainConfig) -> int:
    """Returns the number of processes to start on each node: normally all that are available.

    On one node, where neither a user nor a scheduler chose the number, it is the largest that
    divides the micro-batches of a step. A line then reports the processes that are left out.

    Raises:
        UserError: the processes do not divide the micro-batches.
    """
    from distvgg.data.plan import BatchPlan, valid_world_sizes

    whole, micro = train.global_batch_size, train.micro_batch_size
    if node.processes or node.granted or node.nodes > 1:
        BatchPlan(1, whole, micro, world_size=node.nodes * available)
        return available
    most = max(n for n in valid_world_sizes(whole // micro) if n <= available)
    if most < available:
        print(
            f"{most} of {available} processes are started: {available} do not divide the"
            f" {whole // micro} micro-batches of a step; to use all, set"
            f" {batch_for(train, available)}, which changes the result",
            flush=True,
        )
    return most


def batch_for(train: TrainConfig, world_size: int) -> str:
    """Returns an option with which `world_size` divides the micro-batches of a step.

    It is a smaller micro-batch if the global batch allows one, else a global batch of similar size.
    """
    whole, micro = train.global_batch_size, train.micro_batch_size
    for smaller in range(micro - 1, 1, -1):  # 1 is too few for BatchNorm
        if whole % (smaller * world_size) == 0:
            return f"--train.micro_batch_size {smaller}"
    unit = micro * world_size
    return f"--train.global_batch_size {max(1, round(whole / unit)) * unit}"


@contextmanager
def calm_launcher() -> Iterator[None]:
    """Prevents the torch imported inside from printing stack traces when another node ends first.

    The workers' torch still prints all of its messages, as does this one if the user sets LOGLEVEL,
    to INFO for example.
    """
    level = os.environ.setdefault("LOGLEVEL", "CRITICAL")
    quiet = level == "CRITICAL" and "TORCH_CPP_LOG_LEVEL" not in os.environ
    if quiet:
        os.environ["TORCH_CPP_LOG_LEVEL"] = "FATAL"
    yield
    if quiet:
        del os.environ["TORCH_CPP_LOG_LEVEL"]
    logging.getLogger("torch.distributed.elastic").setLevel(level)


def cores() -> int:
    """Returns the number of cores that the processes of this node share.

    SLURM's grant limits the number even where SLURM does not bind processes to cores. Of a quota,
    whole cores count.
    """
    bound = max(1, int(granted_cores()))
    return min(bound, int(os.environ.get("SLURM_CPUS_ON_NODE") or bound))


def find_the_others(node: Node) -> None:
    """Sets the variables that make this node use an address that the other nodes can reach.

    A host that resolves its own name to 127.0.1.1, as Debian does, would otherwise publish that
    address, and gloo would listen on it.
    """
    address = own_address([node.head] if node.rank else [node.peer, NOWHERE])
    if address is None:
        return
    os.environ.setdefault("PET_LOCAL_ADDR", address)
    if interface := interface_of(address):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def own_address(others: list[str]) -> str | None:
    """Returns the IPv4 address of this node on the route to another node. Sends nothing."""
    for other in filter(None, others):
        with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
            way.connect((other, 9))
            address: str = way.getsockname()[0]
            if not ipaddress.ip_address(address).is_loopback:
                return address
    return None


def interface_of(address: str) -> str | None:
    """Returns the network interface that has an address."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address == address for a in addresses):
            return str(name)
    return None


def launch(node: Node, processes: int, train: list[str], run_dir: Path) -> int:
    """Runs `accelerate launch` in this process and returns the exit code."""
    words = [
        *("--config_file", str(ACCELERATE_CONFIG)),
        *("--num_processes", str(node.nodes * processes)),
        *("--main_process_port", str(node.port)),
        *("--max_restarts", str(node.max_restarts)),
    ]
    if node.nodes > 1:
        words += ["--num_machines", str(node.nodes), "--machine_rank", str(node.rank)]
        words += ["--main_process_ip", node.head, "--rdzv_backend", "c10d"]
        # A head that imports torch from a cold disk may start minutes later than the other nodes.
        words += ["--rdzv_conf", f"is_host={int(node.rank == 0)},read_timeout=600,join_timeout=600"]
    # Options of torchrun that accelerate does not pass on; PET_LOCAL_ADDR is another.
    os.environ |= {"PET_RDZV_ID": node.id, "PET_SIGNALS_TO_HANDLE": SIGNALS}
    # The workers must import the code that launched them, whatever else is installed.
    path = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    # The store that workers share with their launchers outlives a restart and keeps the addresses
    # of dead workers (pytorch/pytorch issue 135712). With this variable, each round of workers gets
    # a new store.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"

    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError

    def forward(number: int, _: object) -> None:
        raise SignalException(f"signal {number}", signal.Signals(number))

    # torch 2.8 does not know PET_SIGNALS_TO_HANDLE. Later versions replace these handlers.
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, forward)
    try:
        parser = launch_command_parser()
        launch_command(parser.parse_args([*words, "-m", "distvgg", "train", *train]))
    except ChildFailedError as failed:
        return explain(failed)
    except SignalException as stopped:
        # The workers have ended by now. They saved if the signal reached them in time.
        number = stopped.sigval
        saved = number != signal.SIGINT and (run_dir / REQUEUE_FILE).exists()
        return 0 if saved else 128 + number
    except (RendezvousError, ConnectionError) as error:
        where, why = f"{node.head}:{node.port}", " ".join(str(error).split())
        complain(node, f"no rendezvous of the nodes at {where}, or no longer: {why}")
        return 1
    return 0


def explain(failed: "ChildFailedError") -> int:
    """Returns the exit code of the worker that failed first, and prints the signal that killed it.

    Times are whole seconds. In the first second with a failure, the cause is a killed worker, else
    one that exited by itself, else one that the launcher ended. Every worker that loses contact
    with another exits by itself.
    """

    def order(failure: "ProcessFailure") -> tuple[int, int]:
        if failure.exitcode >= 0:
            return failure.timestamp, 1
        return failure.timestamp, 2 if failure.exitcode == -signal.SIGTERM else 0

    rank, failure = min(failed.failures.items(), key=lambda item: order(item[1]))
    if failure.exitcode >= 0:
        return failure.exitcode
    name = signal.Signals(-failure.exitcode).name
    print(
        f"distvgg: error: process {rank} on {socket.gethostname()} was killed by {name}"
        + (" (out of memory? see dmesg)" if name == "SIGKILL" else ""),
        file=sys.stderr,
        flush=True,
    )
    return 128 - failure.exitcode

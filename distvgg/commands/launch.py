"""`distvgg launch`: one node's part of a run.

Counts the node's devices, divides its cores, and is its `accelerate launch`. The scripts in
`launch/` end here, with one node or many. Invariants: a mistake is one line within seconds; the
exit code is that of the worker that failed first (2: the user can mend it), where the bare launcher
makes 1 of each, and a traceback. Knows of SLURM only what its options say.
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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from distvgg.commands.arguments import resolve
from distvgg.config import TrainConfig
from distvgg.errors import UserError
from distvgg.runs.layout import REQUEUE_FILE

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

ROOT = Path(__file__).resolve().parents[2]
NOWHERE = "192.0.2.1"  # RFC 5737. Asked for a route only: the default one
# What ends the launcher and is handed on to the workers, which save. Its own list lacks the last
# two: it would die of them, and the workers with it.
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"


@dataclass(frozen=True)
class Node:
    """One node's part of a run."""

    nodes: int = 1
    """How many nodes take part."""
    rank: int = 0
    """0 on the head, where all meet; another elsewhere."""
    head: str = ""
    """The head's name, as every node can resolve it."""
    port: int = 0
    """A port that is free on the head. 0: any, which suits one node."""
    id: str = "distvgg"
    """Of this run: nodes of other runs that meet at the same port are strangers."""
    peer: str = ""
    """Any node but the head, from which the head learns its own address."""
    processes: int = 0
    """Processes on this node. 0: one a GPU, as far as they divide the micro-batches of a step."""
    granted: int = 0
    """GPUs that a scheduler granted on this node."""
    uniform: bool = False
    """Every node runs as many processes as this one."""
    max_restarts: int = 0
    """How often all workers start again after one died."""

    def __post_init__(self) -> None:
        if self.nodes > 1 and not (self.head and self.port):
            raise UserError("--nodes needs --head and --port")


def main(words: list[str]) -> int:
    """Runs this node's workers to their end; returns the exit code."""
    end = words.index("--") if "--" in words else len(words)
    node = tyro.cli(Node, prog="distvgg launch", args=words[:end], description=__doc__)
    train = words[end + 1 :]
    try:
        _, config, run_dir = resolve(train)
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
    """Says a mistake in a line; one that every node finds alike, on the head only, while the others
    wait to be ended."""
    if everywhere and node.rank:
        time.sleep(5)
    else:
        where = f"{socket.gethostname()}: " if node.nodes > 1 and not everywhere else ""
        print(f"distvgg: error: {where}{error}", file=sys.stderr, flush=True)
    return 2


def count_processes(node: Node) -> int:
    """How many processes this node runs: one a GPU that torch sees. On a machine without GPUs one
    for each that a scheduler declared, else two as far as there are cores.

    Raises:
        UserError: the machine has GPUs, but torch does not see them, or not all.
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
            print(f"{socket.gethostname()} has no GPU: {on_cpu} CPU process(es)", flush=True)
        return on_cpu
    wanted = node.processes or max(seen, node.granted)
    if seen < wanted:
        raise UserError(
            f"{wanted} GPUs are wanted but torch sees {seen}: mind CUDA_VISIBLE_DEVICES, or leave"
            " this machine out (SLURM: --exclude)"
        )
    return wanted


def fit_processes(node: Node, available: int, train: TrainConfig) -> int:
    """The number of processes to start on each node: all that are available. Where neither a user
    nor a scheduler chose their number, the most that divide the micro-batches of a step; prints
    what that leaves out.

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
    """An option with which so many processes divide the micro-batches of a step: a smaller
    micro-batch where the global batch allows it, else another global batch near this one."""
    whole, micro = train.global_batch_size, train.micro_batch_size
    for smaller in range(micro - 1, 1, -1):  # 1 is too few for BatchNorm
        if whole % (smaller * world_size) == 0:
            return f"--train.micro_batch_size {smaller}"
    unit = micro * world_size
    return f"--train.global_batch_size {max(1, round(whole / unit)) * unit}"


@contextmanager
def calm_launcher() -> Iterator[None]:
    """Imports torch such that it does not print stack traces of its own when another node ends
    first; the workers' torch, and a user who sets LOGLEVEL (INFO, say), get all of it."""
    level = os.environ.setdefault("LOGLEVEL", "CRITICAL")
    quiet = level == "CRITICAL" and "TORCH_CPP_LOG_LEVEL" not in os.environ
    if quiet:
        os.environ["TORCH_CPP_LOG_LEVEL"] = "FATAL"
    yield
    if quiet:
        del os.environ["TORCH_CPP_LOG_LEVEL"]
    logging.getLogger("torch.distributed.elastic").setLevel(level)


def cores() -> int:
    """Cores that this node's processes share; SLURM's grant counts also where it does not bind."""
    bound = len(os.sched_getaffinity(0))
    return min(bound, int(os.environ.get("SLURM_CPUS_ON_NODE") or bound))


def find_the_others(node: Node) -> None:
    """Makes the nodes meet under addresses that the others can reach. A host that takes its own
    name for 127.0.1.1, as Debian's do, would hand out that one, and gloo listen there."""
    address = own_address([node.head] if node.rank else [node.peer, NOWHERE])
    if address is None:
        return
    os.environ.setdefault("PET_LOCAL_ADDR", address)
    if interface := interface_of(address):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def own_address(others: list[str]) -> str | None:
    """This node's IPv4 address on the way to another. Sends nothing."""
    for other in filter(None, others):
        with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
            way.connect((other, 9))
            address: str = way.getsockname()[0]
            if not ipaddress.ip_address(address).is_loopback:
                return address
    return None


def interface_of(address: str) -> str | None:
    """The network interface that has an address."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address == address for a in addresses):
            return str(name)
    return None


def launch(node: Node, processes: int, train: list[str], run_dir: Path) -> int:
    """`accelerate launch`, in this process; returns the exit code."""
    words = [
        *("--config_file", str(ROOT / "accelerate_config.yaml")),
        *("--num_processes", str(node.nodes * processes)),
        *("--main_process_port", str(node.port)),
        *("--max_restarts", str(node.max_restarts)),
    ]
    if node.nodes > 1:
        words += ["--num_machines", str(node.nodes), "--machine_rank", str(node.rank)]
        words += ["--main_process_ip", node.head, "--rdzv_backend", "c10d"]
        # A head that imports torch from a cold disk may come minutes later than the others.
        words += ["--rdzv_conf", f"is_host={int(node.rank == 0)},read_timeout=600,join_timeout=600"]
    # torchrun's options that accelerate does not hand on; PET_LOCAL_ADDR is another.
    os.environ |= {"PET_RDZV_ID": node.id, "PET_SIGNALS_TO_HANDLE": SIGNALS}
    # The workers run the code that launched them, whatever else is installed.
    path = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    # The store that workers share with their launchers outlives a restart, and has the addresses of
    # the dead (torch 2.14); this gives each round of workers a new one.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"

    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError

    try:
        parser = launch_command_parser()
        launch_command(parser.parse_args([*words, "-m", "distvgg", "train", *train]))
    except ChildFailedError as failed:
        return explain(failed)
    except SignalException as stopped:
        # The workers have ended by now: stopped early, if they were told in time.
        number = stopped.sigval
        saved = number != signal.SIGINT and (run_dir / REQUEUE_FILE).exists()
        return 0 if saved else 128 + number
    except (RendezvousError, ConnectionError) as error:
        where, why = f"{node.head}:{node.port}", " ".join(str(error).split())
        complain(node, f"no rendezvous of the nodes at {where}, or no longer: {why}")
        return 1
    return 0


def explain(failed: "ChildFailedError") -> int:
    """The exit code of the worker that failed first; says so where the worker itself could not.

    Times are whole seconds. Of the first second a killed worker is the cause, then one that gave up
    by itself, as all do that lose contact with another, and last one that the launcher ended.
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

"""Influences on a run from outside its config: environment variables, threads, the machine.

Contains the lists of variables that would change the numbers of a run, taken from the sources of
accelerate 1.15 and torch 2.14. The launcher chooses the device and the world size; the world size
changes no number.

Invariant: after `clear` and `refuse`, none of these variables affects the numbers, except those
that `notes` names.

Imports no torch: variables that torch and its libraries read at load time have to be cleared first.
"""

import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from distvgg.cores import granted_cores
from distvgg.errors import UserError
from distvgg.wording import counted

# Other kinds of training. accelerate enables each by a variable that its launcher sets.
_KINDS = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker",
}
# Variables of a launcher that say which process of how many this one is, and where all meet.
_RANKS = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK"),
    *("MASTER_ADDR", "MASTER_PORT"),
)
# Variables of MPI from which accelerate takes the number of processes, and the rank.
_MPI = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_MPI_RANK = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
# Set by the launchers of torch, and by accelerate, which starts several processes with those.
_LAUNCHER = "TORCHELASTIC_RUN_ID"
# Variables that accelerate reads when it starts, with the neutral value that its launcher sets.
_ACCELERATE = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",  # divides every loss
    "ACCELERATE_DYNAMO_BACKEND": "no",  # train.compile
    "ACCELERATE_DYNAMO_MODE": "default",
    "ACCELERATE_DYNAMO_USE_DYNAMIC": "false",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": "false",
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "false",
    "ACCELERATE_FP8_BACKEND": "no",  # rewrites layers, whatever the precision
    "FORK_LAUNCHED": "0",
}
# Variables that torch and its libraries read at load time, which select kernels, the number
# of threads and the precision.
_LIBRARIES = (
    *("ATEN_CPU_CAPABILITY", "LRU_CACHE_CAPACITY"),  # LRU_CACHE_CAPACITY=0 is a segmentation fault
    *(
        f"{library}_{name}"
        for library in ("ONEDNN", "DNNL", "MKLDNN")
        for name in ("MAX_CPU_ISA", "CPU_ISA_HINTS", "DEFAULT_FPMATH_MODE")
    ),
    *("MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "MKL_DEBUG_CPU_TYPE", "MKL_VML_DEBUG_CPU_TYPE"),
    # With fewer threads than train.cpu_threads, oneDNN waits for the missing ones forever (3.12).
    *("OMP_DYNAMIC", "OMP_THREAD_LIMIT", "OMP_MAX_ACTIVE_LEVELS"),
    *("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"),
    *("CUBLAS_WORKSPACE_CONFIG", "CUBLASLT_WORKSPACE_SIZE", "DISABLE_ADDMM_CUDA_LT"),
    *("TORCH_BLAS_PREFER_CUBLASLT", "TORCH_LINALG_PREFER_CUSOLVER", "PYTORCH_TUNABLEOP_ENABLED"),
    *("CUDNN_UNFUSE_FMA", "CUDNN_USE_EX2_EMULATION", "PYTORCH_SUM_INNER_TREE"),
)
_PREFIXES = (
    *("CUBLAS_EMULAT", "CUBLAS_FIXEDPOINT_", "TORCH_CUDNN_"),
    *("TORCH_COMPILE_", "TORCHDYNAMO_", "TORCHINDUCTOR_"),
)
_HARMLESS = ("TORCHINDUCTOR_CACHE_DIR", "TORCHINDUCTOR_COMPILE_THREADS", "TORCH_COMPILE_DEBUG")
# Variables that the C library reads before Python runs, which may select other instructions.
_TAKEN = ("GLIBC_TUNABLES",)

_cleared: dict[str, str] = {}
_set_aside: dict[str, str] = {}


def clear() -> None:
    """Removes the variables that would change the numbers; to be called before torch is loaded.

    Variables that torch has already read stay, and `notes` names them.
    """
    for name in [*_ACCELERATE, *(() if "torch" in sys.modules else _set_for_libraries())]:
        if (value := os.environ.pop(name, None)) is not None:
            _cleared[name] = value


def _set_for_libraries() -> list[str]:
    return [
        name
        for name in os.environ
        if name in _LIBRARIES or (name.startswith(_PREFIXES) and name not in _HARMLESS)
    ]


def refuse(environment: Mapping[str, str] = os.environ) -> None:
    """Checks that the launcher is supported and starts the kind of training that distvgg does.

    Raises:
        UserError: the launcher starts another kind of training, or is unknown.
    """
    for name, kind in _KINDS.items():
        if is_on(name, environment):
            raise UserError(
                f"{name}={environment[name]} asks for {kind}, which distvgg does not have:"
                " unset it, or launch with --config_file accelerate_config.yaml"
            )
    refuse_half_a_launcher(environment)


def refuse_half_a_launcher(environment: Mapping[str, str] = os.environ) -> None:
    """Checks that the variables of a launcher are all there, or none that matters.

    A shell in a container, or in an interactive allocation, may have some of them.

    Raises:
        UserError: some are missing, or they contradict each other.
    """
    size, rank = environment.get("WORLD_SIZE", "1"), environment.get("RANK")
    left = [n for n in _RANKS if n in environment]
    remedy = (
        f", as a launcher leaves it in a shell: for one process, unset {' '.join(left)}; for"
        " several, start with accelerate launch"
    )
    if not size.isdecimal():
        raise UserError(f"WORLD_SIZE={size!r} is not a number{remedy}")
    if int(size) < 2:
        for name in _MPI:
            if environment.get(name, "1") not in ("", "0", "1"):
                raise UserError(
                    f"{name}={environment[name]}, but WORLD_SIZE is {size}: distvgg is started by"
                    f" accelerate launch or torchrun, not by MPI; for one process, unset {name}"
                )
        for name in ("RANK", "LOCAL_RANK"):
            if environment.get(name) and "WORLD_SIZE" not in environment:
                raise UserError(f"{name}={environment[name]} without WORLD_SIZE{remedy}")
        return
    missing = [] if rank or any(environment.get(n) for n in _MPI_RANK) else ["RANK"]
    if not environment.get("MASTER_ADDR"):
        missing.append("MASTER_ADDR")
    if missing:
        raise UserError(f"WORLD_SIZE={size} without {' and '.join(missing)}{remedy}")
    if rank and not (rank.isdecimal() and int(rank) < int(size)):
        raise UserError(f"RANK={rank} is not below WORLD_SIZE={size}{remedy}")


def set_ranks_aside() -> None:
    """Removes the variables of ranks, for a command that uses one process.

    Under a launcher they stay, so that the main process speaks for all.
    """
    if has_launcher():
        return
    for name in (*_RANKS, *_MPI, *_MPI_RANK):
        if (value := os.environ.pop(name, None)) is not None:
            _set_aside[name] = value


def for_training() -> Mapping[str, str]:
    """Returns the environment that a training started here would find."""
    return os.environ | _set_aside


def complete_launcher() -> str | None:
    """Prepares the variables of several processes for accelerate 1.15.

    A shell of a SLURM allocation has PMI_SIZE=1, which accelerate reads before WORLD_SIZE. On a
    GPU, accelerate has no default for the port.

    Returns:
        A line for the user if no launcher started this process: it then waits for the others.
    """
    size = world_size()
    if size == 1:
        return None
    for name in _MPI:
        if os.environ.get(name) != str(size):
            os.environ.pop(name, None)
    port = os.environ.setdefault("MASTER_PORT", "29500")
    if has_launcher():
        return None
    return (
        f"note: process {rank()} of {size} meets the others at {os.environ['MASTER_ADDR']}:{port},"
        " as RANK and WORLD_SIZE say; to train on one process, unset both"
    )


def is_on(name: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Returns True if a variable has a value that accelerate takes for true."""
    return environment.get(name, "").lower() in ("1", "true", "t", "yes", "y", "on")


def has_launcher() -> bool:
    """Returns True if accelerate launch or torchrun started this process as one of several.

    Such a launcher ends all processes after the first that fails.
    """
    return _LAUNCHER in os.environ


def world_size(environment: Mapping[str, str] = os.environ) -> int:
    """Returns the number of processes that a launcher started, or 1. Needs no process group."""
    size = environment.get("WORLD_SIZE", "")
    return max(1, int(size)) if size.isdecimal() else 1


def rank() -> int:
    """Returns this process's rank, 0 if the world size is 1. Needs no process group."""
    rank = os.environ.get("RANK", "")
    return int(rank) if world_size() > 1 and rank.isdecimal() else 0


def has_home() -> bool:
    """Returns True if this user's home directory is known, by HOME or by the list of users."""
    return os.path.expanduser("~") != "~"


def provide_home() -> str | None:
    """Sets HOME to a temporary directory of this user where no home directory is known.

    A container may run under a user id without an entry in the list of users. Libraries then fail
    on `~`, and on the name of the user.

    Returns:
        A line for the user; None if there is a home directory.

    Raises:
        UserError: the directory cannot be made, or is another user's.
    """
    if has_home():
        return None
    home = Path(tempfile.gettempdir()) / f"distvgg-{os.getuid()}"
    try:
        home.mkdir(mode=0o700, exist_ok=True)
        owner = home.lstat().st_uid
    except OSError as error:
        raise UserError(
            f"no home directory, and {home} cannot be made ({error.strerror}): set HOME to a"
            " writable folder"
        ) from error
    if owner != os.getuid():
        raise UserError(f"no home directory, and {home} is another user's: set HOME to a folder")
    os.environ["HOME"] = str(home)
    os.environ.setdefault("USER", home.name)
    return f"no home directory: {home} is used, also for decoded data; HOME moves it"


def notes(
    machines: Sequence[Mapping[str, str]],
    before: Mapping[str, str] | None,
    cpu_threads: int | None,
) -> list[str]:
    """Lists what may change the bits or the speed of a run from now on, one line each.

    Args:
        machines: device and versions of every rank (`provenance.machine`).
        before: device and versions in the launch that wrote the checkpoint. None for a new run,
            empty for a run of distvgg 0.1, which did not record them.
        cpu_threads: `train.cpu_threads` for a run on a CPU; None on a GPU.
    """
    found, here = [], machines[0]
    if before is not None:
        was = {"distvgg": "0.1", **before}
        changed = [f"{k} {here[k]} (was {v})" for k, v in was.items() if here.get(k, v) != v]
        if changed:
            now = ", ".join(changed)
            found.append(f"bits may differ from here on: the run continues with {now}")
    if len(kinds := sorted({m["device"] for m in machines})) > 1:
        found.append(
            "processes compute on devices of different kinds, so that bits depend on which computes"
            f" what: {', '.join(kinds)}"
        )
    cores = granted_cores()
    wanted = (cpu_threads or 0) * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if wanted > cores:
        found.append(
            f"{wanted} threads (train.cpu_threads {cpu_threads}) share {counted(cores, 'core')}:"
            " slower, to the same bits"
        )
    if without := _without_effect(cpu_threads):
        found.append(f"set in the environment, without effect: {', '.join(without)}")
    taken = [*_set_for_libraries(), *(name for name in _TAKEN if name in os.environ)]
    if taken:
        values = ", ".join(f"{name}={os.environ[name]}" for name in taken)
        found.append(f"set in the environment, taken, and may change bits: {values}")
    return found


def _without_effect(cpu_threads: int | None) -> list[str]:
    """Lists variables that are set but have no effect, as `NAME=VALUE (field to use instead)`."""
    instead = {
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "train.micro_batch_size",
        "ACCELERATE_DYNAMO_BACKEND": "train.compile",
    }
    found = [
        f"{name}={value}" + (f" ({instead[name]})" if name in instead else "")
        for name, value in _cleared.items()
        if value.lower() != _ACCELERATE.get(name)
    ]
    # 1 is not reported, because launchers set it.
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    if cpu_threads is not None and threads not in ("1", str(cpu_threads)):
        found.append(f"OMP_NUM_THREADS={threads} (train.cpu_threads)")
    return found

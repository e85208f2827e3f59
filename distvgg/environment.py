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
from collections.abc import Mapping, Sequence

from distvgg.errors import UserError

# Other kinds of training. accelerate enables each by a variable that its launcher sets.
_KINDS = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker",
}
# Variables of MPI from which accelerate takes the number of processes.
_MPI = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
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
    size = environment.get("WORLD_SIZE", "1")
    if not size.isdecimal():
        raise UserError(f"WORLD_SIZE={size!r} is not a number: unset it for one process")
    if int(size) > 1:
        if not environment.get("MASTER_ADDR"):
            raise UserError(
                f"WORLD_SIZE={size} without MASTER_ADDR, as a launcher leaves it in a shell: unset"
                " WORLD_SIZE for one process, or start with accelerate launch"
            )
        return
    for name in _MPI:
        if environment.get(name, "1") not in ("", "0", "1"):
            raise UserError(
                f"{name}={environment[name]}, but WORLD_SIZE is {size}: distvgg is started by"
                " accelerate launch or torchrun, not by MPI; unset it for one process"
            )
    if "LOCAL_RANK" in environment and "WORLD_SIZE" not in environment:
        raise UserError(
            "LOCAL_RANK without WORLD_SIZE, as a launcher leaves them in a shell: unset LOCAL_RANK"
            " for one process"
        )


def is_on(name: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Returns True if a variable has a value that accelerate takes for true."""
    return environment.get(name, "").lower() in ("1", "true", "t", "yes", "y", "on")


def world_size() -> int:
    """Returns the number of processes that a launcher started, or 1. Needs no process group."""
    size = os.environ.get("WORLD_SIZE", "")
    return max(1, int(size)) if size.isdecimal() else 1


def rank() -> int:
    """Returns this process's rank, 0 if the world size is 1. Needs no process group."""
    return int(os.environ.get("RANK") or 0) if world_size() > 1 else 0


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
    cores = len(os.sched_getaffinity(0))
    wanted = (cpu_threads or 0) * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if wanted > cores:
        found.append(
            f"{wanted} threads (train.cpu_threads {cpu_threads}) share {cores} core(s): slower, to"
            " the same bits"
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

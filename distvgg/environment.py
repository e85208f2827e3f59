"""Influences on a run from outside its config: environment variables, threads, the machine.

Owns the lists of variables that would change the numbers of a run, from the sources of accelerate
1.15 and torch 2.14. Invariant: after `clear` and `refuse` none of them reaches the numbers but
those that `notes` names. The launcher chooses the device and the number of processes, which changes
no number. Imports no torch: what torch and its libraries read when they are loaded has to be
cleared before.
"""

import os
import sys
from collections.abc import Mapping, Sequence

from distvgg.errors import UserError

# Other kinds of training, which accelerate turns on by a variable of its launcher's.
_KINDS = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker",
}
# Numbers of processes that accelerate believes of MPI.
_MPI = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
# Read by accelerate when it starts, with the value that says nothing: what its launcher sets.
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
# Read when torch and its libraries are loaded: which kernels, in how many threads, how precise.
_LIBRARIES = (
    *("ATEN_CPU_CAPABILITY", "LRU_CACHE_CAPACITY"),  # the second, at 0, is a segmentation fault
    *(
        f"{library}_{name}"
        for library in ("ONEDNN", "DNNL", "MKLDNN")
        for name in ("MAX_CPU_ISA", "CPU_ISA_HINTS", "DEFAULT_FPMATH_MODE")
    ),
    *("MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "MKL_DEBUG_CPU_TYPE", "MKL_VML_DEBUG_CPU_TYPE"),
    # Fewer threads than train.cpu_threads: oneDNN waits for the rest for ever (3.12).
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
# Read by the C library before Python runs: it may choose other instructions.
_TAKEN = ("GLIBC_TUNABLES",)

_cleared: dict[str, str] = {}


def clear() -> None:
    """Removes what would change the numbers. To be called before torch is loaded; what torch has
    read already stays, and is named by `notes`."""
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
    """Checks that the launcher starts this kind of training.

    Raises:
        UserError: it starts another kind, or is none that is known here.
    """
    for name, kind in _KINDS.items():
        if environment.get(name, "").lower() in ("1", "true", "t", "yes", "y", "on"):
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


def world_size() -> int:
    """The number of processes that a launcher started, without a process group; else 1."""
    size = os.environ.get("WORLD_SIZE", "")
    return max(1, int(size)) if size.isdecimal() else 1


def rank() -> int:
    """This process's rank, without a process group: 0 where it was not launched as one of many."""
    return int(os.environ.get("RANK") or 0) if world_size() > 1 else 0


def notes(
    machines: Sequence[Mapping[str, str]],
    before: Mapping[str, str] | None,
    cpu_threads: int | None,
) -> list[str]:
    """Lists what could change the bits of a run from here on, or its speed, a line each.

    Args:
        machines: device and versions of every rank (`provenance.machine`).
        before: those of the start that the checkpoint came of; None for a new run, empty where
            version 0.1 of distvgg took no note of them.
        cpu_threads: of a run on a CPU; None on a GPU.
    """
    found, here = [], machines[0]
    if before is not None:
        was = {"distvgg": "0.1", **before}
        changed = [f"{k} {here[k]} (was {v})" for k, v in was.items() if here.get(k, v) != v]
        if changed:
            found.append(f"bits may differ from here on: the run goes on with {', '.join(changed)}")
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
    """Lists variables that are set and have no effect, as `NAME=VALUE (the field that has)`."""
    instead = {
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "train.micro_batch_size",
        "ACCELERATE_DYNAMO_BACKEND": "train.compile",
    }
    found = [
        f"{name}={value}" + (f" ({instead[name]})" if name in instead else "")
        for name, value in _cleared.items()
        if value.lower() != _ACCELERATE.get(name)
    ]
    # A launcher sets 1.
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    if cpu_threads is not None and threads not in ("1", str(cpu_threads)):
        found.append(f"OMP_NUM_THREADS={threads} (train.cpu_threads)")
    return found

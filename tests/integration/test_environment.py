"""What is set outside a run's config: it changes no number, or a line says so."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from distvgg import environment
from distvgg.errors import UserError
from processes import CPU, assert_same_run, run, tiny, train

# Three steps.
BF16 = ("--train.precision", "bf16", "--train.epochs", "0.3")
HOSTILE = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    "ACCELERATE_DYNAMO_MODE": "max-autotune",
    "ACCELERATE_DYNAMO_USE_DYNAMIC": "true",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": "true",
    "ACCELERATE_DEBUG_MODE": "true",
    "ACCELERATE_DOWNCAST_BF16": "true",
    "ACCELERATE_CPU_AFFINITY": "false",
    "FSDP_OFFLOAD_PARAMS": "true",
    "OMP_NUM_THREADS": "2",
    "MKL_NUM_THREADS": "2",
    "OMP_DYNAMIC": "true",
    "OMP_THREAD_LIMIT": "1",
    "OMP_MAX_ACTIVE_LEVELS": "0",
    "MPI_LOCALNRANKS": "2",
    "LRU_CACHE_CAPACITY": "0",
    "ACCELERATE_FP8_BACKEND": "TE",
    "ATEN_CPU_CAPABILITY": "default",
    "MKLDNN_MAX_CPU_ISA": "AVX2",
    "ONEDNN_DEFAULT_FPMATH_MODE": "BF16",
    "MKL_CBWR": "COMPATIBLE",
    "TORCH_COMPILE_DISABLE": "1",
    "SLURM_PROCID": "3",
}
# As `accelerate config` leaves it for another project; launched without --config_file it is taken.
PERSONAL = """\
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
mixed_precision: 'no'
num_machines: 1
machine_rank: 0
num_processes: 2
main_training_function: main
dynamo_config:
  dynamo_backend: INDUCTOR
  dynamo_mode: max-autotune
  dynamo_use_dynamic: true
"""


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in the tests' own environment, on one process."""
    folder = tmp_path_factory.mktemp("calm") / "run"
    train(folder, *BF16)
    return folder


def test_a_hostile_environment_trains_the_same_run(calm: Path, tmp_path: Path) -> None:
    personal = tmp_path / "accelerate" / "default_config.yaml"
    personal.parent.mkdir()
    personal.write_text(PERSONAL)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"),
            *("-m", "distvgg", *tiny(tmp_path / "run", *BF16)),
        ],
        env=os.environ | CPU | HOSTILE | {"HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "= 2 processes" in done.stdout
    (note,) = (line for line in done.stdout.splitlines() if "without effect" in line)
    assert note.startswith("note: set in the environment, without effect: ")
    for said in (
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4 (train.micro_batch_size)",
        "ACCELERATE_DYNAMO_BACKEND=INDUCTOR (train.compile)",
        "ATEN_CPU_CAPABILITY=default",
        "OMP_NUM_THREADS=2 (train.cpu_threads)",
    ):
        assert said in note
    assert_same_run(tmp_path / "run", calm)


def test_an_ordinary_environment_needs_no_note(tmp_path: Path) -> None:
    short = ("--train.epochs", "0.1", "--optim.warmup_epochs", "0")
    said = train(tmp_path / "run", *short, processes=2)
    assert "note:" not in said


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "WORLD_SIZE": "2"}, "asks for FSDP"),
        ({"WORLD_SIZE": "2"}, "without RANK and MASTER_ADDR"),
        ({"WORLD_SIZE": ""}, "is not a number"),
        ({"WORLD_SIZE": "1", "PMI_SIZE": "2"}, "not by MPI"),
        ({"ACCELERATE_USE_DEEPSPEED": "1"}, "asks for DeepSpeed"),
        ({"ACCELERATE_USE_MEGATRON_LM": "True"}, "asks for Megatron-LM"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "not by MPI"),
        ({"PMI_SIZE": "4"}, "not by MPI"),
        ({"LOCAL_RANK": "0"}, "unset LOCAL_RANK"),
        ({"RANK": "1"}, "RANK=1 without WORLD_SIZE"),
    ],
)
def test_another_kind_of_start_is_refused_in_a_line(
    variables: dict[str, str], expected: str
) -> None:
    with pytest.raises(UserError, match=expected):
        environment.refuse(variables)


def test_what_launchers_leave_in_a_shell_does_no_harm() -> None:
    environment.refuse({"MASTER_ADDR": "h", "PMI_SIZE": "1", "ACCELERATE_USE_FSDP": "false"})
    environment.refuse({"ACCELERATE_USE_DEEPSPEED": "no"})
    launched = {"WORLD_SIZE": "2", "LOCAL_RANK": "1", "RANK": "1", "MASTER_ADDR": "host"}
    environment.refuse(launched | {"PMI_SIZE": "2"})
    done = run(["config", "quickstart"], env={"RANK": "1"})
    assert done.stdout.startswith("seed: 0")
    done = run(["config", "quikstart"], env={"RANK": "1"}, timeout=20)
    assert "did you mean quickstart" in done.stderr


def test_a_refused_start_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = run(tiny(tmp_path / "run"), env={"ACCELERATE_USE_FSDP": "true"})
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("distvgg: error: ACCELERATE_USE_FSDP=true asks for FSDP")


@pytest.mark.skipif(shutil.which("taskset") is None, reason="needs taskset (util-linux)")
def test_threads_are_a_runs_own_and_not_the_machines(calm: Path, tmp_path: Path) -> None:
    """Two of them on one core too, which is said."""
    two = (*BF16, "--train.cpu_threads", "2")
    train(tmp_path / "two processes", *two, processes=2)
    done = subprocess.run(
        [
            *("taskset", "-c", "0", sys.executable, "-m", "distvgg"),
            *tiny(tmp_path / "one core", *two),
        ],
        env=os.environ | CPU,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "2 threads each" in done.stdout
    assert "note: 2 threads (train.cpu_threads 2) share 1 core: slower" in done.stdout
    assert_same_run(tmp_path / "one core", tmp_path / "two processes")
    weights = [(d / "model.safetensors").read_bytes() for d in (calm, tmp_path / "one core")]
    assert weights[0] != weights[1]


def test_another_machine_is_said_in_a_line() -> None:
    here = {"device": "A", "torch": "2.14"}
    assert not environment.notes([here, here], None, 1)
    assert not environment.notes([here, here], here, None)
    (line,) = environment.notes([here | {"distvgg": "0.2"}], {}, 1)
    assert line.endswith("the run continues with distvgg 0.2 (was 0.1)")
    (line,) = environment.notes([here], here | {"device": "B", "torch": "2.13"}, 1)
    assert line == (
        "bits may differ from here on: the run continues with device A (was B), torch 2.14"
        " (was 2.13)"
    )
    (line,) = environment.notes([here, here | {"device": "B"}], here, 1)
    assert line.endswith("which computes what: A, B")

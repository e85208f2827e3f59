"""What a process says and does where a machine is unlike others: ranks left in a shell, file
systems without locks, users without a home, output in ASCII, fewer cores than there are."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from made_data import noise, write_folders
from processes import CPU, Started, assert_same_run, run, tiny, train

SITE = str(Path(__file__).parents[1] / "support" / "no_locks")
HALVES = (
    ({"RANK": "1"}, "RANK=1 without WORLD_SIZE"),
    ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0 without WORLD_SIZE"),
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 without RANK and MASTER_ADDR"),
    ({"RANK": "1", "WORLD_SIZE": "2"}, "WORLD_SIZE=2 without MASTER_ADDR"),
    ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "h"}, "RANK=2 is not below WORLD_SIZE=2"),
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two' is not a number"),
    ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, "OMPI_COMM_WORLD_SIZE=2, but"),
    ({"PMI_SIZE": "2", "PMI_RANK": "1"}, "PMI_SIZE=2, but WORLD_SIZE is 1"),
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(folder)
    return folder


@pytest.mark.parametrize(("left", "what"), HALVES, ids=lambda value: " ".join(value))
def test_a_training_with_half_a_launcher_says_which_half_at_once(
    left: dict[str, str], what: str, tmp_path: Path
) -> None:
    began = time.monotonic()
    done = run(tiny(tmp_path / "run"), env=left)
    assert time.monotonic() - began < 10  # a rank other than 0 used to wait 30 s for a launcher
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert what in line
    unset = re.search(r"for one process, unset ([A-Z_ ]+)", line)
    assert unset is not None
    # The remedy is one: without these variables the same start is not refused.
    rest = {name: value for name, value in left.items() if name not in unset[1].split()}
    from distvgg import environment

    environment.refuse(rest)


POD = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "left",
    [
        HALVES[0][0],
        *(
            pytest.param(left, marks=pytest.mark.variant)
            for left in (HALVES[3][0], HALVES[6][0], POD)
        ),
    ],
    ids=str,
)
def test_commands_of_one_process_ignore_ranks_that_are_left_in_a_shell(
    left: dict[str, str], finished: Path
) -> None:
    assert "finished" in run(["compare", str(finished)], env=left).stdout
    last = json.loads((finished / "metrics.jsonl").read_text().splitlines()[-1])
    said = run(["evaluate", str(finished)], env=left, timeout=60).stdout
    assert f"test loss {last['test/loss']:.3f}" in said
    done = run(["doctor"], env=left)
    fix = [line for line in done.stdout.splitlines() if line.startswith("fix")]
    # What a training started here would refuse is to fix; a pod's variables are complete.
    assert [line.split()[1] for line in fix] == ([] if left == POD else ["environment"])
    assert done.returncode == len(fix)
    assert "versions" in done.stdout


def test_a_typo_is_told_at_once_where_no_launcher_ends_the_process(tmp_path: Path) -> None:
    began = time.monotonic()
    done = run(["train", "quickstart", "--typo", "1"], env=POD)
    assert time.monotonic() - began < 10
    assert done.returncode == 2
    assert "no option --typo" in done.stderr


def test_complete_variables_without_a_launcher_are_a_start(finished: Path, tmp_path: Path) -> None:
    """As a pod of a PyTorchJob has them, and a wrapper of mpirun or srun."""
    port = 29000 + os.getpid() % 900
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        Started(tmp_path / "run", log=tmp_path / f"log{rank}", env=env | {"RANK": str(rank)})
        for rank in range(2)
    ]
    for rank, started in enumerate(ranks):
        code, output = started.end()
        assert code == 0, output
        assert f"note: process {rank} of 2 meets the others at 127.0.0.1:{port}" in output
    assert_same_run(finished, tmp_path / "run")


def test_a_launcher_in_the_shell_of_an_allocation_starts_its_own_processes(
    finished: Path, tmp_path: Path
) -> None:
    """accelerate reads PMI_SIZE before the launcher's WORLD_SIZE."""
    said = train(tmp_path / "run", processes=2, env={"PMI_SIZE": "1", "PMI_RANK": "0"})
    assert "= 2 processes" in said
    assert_same_run(finished, tmp_path / "run")


@pytest.mark.variant
def test_without_locks_and_without_fsync_of_folders_a_run_keeps_its_folder_to_itself(
    finished: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    env = {"PYTHONPATH": os.pathsep.join([SITE, os.environ.get("PYTHONPATH", "")])}
    args = ("--train.epochs", "99", "--checkpoint.every_steps", "4")
    first = Started(folder, *args, env=env)
    first.until_step(9)
    began = time.monotonic()
    second = run(tiny(folder, *args), env=env)
    assert second.returncode == 2
    assert time.monotonic() - began < 30
    (line,) = second.stderr.splitlines()
    assert f"{folder} is in use by process {first.process.pid} on " in line
    assert f"{folder}/.lock.holder stands for the lock" in first.output()
    first.process.kill()
    first.end()
    assert (folder / ".lock.holder").is_symlink()
    # The same command goes on after a kill, and a normal end leaves no lock.
    third = Started(folder, *args, env=env)
    third.until(lambda: "resumed after step" in third.output())
    (folder / "STOP").touch()
    code, output = third.end()
    assert code == 0, output
    assert not (folder / ".lock.holder").is_symlink()
    (folder / ".lock.holder").symlink_to(
        f"process 7 on node-b (boot 0-0, {os.readlink('/proc/self/ns/pid')}, start 1)"
    )
    line = run(tiny(folder, *args), env=env).stderr
    assert "is in use by process 7 on node-b: wait for it" in line
    assert line.rstrip().endswith(f"if that process is dead, delete {folder}/.lock.holder")


def nobody(*words: str, home: str | None = None) -> subprocess.CompletedProcess[str]:
    """Runs distvgg under a user id that has no entry in the list of users, and no HOME."""
    keep = {k: v for k, v in os.environ.items() if k in ("PATH", "PYTHONPATH", "TMPDIR")}
    command = ["unshare", "--user", "--map-user=12345", "--map-group=12345"]
    return subprocess.run(
        [*command, sys.executable, "-m", "distvgg", *words],
        env=keep | CPU | ({"HOME": home} if home else {}),
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def no_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files, where a user without a home gets one."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    probe = ["unshare", "--user", "--map-user=12345", "--map-group=12345", "true"]
    if shutil.which("unshare") is None or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("needs unshare (util-linux) and user namespaces")
    return tmp_path


def test_without_a_home_and_a_name_a_run_trains_and_says_where_its_data_is(no_entry: Path) -> None:
    words = tiny(no_entry / "run", "--track.wandb", "true")
    done = nobody(*words)
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    home = no_entry / "distvgg-12345"
    assert line == (
        f"distvgg: note: no home directory: {home} is used, also for decoded data; HOME moves it"
    )
    assert (home / ".cache" / "distvgg").is_dir()
    assert "W&B: offline" in done.stdout
    assert not list(Path.cwd().glob("~*"))


def test_where_no_home_can_be_made_one_line_says_what_to_set(no_entry: Path) -> None:
    (no_entry / "distvgg-12345").touch()
    done = nobody("doctor")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.endswith("cannot be made (File exists): set HOME to a writable folder")
    (no_entry / "file").touch()
    done = nobody(*tiny(no_entry / "run"), home=str(no_entry / "file"))
    assert done.returncode == 2
    assert "set DISTVGG_CACHE to a writable folder" in done.stderr


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set whose class names are not ASCII."""
    folder = tmp_path_factory.mktemp("images") / "set"
    splits = {"train": noise(96, 0, side=16), "test": noise(40, 1, side=16)}
    return Path(write_folders(folder, ["\u00e4pfel", "\u65e5\u672c"], splits))


@pytest.mark.parametrize(
    "env",
    [
        pytest.param({"PYTHONIOENCODING": "ascii"}, marks=pytest.mark.variant),
        pytest.param({"LC_ALL": "C", "LANG": "C"}, marks=pytest.mark.variant),
    ],
    ids=str,
)
def test_names_that_are_not_ascii_are_escaped_where_the_output_is(
    env: dict[str, str], foreign: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "l\u00e4ufe"
    words = ("--data.name", "custom", "--data.path", str(foreign), "--data.train_size", "none")
    words += ("--data.val_size", "16", "--model.image_size", "16", "--train.epochs", "1")
    batches = ("--train.global_batch_size", "16", "--train.micro_batch_size", "8")
    for args in (
        tiny(folder, *words, *batches),
        ["evaluate", str(folder)],
        ["tables", str(folder)],
        ["compare", str(folder), "--out", str(tmp_path / "table.txt")],
        ["doctor", *tiny(folder, *words, *batches)[1:]],
    ):
        done = run(args, env=env)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        if args[0] == "evaluate" and "PYTHONIOENCODING" in env:
            assert r"\u65e5\u672c" in done.stdout
    assert "l\u00e4ufe" in (tmp_path / "table.txt").read_text(encoding="utf-8")


needs_two_cores = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2 or shutil.which("taskset") is None,
    reason="needs two cores and taskset (util-linux)",
)


@pytest.mark.variant
@needs_two_cores
def test_a_process_bound_to_one_core_says_so(tmp_path: Path) -> None:
    core = str(min(os.sched_getaffinity(0)))
    bound = f"1 of {os.cpu_count()} cores"

    def on_one_core(*words: str) -> str:
        return subprocess.run(
            ["taskset", "-c", core, sys.executable, "-m", "distvgg", *words],
            env=os.environ | CPU,
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        ).stdout

    assert re.search(rf"devices +cpu, {bound}\n", on_one_core("doctor"))
    on_one_core(*tiny(tmp_path / "run", "--train.epochs", "0.1"))
    hardware = json.loads((tmp_path / "run" / "result.json").read_text())["hardware"]
    assert hardware.endswith(f", {bound}, 1 thread a process")
    said = on_one_core("launch", "--", *tiny(tmp_path / "one", "--train.epochs", "0.1")[1:])
    assert "= 1 process" in said


@pytest.fixture
def quota() -> Iterator[Path]:
    """A cgroup of this machine with one and a half cores, which a process joins by its number."""
    v1, v2 = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")
    folder = (v1 if v1.is_dir() else v2) / f"distvgg-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"cannot make a cgroup: {error}")
    try:
        if v1.is_dir():
            (folder / "cpu.cfs_quota_us").write_text("150000")
        else:
            (folder / "cpu.max").write_text("150000 100000")
    except OSError as error:
        pytest.skip(f"cannot set a quota: {error}")
    else:
        yield folder
    finally:
        folder.rmdir()


@needs_two_cores
def test_a_quota_of_a_container_is_what_the_doctor_reports(quota: Path) -> None:
    words = f"echo $$ > {quota}/cgroup.procs; exec {sys.executable} -m distvgg doctor"
    done = subprocess.run(
        ["bash", "-c", words], env=os.environ | CPU, capture_output=True, text=True, timeout=120
    )
    assert re.search(rf"devices +cpu, 1.5 of {os.cpu_count()} cores\n", done.stdout), done.stderr

"""`distvgg launch`, which every launch script ends in: what the bare launcher of several loses."""

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import accelerate.commands.launch
import psutil
import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from distvgg.commands.launch import explain, main
from processes import CPU, ROOT, TINY, rows, run

NODE = ("-m", "distvgg", "launch", "--processes", "2", "--")


def start(run_dir: Path, *words: str) -> subprocess.Popen[str]:
    """A training of two processes by the script, as launch/multi_gpu.sh starts it."""
    return subprocess.Popen(
        [sys.executable, *NODE, "quickstart", *TINY, "--run-dir", str(run_dir), *words],
        env=os.environ | CPU,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def until_step(process: subprocess.Popen[str], run_dir: Path, step: int) -> None:
    while not any(row["step"] >= step for row in rows(run_dir)[-1:]):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), "give one recipe, not none"),
        (("quickstart", "--train.epoch", "1"), "did you mean train.epochs?"),
        (
            ("quickstart", "--train.global_batch_size", "64"),
            "2 processes do not divide the 1 micro-batches",
        ),
        # Found by the workers, under the launcher.
        (("quickstart", *TINY, "--run-dir", "/proc/run"), "cannot write run folder /proc/run"),
    ],
    ids=["no recipe", "typo", "processes", "run folder"],
)
def test_a_mistake_is_one_line_and_exit_code_2(words: tuple[str, ...], expected: str) -> None:
    done = run(words, program=NODE, cwd=ROOT)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("distvgg: error: ")
    assert expected in line


@pytest.mark.parametrize("recipe", ["quickstart", "fast"])
@pytest.mark.parametrize(
    ("gpus", "expected"), [(0, min(2, os.cpu_count() or 1)), (1, 1), (2, 2), (3, 2), (8, 4)]
)
def test_any_number_of_gpus_trains(
    gpus: int,
    expected: int,
    recipe: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The README's first commands; with a faked count, up to the launch."""
    launched: list[argparse.Namespace] = []
    monkeypatch.setattr(accelerate.commands.launch, "launch_command", launched.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with mock.patch.dict(os.environ):
        os.environ.pop("ACCELERATE_USE_CPU", None)
        assert main(["--port", "0", "--", recipe]) == 0
    assert launched[0].num_processes == expected
    assert launched[0].training_script_args == ["train", recipe]
    shown = capsys.readouterr().out
    if gpus > expected:
        assert f"{expected} of {gpus} processes are started" in shown
        (option,) = re.findall(r"to use all, set (--\S+ \d+)", shown)
        with mock.patch.dict(os.environ):
            assert main(["--port", "0", "--", recipe, *option.split()]) == 0
        assert launched[1].num_processes == gpus
    else:
        assert shown == ""


def test_signals_to_the_launcher_save_and_exit_0(tmp_path: Path) -> None:
    process = start(tmp_path / "run", "--train.epochs", "100")
    until_step(process, tmp_path / "run", 3)
    process.send_signal(signal.SIGUSR1)  # the bare launcher dies of it
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (0, "")
    assert (tmp_path / "run" / "REQUEUE").exists()


@pytest.mark.parametrize(
    "the_other_ends_too", [False, pytest.param(True, marks=pytest.mark.variant)]
)
def test_a_killed_worker_is_named_and_gives_the_exit_code(
    tmp_path: Path, the_other_ends_too: bool
) -> None:
    process = start(tmp_path / "run", "--train.epochs", "100")
    until_step(process, tmp_path / "run", 3)
    launcher = psutil.Process(process.pid)
    other, killed = sorted(
        (w for w in launcher.children() if "train" in w.cmdline()), key=lambda w: w.pid
    )
    if the_other_ends_too:  # before the launcher looks
        launcher.suspend()
    killed.kill()
    while the_other_ends_too and other.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.02)
    launcher.resume()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL
    assert re.search(r"distvgg: error: process 1 on \S+ was killed by SIGKILL", stderr)
    assert "Traceback" not in stderr


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ([(0, 1), (0, -signal.SIGKILL)], 128 + signal.SIGKILL),
        ([(0, -signal.SIGTERM), (0, 1)], 1),  # the launcher ends the others
        ([(30, -signal.SIGKILL), (0, 3)], 3),  # and kills who does not heed it
    ],
)
def test_the_exit_code_is_that_of_the_cause(ends: list[tuple[int, int]], expected: int) -> None:
    failures = {}
    for rank, (second, code) in enumerate(ends):
        failures[rank] = ProcessFailure(rank, pid=1, exitcode=code, error_file="")
        failures[rank].timestamp = second
    assert explain(ChildFailedError("train", failures)) == expected


def test_gpus_that_torch_does_not_see_are_an_error(tmp_path: Path) -> None:
    """On a machine without GPUs, by a PCI bus that has one; nowhere else can it be hidden."""
    if os.geteuid() != 0 or Path("/dev/nvidiactl").exists():
        pytest.skip("needs root and no GPU")
    card = tmp_path / "pci" / "0000:00:1e.0"
    card.mkdir(parents=True)
    (card / "class").write_text("0x030200\n")
    (card / "vendor").write_text("0x10de\n")
    script = f"mount --bind {card.parent} /sys/bus/pci/devices && exec {sys.executable} $0 $@"
    launch = ["-m", "distvgg", "launch", "--", "quickstart"]
    words = ["unshare", "--mount", "bash", "-c", script, *launch]
    done = subprocess.run(
        [*words, *TINY, "--run-dir", str(tmp_path / "run")],
        env={k: v for k, v in os.environ.items() if k != "ACCELERATE_USE_CPU"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "this machine has GPUs but torch sees none" in done.stderr
    assert not (tmp_path / "run").exists()

"""The proof that anyone can run: what it prints, and that it can fail."""

import hashlib
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from processes import CPU, ROOT, TINY, rows

PROVE = ROOT / "launch" / "prove.py"


def prove(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, str(PROVE), *words],
        env=os.environ | CPU,
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.mark.variant
def test_the_proof_prints_equal_sums_and_keeps_its_runs(tmp_path: Path) -> None:
    words = ("quickstart", *TINY, "--train.epochs", "2", "--processes", "1,2")
    done = prove(*words, "--dir", str(tmp_path / "kept"))
    assert done.returncode == 0, done.stderr
    head, *sums, verdict = done.stdout.splitlines()
    assert head.startswith("processes    SHA-256 of model.safetensors")
    assert [line.split("  ")[0].strip() for line in sums] == ["1", "2", "2 -> 1 -> 2"]
    assert verdict == "equal"
    weights = (tmp_path / "kept" / "killed" / "model.safetensors").read_bytes()
    assert set(re.findall(r"[0-9a-f]{64}", done.stdout)) == {hashlib.sha256(weights).hexdigest()}
    # The killed run came to its end in three starts, from checkpoints in between.
    starts = json.loads((tmp_path / "kept" / "killed" / "result.json").read_text())["starts"]
    assert [processes for _, processes in starts] == [2, 1, 2]
    assert [step > 0 for step, _ in starts] == [False, True, True]


def run_folder(folder: Path, weights: bytes, loss: float) -> Path:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(weights)
    rows = [{"step": 1, "train/loss": 2.5, "perf/step_ms": loss}, {"step": 2, "train/loss": loss}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_proof_fails_where_a_byte_or_a_row_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = runpy.run_path(str(PROVE))
    compare, made = program["compare"], program["Run"]
    first = made(run_folder(tmp_path / "first", b"weights", 2.25), (1,))
    same = made(run_folder(tmp_path / "same", b"weights", 2.25), (2,))
    assert compare([first, same], "processes") == 0
    assert capsys.readouterr().out.endswith("equal\n")
    other = made(run_folder(tmp_path / "other", b"weights", 2.250000000000001), (4, 1))
    assert compare([first, same, other], "processes") == 1
    *_, verdict, ours, theirs = capsys.readouterr().out.splitlines()
    assert verdict == "DIFFERENT"
    assert ours == '1: {"step": 2, "train/loss": 2.25}'
    assert theirs == '4 -> 1: {"step": 2, "train/loss": 2.250000000000001}'
    bytes_ = made(run_folder(tmp_path / "bytes", b"weightz", 2.25), (3,))
    assert compare([first, bytes_], "processes") == 1


def test_mistakes_are_said_before_anything_is_trained(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = prove("--dir", str(tmp_path))
    assert done.returncode == 2
    assert "is not empty: choose a new folder" in done.stderr
    done = prove("quikstart", "--processes", "1")
    assert done.returncode == 1
    assert "did you mean quickstart" in done.stderr


@pytest.mark.variant
def test_a_proof_that_is_stopped_leaves_no_process_behind(tmp_path: Path) -> None:
    words = ("quickstart", *TINY, "--train.epochs", "100", "--processes", "2")
    proof = psutil.Popen(
        [sys.executable, str(PROVE), *words, "--dir", str(tmp_path / "kept")],
        env=os.environ | CPU,
    )
    while len(rows(tmp_path / "kept" / "2")) < 3:
        assert proof.poll() is None
        time.sleep(0.05)
    started = proof.children(recursive=True)
    assert len(started) >= 3  # the launcher and its two workers
    proof.send_signal(signal.SIGTERM)
    assert proof.wait(60) == 130
    assert not psutil.wait_procs(started, 10)[1]

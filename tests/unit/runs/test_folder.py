"""Whose a run folder is, who may write to it, and how files come into it."""

import errno
import fcntl
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from disks import file_size_limit, read_only
from distvgg.config import Config
from distvgg.errors import UserError
from distvgg.recipe import load
from distvgg.runs.files import atomic_write
from distvgg.runs.folder import (
    ask_ranks_to_stop,
    check_same_config,
    claim_run_dir,
    mark_stopped,
)
from distvgg.runs.metrics_file import read_rows
from distvgg.runs.result import read_result


def test_a_run_folder_keeps_to_its_config(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    auto = load("quickstart")
    assert check_same_config(folder, auto) == auto
    resolved = auto.replace(train__precision="bf16")
    claim_run_dir(folder, resolved).release()
    (folder / "metrics.jsonl").touch()
    assert check_same_config(folder, auto) == resolved
    assert check_same_config(folder, resolved) == resolved
    claim_run_dir(folder, resolved).release()
    with pytest.raises(UserError, match=r"optim\.lr is 0\.1 there, 0\.3 here") as error:
        check_same_config(folder, auto.replace(optim__lr=0.3))
    assert "seed" not in str(error.value)
    with pytest.raises(UserError, match=r"train\.precision is bf16 there, no here"):
        check_same_config(folder, auto.replace(train__precision="no"))
    # These change no result: a run goes on with the values that are given now.
    free = {"train__detect_anomaly": True, "train__cuda_graphs": False, "track__wandb": False}
    assert check_same_config(folder, auto.replace(**free)) == resolved.replace(**free)


def test_a_folder_in_which_nothing_was_trained_takes_another_config(tmp_path: Path) -> None:
    """Its data could not be read: the message says which option to change."""
    claim_run_dir(tmp_path, Config(seed=1)).release()
    assert check_same_config(tmp_path, Config(seed=2)) == Config(seed=2)
    claim_run_dir(tmp_path, Config(seed=2)).release()
    assert load(str(tmp_path / "config.yaml")) == Config(seed=2)
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(UserError, match="seed is 2 there, 3 here"):
        claim_run_dir(tmp_path, Config(seed=3))


def test_a_folder_of_other_things_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"holds files but no config\.yaml"):
        claim_run_dir(tmp_path, Config())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write run folder"):
        claim_run_dir(tmp_path / "file" / "run", Config())


def test_a_start_that_was_cut_off_leaves_a_folder_that_can_be_taken(tmp_path: Path) -> None:
    for name in (".lock", ".config.yaml.tmp", "STOP", "REQUEUE"):
        (tmp_path / name).write_text("half of")
    claim_run_dir(tmp_path, Config()).release()
    assert load(str(tmp_path / "config.yaml")) == Config()
    # A user may have asked already that this start stop; that it was to come is now done.
    assert {p.name for p in tmp_path.iterdir()} == {".lock", "config.yaml", "STOP"}


def test_two_runs_cannot_use_a_folder_but_one_after_a_dead_one_can(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from distvgg.config import Config;"
        " from distvgg.runs.folder import claim_run_dir;"
        f" lock = claim_run_dir(Path({str(tmp_path)!r}), Config());"
        " print('taken', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"taken\n"
        with pytest.raises(UserError, match=rf"is in use by process {other.pid} on .+: wait"):
            claim_run_dir(tmp_path, Config())
        other.kill()
    claim_run_dir(tmp_path, Config()).release()


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("metrics.jsonl", Path.mkdir),
        ("model.safetensors", Path.mkdir),
        ("confusion.json", os.mkfifo),
        ("metrics.jsonl", lambda path: path.symlink_to("nowhere")),
        ("checkpoints", Path.touch),
    ],
)
def test_what_cannot_take_a_file_is_found_before_the_training(
    name: str, make: Callable[[Path], None], tmp_path: Path
) -> None:
    claim_run_dir(tmp_path, Config()).release()
    make(tmp_path / name)
    with pytest.raises(UserError, match=rf"{name} is not a (file|folder) .*: move it away"):
        claim_run_dir(tmp_path, Config())


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    for name in ("result.json", "metrics.jsonl"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=r"cannot read .*result\.json \(Is a directory\): make it"):
        read_result(tmp_path)
    with pytest.raises(UserError, match=r"cannot read .*metrics\.jsonl \(Is a directory\): make"):
        read_rows(tmp_path / "metrics.jsonl")


def test_a_result_without_a_number_that_is_printed_is_damaged(tmp_path: Path) -> None:
    numbers = {"top1": 0.5, "step": 3, "count": 7}
    result = dict.fromkeys(("seed", "steps", "epochs", "train_size", "num_processes"), 0)
    result |= dict.fromkeys(("precision", "hardware", "data_fingerprint"), "")
    result |= {"starts": [], "curves": [], "versions": {}, "commit": None, "images_per_sec": None}
    result |= {"val": numbers, "best": numbers, "test": None}
    path = tmp_path / "result.json"
    path.write_text(json.dumps(result))
    assert read_result(tmp_path) is not None
    for part, number in (("val", "count"), ("val", "top1"), ("best", "step")):
        less = {k: v for k, v in numbers.items() if k != number}
        path.write_text(json.dumps(result | {part: less}))
        with pytest.raises(UserError, match=r"result\.json is damaged: delete it"):
            read_result(tmp_path)


def test_a_read_only_folder_is_one_clear_line(tmp_path: Path) -> None:
    claim_run_dir(tmp_path / "run", Config()).release()
    with read_only(tmp_path), pytest.raises(UserError, match=r"cannot write run folder .+\("):
        claim_run_dir(tmp_path / "run", Config())


def test_stopping_leaves_the_marker_and_consumes_the_wish(tmp_path: Path) -> None:
    (tmp_path / "STOP").touch()
    mark_stopped(tmp_path, requeue=True)
    assert {p.name for p in tmp_path.iterdir()} == {"REQUEUE"}
    lock = claim_run_dir(tmp_path, Config())
    assert not (tmp_path / "REQUEUE").exists()
    mark_stopped(tmp_path, requeue=False)
    assert not (tmp_path / "REQUEUE").exists()
    lock.release()


def test_the_stop_of_a_launch_that_was_killed_is_not_that_of_the_next(tmp_path: Path) -> None:
    config = load("debug")
    ask_ranks_to_stop(tmp_path)
    claim_run_dir(tmp_path, config).release()
    assert not (tmp_path / "STOP").exists()
    (tmp_path / "STOP").touch()  # by the user
    claim_run_dir(tmp_path, config).release()
    assert (tmp_path / "STOP").exists()
    ask_ranks_to_stop(tmp_path / "not there")  # raises nothing: the signal was heard anyway


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic_write(path, b"old")
    with file_size_limit(1000), pytest.raises(OSError, match="too large"):
        atomic_write(path, bytes(2000))
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_without_file_locks_the_folder_is_locked_by_a_link_and_a_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    folder = tmp_path / "run"
    lock = claim_run_dir(folder, Config())
    assert capsys.readouterr().out == (
        f"note: the file system of {folder}/.lock has no file locks: {folder}/.lock.holder stands"
        " for the lock\n"
    )
    with pytest.raises(UserError, match=r"is in use by process \d+ on"):
        claim_run_dir(folder, Config())
    lock.release()
    # A start that is refused keeps no lock.
    (folder / "metrics.jsonl").touch()
    with pytest.raises(UserError, match="was made with another config"):
        claim_run_dir(folder, Config(seed=1))
    claim_run_dir(folder, Config()).release()


@pytest.mark.parametrize(("number", "tolerated"), [(errno.EINVAL, True), (errno.EIO, False)])
def test_a_file_system_may_lack_fsync_of_folders_but_no_other_error_is_hidden(
    number: int, tolerated: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with nullcontext() if tolerated else pytest.raises(OSError, match="Input/output"):
        atomic_write(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"  # renamed before the folder is flushed

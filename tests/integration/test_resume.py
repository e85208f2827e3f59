"""A run that is stopped, killed or loses a process goes on to the same numbers.

Real processes under the real launcher. `whole` runs are never interrupted; what the others end with
is compared with theirs to the last bit; where the number of processes changes between starts, in
test_world_size_invariance.py.
"""

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from made_data import made_rows, write_parquet
from processes import Started, assert_same_run, measured, run, tiny, train

# 75 steps, of 20 ms or so; steps straddle epochs, checkpoints fall between rows.
ARGS = ("--train.epochs", "8", "--eval.every_epochs", "2", "--track.every_steps", "3")
ARGS += ("--checkpoint.every_steps", "7")
# All that has state: momenta of both kinds, an average of the weights.
ARGS += ("--optim.name", "muon", "--optim.ema_decay", "0.9")
STEPS = 75


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody disturbed, on one process, which has the bytes of any other number."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(folder, *ARGS)
    return folder


def on_two(folder: Path, *launcher: str) -> Started:
    return Started(folder, *ARGS, processes=2, launcher=launcher)


def saved_steps(folder: Path) -> list[int]:
    return sorted(int(p.name[5:]) for p in (folder / "checkpoints").glob("step_*"))


def progress(folder: Path, step: int) -> dict[str, object]:
    """What a checkpoint notes beside tensors."""
    path = folder / "checkpoints" / f"step_{step:08}" / "manifest.json"
    found: dict[str, object] = json.loads(path.read_text())["body"]["progress"]
    return found


def resumed(output: str) -> int:
    """The step from which a start went on."""
    found = re.search(r"^resumed after step ([\d,]+)$", output, re.MULTILINE)
    return int(found[1].replace(",", "")) if found else 0


def signal_the_launcher(started: Started) -> None:
    started.process.send_signal(signal.SIGTERM)


def signal_one_worker(started: Started) -> None:
    started.workers()[1].send_signal(signal.SIGUSR1)


def signal_all_workers_twice(started: Started) -> None:
    for _ in range(2):
        for worker in started.workers():
            worker.send_signal(signal.SIGUSR2)


def all_have_handlers(started: Started) -> bool:
    """Whether all workers catch SIGTERM (proc(5), SigCgt)."""
    for worker in started.workers():
        status = Path(f"/proc/{worker.pid}/status").read_text()
        (caught,) = re.findall(r"(?m)^SigCgt:\s*([0-9a-f]+)$", status)
        if not int(caught, 16) & 1 << (signal.SIGTERM - 1):
            return False
    return True


def touch_the_stop_file(started: Started) -> None:
    (started.run_dir / "STOP").touch()


def kill_the_launcher(started: Started) -> None:
    started.process.kill()


# (how, what the run calls it, the launcher's exit code, which loses the workers' own)
WAYS_TO_STOP = (
    (signal_the_launcher, "SIGTERM", 1),
    (signal_one_worker, "SIGUSR1|another process", 0),
    (touch_the_stop_file, "STOP|another process", 0),
    (signal_all_workers_twice, "SIGUSR2", 0),
    (kill_the_launcher, "SIGTERM", -signal.SIGKILL),
)


@pytest.mark.parametrize(
    "ways",
    [
        pytest.param(WAYS_TO_STOP[:2], id="two"),
        pytest.param(WAYS_TO_STOP[2:], id="three", marks=pytest.mark.variant),
    ],
)
def test_told_to_stop_in_any_way_it_saves_leaves_the_marker_and_goes_on(
    ways: tuple[tuple[Callable[[Started], None], str, int], ...], whole: Path, tmp_path: Path
) -> None:
    folder, at = tmp_path / "run", 0
    for nth, (stop, why, exit_code) in enumerate(ways, start=1):
        started = on_two(folder)
        # A stop may have taken more than 12 steps: then the old rows say nothing of this start.
        started.until_step(max(12 * nth, at + 1))
        assert not (folder / "REQUEUE").exists()
        workers, told = started.workers(), time.monotonic()
        stop(started)
        while any(alive(w.pid) for w in workers):
            assert time.monotonic() - told < 10, started.output()
            time.sleep(0.02)
        code, output = started.end()
        assert code == exit_code, output
        line = rf"^({why}): stopped after step (\d+) of {STEPS}, with"
        said = re.search(line, output, re.MULTILINE)
        assert said, output
        assert resumed(output) == at
        at = int(said[2])
        assert saved_steps(folder)[-1] == at
        assert (folder / "REQUEUE").exists()
        assert not (folder / "STOP").exists()
        assert not (folder / "result.json").exists()
    assert on_two(folder).end()[0] == 0
    assert not (folder / "REQUEUE").exists()
    assert_same_run(whole, folder)


def alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def test_told_to_stop_during_the_imports_it_leaves_with_the_marker(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    started = on_two(folder)
    started.until(lambda: len(started.workers()) == 2 and all_have_handlers(started))
    signal_one_worker(started)  # torch is not imported yet
    code, output = started.end(40)
    assert code == 0, output
    assert "stopped before the first step; the same command goes on" in output
    assert (folder / "REQUEUE").exists()


@pytest.mark.parametrize(
    "stop",
    [
        signal_the_launcher,
        *(
            pytest.param(s, marks=pytest.mark.variant)
            for s in (signal_one_worker, touch_the_stop_file)
        ),
    ],
)
def test_told_to_stop_while_it_decodes_images_it_leaves_at_once(
    cifar100: str, tmp_path: Path, stop: Callable[[Started], None]
) -> None:
    folder, cache = tmp_path / "run", tmp_path / "cache"
    # Resized, so that decoding takes long enough to be stopped on a busy machine.
    data = ("--data.name", "cifar100", "--data.path", cifar100, "--data.resize", "64")
    started = Started(folder, *data, processes=2, env={"DISTVGG_CACHE": str(cache)})
    started.until(lambda: any(cache.glob("*.building/train_images.npy")))
    stop(started)
    _, output = started.end(20)
    assert "stopped before the first step; the same command goes on" in output
    assert not any(cache.glob("*/train_images.npy")), "it decoded all"
    assert (folder / "REQUEUE").exists()
    assert not (folder / "STOP").exists()
    assert not any(cache.glob("*.building"))


@pytest.mark.variant
def test_told_to_stop_in_an_evaluation_it_does_that_again(tmp_path: Path) -> None:
    """Many small batches make an evaluation of seconds; the row of it comes once, and whole."""
    slow = ("--data.val_size", "3000", "--eval.batch_size", "8", "--eval.every_epochs", "0.5")
    slow += ("--train.epochs", "0.6", "--eval.test", "false")
    folders = [tmp_path / "whole", tmp_path / "run"]
    train(folders[0], *slow, processes=2)
    started = Started(folders[1], *slow, processes=2)
    started.until_step(5)
    time.sleep(0.3)
    assert [r["step"] for r in measured(folders[1])] == [1, 2, 3, 4, 5], "not in the evaluation"
    signal_one_worker(started)
    code, output = started.end()
    assert code == 0, output
    assert "stopped after step 5 of 6" in output
    assert progress(folders[1], 5)["validated"] == 0
    assert Started(folders[1], *slow, processes=2).end()[0] == 0
    assert_same_run(*folders)


def test_ctrl_c_stops_a_single_process_with_a_checkpoint(tmp_path: Path) -> None:
    started = Started(tmp_path / "run", *ARGS)
    started.until_step(30)
    started.process.send_signal(signal.SIGINT)
    code, output = started.end()
    assert code == 130, output
    assert "SIGINT: stopped after step" in output
    assert (tmp_path / "run" / "REQUEUE").exists()


def test_a_dead_process_ends_the_others_and_max_restarts_brings_the_job_back(
    whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    started = on_two(folder, "--max_restarts", "2")
    started.until_step(20)
    before = {w.pid for w in started.workers()}
    os.kill(started.workers()[0].pid, signal.SIGKILL)
    started.until(lambda: len({w.pid for w in started.workers()} - before) == 2, 20)
    # Once more where the processes have not found each other yet: the other waits in C. Before it
    # has its handlers, milliseconds after it was started, it would end without a word.
    started.until(lambda: all_have_handlers(started))
    os.kill(started.workers()[1].pid, signal.SIGKILL)
    code, output = started.end()
    assert code == 0, output
    lost = r"lost contact with another process, which died or was killed|another process died"
    assert len(re.findall(lost, output)) >= 2
    assert "Traceback" not in output
    assert_same_run(whole, folder)


def test_a_run_under_way_is_not_started_twice_and_does_not_outlive_a_process(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    started = Started(folder, *ARGS, "--train.epochs", "99", processes=2)
    started.until_step(3)
    done = run(tiny(folder, *ARGS, "--train.epochs", "99"))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert re.fullmatch(r"distvgg: error: run folder .+ is in use by process \d+ on .+", line)

    killed = time.monotonic()
    os.kill(started.workers()[0].pid, signal.SIGKILL)
    code, output = started.end(20)
    assert code == 1
    assert time.monotonic() - killed < 10
    assert "distvgg: error on process 1: lost contact with another process" in output
    assert not (folder / "REQUEUE").exists()


def test_damage_costs_only_what_is_damaged(whole: Path, tmp_path: Path) -> None:
    """The newest is a copy, the next has a wrong bit, the next counts on rows that are gone."""
    folder, args = tmp_path / "run", (*ARGS, "--checkpoint.keep", "3")
    started = Started(folder, *args, processes=2)
    started.until_step(40)
    started.kill()
    steps = saved_steps(folder)
    names = [f"step_{step:08}" for step in steps]
    newest = folder / "checkpoints" / names[-1] / "state.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 4
    newest.write_bytes(content)
    copy = folder / "checkpoints" / f"step_{STEPS - 1:08}"
    shutil.copytree(folder / "checkpoints" / names[-3], copy)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    there = [line for line in lines if json.loads(line)["step"] <= steps[-3]]
    (folder / "metrics.jsonl").write_text("".join(there))
    code, output = Started(folder, *args).end()
    assert code == 0, output
    assert f"checkpoint {copy.name} refused: it is a copy of {names[-3]}" in output
    assert (
        f"checkpoint {names[-1]} refused: state.safetensors is damaged: its SHA-256 is not the"
        " manifest's" in output
    )
    assert (
        f"checkpoint {names[-2]} refused: metrics.jsonl no longer has the rows that it counts on"
        in output
    )
    assert resumed(output) == steps[-3]
    assert_same_run(whole, folder)


def test_other_data_is_refused_at_a_resume(tmp_path: Path) -> None:
    data = ("--data.name", "custom", "--data.path", str(tmp_path / "data"))
    write_parquet(tmp_path / "data", made_rows(800, seed=1), None)
    started = Started(tmp_path / "run", *ARGS, *data)
    started.until_step(20)
    started.kill()
    write_parquet(tmp_path / "data", made_rows(800, seed=2), None)
    code, output = Started(tmp_path / "run", *ARGS, *data).end()
    assert code == 2
    assert re.search(r"^distvgg: error: checkpoint .+ was trained on other data", output, re.M)

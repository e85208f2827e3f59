"""One W&B run over kills and restarts: each row once, in order, online, offline and in turns.

Sessions are real processes (wandb_driver) with the real client; kills are SIGKILL.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from processes import CPU, ROOT, Started, kill_all, measured, run
from wandb_client import client, login, own, read_offline
from wandb_driver import row
from wandb_server import ReceivedRun, WandbServer, serving

DRIVER = ROOT / "tests" / "support" / "wandb_driver.py"
PROMPT = {"WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "1"}
NEVER = {"WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "600"}  # only at the end
OFFLINE = {"WANDB_MODE": "offline"}

pytestmark = pytest.mark.usefixtures("newcomer")


def start(folder: Path, written: int, total: int, end: str, env: dict[str, str]) -> Any:
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, str(DRIVER), str(folder), str(written), str(total), end],
        env=os.environ | CPU | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(
    folder: Path, written: int, total: int, env: dict[str, str], end: str = "finish"
) -> str:
    """A session that ends well; returns what it printed."""
    with start(folder, written, total, end, env) as process:
        output, _ = process.communicate(timeout=90)
    assert process.returncode == 0, output
    return str(output)


def killed(
    folder: Path,
    written: int,
    total: int,
    env: dict[str, str],
    *,
    when: Callable[[], bool] = lambda: True,
    whole: bool = True,
) -> None:
    """A session that is killed once it has logged its rows and something is so.

    Args:
        whole: kill the processes of W&B as well, as the end of a machine does.
    """
    with start(folder, written, total, "wait", env) as process:
        awaited = {"logged\n", "W&B"}  # in either order
        while awaited:
            line = process.stdout.readline()
            awaited -= {line, line[:3]}
        until(when)
        kill_all(process) if whole else process.kill()


def until(condition: Callable[[], bool], within: float = 30) -> None:
    end = time.monotonic() + within
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def offline_runs(folder: Path) -> list[Path]:
    return sorted(folder.glob("wandb/offline-run-*"))


def sync(folder: Path, server: WandbServer) -> str:
    done = run(["sync", str(folder)], env=login(server))
    assert done.returncode == 0, done.stderr
    return done.stdout


def untimed(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without what the clock of a machine gave."""
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows]


def only_run(server: WandbServer, folder: Path, rows: int) -> ReceivedRun:
    """The server's one run, the folder's, which must have each of these rows once and in order."""
    (received,) = server.runs.values()
    assert received.id == json.loads((folder / "wandb" / "run.json").read_text())["id"]
    assert [own(r) for r in received.rows()] == [row(n) for n in range(rows)]
    assert [r["_step"] for r in received.rows()] == list(range(rows))
    assert received.axes() == {"step"}
    assert server.unknown == set()
    return received


def test_online_each_row_arrives_once_over_kills(tmp_path: Path) -> None:
    with serving() as server:
        env = login(server)

        def arrived(rows: int) -> bool:
            return any(len(run.rows()) == rows for run in server.runs.values())

        killed(tmp_path, 0, 20, env | PROMPT, when=lambda: arrived(20))
        killed(tmp_path, 12, 30, env | NEVER)  # 12 to 19 are there; all that is new gets lost
        assert arrived(20)
        killed(tmp_path, 12, 25, env | NEVER, whole=False)
        until(lambda: arrived(25))  # what a killed training logged is sent after its death
        said = finished(tmp_path, 22, 40, env)
        assert said.count("W&B:") == 1
        received = only_run(server, tmp_path, rows=40)
        assert received.exit_code == 0
        assert own(received.summary()).items() >= row(39).items()
        with start(tmp_path, 40, 50, "crash", env) as process:  # a finished run goes on as well
            assert "as asked" in process.communicate(timeout=90)[0]
        assert process.returncode == 1
        assert only_run(server, tmp_path, rows=50).exit_code == 1


def test_a_killed_training_goes_on_as_the_same_run(tmp_path: Path) -> None:
    """The real program: killed between two checkpoints, online."""
    args = ("--track.wandb=true", "--train.epochs", "12", "--checkpoint.every_steps", "20")
    with serving() as server:
        env = login(server) | PROMPT
        first = Started(tmp_path / "run", *args, env=env)
        first.until(lambda: any(len(run.rows()) > 30 for run in server.runs.values()))
        first.kill()
        code, output = Started(tmp_path / "run", *args, env=env).end()
        assert code == 0, output
        (received,) = server.runs.values()
    expected = measured(tmp_path / "run")
    assert untimed(own(r) for r in received.rows()) == expected
    assert received.exit_code == 0


@pytest.mark.variant
def test_the_offline_file_has_each_row_once_over_kills(tmp_path: Path) -> None:
    killed(tmp_path, 0, 20, OFFLINE)
    killed(tmp_path, 12, 30, OFFLINE)
    finished(tmp_path, 25, 40, OFFLINE)
    (folder,) = offline_runs(tmp_path)
    assert read_offline(folder) == [row(n) for n in range(40)]
    with serving() as server:
        client(f"wandb sync {tmp_path / 'wandb'}", env=login(server))
        only_run(server, tmp_path, rows=40)
        said = finished(tmp_path, 32, 45, OFFLINE)  # a second file would double the rows
        assert said.strip().endswith(f"W&B: offline (as set). To upload: distvgg sync {tmp_path}")
        assert offline_runs(tmp_path) == [folder]
        assert "has 45 rows, 5 of them new" in sync(tmp_path, server)
        only_run(server, tmp_path, rows=45)


def test_online_and_offline_in_turns(tmp_path: Path) -> None:
    with serving() as server:
        finished(tmp_path, 0, 10, OFFLINE)
        finished(tmp_path, 8, 20, login(server))
        assert offline_runs(tmp_path) == []  # all went online, and cannot go twice
        only_run(server, tmp_path, rows=20)
        finished(tmp_path, 15, 30, OFFLINE)
        assert offline_runs(tmp_path) == []
        assert "has 30 rows, 10 of them new" in sync(tmp_path, server)
        assert only_run(server, tmp_path, rows=30).exit_code == 1  # the folder has no result


def test_one_process_at_a_time_sends_rows(tmp_path: Path) -> None:
    with serving() as server, start(tmp_path, 0, 10, "wait", login(server)) as process:
        assert any(line.startswith("W&B: http") for line in process.stdout)
        done = run(["sync", str(tmp_path)], env=login(server))
        process.kill()
        assert done.returncode == 2
        assert "its training is sending the rows" in done.stderr
        until(lambda: any(len(run.rows()) == 10 for run in server.runs.values()))
        finished(tmp_path, 10, 12, login(server))
        only_run(server, tmp_path, rows=12)


def test_a_hanging_wandb_slows_neither_a_step_nor_much_the_end(tmp_path: Path) -> None:
    started = time.monotonic()
    said = finished(tmp_path, 0, 5, OFFLINE | {"WANDB_FINISH_TIMEOUT": "1"}, end="stop")
    seconds = re.search(r"seconds (\S+)", said)
    assert seconds
    assert float(seconds[1]) < 5  # 5,000 rows, with their lines in metrics.jsonl
    assert time.monotonic() - started < 40
    failed = [line for line in said.splitlines() if line.startswith("W&B: failed")]
    assert failed == [f"W&B: failed (no answer in 1 s). To upload: distvgg sync {tmp_path}"]
    assert "Traceback" not in said


def test_the_run_of_an_earlier_version_continues(tmp_path: Path) -> None:
    folder = tmp_path / "wandb"
    folder.mkdir()
    (folder / "run.json").write_text('{"id": "0123abcd", "uploaded": null}')
    with serving() as server:
        finished(tmp_path, 3, 6, login(server))
        assert only_run(server, tmp_path, rows=6).id == "0123abcd"

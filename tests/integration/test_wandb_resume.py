"""One W&B run over kills and restarts: each row once, in order, online, offline and in turns.

Sessions are real processes (wandb_driver) with the real client; kills are SIGKILL.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distvgg.tracking.wandb_ledger import Ledger, rows_in
from processes import CPU, ROOT, Started, measured
from wandb_client import client, login, own
from wandb_driver import row
from wandb_server import ReceivedRun, WandbServer, serving

DRIVER = ROOT / "tests" / "support" / "wandb_driver.py"
# What is logged is on its way at once, or never before a kill.
PROMPT = {
    "WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "1",
    "WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL": "0.1",
}
NEVER = {
    "WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "600",
    "WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL": "600",
}
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
    when: Callable[[], bool] = lambda: True,
) -> None:
    """A session that is killed once it has logged its rows and something is so."""
    with start(folder, written, total, "wait", env) as process:
        shown = iter(process.stdout)
        assert any(line == "logged\n" for line in shown)
        end = time.monotonic() + 30
        while not when():
            assert time.monotonic() < end
            time.sleep(0.05)
        process.kill()


def fragments(folder: Path) -> list[Path]:
    return sorted(folder.glob("wandb/offline-run-*/*.wandb"))


def id_of(folder: Path) -> str:
    return str(json.loads((folder / "wandb" / "run.json").read_text())["id"])


def only_run(server: WandbServer, folder: Path, rows: int) -> ReceivedRun:
    """The server's one run, the folder's, which must have each of these rows once and in order."""
    (received,) = server.runs.values()
    assert received.id == id_of(folder)
    assert [own(r) for r in received.rows()] == [row(n) for n in range(rows)]
    assert [r["_step"] for r in received.rows()] == list(range(rows))
    assert received.axes() == {"*": "step"}
    assert server.unknown == set()
    return received


def test_online_each_row_arrives_once_over_kills(tmp_path: Path) -> None:
    with serving() as server:
        env = login(server)

        def arrived() -> bool:
            return any(len(run.rows()) == 20 for run in server.runs.values())

        killed(tmp_path, 0, 20, env | PROMPT, when=arrived)
        killed(tmp_path, 12, 30, env | NEVER)  # 12 to 19 are there; all that is new gets lost
        (received,) = server.runs.values()
        assert len(received.rows()) == 20
        said = finished(tmp_path, 25, 40, env)  # 20 to 24 are sent again
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
    got = [{k: v for k, v in own(r).items() if "perf/" not in k} for r in received.rows()]
    assert got == expected
    assert received.exit_code == 0


def test_offline_fragments_hold_each_row_once_over_kills(tmp_path: Path) -> None:
    def on_disk() -> bool:
        return [rows_in(file) for file in fragments(tmp_path)] == [20]

    killed(tmp_path, 0, 20, OFFLINE | PROMPT, when=on_disk)
    killed(tmp_path, 12, 30, OFFLINE | NEVER)  # what is new gets lost: an empty fragment
    finished(tmp_path, 25, 40, OFFLINE)
    whole, torn = fragments(tmp_path)
    assert (rows_in(whole), rows_in(torn)) == (20, 20)
    torn.write_bytes(torn.read_bytes()[:4000])  # as by a kill, in the middle of a record
    said = finished(tmp_path, 32, 45, OFFLINE)
    assert [rows_in(file) for file in fragments(tmp_path)] == [20, 25]
    upload = re.search(r"To upload: (wandb sync .+); to view", said)
    assert upload
    with serving() as server:
        client(upload[1], env=login(server))
        only_run(server, tmp_path, rows=45)


def test_online_and_offline_in_turns(tmp_path: Path) -> None:
    with serving() as server:
        finished(tmp_path, 0, 10, OFFLINE)
        finished(tmp_path, 8, 20, login(server))
        assert fragments(tmp_path) == []  # all went online, and cannot go twice
        only_run(server, tmp_path, rows=20)
        finished(tmp_path, 15, 30, OFFLINE)
        client(f"wandb sync {tmp_path / 'wandb'}", env=login(server))
        only_run(server, tmp_path, rows=30)


def test_a_hanging_wandb_slows_neither_a_step_nor_much_the_end(tmp_path: Path) -> None:
    said = finished(tmp_path, 0, 5, OFFLINE | {"WANDB_FINISH_TIMEOUT": "1"}, end="stop")
    seconds = re.search(r"seconds (\S+)", said)
    assert seconds
    assert float(seconds[1]) < 5  # 5,000 rows, with their lines in metrics.jsonl
    _, failed = (line for line in said.splitlines() if line.startswith("W&B:"))
    assert re.fullmatch(
        r"W&B: failed \(no answer in 6 s\); rows still go to metrics\.jsonl", failed
    )
    assert "Traceback" not in said


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"\xff\0\x01", b'{"id": "abcd', b'["a"]', b'{"id": 5}'),
        *(b'{"id": "../../ab", "uploaded": 0}', b'{"id": "0123abcd", "uploaded": -1}'),
    ],
)
def test_a_damaged_ledger_means_a_new_run(tmp_path: Path, content: bytes) -> None:
    said: list[str] = []
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "run.json").write_bytes(content)
    ledger = Ledger(tmp_path, said.append)
    (line,) = said
    assert line.startswith(f"W&B: a new run, {ledger.id}, with every row (")
    assert ledger.offline() == 0
    assert Ledger(tmp_path, said.append).id == ledger.id
    assert len(said) == 1


def test_offline_after_an_online_kill_is_a_new_run_with_every_row(tmp_path: Path) -> None:
    said: list[str] = []
    before = Ledger(tmp_path, said.append)
    before.before_online()
    before.online()
    after = Ledger(tmp_path, said.append)
    assert after.id == before.id  # online, the server knows
    assert after.offline() == 0
    assert after.id != before.id
    assert said == [
        f"W&B: a new run, {after.id}, with every row"
        f" (what the server has of {before.id} is not known)"
    ]


def test_a_fragment_that_cannot_be_read_means_a_new_run(tmp_path: Path) -> None:
    said: list[str] = []
    before = Ledger(tmp_path, said.append)
    before.before_online()
    file = tmp_path / "wandb" / f"offline-run-1-{before.id}" / f"run-{before.id}.wandb"
    file.mkdir(parents=True)  # a folder in a file's place
    after = Ledger(tmp_path, said.append)
    assert after.offline() == 0
    assert after.id != before.id
    assert len(said) == 1

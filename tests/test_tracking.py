"""Where the curves of a run end up: W&B online, offline and out of order, TensorBoard, a terminal.

The W&B client is the real one; it talks to a server on the loopback interface (wandb_server), or to
none. Several tests look at one run from several sides.
"""

import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from wandb_server import ENTITY, KEY, ReceivedRun, WandbServer, serving

from distvgg.config import load
from launch import ROOT, TINY, rows, run

STEPS = 10  # of TINY
ROWS = STEPS + 2  # train rows, val, test
CPU = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
OFFLINE = re.compile(
    r"W&B: offline \((.+)\)\. To upload: (wandb sync .+); to view: wandb leet (.+)"
)


@dataclass
class Outcome:
    """One run, as its user saw it."""

    folder: Path
    output: str  # what the terminal showed
    seconds: float

    def said(self) -> list[str]:
        """The lines about W&B: ours and any of the client's own."""
        lines = re.split(r"[\r\n]+", self.output)
        return [line.strip() for line in lines if re.match(r"\s*(W&B|wandb):", line)]

    def offline(self) -> tuple[str, str, Path]:
        """Why the run went offline, the command that uploads it, and its folder: from the one line
        about W&B, that says so."""
        (line,) = self.said()
        said = OFFLINE.fullmatch(line)
        assert said, line
        folder = Path(shlex.split(said[3])[0])
        assert said[2] == f"wandb sync {shlex.quote(str(folder))}"
        return said[1], said[2], folder


@pytest.fixture(scope="module", autouse=True)
def newcomer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Makes these tests' processes those of a user whom W&B does not know, and who cannot reach it
    but where a test says so."""
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ:
            if name.startswith(("WANDB_", "XDG_")) or name == "NETRC":
                patch.delenv(name)
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        patch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")
        yield


def trained(
    folder: Path, *args: str, processes: int = 1, env: dict[str, str] | None = None
) -> Outcome:
    """A tiny run with W&B on, which must succeed and leave every row in metrics.jsonl."""
    started = time.monotonic()
    done = run(command(folder, *args), processes=processes, env=env)
    outcome = Outcome(folder, done.stdout + done.stderr, time.monotonic() - started)
    assert done.returncode == 0, outcome.output
    assert "\r" not in outcome.output
    complete(folder)
    return outcome


def command(folder: Path, *args: str) -> list[str]:
    return [*("train", "quickstart", "--run-dir", str(folder)), *TINY, "--track.wandb=true", *args]


def complete(folder: Path, steps: int = STEPS) -> list[dict[str, Any]]:
    """The rows of a finished run: every step's once, and one of each evaluation."""
    found = rows(folder)
    assert [r["step"] for r in found if "train/loss" in r] == list(range(1, steps + 1))
    assert [r["step"] for r in found if "val/top1" in r] == [steps]
    assert [r["step"] for r in found if "test/top1" in r] == [steps]
    assert len(found) == steps + 2
    return found


def client(command: str, env: dict[str, str] | None = None) -> str:
    """What a command of the W&B client's prints."""
    return subprocess.run(
        [sys.executable, "-m", *shlex.split(command)],
        env=os.environ | (env or {}),
        cwd=os.environ["HOME"],  # it leaves a folder there
        check=True,
        capture_output=True,
        text=True,
    ).stdout


def login(server: WandbServer) -> dict[str, str]:
    return {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}


def own(row: dict[str, Any]) -> dict[str, Any]:
    """A row of W&B's without what the client adds to it."""
    return {name: value for name, value in row.items() if not name.startswith("_")}


def read_offline(folder: Path) -> list[dict[str, Any]]:
    """The rows of an offline run's file, by the client's own reader."""
    (file,) = folder.glob("*.wandb")
    printed = client(f"wandb leet inspect --json {shlex.quote(str(file))}")
    records = [json.loads(line) for line in printed.splitlines()]
    return [own(r["history"]["item"]) for r in records if r["type"] == "history"]


Online = tuple[Outcome, WandbServer, ReceivedRun]


@pytest.fixture(scope="module")
def online_run(tmp_path_factory: pytest.TempPathFactory) -> Online:
    """A run over two processes with a key and a server, and what the server took."""
    folder = tmp_path_factory.mktemp("online") / "run"
    with serving() as server:
        outcome = trained(folder, "--track.name", "two", processes=2, env=login(server))
    (received,) = server.runs.values()  # one run, of two processes
    return outcome, server, received


def test_online_every_row_arrives_once(online_run: Online) -> None:
    outcome, _, received = online_run
    assert [own(row) for row in received.rows()] == rows(outcome.folder)
    found = {name for row in received.rows() for name in row}
    assert {"train/loss", "val/top1", "test/top1", "perf/images_per_sec"} <= found
    assert received.summary()["test/top1"] == rows(outcome.folder)[-1]["test/top1"]
    assert received.exit_code == 0


def test_online_run_has_its_name_config_and_axis(online_run: Online) -> None:
    outcome, _, received = online_run
    assert (received.project, received.name) == ("distvgg", "two")
    config = {name: entry["value"] for name, entry in received.config.items() if name != "_wandb"}
    flat = load(str(outcome.folder / "config.yaml")).flat()
    assert config == {name: "none" if value is None else value for name, value in flat.items()}
    assert received.axes() == {"*": "step"}


def test_online_the_client_asks_for_nothing_unforeseen(online_run: Online) -> None:
    _, server, _ = online_run
    assert server.unknown == set()
    assert {"UpsertBucket", "file_stream"} <= set(server.operations)


def test_online_one_line_shows_the_address(online_run: Online) -> None:
    outcome, server, received = online_run
    url = f"{server.url}/{ENTITY}/distvgg/runs/{received.id}"
    assert outcome.said() == [f"W&B: {url}"]
    assert url in json.loads((outcome.folder / "result.json").read_text())["curves"]


@pytest.fixture(scope="module")
def at_a_terminal(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A run of a user who has no key, at a terminal, where W&B could ask for one."""
    folder = tmp_path_factory.mktemp("terminal") / "a run"
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (50, 200))
    started = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-m", "distvgg", *command(folder)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=os.environ | CPU | {"TQDM_MININTERVAL": "0"},
        start_new_session=True,
    ) as process:
        os.close(theirs)
        shown = read_terminal(ours, process, within=120)
    os.close(ours)
    outcome = Outcome(folder, shown, time.monotonic() - started)
    assert process.returncode == 0, shown
    complete(folder)
    return outcome


def read_terminal(ours: int, process: subprocess.Popen[bytes], within: float) -> str:
    """All that a process shows; one that is still there at the end, waiting, is killed."""
    os.set_blocking(ours, False)
    shown, end = b"", time.monotonic() + within
    while time.monotonic() < end:
        try:
            shown += os.read(ours, 65536)
        except BlockingIOError:
            time.sleep(0.05)
        except OSError:  # the other side is closed
            break
    else:
        process.kill()
    return shown.decode()


def test_without_a_key_nobody_is_asked_and_no_row_is_lost(at_a_terminal: Outcome) -> None:
    why, _, folder = at_a_terminal.offline()
    assert why == "no API key, see wandb login"
    assert read_offline(folder) == rows(at_a_terminal.folder)


def test_the_printed_command_uploads_an_offline_run(at_a_terminal: Outcome) -> None:
    _, upload, _ = at_a_terminal.offline()
    with serving() as server:
        client(upload, env=login(server))
    (received,) = server.runs.values()
    assert [own(row) for row in received.rows()] == rows(at_a_terminal.folder)
    assert (received.axes(), received.exit_code) == ({"*": "step"}, 0)
    assert server.unknown == set()


def test_a_terminal_has_a_progress_bar(at_a_terminal: Outcome) -> None:
    *_, last = (line for line in at_a_terminal.output.split("\r") if f"{STEPS}/{STEPS} [" in line)
    assert re.search(r"100%\|█+\| 10/10 \[\d\d:\d\d<\d\d:\d\d", last), last
    assert re.search(r"loss \d\.\d{3}, top1 \d+\.\d\d%, [\d,]+ images/s", last), last
    # Lines stand above the bar, each on its own.
    assert re.search(r"\rstep 10/10  epoch 1\.07  val loss [^\r]+\r\n", at_a_terminal.output)


def test_a_server_that_never_answers_is_given_up(tmp_path: Path) -> None:
    with serving(answers=False) as server:
        outcome = trained(tmp_path / "run", env=login(server) | {"WANDB_INIT_TIMEOUT": "1"})
    why, _, folder = outcome.offline()
    assert why.startswith("Timed out initializing run")
    assert read_offline(folder) == rows(outcome.folder)
    assert outcome.seconds < 60  # W&B's own patience is 90 s


def test_what_an_outage_held_back_can_be_uploaded_later(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with serving(stops_answering_after="file_stream") as server:
        outcome = trained(folder, env=login(server) | {"WANDB_FINISH_TIMEOUT": "1"})
    address, later = outcome.said()
    assert address.startswith(f"W&B: {server.url}")
    assert re.fullmatch(r"W&B: Timed out finishing run\. To upload the rest: wandb sync .+", later)
    assert read_offline(Path(later.split()[-1])) == rows(folder)


def test_neither_a_missing_server_nor_the_death_of_wandb_ends_a_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    longer = ("--train.epochs", "8", "--eval.every_epochs", "8")
    with subprocess.Popen(
        [sys.executable, "-m", "distvgg", *command(folder, *longer)],
        env=os.environ | CPU | {"WANDB_API_KEY": KEY, "WANDB_INIT_TIMEOUT": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        while not (folder / "metrics.jsonl").exists() or not rows(folder):
            assert process.poll() is None
            time.sleep(0.05)
        os.kill(child(process.pid, "wandb-core"), signal.SIGKILL)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    complete(folder, steps=75)  # 8 * 600 / 64
    missing, dead = (line for line in output.splitlines() if line.startswith("W&B:"))
    said = OFFLINE.fullmatch(missing)
    assert said, missing
    assert "connection refused" in said[1]
    assert re.fullmatch(r"W&B: failed \(.+\); rows still go to metrics\.jsonl", dead), dead


def child(parent: int, name: str) -> int:
    """The process id of a child by its command's name (Linux)."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        fields = re.fullmatch(r"(\d+) \((.*)\) \w (\d+) .*", stat.read_text().strip())
        if fields and fields[2] == name and int(fields[3]) == parent:
            return int(fields[1])
    raise AssertionError(f"process {parent} has no child {name}")


@pytest.fixture(scope="module")
def with_a_short_key(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("short") / "run"
    return trained(folder, "--track.tensorboard", "true", env={"WANDB_API_KEY": "short"})


def test_a_key_of_the_wrong_form_means_offline(with_a_short_key: Outcome) -> None:
    why, _, folder = with_a_short_key.offline()
    assert "API key" in why
    assert len(read_offline(folder)) == ROWS


def test_tensorboard_has_every_row(with_a_short_key: Outcome) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(with_a_short_key.folder / "tensorboard" / "distvgg"))
    events.Reload()
    found = {
        (event.step, name): event.value
        for name in events.Tags()["scalars"]
        for event in events.Scalars(name)
    }
    written = {
        (row["step"], name): value
        for row in rows(with_a_short_key.folder)
        for name, value in row.items()
    }
    assert found == pytest.approx(written, rel=1e-6)  # event files hold float32


def test_a_log_file_gets_plain_lines(with_a_short_key: Outcome) -> None:
    steps = [line for line in with_a_short_key.output.splitlines() if line.startswith("step")]
    first, val, test = steps  # within 30 s there is one line of training
    assert re.fullmatch(r"step  1/10  epoch 0\.11  loss \d\.\d{3}, top1 \d+\.\d\d%", first)
    assert re.match(r"step 10/10  epoch 1\.07  val loss \d\.\d{3}, val top1 \d+\.\d\d%", val)
    assert re.match(r"step 10/10  epoch 1\.07  test loss", test)


def test_a_log_file_says_at_most_every_30_seconds_how_much_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from distvgg import tracking

    now = 1000.0
    monkeypatch.setattr(tracking, "time", SimpleNamespace(monotonic=lambda: now))
    console = tracking.Console(200)
    for step in range(101, 171):  # a resumed run
        now += 1
        console.advance()
        console.log({"step": step, "epoch": step / 10, "train/loss": 1.5}, step)
    first, second, third = capsys.readouterr().out.splitlines()
    assert first == "step 101/200  epoch 10.10  loss 1.500"  # one step says nothing about speed
    assert second == "step 131/200  epoch 13.10  loss 1.500, 1:09 left"
    assert third == "step 161/200  epoch 16.10  loss 1.500, 0:39 left"


def test_wandb_mode_disabled_leaves_no_trace(tmp_path: Path) -> None:
    outcome = trained(tmp_path / "run", env={"WANDB_MODE": "disabled"})
    assert outcome.said() == []
    assert not (outcome.folder / "wandb").exists()


def test_wandb_is_not_even_imported_where_it_is_off(tmp_path: Path) -> None:
    poison = tmp_path / "poison"
    (poison / "wandb").mkdir(parents=True)
    (poison / "wandb" / "__init__.py").write_text("import os; os._exit(66)\n")
    path = os.pathsep.join([str(poison), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    outcome = trained(tmp_path / "run", "--track.wandb", "false", env={"PYTHONPATH": path})
    assert outcome.said() == []
    assert not (outcome.folder / "wandb").exists()

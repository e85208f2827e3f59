"""Where W&B has the curves of a run: online, offline, out of order.

The W&B client is the real one; it talks to a server on the loopback interface (wandb_server), or to
none. Several tests look at one run from several sides.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from distvgg.recipe import load
from processes import CPU, ROOT, descendants, rows, run, tiny
from processes import at_a_terminal as run_at_a_terminal
from wandb_client import logged, login, own, read_offline
from wandb_server import ENTITY, KEY, ReceivedRun, WandbServer, serving

pytestmark = pytest.mark.usefixtures("newcomer")

STEPS = 10  # of TINY
ROWS = STEPS + 2  # train rows, val, test
OFFLINE = re.compile(r"W&B: offline \((.+)\)\. To upload: (distvgg sync .+)")


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
        (folder,) = self.folder.glob("wandb/offline-run-*")
        assert said[2] == f"distvgg sync {shlex.quote(str(self.folder))}"
        return said[1], said[2], folder


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
    return tiny(folder, "--track.wandb=true", *args)


def complete(folder: Path, steps: int = STEPS) -> list[dict[str, Any]]:
    """The rows of a finished run: every step's once, and one of each evaluation."""
    found = rows(folder)
    assert [r["step"] for r in found if "train/loss" in r] == list(range(1, steps + 1))
    assert [r["step"] for r in found if "val/top1" in r] == [steps]
    assert [r["step"] for r in found if "test/top1" in r] == [steps]
    assert len(found) == steps + 2
    return found


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
    assert [own(row) for row in received.rows()] == logged(outcome.folder)
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
    assert received.axes() == {"step"}


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
    started = time.monotonic()
    shown = run_at_a_terminal(command(folder))
    complete(folder)
    return Outcome(folder, shown, time.monotonic() - started)


def test_without_a_key_nobody_is_asked_and_no_row_is_lost(at_a_terminal: Outcome) -> None:
    why, _, folder = at_a_terminal.offline()
    assert "login" in why
    assert read_offline(folder) == logged(at_a_terminal.folder)


def test_the_printed_command_uploads_an_offline_run_once(at_a_terminal: Outcome) -> None:
    _, upload, _ = at_a_terminal.offline()
    with serving() as server:
        for new in (ROWS, 0):
            done = run(shlex.split(upload)[1:], env=login(server))
            assert re.fullmatch(
                rf"W&B: {server.url}/\S+ has {ROWS} rows, {new} of them new\n", done.stdout
            ), done.stdout + done.stderr
            (received,) = server.runs.values()
            assert not new or received.axes() == {"step"}
    assert [own(row) for row in received.rows()] == logged(at_a_terminal.folder)
    assert received.exit_code == 0
    assert server.unknown == set()


@pytest.mark.parametrize(
    ("what", "env", "said"),
    [
        ("run", {"WANDB_MODE": "offline"}, "W&B: offline (as set); see wandb login and WANDB_MODE"),
        ("run", {"WANDB_MODE": "disabled"}, "W&B: disabled by its settings; see wandb login"),
        ("run", {"WANDB_MODE": "of"}, "fix WANDB_MODE, or --track.wandb false"),
        ("none", {}, "none: not a run folder (no config.yaml)"),
    ],
)
def test_sync_says_why_it_cannot(
    online_run: Online, tmp_path: Path, what: str, env: dict[str, str], said: str
) -> None:
    folder = {"run": online_run[0].folder, "none": tmp_path / "none"}[what]
    done = run(["sync", str(folder)], env=env)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_server_that_never_answers_is_given_up(tmp_path: Path) -> None:
    limits = {"WANDB_INIT_TIMEOUT": "1", "WANDB_FINISH_TIMEOUT": "5"}
    with serving(answers=False) as server:
        outcome = trained(tmp_path / "run", env=login(server) | limits)
    assert outcome.seconds < 60  # W&B's own limit is 90 s
    upload = f"To upload: distvgg sync {tmp_path / 'run'}"
    if outcome.said() == [f"W&B: failed (no answer in 5 s). {upload}"]:
        return  # wandb before 0.31 does not notice
    why, _, folder = outcome.offline()
    assert re.match("Timed out initializing run|Failed to get resume status", why)
    assert read_offline(folder) == logged(outcome.folder)


def test_a_key_that_the_server_refuses_means_offline(tmp_path: Path) -> None:
    with serving() as server:
        outcome = trained(tmp_path / "run", env=login(server) | {"WANDB_API_KEY": "x" * 40})
    why, _, folder = outcome.offline()
    assert "permission denied" in why
    assert read_offline(folder) == logged(outcome.folder)


def test_an_outage_at_the_end_is_waited_for_only_so_long(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with serving(stops_answering_after="file_stream") as server:
        outcome = trained(folder, env=login(server) | {"WANDB_FINISH_TIMEOUT": "1"})
    address, later = outcome.said()
    assert address.startswith(f"W&B: {server.url}")
    assert later == f"W&B: failed (no answer in 1 s). To upload: distvgg sync {folder}"


@pytest.mark.parametrize(
    "which", [pytest.param("wandb-core", marks=pytest.mark.variant), "wandb_sync"]
)
def test_neither_a_missing_server_nor_the_death_of_wandb_ends_a_run(
    tmp_path: Path, which: str
) -> None:
    folder = tmp_path / "run"
    longer = ("--train.epochs", "8", "--eval.every_epochs", "8")
    with subprocess.Popen(
        [sys.executable, "-m", "distvgg", *command(folder, *longer)],
        env=os.environ | CPU | {"WANDB_API_KEY": KEY},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout
        shown = iter(process.stdout)
        missing = next(line.strip() for line in shown if line.startswith("W&B:"))
        # Before the run ends, which takes longer than the client's start.
        (victim,) = descendants(process.pid, which)
        victim.kill()
        output = "".join(shown)
    assert process.returncode == 0, output
    complete(folder, steps=75)  # 8 * 600 / 64
    (dead,) = (line for line in output.splitlines() if line.startswith("W&B:"))
    said = OFFLINE.fullmatch(missing)
    assert said, missing
    assert said[1] == "no connection to 127.0.0.1:1"
    assert re.fullmatch(r"W&B: failed \(.+\)\. To upload: distvgg sync .+", dead), dead


@pytest.fixture(scope="module")
def with_a_short_key(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("short") / "run"
    return trained(folder, env={"WANDB_API_KEY": "short"})


def test_a_key_of_the_wrong_form_means_offline(with_a_short_key: Outcome) -> None:
    why, _, folder = with_a_short_key.offline()
    assert "API key" in why or "no connection" in why  # wandb before 0.31 accepts any key
    assert len(read_offline(folder)) == ROWS


def test_wandb_mode_disabled_leaves_no_trace(tmp_path: Path) -> None:
    outcome = trained(tmp_path / "run", env={"WANDB_MODE": "disabled"})
    assert outcome.said() == []
    assert not (outcome.folder / "wandb").exists()


@pytest.mark.parametrize("used", [pytest.param(False, marks=pytest.mark.variant), True])
def test_a_broken_client_is_never_imported_by_the_training(tmp_path: Path, used: bool) -> None:
    poison = tmp_path / "poison"
    (poison / "wandb").mkdir(parents=True)
    (poison / "wandb" / "__init__.py").write_text("import os; os._exit(66)\n")
    path = os.pathsep.join([str(poison), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    folder = tmp_path / "run"
    outcome = trained(folder, f"--track.wandb={used}", env={"PYTHONPATH": path})
    failed = f"W&B: failed (exit code 66). To upload: distvgg sync {folder}"
    assert outcome.said() == [failed] * used
    assert (folder / "wandb").exists() == used

"""Searches over hyperparameters: the agent of a W&B sweep, and Optuna, with real trainings."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from processes import CPU, ROOT, TINY, rows
from wandb_client import logged, login, own
from wandb_server import Sweep, serving

pytestmark = pytest.mark.usefixtures("newcomer")

VALUES = {name.removeprefix("--"): value for name, value in zip(TINY[::2], TINY[1::2], strict=True)}


@pytest.mark.variant
def test_each_trial_of_a_sweep_has_a_folder_and_joins_its_run(tmp_path: Path) -> None:
    """The real agent and launch/sweep.yaml; the two trials have equal values."""
    trial = VALUES | {"track.wandb": True, "optim.lr": 0.05, "augment.trivial": True}
    file = (ROOT / "launch" / "sweep.yaml").read_text()
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with serving() as server:
        server.sweep = Sweep("s1", "searched", file, [trial, dict(trial)])
        done = subprocess.run(
            [sys.executable, "-m", "wandb", "agent", "tester/searched/s1"],
            env=os.environ | CPU | login(server) | {"PATH": path},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert list(server.runs) == server.sweep.taken
        for number, run in enumerate(server.runs.values()):
            folder = tmp_path / "runs" / "sweep-s1" / run.id
            assert [own(row) for row in run.rows()] == logged(folder)
            assert run.config["optim.lr"]["value"] == 0.05
            assert run.config["augment.trivial"]["value"] is True
            assert (run.project, run.said["sweep"]) == ("searched", "s1")
            assert run.name == f"breezy-sweep-{number}"  # the server's
            assert run.exit_code == 0
        assert server.unknown == set()


SPACE = """
metric: {name: val/loss, goal: minimize}
parameters:
  optim.lr: {values: [1.0, 1.0e-9]}
  eval.test: {value: false}
command: ["${env}", python, -m, distvgg, train, quickstart, "${args}"]
"""


def command(folder: Path, *words: str) -> tuple[list[str], dict[str, str]]:
    """A search over SPACE that keeps its runs in `found`, and its environment."""
    (folder / "space.yaml").write_text(SPACE)
    program = (sys.executable, str(ROOT / "launch" / "search.py"), str(folder / "space.yaml"))
    where = ("--dir", str(folder / "found"))
    long = ("--train.epochs", "20", "--optim.warmup_epochs", "0", "--eval.every_epochs", "2")
    return [*program, *words, *where, *TINY, *long], os.environ | CPU


def search(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    program, env = command(folder, *words)
    return subprocess.run(program, env=env, capture_output=True, text=True, timeout=120)


@pytest.mark.variant
def test_a_trial_worse_than_the_median_is_stopped_and_a_search_continues(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    # With this seed, the two first trials take 1e-9, which changes nothing, and the third 1.0.
    first = search(tmp_path, "--trials", "3", "--startup", "2", "--seed", "1")
    assert first.returncode == 0, first.stderr
    assert "2 complete, 1 pruned" in first.stdout, first.stdout
    best = re.search(
        r"best: trial [01], val/loss (\S+)\n +(python -m distvgg train .+)", first.stdout
    )
    assert best, first.stdout
    assert "--optim.lr=1e-09" in best[2]
    found = tmp_path / "found"
    assert (found / "2" / "REQUEUE").exists()
    steps = [row["step"] for row in rows(found / "2")]
    assert 0 < len(steps) < len(rows(found / "0"))
    assert float(best[1]) == pytest.approx(
        json.loads((found / "0" / "result.json").read_text())["val"]["loss"], abs=1e-4
    )
    again = search(tmp_path, "--trials", "0")
    assert again.stdout.splitlines()[-2:] == first.stdout.splitlines()[-2:]


@pytest.mark.variant
def test_a_stopped_search_goes_on_where_it_was(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    words, env = command(tmp_path, "--trials", "1")
    with subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 60
        while not rows(tmp_path / "found" / "0") and time.monotonic() < end:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert (tmp_path / "found" / "0" / "REQUEUE").exists()
    again = search(tmp_path, "--trials", "1")
    assert f"into {tmp_path / 'found' / '0'}\ntrial 1: complete" in again.stdout, again.stdout
    assert "resumed after step" in (tmp_path / "found" / "0.log").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--optim.lrr", "1"], "unknown key optim.lrr, did you mean optim.lr?"),
        (["--optim.lr", "0"], "optim.lr must be greater than 0"),
    ],
)
def test_a_search_refuses_what_a_training_refuses(
    tmp_path: Path, words: list[str], said: str
) -> None:
    pytest.importorskip("optuna")
    done = search(tmp_path, *words)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1

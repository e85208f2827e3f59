"""The trackers of `track.also`, with the real packages and their local stores."""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distvgg.config import TRACKERS
from distvgg.errors import UserError
from distvgg.recipe import load
from processes import Started, measured, run, tiny

# Some 70 steps, of which every tenth is saved.
LONG = ("--train.epochs", "8", "--checkpoint.every_steps", "10")


def test_the_names_are_those_of_accelerate() -> None:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    assert set(TRACKERS) | {"tensorboard", "wandb"} >= set(LOGGER_TYPE_TO_CLASS)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("trackoi", "no tracker 'trackoi', did you mean trackio?: give some of aim, clearml"),
        ("wandb", "wandb has a field of its own: --track.wandb true"),
    ],
)
def test_a_wrong_name_is_one_line(value: str, said: str) -> None:
    with pytest.raises(UserError, match=r"track\.also: ") as error:
        load("quickstart", {"track.also": f"mlflow,{value}"})
    assert said in str(error.value)


def test_a_tracker_that_is_not_installed_is_one_line(tmp_path: Path) -> None:
    done = run(tiny(tmp_path / "run", "--track.also=dvclive"))
    assert done.returncode == 2
    assert "dvclive is not installed: pip install dvclive, or --track.also none" in done.stderr
    assert done.stderr.count("\n") == 1


def of_trackio(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of each run in trackio's local store."""
    code = """
import json, sys
from trackio.sqlite_storage import SQLiteStorage
runs = SQLiteStorage.get_runs("distvgg")
print(json.dumps({run: SQLiteStorage.get_logs("distvgg", run) for run in runs}))
"""
    env = os.environ | {"TRACKIO_DIR": str(folder)}
    printed = subprocess.check_output([sys.executable, "-c", code], env=env, text=True)
    return {
        run: [{k: v for k, v in row.items() if k != "timestamp"} for row in rows]
        for run, rows in json.loads(printed).items()
    }


def without_speed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows]


def test_trackio_has_each_row_once_over_a_kill(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    env = {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    folder, args = tmp_path / "run", ("--track.also=trackio", *LONG)
    first = Started(folder, *args, env=env)
    first.until(lambda: len(of_trackio(tmp_path / "trackio")) and len(first.rows()) > 25)
    first.kill()
    code, output = Started(folder, *args, env=env).end()
    assert code == 0, output
    assert "resumed after step" in output
    ((name, rows),) = of_trackio(tmp_path / "trackio").items()
    assert without_speed(rows) == measured(folder)
    assert name.startswith("run-")
    result = json.loads((folder / "result.json").read_text())
    assert "trackio show --project distvgg" in result["curves"]


def test_mlflow_has_each_row_once_over_a_kill(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    env = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    folder, args = tmp_path / "run", ("--track.also=mlflow", *LONG)
    first = Started(folder, *args, env=env)
    first.until(lambda: len(first.rows()) > 25)
    first.kill()
    code, output = Started(folder, *args, env=env).end()
    assert code == 0, output
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        (run,) = database.execute("SELECT name, status FROM runs")
        found = database.execute("SELECT key, step, value FROM metrics").fetchall()
    assert run == ("run", "FINISHED")
    expected = [
        (name, row["step"], value)
        for row in measured(folder)
        for name, value in row.items()
        if name not in ("step", "epoch")  # two rows of one step have one epoch
    ]
    measured_there = [m for m in found if not m[0].startswith("perf/") and m[0] != "epoch"]
    assert sorted(measured_there) == sorted(expected)


def test_a_tracker_that_fails_ends_no_run(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    # A project that trackio rejects.
    done = run(tiny(tmp_path / "run", "--track.also=trackio", "--track.project", "registry-a"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("track.also: trackio failed (Project name 'registry-a' is not") == 1
    assert len(measured(tmp_path / "run")) == 12

"""What W&B has of a run beside its rows: how it began, how it ended, and what it left.

The W&B client is the real one; it talks to a server on the loopback interface (wandb_server), or
writes its offline file.
"""

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from distvgg.runs.confusion import by_superclass, read_confusion
from distvgg.tracking.wandb_sync import MAX_NAME
from processes import Started, run, tiny
from wandb_client import client, logged, login, own, read_offline
from wandb_server import ReceivedRun, WandbServer, serving

pytestmark = pytest.mark.usefixtures("newcomer")

ENDS = ("--track.wandb=true", "--track.wandb_artifact")


def sync(folder: Path, server: WandbServer, **env: str) -> str:
    done = run(["sync", str(folder)], env=login(server) | env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_end(server: WandbServer, folder: Path) -> ReceivedRun:
    """Checks the summary, the table and the weights of the server's one run; returns the run."""
    (received,) = server.runs.values()
    assert [own(row) for row in received.rows()] == logged(folder)  # and nothing after them
    result = json.loads((folder / "result.json").read_text())
    summary = received.summary()
    best = {"best/val/top1": result["best"]["top1"], "best/step": result["best"]["step"]}
    tests = {f"test/{name}": value for name, value in result["test"].items()}
    assert summary.items() >= (best | tests).items()
    table = json.loads(received.uploads[summary["confusion_matrix"]["path"]])
    assert table["columns"] == ["Actual", "Predicted", "nPredictions"]
    confusion = read_confusion(folder)
    assert confusion
    coarse = by_superclass(confusion)
    assert coarse
    names, found = coarse.class_names, [[0] * 20 for _ in range(20)]
    for true, predicted, images in table["data"]:
        found[names.index(true)][names.index(predicted)] = images
    assert found == coarse.counts
    of_type = {artifact.type: artifact for artifact in server.artifacts.values()}
    assert set(of_type) == {"model", "run_table"}
    assert len(server.artifacts) == 2  # one version of each
    assert of_type["model"].committed
    assert of_type["model"].files == {
        name: (folder / name).read_bytes() for name in ("model.safetensors", "preprocessing.json")
    }
    assert received.exit_code == 0
    assert server.unknown == set()
    return received


def test_the_end_of_a_run_is_sent_once_and_its_report_when_there_is_one(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with serving() as server:
        done = run(tiny(folder, *ENDS), env=login(server))
        assert done.returncode == 0, done.stderr
        assert "report" not in check_end(server, folder).summary()

        sent = len(server.operations)
        sync(folder, server)
        again = server.operations[sent:]
        assert not {"CreateArtifact", "artifact"} & set(again)  # nothing is new
        check_end(server, folder)

        (folder / "report.html").write_text("<p>é</p>", encoding="utf-8")
        sync(folder, server)
        received = check_end(server, folder)
        report = received.uploads[received.summary()["report"]["path"]]
        assert report.decode() == "<p>é</p>"


def test_the_offline_file_has_the_end_and_uploads_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = run(tiny(folder, *ENDS), env={"WANDB_MODE": "offline"})
    assert done.returncode == 0, done.stderr
    (offline,) = folder.glob("wandb/offline-run-*")
    assert read_offline(offline) == logged(folder)
    with serving() as server:
        client(f"wandb sync '{folder / 'wandb'}'", env=login(server))
        check_end(server, folder)


def test_without_being_asked_no_weights_leave(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert run(tiny(folder)).returncode == 0
    with serving() as server:
        sync(folder, server)
        assert [artifact.type for artifact in server.artifacts.values()] == ["run_table"]


@pytest.mark.parametrize(
    ("number", "env", "preempting"),
    [
        (signal.SIGTERM, {}, True),
        # W&B's agent ends a trial so, and would start a preempted one again.
        (signal.SIGTERM, {"WANDB_SWEEP_ID": "s"}, False),
        pytest.param(signal.SIGUSR1, {"WANDB_SWEEP_ID": "s"}, True, marks=pytest.mark.variant),
    ],
)
def test_a_run_that_a_signal_stops_is_preempted_for_wandb(
    tmp_path: Path, number: int, env: dict[str, str], preempting: bool
) -> None:
    folder, args = tmp_path / "run", ("--track.wandb=true", "--train.epochs", "20")
    with serving() as server:
        first = Started(folder, *args, env=login(server) | env)
        first.until(lambda: len(first.rows()) > 3)
        first.process.send_signal(number)
        code, output = first.end()
        assert code == 0, output
        assert (folder / "REQUEUE").exists()
        (received,) = server.runs.values()
        assert [own(row) for row in received.rows()] == logged(folder)
        assert received.preempting == preempting
        assert received.exit_code == int(preempting)


LONG = "n" * (MAX_NAME + 1)
FIRST = {
    "WANDB_RUN_ID": "chosen",
    "WANDB_NAME": LONG,
    "WANDB_TAGS": "a,b",
    "WANDB_NOTES": "why",
    "WANDB_RUN_GROUP": "g",
    "WANDB_PROJECT": "other",
    "WANDB_ENTITY": "team",
}
LATER: dict[str, Any] = {name: f"x{value[:3]}" for name, value in FIRST.items()}


@pytest.mark.parametrize("mode", ["online", pytest.param("offline", marks=pytest.mark.variant)])
def test_the_environment_of_the_first_start_names_the_run_for_ever(
    tmp_path: Path, mode: str
) -> None:
    folder = tmp_path / "run"
    with serving() as server:
        done = run(
            tiny(folder, "--track.wandb=true"), env=login(server) | FIRST | {"WANDB_MODE": mode}
        )
        shortened = re.findall(r"W&B: note: (.+)", done.stdout)
        assert shortened == ["WANDB_NAME shortened from 129 to 128 characters, W&B's limit"]
        said = sync(folder, server, **LATER)
        ignored = (
            f"WANDB_RUN_ID={LATER['WANDB_RUN_ID']} is ignored: the run folder continues chosen"
        )
        assert re.findall(r"W&B: note: (.+)", said) == [ignored]
        (received,) = server.runs.values()
        assert (received.id, received.name, received.project) == ("chosen", LONG[:-1], "other")
        assert received.entity == "team"
        named = ("tags", "notes", "groupName")
        assert [received.said[name] for name in named] == [["a", "b"], "why", "g"]


def test_the_config_wins_over_the_environment(tmp_path: Path) -> None:
    named = ("--track.wandb=true", "--track.name", "mine", "--track.project", "ours")
    with serving() as server:
        done = run(tiny(tmp_path / "run", *named), env=login(server) | FIRST)
        assert done.returncode == 0, done.stderr
        (received,) = server.runs.values()
        assert (received.name, received.project) == ("mine", "ours")

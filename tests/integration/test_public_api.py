"""`import distvgg`: what it offers, what it does not load, and that it works in a notebook."""

import inspect
import math
import socket
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import distvgg
from processes import assert_same_run, rows, run, tiny, train

# What a program of a user's begins with; `options` are those of a tiny run.
BEGIN = """
import sys
import distvgg
words = sys.argv[2:]
options = dict(zip((w.removeprefix("--") for w in words[::2]), words[1::2]))
config = distvgg.load_config("quickstart", options)
run_dir = sys.argv[1]
"""


def program(text: str, run_dir: Path, **how: object) -> subprocess.CompletedProcess[str]:
    """Runs a program of a user's, whose config is that of `tiny`."""
    _, _, _, folder, *options = tiny(run_dir)
    return run((folder, *options), program=("-c", BEGIN + text), **how)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run in a process of its own."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(folder)
    return folder


@pytest.fixture
def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_the_public_names_are_imported_when_they_are_used() -> None:
    probe = (
        "import sys, distvgg; distvgg.load_config('debug'); distvgg.UserError;"
        " distvgg.read_metrics; print('torch' in sys.modules);"
        " print(all(hasattr(distvgg, name) for name in distvgg.__all__))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_every_public_function_says_what_it_takes_and_raises() -> None:
    assert dir(distvgg) == distvgg.__all__ == sorted(distvgg.__all__)
    for name in distvgg.__all__:
        value = getattr(distvgg, name)
        text = inspect.getdoc(value) or ""
        if inspect.isfunction(value):
            assert all(word in text for word in ("Args:", "Raises:")), name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'fit'"):
        _ = distvgg.fit


def test_metrics_are_ready_for_pandas_while_their_last_line_is_written(
    finished: Path, tmp_path: Path
) -> None:
    table = pd.DataFrame(distvgg.read_metrics(finished))
    assert table["step"].tolist() == [row["step"] for row in rows(finished)]
    assert table["train/loss"].dtype == table["val/top1"].dtype == float
    assert table["val/top1"].notna().sum() == 1
    running = tmp_path / "run"
    running.mkdir()
    with pytest.raises(distvgg.UserError, match=r"is not the folder of a run: it has no metrics"):
        distvgg.read_metrics(running)
    (running / "config.yaml").touch()
    assert distvgg.read_metrics(running) == []
    lines = '{"step": 1, "train/loss": null}\n{"step": 2, "train/loss": 4.5}\n{"step": 3, "tra'
    (running / "metrics.jsonl").write_text(lines)
    first, second = distvgg.read_metrics(str(running))
    assert math.isnan(first["train/loss"])
    assert second == {"step": 2, "train/loss": 4.5}


def test_a_training_is_not_changed_by_others_in_the_same_process(
    finished: Path, tmp_path: Path
) -> None:
    """Before it: one of another config, and its own first steps up to the stop file."""
    text = """
import pathlib, signal
import distvgg.preemption
other = config.replace(
    train__precision="bf16", train__cpu_threads=2, optim__name="muon", optim__ema_decay=0.9,
    model__depth=13, train__detect_anomaly=True, augment__trivial=True, eval__tta="flip"
)
print(distvgg.train(other, run_dir + "-other").precision)
stop = pathlib.Path(run_dir, "STOP")
stop.parent.mkdir()
stop.touch()
distvgg.preemption.LOOK_EVERY = 0.0
try:
    distvgg.train(config, run_dir)
except distvgg.preemption.Preempted as error:
    print(error)
result = distvgg.train(config, run_dir)
assert result == distvgg.train(config, run_dir)
print(result.precision, signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)
"""
    done = program(text, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "bf16" in lines
    assert any(line.startswith("STOP: stopped") for line in lines)
    assert lines[-1] == "no True"
    assert_same_run(tmp_path / "run", finished)


NOTEBOOK = """
from accelerate import notebook_launcher
notebook_launcher(distvgg.train, (config, run_dir), num_processes=2, use_port=PORT)
print(distvgg.train(config, run_dir).num_processes)
"""


def test_a_notebook_trains_on_two_processes_to_the_same_bits(
    finished: Path, tmp_path: Path, free_port: int
) -> None:
    """After it looked at another run, with the threads of several cores."""
    before = f"""
import numpy
distvgg.read_metrics({str(finished)!r})
distvgg.load({str(finished)!r}).classify(numpy.zeros((99, 99, 3), numpy.uint8))
"""
    text = before + NOTEBOOK.replace("PORT", f"'{free_port}'")
    done = program(text, tmp_path / "run", env={"OMP_NUM_THREADS": "2"})
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stdout
    assert done.stdout.splitlines()[-1] == "2"
    assert_same_run(tmp_path / "run", finished)


def test_a_notebook_that_has_trained_by_itself_is_told_to_restart(
    tmp_path: Path, free_port: int
) -> None:
    text = "distvgg.train(config, run_dir + '-before')" + NOTEBOOK.replace("PORT", f"'{free_port}'")
    done = program(text, tmp_path / "run")
    assert "Restart your notebook" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()

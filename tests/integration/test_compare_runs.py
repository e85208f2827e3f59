"""The table of runs that are finished or were stopped."""

import json
import re
from pathlib import Path

import pytest

from processes import Started, run, train

ARGS = ("--train.epochs", "3", "--checkpoint.every_steps", "4", "--track.every_steps", "2")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds that are finished, a third that was stopped."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in range(2):
        train(folder / f"seed{seed}", *ARGS, "--seed", str(seed))
    started = Started(folder / "seed2", *ARGS, "--seed", "2", log=folder / "log")
    started.until_step(4)
    started.process.terminate()
    assert started.end()[0] == 0
    return folder


def lines(text: str) -> dict[str, str]:
    """Lines by their first word."""
    return {line.split()[0]: line for line in text.splitlines() if line}


def test_real_runs_while_one_is_stopped(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "table.txt"
    folders = [str(runs / f"seed{s}") for s in range(3)]
    done = run(["compare", *folders, "--out", str(out)])
    assert done.returncode == 0, done.stderr
    assert out.read_text() == done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["table.txt"]
    header, *_ = done.stdout.splitlines()
    assert re.match(r"run +seed +val top1 +test top1 +best val top1 ", header)
    rows = lines(done.stdout)
    finished = [json.loads((runs / f"seed{s}" / "result.json").read_text()) for s in range(2)]
    for seed, numbers in enumerate(finished):
        val, test = (f"{100 * numbers[split]['top1']:.2f}%" for split in ("val", "test"))
        speed = f"{numbers['images_per_sec']:,.0f}"
        assert re.match(
            rf"seed{seed} +{seed} +{val} +{test} .* {speed} +finished$", rows[f"seed{seed}"]
        )
    # The step is the checkpoint's: rows come every second step only.
    step = max(int(p.name[5:]) for p in (runs / "seed2" / "checkpoints").iterdir())
    stopped = f"step {step}/{finished[0]['steps']} (stopped, to be started again)"
    assert rows["seed2"].endswith(stopped)
    assert rows["2"].startswith("2 of 3")

"""The table of run folders: arithmetic over seeds, every state of a folder."""

import json
import os
import re
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from distvgg.commands import compare as module
from distvgg.commands.compare import compare
from distvgg.config import Config
from distvgg.errors import UserError
from distvgg.runs.result import Result, save_result
from processes import ROOT


def made(
    folder: Path, val: float | None = None, test: float | None = None, **dotted: object
) -> Path:
    """A run folder by hand: finished where it has numbers, else just begun."""
    config = Config().replace(**dotted)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.to_yaml())
    if val is not None:
        save_result(result(config.seed, val, test), folder)
    return folder


def result(seed: int, val: float, test: float | None) -> Result:
    return Result(
        seed=seed,
        steps=282,
        epochs=8.0,
        train_size=9000,
        val={"top1": val, "count": 1000},
        best={"step": 282, "top1": val},
        test=None if test is None else {"top1": test, "count": 2000},
        images_per_sec=2440.4,
        num_processes=2,
        starts=[(0, 2)],
        precision="bf16",
        hardware="a GPU",
        data_fingerprint="data",
        versions={"torch": "2"},
        commit="c0ffee",
        curves=[],
    )


def lines(text: str) -> dict[str, str]:
    """Lines by their first word."""
    return {line.split()[0]: line for line in text.splitlines() if line}


def test_means_are_over_finished_seeds_and_validation_alone_ranks(tmp_path: Path) -> None:
    val, test = [0.7012, 0.7034, 0.7101], [0.6990, 0.7005, 0.7033]
    for seed in range(3):
        made(tmp_path / f"a{seed}", val[seed], test[seed], seed=seed, optim__lr=0.05)
    made(tmp_path / "a3", seed=3, optim__lr=0.05)
    made(tmp_path / "b0", 0.7, 0.99, seed=0)
    made(tmp_path / "b0-again", 0.7, 0.99, seed=0, track__name="again")
    made(tmp_path / "c0", seed=0, optim__lr=0.2)
    text = compare(sorted(tmp_path.iterdir(), reverse=True))
    table, groups, notes = text.split("\n\n")
    # What names a run is no column.
    assert re.match(r"run +optim\.lr +seed +val top1 ", table)
    order = [line.split()[0] for line in table.splitlines()[1:]]
    assert order == ["a0", "a1", "a2", "a3", "b0-again", "b0", "c0"]

    def spread(values: list[float]) -> str:
        percent = [100 * v for v in values]
        return f"{statistics.mean(percent):.2f} ± {statistics.stdev(percent):.2f}%"

    header, *rows = groups.splitlines()
    assert header.split()[:3] == ["optim.lr", "seeds", "finished"]
    assert [" ".join(row.split()) for row in rows] == [
        f"0.05 3 of 4 {spread(val)} {spread(test)} <- best",
        "0.1 1 of 1 70.00% 99.00%",
        "0.2 0 of 1 - -",
    ]
    assert spread(val) == "70.49 ± 0.46%"
    assert "Best mean val top1: optim.lr 0.05, over 3 seeds, 0.49 points ahead" in notes
    assert notes.endswith("of the next, over 1 seed.")


def test_a_sweep_without_repeated_seeds_is_ranked_and_says_what_it_rests_on(tmp_path: Path) -> None:
    for lr, val in ((0.05, 0.6), (0.1, 0.7)):
        made(tmp_path / f"lr{lr}" / "run", val, optim__lr=lr)
    table, notes = compare(sorted(tmp_path.glob("*/run"))).split("\n\n")
    # Folders of one name are told apart; there is no test split.
    assert re.match(r"lr0\.1/run +0\.1 +70\.00% +- +70\.00% +2,440 +finished", table.split("\n")[1])
    assert "over 1 seed, 10.00 points ahead of the next, over 1 seed; one seed each" in notes


def test_runs_of_different_data_are_not_ranked_and_few_fields_get_a_column(tmp_path: Path) -> None:
    made(tmp_path / "a", 0.6, data__name="cifar100")
    many = {"model__width": 0.5, "model__dropout": 0.1, "optim__lr": 0.3, "optim__momentum": 0.8}
    many |= {"train__epochs": 3, "train__label_smoothing": 0.1, "augment__cutout": 8}
    many |= {"optim__weight_decay": 0.001, "optim__nesterov": False, "seed": 4}
    made(tmp_path / "b", 0.7, data__name="cifar10", **many)
    table, notes = compare([tmp_path / "a", tmp_path / "b"]).split("\n\n")
    assert "The runs are of different data (cifar10, cifar100): none is the best." in notes
    assert "Best mean" not in notes
    columns = table.splitlines()[0].split()
    assert {"data.name", "model.width", "optim.lr", "train.epochs", "seed"} <= {*columns}
    assert sum("." in name for name in columns) == 8
    assert "Also different, without a column: " in notes


def test_test_neither_ranks_nor_stars_nor_parts_runs_that_read_it_from_those_that_did_not(
    tmp_path: Path,
) -> None:
    made(tmp_path / "a0", 0.71, seed=0, eval__test=False)
    made(tmp_path / "a1", 0.70, 0.10, seed=1)
    made(tmp_path / "b0", 0.69, 0.99, seed=0, optim__lr=0.05, eval__tta="flip")
    made(tmp_path / "b1", 0.68, 0.99, seed=1, optim__lr=0.05)
    table, groups, _ = compare(sorted(tmp_path.iterdir())).split("\n\n")
    assert [line.split()[0] for line in table.splitlines()] == ["run", "a0", "a1", "b0", "b1"]
    assert [" ".join(line.split()) for line in groups.splitlines()[1:]] == [
        "0.1 2 of 2 70.50 ± 0.71% - <- best",
        "0.05 2 of 2 68.50 ± 0.71% 99.00 ± 0.00%",
    ]


def test_every_state_is_a_row_and_none_ends_the_table(tmp_path: Path) -> None:
    made(tmp_path / "finished", 0.7, 0.7)
    made(tmp_path / "begun")
    dead = made(tmp_path / "killed", checkpoint__every_steps=None)
    rows = [
        {"step": 100, "epoch": 100 * 256 / 45_000, "train/loss": None},
        {"step": 176, "epoch": 176 * 256 / 45_000, "val/top1": 0.4},
    ]
    half = json.dumps(rows[0])[:-9].encode()
    content = b"".join(json.dumps(r).encode() + b"\n" for r in rows)
    (dead / "metrics.jsonl").write_bytes(content + b"\0\0\n[]\n" + half)
    os.utime(dead / "config.yaml", (0, 0))
    os.utime(dead / "metrics.jsonl", (1e9, 1e9))
    facts = {"step": 9, "what": "loss", "value": "nan", "micro_batch": 2, "samples": [1]}
    for name, micro_batch in (("failed", 2), ("failed-sum", None)):
        text = json.dumps(facts | {"micro_batch": micro_batch})
        (made(tmp_path / name) / "failure.json").write_text(text)
    (made(tmp_path / "failed-damaged") / "failure.json").write_text("{")
    (made(tmp_path / "stopped") / "REQUEUE").touch()
    for name, text in (
        ("cut", json.dumps(asdict(result(0, 0.7, 0.7)))[:99]),
        ("empty", "{}"),
        ("list", "[]"),
        ("no-top1", json.dumps(asdict(result(0, 0.7, 0.7)) | {"val": {}})),
    ):
        (made(tmp_path / name) / "result.json").write_text(text)
    (made(tmp_path / "unreadable") / "result.json").mkdir()
    (made(tmp_path / "no-rows") / "metrics.jsonl").mkdir()
    (made(tmp_path / "config") / "config.yaml").write_text("optim: {lr: -1}")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "file").touch()

    found = lines(compare(sorted(tmp_path.iterdir())).split("\n\n")[0])
    states = {name: re.split(r"  +", line, maxsplit=6)[-1] for name, line in found.items()}
    day = r"\d{4}-\d\d-\d\d \d\d:\d\d"
    assert re.fullmatch(rf"no step yet \(running or killed, last sign {day}\)", states["begun"])
    assert states["killed"].startswith("step 176/3516 (running or killed, last sign 2001-09-0")
    assert re.search(r" +- +- +40\.00% +176 +- +step", found["killed"])
    assert states["failed"] == "failed at step 9: loss of micro-batch 2 is nan"
    assert states["failed-sum"] == "failed at step 9: loss of the sum over micro-batches is nan"
    assert states["failed-damaged"] == "failed (failure.json is damaged)"
    assert states["stopped"] == "no step yet (stopped, to be started again)"
    for name in ("cut", "empty", "list", "no-top1"):
        assert states[name] == "result.json is damaged, or of another version"
    assert states["unreadable"] == states["no-rows"] == "cannot be read: Is a directory"
    assert (
        states["config"] == "config.yaml cannot be used: optim.lr must be greater than 0 (got -1)"
    )
    assert states["nothing"] == "no run here"
    assert states["file"] == "cannot be read: Not a directory"
    assert found["finished"].endswith("finished")


def test_of_two_that_write_at_once_none_leaves_a_table_that_lacks_a_finished_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = made(tmp_path / "s0", 0.7, 0.7), made(tmp_path / "s1", seed=1)
    out = tmp_path / "table.txt"
    out.write_text("of another task")
    write, writers = module.atomic_write, []

    def slow(path: Path, content: bytes, *, writer: str) -> None:
        if not writers:  # between this task's look and its writing, the other one ends
            save_result(result(1, 0.8, 0.8), second)
        writers.append(writer)
        write(path, content, writer=writer)

    monkeypatch.setattr(module, "atomic_write", slow)
    text = compare([first, second, out], out)
    assert out.read_text() == text + "\n"
    assert "2 of 2" in text
    assert "table.txt" not in text
    assert len(writers) == 2
    assert str(os.getpid()) in writers[0]


def test_mistakes(tmp_path: Path) -> None:
    folder = made(tmp_path / "run", 0.7)
    with pytest.raises(UserError, match=r"run folder .*nowhere does not exist"):
        compare([folder, tmp_path / "nowhere"])
    with pytest.raises(UserError, match=r"cannot write .* \(No such file or directory\)"):
        compare([folder], tmp_path / "nowhere" / "table.txt")
    with pytest.raises(UserError, match=r"result\.json belongs to a run: choose another place"):
        compare([folder], folder / "result.json")


def test_it_answers_at_once_and_imports_nothing_heavy(tmp_path: Path) -> None:
    folders = [str(made(tmp_path / f"s{s}", 0.7, 0.7, seed=s)) for s in range(9)]
    probe = (
        "import sys, time; t = time.process_time()\n"
        "import distvgg.cli\n"
        f"distvgg.cli.main(['compare', *{folders!r}])\n"
        "print(time.process_time() - t, *sorted({'torch', 'accelerate', 'numpy', 'wandb'}"
        " & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=True, cwd=ROOT
    )
    seconds, *heavy = done.stdout.splitlines()[-1].split()
    assert not heavy
    assert float(seconds) < 1

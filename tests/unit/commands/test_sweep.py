"""Sweeps over config fields: their syntax, and the command line of each task of a job array."""

from pathlib import Path

import pytest

from distvgg.commands.sweep import list_fields, parse, words_of_task
from distvgg.errors import UserError
from distvgg.recipe import load
from processes import run

FOLDER = Path("runs/sweep-7")


def values_of(words: list[str]) -> dict[str, str]:
    """The options among the words of `train`, by name."""
    return dict(word[2:].split("=", 1) for word in words if word.startswith("--") and "=" in word)


def test_combinations_change_the_last_field_fastest() -> None:
    sweep = parse("fast", {"train.epochs": "1"}, ["optim.lr=0.05,0.1", "seed=0,1,2"])
    assert len(sweep) == 6
    found = [values_of(sweep.words(n)) for n in range(6)]
    assert [(v["optim.lr"], v["seed"]) for v in found] == [
        (lr, seed) for lr in ("0.05", "0.1") for seed in "012"
    ]
    assert all(v["train.epochs"] == "1" for v in found)


def test_a_list_is_one_value() -> None:
    """An option whose value is a list is no sweep, and a sweep over lists has them in brackets."""
    assert "model.max_pools" in list_fields()
    fixed = parse("fast", {"model.max_pools": "1,2,4,5"}, [])
    assert len(fixed) == 1
    swept = parse("fast", {}, ["model.max_pools=[2,3,4,5],[1,2],[]"])
    pools = [load("fast", values_of(swept.words(n))).model.max_pools for n in range(len(swept))]
    assert pools == [(2, 3, 4, 5), (1, 2), ()]
    assert load("fast", values_of(fixed.words(0))).model.max_pools == (1, 2, 4, 5)
    tables = parse("fast", {}, ["model.layers=[64,M],[1x1-8],[]"])
    found = [load("fast", values_of(tables.words(n))).model for n in range(len(tables))]
    assert [model.layers for model in found] == [(64, "M"), ("1x1-8",), None]
    assert found[2] == load("fast").model


@pytest.mark.parametrize(
    ("options", "sweeps", "expected"),
    [
        ({}, ["optim.lr"], "expected FIELD=VALUE"),
        ({}, ["optim.lr=0.1,,0.2"], "values with commas between"),
        ({}, ["optim.lr=0.1", "optim.lr=0.2"], "given twice"),
        ({"seed": "1"}, ["seed=0,1"], "given twice"),
        ({}, ["optim.rate=0.1,0.2"], "unknown key optim.rate"),
        ({}, ["optim.lr=0.1,-1"], "optim.lr must be greater than 0"),
        ({}, ["model.max_pools=1,2,4,5"], "write each value in brackets"),
        ({}, ["optim.lr=[0.1],[0.2]"], "without brackets"),
        ({}, ["seed=0,0"], "a value is given twice"),
        ({"track.name": "a\nb"}, ["seed=0,1"], "a line break"),
        ({"optim.lr": "0.05,0.1"}, [], "for several values: --sweep optim.lr=..."),
    ],
)
def test_a_mistake_is_named_before_anything_is_trained(
    options: dict[str, str], sweeps: list[str], expected: str
) -> None:
    with pytest.raises(UserError) as error:
        parse("fast", options, sweeps)
    assert expected in str(error.value)


def test_a_task_trains_its_combination_in_a_folder_of_its_own() -> None:
    sweep = parse("fast", {}, ["seed=4,5"])
    words = words_of_task(sweep, 1, 2, FOLDER)
    assert words == ["fast", "--seed=5", "--run-dir", "runs/sweep-7/1"]
    with pytest.raises(UserError, match="task 2 of 2 combinations: set --array 0-1"):
        words_of_task(sweep, 2, 3, FOLDER)


def test_without_a_sweep_a_tasks_number_is_its_seed() -> None:
    plain = parse("fast", {}, [])
    assert values_of(words_of_task(plain, 3, 8, FOLDER))["seed"] == "3"
    seeded = parse("fast", {"seed": "9"}, [])
    assert values_of(words_of_task(seeded, 0, 1, FOLDER))["seed"] == "9"
    with pytest.raises(UserError, match="all 8 tasks would train the same run"):
        words_of_task(seeded, 3, 8, FOLDER)


def test_the_command_lists_combinations_or_prints_the_words_of_one() -> None:
    sweep = ("sweep", "debug", "--sweep", "optim.lr=0.05,0.1", "--sweep=seed=0,1")
    listed = run(sweep)
    assert listed.stdout.splitlines()[2] == "2  debug --optim.lr=0.1 --seed=0"
    one = run((*sweep, "--task", "3", "--tasks", "3", "--run-dir", "r"))
    assert one.stdout.split() == ["debug", "--optim.lr=0.1", "--seed=1", "--run-dir", "r/3"]
    assert "3 tasks leave some of 4 combinations out: --array 0-3 has all" in one.stderr

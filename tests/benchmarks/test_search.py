"""The search among recipes: pairs of seeds, what it does not read, how it goes on."""

from pathlib import Path

import pytest
import yaml

from benchmarks.search import Search, interval, search
from distvgg.errors import UserError
from distvgg.recipe import load
from distvgg.runs.result import read_result
from processes import TINY, run_module

PROXY = dict(zip([w[2:] for w in TINY[::2]], TINY[1::2], strict=True))


def plan(**changes: object) -> Search:
    return Search.model_validate(
        {
            "recipe": "quickstart",
            "proxy": PROXY,
            "seeds": [0, 1],
            "cases": {"sgd": {}, "lr-0.00001": {"optim.lr": 1e-5}},
        }
        | changes
    )


def test_the_interval_of_paired_gains_is_students() -> None:
    # By hand: mean 2, standard deviation 1, t of two degrees of freedom 4.303.
    assert interval([1.0, 2.0, 3.0]) == "-0.48 to +4.48"
    assert interval([0.5]) == "one seed"


def test_a_wrong_override_is_found_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"optim\.lr"):
        search(plan(cases={"sgd": {}, "typo": {"optim.lrr": 1}}), tmp_path / "out", None, 1)
    assert not (tmp_path / "out").exists()


@pytest.mark.variant
def test_cases_run_in_pairs_and_a_second_start_only_reads(tmp_path: Path) -> None:
    file, out = tmp_path / "search.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(plan().model_dump(), sort_keys=False))

    def table() -> list[list[str]]:
        printed = run_module("benchmarks.search", str(file), "--out", str(out), "--jobs", "2")
        return [[c.strip() for c in row.split("|")[1:-1]] for row in printed.splitlines()]

    first = table()
    header, _, baseline, slow = first
    assert header[1] == "val top-1, seeds 0 1"
    accuracies = {}
    for name in ("sgd", "lr-0.00001"):
        for seed in (0, 1):
            folder = out / f"{name}-seed{seed}"
            result, config = read_result(folder), load(str(folder / "config.yaml"))
            assert result is not None
            assert (out / f"{name}-seed{seed}.log").exists()
            assert (result.test, config.seed) == (None, seed)
            accuracies[name, seed] = 100 * result.val["top1"]
    assert baseline[1] == f"{accuracies['sgd', 0]:.2f} {accuracies['sgd', 1]:.2f}"
    gain = sum(accuracies["lr-0.00001", s] - accuracies["sgd", s] for s in (0, 1)) / 2
    assert slow[3] == f"{gain:+.2f}"
    assert table() == first

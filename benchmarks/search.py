"""A search among recipes: cases beside a baseline on a proxy, in pairs of the same seed.

    python -m benchmarks.search docs/search/start.yaml --data.path FOLDER --out runs/search

A search file names a recipe, what the proxy changes of it, seeds, and cases, the first of which is
the baseline. Invariant: test is never read; two cases are compared by their differences at the same
seed, which share the order of samples and all draws; a search that is started again goes on.
"""

import argparse
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, Field

from distvgg import metrics
from distvgg.commands.text_tables import markdown_table
from distvgg.recipe import load
from distvgg.runs.result import Result, read_result

Overrides = dict[str, Any]
# Student's t at 97.5% for 1, 2, ... degrees of freedom; the last serves beyond, a little wide.
_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


class Search(BaseModel, extra="forbid"):
    """What a search file says; overrides by dotted names, as on the command line."""

    recipe: str
    proxy: Overrides = {}
    seeds: list[int] = Field(min_length=1)
    cases: dict[str, Overrides] = Field(min_length=2)


def search(plan: Search, out: Path, data: str | None, jobs: int) -> str:
    """Runs what is not finished, seed by seed, and returns the table of what is.

    Raises:
        UserError: an override is wrong.
        SystemExit: a run failed.
    """
    fixed = {"eval.test": False, "track.wandb": False} | ({"data.path": data} if data else {})
    runs = {
        (name, seed): plan.proxy | case | fixed | {"seed": seed}
        for seed in plan.seeds
        for name, case in plan.cases.items()
    }
    for overrides in runs.values():
        load(plan.recipe, overrides)  # all mistakes before the first hour
    with ThreadPoolExecutor(jobs) as pool:
        futures = {
            key: pool.submit(_train, plan.recipe, overrides, _folder(out, *key), jobs)
            for key, overrides in runs.items()
        }
    return summary(plan, {key: future.result() for key, future in futures.items()})


def _folder(out: Path, name: str, seed: int) -> Path:
    return out / f"{name}-seed{seed}"


def _log(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")  # the name of a case may have a dot in it


def _train(recipe: str, overrides: Overrides, folder: Path, jobs: int) -> Result:
    words = [
        w
        for k, v in overrides.items()
        for w in (f"--{k}", str(v).lower() if isinstance(v, bool) else str(v))
    ]
    folder.parent.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with _log(folder).open("w") as log:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "distvgg", "train", recipe, "--run-dir", str(folder)),
                *("--train.cpu_threads", str(threads), *words),
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    result = read_result(folder) if done.returncode == 0 else None
    if result is None:
        raise SystemExit(f"{folder} failed: see {_log(folder)}")
    print(f"{folder.name}  {metrics.describe(result.val)}", file=sys.stderr, flush=True)
    return result


def summary(plan: Search, results: dict[tuple[str, int], Result]) -> str:
    """Returns a table with a row for each case.

    A row has validation top-1 over seeds, and the difference to the baseline at the same seeds with
    its 95% interval (Student's t).
    """
    baseline = next(iter(plan.cases))
    rows = []
    for name in plan.cases:
        val = [100 * results[name, seed].val[metrics.TOP1] for seed in plan.seeds]
        beside = [100 * results[baseline, seed].val[metrics.TOP1] for seed in plan.seeds]
        gains = [a - b for a, b in zip(val, beside, strict=True)]
        speeds = [s for seed in plan.seeds if (s := results[name, seed].images_per_sec)]
        cells = (
            ["", ""] if name == baseline else [f"{statistics.mean(gains):+.2f}", interval(gains)]
        )
        rows.append(
            [
                name,
                " ".join(f"{v:.2f}" for v in val),
                f"{statistics.mean(val):.2f}",
                *cells,
                f"{statistics.median(speeds):,.0f}" if speeds else "",
            ]
        )
    seeds = " ".join(map(str, plan.seeds))
    header = ["case", f"val top-1, seeds {seeds}", "mean", "gain", "95% interval", "images/s"]
    return markdown_table(header, rows)


def interval(values: Sequence[float]) -> str:
    """The 95% interval of a mean, and what there is to say of a single value."""
    n = len(values)
    if n == 1:
        return "one seed"
    t = _T[min(n - 2, len(_T) - 1)]
    mean, half = statistics.mean(values), t * statistics.stdev(values) / math.sqrt(n)
    return f"{mean - half:+.2f} to {mean + half:+.2f}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("search", type=Path, help="a search file (YAML)")
    parser.add_argument("--data.path", dest="data", metavar="FOLDER")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at a time, on a share of the cores"
    )
    options = parser.parse_args()
    plan = Search.model_validate(yaml.safe_load(options.search.read_text()))
    print(search(plan, options.out, options.data, options.jobs))


if __name__ == "__main__":
    main()

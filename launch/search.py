"""Searches for hyperparameters without a server: Optuna, with a median pruner over validations.

    python launch/search.py [launch/sweep.yaml] [--trials N] [--dir DIR] [--section.field VALUE ...]

Reads the recipe, the parameters and the metric of a W&B sweep file. Each trial is a process
`distvgg train` in a run folder of its own, DIR/NUMBER. A trial that is worse than the median of the
trials before it, at the same step, is stopped with a checkpoint. The same command continues a
search, and several at once, on machines that share DIR, share its trials.

Invariant: a search reads validation only, from metrics.jsonl. The search file DIR/search.log and
the run folders alone say what was tried.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from distvgg.commands.arguments import Parser, overrides
from distvgg.config import Config
from distvgg.errors import UserError
from distvgg.recipe import load
from distvgg.runs.layout import RESULT_FILE, STOP_FILE
from distvgg.runs.metrics_file import read_rows

try:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import Trial, TrialState
except ModuleNotFoundError:
    sys.exit("distvgg: error: a search needs Optuna: pip install optuna")

ROOT = Path(__file__).resolve().parent.parent
POLL_SECONDS = 0.5
# The W&B distributions that have their like in Optuna.
DISTRIBUTIONS = ("uniform", "log_uniform_values", "int_uniform", "categorical", "constant")


class Search:
    """The search that a sweep file describes, and the options of all its trials.

    Raises:
        UserError: no such file, a distribution that is unknown, or a value that the config rejects.
    """

    def __init__(self, file: Path, options: dict[str, str]) -> None:
        try:
            sweep = yaml.safe_load(file.read_text())
            words = [str(word) for word in sweep["command"]]
            self.recipe = words[words.index("train") + 1]
            self.metric = str(sweep["metric"]["name"])
            goal = optuna.study.StudyDirection[sweep["metric"].get("goal", "minimize").upper()]
            self.parameters: dict[str, dict[str, Any]] = sweep["parameters"]
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror}") from error
        except (yaml.YAMLError, KeyError, ValueError, IndexError, TypeError) as error:
            raise UserError(
                f"{file}: not a sweep file such as launch/sweep.yaml ({error})"
            ) from error
        self.direction, self.options = goal, options
        self.parameters = {n: p for n, p in self.parameters.items() if n not in options}
        for name, parameter in self.parameters.items():
            if parameter.get("distribution", "uniform") not in DISTRIBUTIONS:
                wanted = ", ".join(DISTRIBUTIONS)
                raise UserError(f"{file}: {name}: expected a distribution of {wanted}")
            for value in _ends(parameter):
                load(self.recipe, options | {name: value})

    def values(self, trial: Trial) -> dict[str, str]:
        """Draws a value for each parameter; returns all options of the trial as text."""
        drawn = {name: _draw(trial, name, given) for name, given in self.parameters.items()}
        return {name: str(value) for name, value in drawn.items()} | self.options


def _ends(parameter: dict[str, Any]) -> list[Any]:
    """Returns all values of a parameter, or its least and its greatest."""
    if "values" in parameter:
        return list(parameter["values"])
    return [parameter[name] for name in ("value", "min", "max") if name in parameter]


def _draw(trial: Trial, name: str, parameter: dict[str, Any]) -> Any:
    if "value" in parameter:
        return parameter["value"]
    if "values" in parameter:
        return trial.suggest_categorical(name, parameter["values"])
    low, high = parameter["min"], parameter["max"]
    if isinstance(low, int) and isinstance(high, int):
        return trial.suggest_int(name, low, high)
    log = parameter.get("distribution") == "log_uniform_values"
    return trial.suggest_float(name, low, high, log=log)


def main(words: Sequence[str]) -> int:
    """Runs or continues a search; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("file", type=Path, nargs="?", default=ROOT / "launch" / "sweep.yaml")
    parser.add_argument("--trials", type=int, default=20, help="of this command; default: 20")
    parser.add_argument("--dir", type=Path, default=Path("runs/search"), help="all that it keeps")
    parser.add_argument("--seed", type=int, help="of Optuna's choices; default: another each time")
    parser.add_argument(
        "--startup", type=int, default=5, help="trials before the first may be pruned; default: 5"
    )
    options, rest = parser.parse_known_args(words)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        search = Search(options.file, _config_options(rest))
        options.dir.mkdir(parents=True, exist_ok=True)
        study = optuna.create_study(
            study_name=str(options.file.stem),
            storage=JournalStorage(JournalFileBackend(str(options.dir / "search.log"))),
            load_if_exists=True,
            direction=search.direction,
            sampler=optuna.samplers.TPESampler(seed=options.seed),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=options.startup),
        )
        for _ in range(options.trials):
            run_trial(study, search, options.dir)
    except UserError as error:
        print(f"distvgg: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return 130
    report(study, search)
    return 0


def _config_options(words: Sequence[str]) -> dict[str, str]:
    """Returns the config fields on a command line, as text by dotted name."""
    parser = Parser("train", "")
    parser.add_config_options(Config())
    return overrides(parser.parse(words))


def run_trial(study: optuna.Study, search: Search, folder: Path) -> None:
    """Trains one trial to its end, or until it is pruned, and tells the study.

    Raises:
        UserError: the training refuses its options.
        KeyboardInterrupt: the search is stopped. The trial is queued again, in its run folder.
    """
    trial = study.ask()
    run_dir = Path(trial.user_attrs.get("run_dir", folder / str(trial.number)))
    values = search.values(trial)
    words = [search.recipe, *(f"--{name}={value}" for name, value in values.items())]
    print(f"trial {trial.number}: {json.dumps(trial.params)}, into {run_dir}", flush=True)
    state, value = TrialState.FAIL, None
    try:
        state, value = train(trial, words, run_dir, search)
    except KeyboardInterrupt:
        study.enqueue_trial(trial.params, user_attrs={"run_dir": str(run_dir)})
        raise
    finally:
        study.tell(trial, value if state == TrialState.COMPLETE else None, state)
    shown = "" if value is None else f", {search.metric} {value:.4f}"
    print(f"trial {trial.number}: {state.name.lower()}{shown}", flush=True)


def train(
    trial: Trial, words: Sequence[str], run_dir: Path, search: Search
) -> tuple[TrialState, float | None]:
    """Trains into a run folder and reports each validation.

    Returns:
        How the trial ended, and the last value of the metric.

    Raises:
        UserError: the training refuses its options.
    """
    log = run_dir.with_name(f"{run_dir.name}.log")
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    with log.open("a") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "distvgg", "train", *words, "--run-dir", str(run_dir)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches this program, which stops the training
        )
    reported: dict[int, float] = {}
    pruned = False
    try:
        ended = False
        while not ended:
            ended = process.poll() is not None  # before the rows are read, so that none is missed
            for row in read_rows(run_dir / "metrics.jsonl"):
                value, step = row.get(search.metric), row["step"]
                if value is None or step in reported:
                    continue
                reported[step] = value
                trial.report(value, step)
                if not ended and not pruned and trial.should_prune():
                    pruned = True
                    (run_dir / STOP_FILE).touch()
            if not ended:
                time.sleep(POLL_SECONDS)
    finally:
        if process.poll() is None:
            process.terminate()  # it saves a checkpoint
            process.wait()
    last = list(reported.values())[-1] if reported else None
    if process.returncode == 2:
        raise UserError(log.read_text().strip().splitlines()[-1].removeprefix("distvgg: error: "))
    if (run_dir / RESULT_FILE).exists() and last is not None:
        return TrialState.COMPLETE, last
    if pruned:
        return TrialState.PRUNED, last
    print(f"trial {trial.number}: exit code {process.returncode}; see {log}", flush=True)
    return TrialState.FAIL, last


def report(study: optuna.Study, search: Search) -> None:
    """Prints how many trials ended how, and the best with its command."""
    counts = {state.name.lower(): 0 for state in (TrialState.COMPLETE, TrialState.PRUNED)}
    for trial in study.trials:
        counts[trial.state.name.lower()] = counts.get(trial.state.name.lower(), 0) + 1
    print(", ".join(f"{n} {state}" for state, n in counts.items()))
    if not counts["complete"]:
        return
    best = study.best_trial
    fixed = {n: p["value"] for n, p in search.parameters.items() if "value" in p}
    fixed.pop("eval.test", None)  # once the search is over, test may be read
    values = fixed | best.params | search.options
    words = [f"--{name}={value}" for name, value in values.items()]
    print(f"best: trial {best.number}, {search.metric} {best.value:.4f}")
    print(f"  python -m distvgg train {search.recipe} {' '.join(words)}")


if __name__ == "__main__":
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sys.exit(main(sys.argv[1:]))

"""The command line: parses words, builds the config and calls a command; contains no logic.

tyro generates the help from the typed signatures below. Options are merged over the recipe and
validated by pydantic in one place (`config.load`). A recipe and a command line therefore give the
same message for the same mistake. Invariant: nothing heavy is imported before it is needed, and a
user error is one line on the main process and exit code 2.
"""

import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import tyro

from distvgg import __version__, environment, preemption
from distvgg.commands.arguments import default_run_dir, one_recipe, resolve, split_options
from distvgg.commands.bench_options import BenchOptions, read_options
from distvgg.config import Config, SplitName, load, recipe_names
from distvgg.errors import PeerLostError, RunError, UserError

SPLITS: dict[str, SplitName] = {split: split for split in get_args(SplitName)}

USAGE = """\
usage: distvgg COMMAND ...

  train RECIPE [--run-dir DIR] [--section.field VALUE ...]   again: resumes, or shows the result
  evaluate RUN_DIR [--split test|val|train]                  its weights, or a checkpoint's
  compare RUN_DIR... [--out FILE]                            runs as one table, seeds averaged
  config RECIPE [--section.field VALUE ...]                  the whole config as YAML
  doctor [RECIPE] [--prepare] [as train]                     what works here, and what to fix
  sweep RECIPE --sweep FIELD=VALUE,VALUE ... [as train]      combinations of values, for a job array
  bench [RECIPE] [--json] [--gpu h100] [as train]            what to expect of 1 to 1,024 GPUs

Over several processes:
  accelerate launch --config_file accelerate_config.yaml --num_processes N -m distvgg train ...
Recipes: {recipes}; every field with its meaning: distvgg train RECIPE --help"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command of the command line and returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["launch"]:
        of_train = words[words.index("--") + 1 :] if "--" in words else []
        if not {"-h", "--help"} & set(of_train):
            from distvgg.commands import launch

            return launch.main(words[1:])
        words = ["train", *of_train]
    environment.clear()  # before a command loads torch
    if words[:1] == ["--version"]:
        print(f"distvgg {__version__}")
        return 0
    if not words or words[0] in ("-h", "--help"):
        print(USAGE.format(recipes=", ".join(recipe_names())))
        return 0 if words else 2
    commands: dict[str, Callable[[list[str]], str]] = {
        "train": _train,
        "evaluate": _evaluate,
        "compare": _compare,
        "config": _config,
        "doctor": _doctor,
        "sweep": _sweep,
        "bench": _bench,
    }
    if words[0] == "train":
        preemption.install()
    try:
        if words[0] not in commands:
            raise UserError(f"no command {words[0]!r}: give one of {', '.join(commands)}")
        text, code = commands[words[0]](words[1:]), 0
    except UserError as error:
        _complain(error)
        return 2
    except RunError as error:
        _complain(error, at_once=isinstance(error, PeerLostError))
        return 1
    except preemption.Preempted as stop:
        preemption.ignore()
        text, code = str(stop), 130 if stop.interrupted else 0
    except KeyboardInterrupt:
        return 130
    if environment.rank() == 0:
        try:
            print(text, flush=True)
        except BrokenPipeError:  # `| head` closed the pipe; at exit Python would flush again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def _train(words: list[str]) -> str:
    positional, options = split_options(words)
    if "help" in options:
        # The help shows the values of the recipe as defaults.
        _help(functools.partial(train, config=load(positional[0]) if positional else Config()))
    return train(*resolve(words))


def _config(words: list[str]) -> str:
    return resolve(words)[1].to_yaml().rstrip()


def _doctor(words: list[str]) -> str:
    positional, options = split_options([w for w in words if w != "--prepare"])
    if "help" in options:
        _help(functools.partial(doctor, load(positional[0]) if positional else Config()))
    run_dir, prepare = options.pop("run_dir", None), "--prepare" in words
    alone = not (positional or options or prepare)
    recipe = None if alone else one_recipe(positional)
    config = Config() if recipe is None else load(recipe, options)
    return doctor(config, recipe, Path(run_dir) if run_dir else None, prepare)


def _bench(words: list[str]) -> str:
    positional, options = split_options([w for w in words if w != "--json"])
    recipe = one_recipe(positional or ["fast"])
    if "help" in options:
        _help(functools.partial(bench, config=load(recipe), options=BenchOptions()))
    of_config = {name for name in options if "." in name or name in Config.model_fields}
    config = load(recipe, {name: options.pop(name) for name in of_config})
    return bench(config, read_options(options), recipe, "--json" in words)


def _sweep(words: list[str]) -> str:
    sweeps, rest = [], []
    remaining = iter(words)
    for word in remaining:
        if word == "--sweep":
            sweeps.append(next(remaining, ""))
        elif word.startswith("--sweep="):
            sweeps.append(word.removeprefix("--sweep="))
        else:
            rest.append(word)
    positional, options = split_options(rest)
    if "help" in options:
        _help(sweep)
    task, tasks = (_number(options, name) for name in ("task", "tasks"))
    run_dir = Path(options.pop("run_dir", "runs/sweep"))
    return sweep(one_recipe(positional), sweeps, options, task, tasks, run_dir)


def _number(options: dict[str, str], name: str) -> int | None:
    value = options.pop(name, None)
    if value is not None and not value.isdecimal():
        raise UserError(f"--{name} {value}: expected a whole number")
    return None if value is None else int(value)


def _evaluate(words: list[str]) -> str:
    positional, options = split_options(words)
    if "help" in options:
        _help(evaluate)
    split = options.pop("split", "test")
    if len(positional) != 1 or options or split not in SPLITS:
        raise UserError(
            "give one run folder or checkpoint: distvgg evaluate RUN_DIR [--split test|val|train]"
        )
    return evaluate(Path(positional[0]), SPLITS[split])


def _compare(words: list[str]) -> str:
    positional, options = split_options(words)
    if "help" in options:
        _help(compare)
    out = options.pop("out", None)
    if not positional or options or out == "":
        raise UserError("give run folders: distvgg compare RUN_DIR... [--out FILE]")
    return compare([Path(p) for p in positional], None if out is None else Path(out))


def train(
    recipe: Annotated[str, tyro.conf.Positional],
    config: Annotated[Config, tyro.conf.arg(name="")],
    run_dir: Path | None = None,
) -> str:
    """Trains a recipe, or resumes its run.

    The same command again resumes an interrupted run, to the same curve, and shows the result of a
    finished run. SIGTERM, SIGUSR1, SIGUSR2, Ctrl-C or a file STOP in the run folder stop a run
    after the step, with a checkpoint.

    Args:
        recipe: name of a packaged recipe, or path of a YAML file, such as the config.yaml of a run.
        config: config of the run.
        run_dir: folder of the run. None: a folder in runs/, named after the recipe and its values.
    """
    from distvgg.training.trainer import train

    return train(config, run_dir or default_run_dir(recipe, config)).text()


def evaluate(run_dir: Annotated[Path, tyro.conf.Positional], split: SplitName = "test") -> str:
    """Evaluates the weights of a finished run or of a checkpoint.

    The output also lists the most frequently confused classes.

    Args:
        run_dir: folder of the run, or one of its checkpoints/step_*.
        split: test, only for the final weights of a finished run; val, the images held out of
            train; or train, the images trained on, without augmentation.
    """
    from distvgg.commands.evaluate import evaluate_run

    return evaluate_run(run_dir, split)


def compare(run_dirs: Annotated[list[Path], tyro.conf.Positional], out: Path | None = None) -> str:
    """Compares runs in one table.

    The table has the config fields that differ, accuracies, throughput and state, with mean and
    standard deviation over runs that differ only in their seed. The command works at any time, also
    during runs.

    Args:
        run_dirs: folders of runs.
        out: also write the table to this file.
    """
    from distvgg.commands.compare import compare

    return compare(run_dirs, out)


def doctor(
    config: Annotated[Config, tyro.conf.arg(name="")],
    recipe: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[RECIPE]")] = None,
    run_dir: Path | None = None,
    prepare: Annotated[bool, tyro.conf.Suppress] = False,
) -> str:
    """Checks this machine and, with a recipe, the run that `train` would start with the same words.

    The checks cover devices, precision, processes, data, disk and trackers. Each prints a line: ok,
    note, or fix with what to do. The exit code is 1 if there is something to fix. `--prepare`
    (without a value) also decodes the data of the recipe into the cache, for machines without a
    network that see the same DISTVGG_CACHE.

    Args:
        config: config of the run.
        recipe: recipe of the run, as for train. None: check the machine only.
        run_dir: folder of the run, as for train.
        prepare: decode the data of the recipe into the cache.
    """
    if environment.rank():
        return ""  # the main process checks for all processes
    from distvgg.commands.doctor import run_checks

    folder = run_dir or (Path("runs") if recipe is None else default_run_dir(recipe, config))
    return run_checks(None if recipe is None else config, folder, prepare=prepare)


def sweep(
    recipe: Annotated[str, tyro.conf.Positional],
    sweep: list[str],
    options: Annotated[dict[str, str] | None, tyro.conf.Suppress] = None,
    task: int | None = None,
    tasks: int | None = None,
    run_dir: Path = Path("runs/sweep"),
) -> str:
    """Checks a sweep and lists its combinations, or prints the command line of one combination.

    The command line has one word per line. Further options of the form --section.field VALUE hold
    for all combinations. launch/slurm_array.sbatch trains the combinations.

    Args:
        recipe: recipe of all runs, as for train.
        sweep: FIELD=VALUE,VALUE,... The option can be repeated: all combinations are run, and the
            last field changes fastest. Each value of a list field is in brackets, as in
            'model.max_pools=[2,3],[1,2,3]'.
        options: dotted field name -> value, for all combinations.
        task: number of one combination; without --sweep, the seed.
        tasks: size of the job array.
        run_dir: folder of all runs. Each run has a subfolder, named by its number.
    """
    from distvgg.commands.sweep import parse, words_of_task

    found = parse(recipe, options or {}, sweep)
    if tasks is not None and tasks < len(found):
        last = len(found) - 1
        note = f"note: {tasks} tasks leave some of {len(found)} combinations out: --array 0-{last}"
        print(f"distvgg: {note} has all", file=sys.stderr, flush=True)
    if task is not None:
        return "\n".join(words_of_task(found, task, tasks or len(found), run_dir))
    return "\n".join(f"{n}  {' '.join(found.words(n))}" for n in range(len(found)))


def bench(
    config: Annotated[Config, tyro.conf.arg(name="")],
    options: Annotated[BenchOptions, tyro.conf.arg(name="")],
    recipe: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[RECIPE]")] = "fast",
    json: Annotated[bool, tyro.conf.Suppress] = False,
) -> str:
    """Predicts step time, throughput and efficiency on 1 to 1,024 GPUs from the speed of one GPU.

    That speed is measured here, in about ten seconds of real steps on synthetic images, or given by
    `--images_per_sec` or `--gpu`. Links are assumed to be those of `--gpu`, or of an H100, unless
    given. `--json` (without a value) prints the curves as JSON. The model is described in
    distvgg/distributed/cost_model.py.
    """
    from distvgg.commands.bench import bench

    return bench(config, recipe, options, as_json=json)


def _help(command: Callable[..., Any]) -> None:
    """Prints the help that tyro generates from a command's signature, and exits."""
    tyro.cli(
        command,
        prog=f"distvgg {getattr(command, 'func', command).__name__}",
        args=["--help"],
        use_underscores=True,
        config=(tyro.conf.FlagConversionOff,),
    )


def _complain(error: Exception, *, at_once: bool = False) -> None:
    """Prints an error once, over all processes.

    All processes usually find the same error. The main process then prints it, and the launcher
    ends the other processes. A process that still exists after 30 seconds has found its own error
    and prints it. A process that lost its peers prints the error immediately (`at_once`).
    """
    if rank := environment.rank():
        if not at_once and preemption.wait(30):
            return
        print(f"distvgg: error on process {rank}: {error}", file=sys.stderr, flush=True)
    else:
        print(f"distvgg: error: {error}", file=sys.stderr, flush=True)

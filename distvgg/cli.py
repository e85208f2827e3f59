"""The command line: parses words and calls a command; contains no logic.

Invariant: nothing heavy is imported before it is needed, and a user error is one line on the main
process and exit code 2.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

from distvgg import __version__, environment, preemption
from distvgg.commands.arguments import (
    RECIPE_HELP,
    RUN_USAGE,
    Parser,
    add_model_options,
    add_run_options,
    asks_for_help,
    config_to_show,
    default_run_dir,
    one_recipe,
    overrides,
    resolve,
    train_parser,
    validated,
)
from distvgg.commands.bench_options import BenchOptions
from distvgg.config import Config, SplitName, load, recipe_names
from distvgg.errors import PeerLostError, RunError, UserError

USAGE = """\
usage: distvgg COMMAND ...

  train RECIPE [--run-dir DIR] [--section.field VALUE ...]   run again: resumes, or shows the result
  evaluate RUN_DIR [--split test|val|train]                  its weights, or a checkpoint's
  compare RUN_DIR... [--out FILE]                            runs as one table, seeds averaged
  curves RUN_DIR... --out FILE                               their curves in one picture
  tables RUN_DIR...                                          results over seeds, as Markdown
  config RECIPE [--section.field VALUE ...]                  the whole config as YAML
  doctor [RECIPE] [--prepare] [as train]                     what works here, and what to fix
  sweep RECIPE --sweep FIELD=VALUE,VALUE ... [as train]      combinations of values, for a job array
  bench [RECIPE] [--json] [--gpu h100] [as train]            what to expect of 1 to 1,024 GPUs
  launch [--processes N ...] -- RECIPE ... [as train]        one node's processes, as the scripts do

Over several processes:
  accelerate launch --config_file accelerate_config.yaml --num_processes N -m distvgg train ...
Recipes: {recipes}
Options: distvgg COMMAND --help; with the values of a recipe: distvgg train RECIPE --help"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command of the command line and returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["launch"]:
        of_train = words[words.index("--") + 1 :] if "--" in words else []
        if not asks_for_help(of_train):
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
        "train": train,
        "evaluate": evaluate,
        "compare": compare,
        "curves": curves,
        "tables": tables,
        "config": config,
        "doctor": doctor,
        "sweep": sweep,
        "bench": bench,
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


def train(words: list[str]) -> str:
    """Runs `distvgg train`."""
    if asks_for_help(words):
        return train_parser(config_to_show(words)).format_help().rstrip()
    _, resolved, run_dir = resolve(words)
    from distvgg.training.trainer import train

    return train(resolved, run_dir).text()


def config(words: list[str]) -> str:
    """Runs `distvgg config`."""
    if asks_for_help(words):
        text = "Prints the whole config of a recipe as YAML, which is itself a recipe."
        parser = Parser("config", text, RUN_USAGE)
        add_run_options(parser, config_to_show(words))
        return parser.format_help().rstrip()
    return resolve(words)[1].to_yaml().rstrip()


def evaluate(words: list[str]) -> str:
    """Runs `distvgg evaluate`."""
    parser = Parser(
        "evaluate",
        """Evaluates the weights of a finished run or of a checkpoint.

The output also lists the most frequently confused classes.""",
    )
    parser.add_argument(
        "run_dir",
        metavar="RUN_DIR",
        type=Path,
        help="folder of the run, or one of its checkpoints/step_*",
    )
    parser.add_argument(
        "--split",
        choices=get_args(SplitName),
        default="test",
        help="test, only for the final weights of a finished run; val, the images held out of"
        " train; or train, the images trained on, without augmentation (default: test)",
    )
    if asks_for_help(words):
        return parser.format_help().rstrip()
    options = parser.parse(words)
    from distvgg.commands.evaluate import evaluate_run

    return evaluate_run(options.run_dir, options.split)


def compare(words: list[str]) -> str:
    """Runs `distvgg compare`."""
    parser = Parser(
        "compare",
        """Compares runs in one table.

The table has the config fields that differ, accuracies, throughput and state, with mean and
standard deviation over runs that differ only in their seed. The command works at any time, also
during runs.""",
    )
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", type=Path, help="folders of runs")
    parser.add_argument(
        "--out", metavar="FILE", type=_file, help="also write the table to this file"
    )
    if asks_for_help(words):
        return parser.format_help().rstrip()
    options = parser.parse(words)
    from distvgg.commands.compare import compare

    return compare(options.run_dirs, options.out)


def curves(words: list[str]) -> str:
    """Runs `distvgg curves`."""
    parser = Parser("curves", "Draws loss, accuracy, learning rate and throughput of runs.")
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", type=Path, help="folders of runs")
    parser.add_argument(
        "--out",
        metavar="FILE",
        type=_file,
        default=Path("curves.svg"),
        help="file to write; its ending says the format (default: curves.svg)",
    )
    if asks_for_help(words):
        return parser.format_help().rstrip()
    options = parser.parse(words)
    from distvgg.commands.curves import draw

    return draw(options.run_dirs, options.out)


def tables(words: list[str]) -> str:
    """Runs `distvgg tables`."""
    parser = Parser(
        "tables",
        """Prints accuracies, costs and confusions of finished runs as Markdown.

Several folders must hold runs whose configs differ only in the seed.""",
    )
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", type=Path, help="folders of runs")
    if asks_for_help(words):
        return parser.format_help().rstrip()
    options = parser.parse(words)
    from distvgg.commands.tables import tables

    return tables(options.run_dirs)


def doctor(words: list[str]) -> str:
    """Runs `distvgg doctor`."""
    parser = Parser(
        "doctor",
        """Checks this machine and, with a recipe, the run that `train` would start.

The checks cover devices, precision, processes, data, disk and trackers. Each prints a line: ok,
note, or fix with what to do. The exit code is 1 if there is something to fix.""",
        usage=f"[{RUN_USAGE}] [--prepare]",
    )
    parser.add_argument(
        "--prepare",
        action="store_true",
        help="also decode the data of the recipe into the cache, for machines without a network"
        " that see the same DISTVGG_CACHE",
    )
    add_run_options(parser, config_to_show(words) if asks_for_help(words) else Config())
    if asks_for_help(words):
        return parser.format_help().rstrip()
    options = parser.parse(words)
    changed = overrides(options)
    recipe, checked = None, Config()
    if options.recipe or changed or options.prepare or options.run_dir:
        recipe = one_recipe(options.recipe)
        checked = load(recipe, changed)
    if environment.rank():
        return ""  # the main process checks for all processes
    from distvgg.commands.doctor import run_checks

    run_dir = options.run_dir or (recipe and default_run_dir(recipe, checked)) or "runs"
    config = None if recipe is None else checked
    return run_checks(config, Path(run_dir), prepare=options.prepare)


def sweep(words: list[str]) -> str:
    """Runs `distvgg sweep`."""
    parser = Parser(
        "sweep",
        """Checks a sweep and lists its combinations, or prints the command line of one combination.

The command line has one word per line. launch/slurm_array.sbatch trains the combinations. Config
options hold for all of them.""",
        usage=f"{RUN_USAGE} --sweep FIELD=VALUE,... [--task N --tasks N]",
    )
    parser.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="FIELD=VALUE,VALUE,...",
        help="values of a field; repeatable: all combinations are run, and the last field changes"
        " fastest. Each value of a list field is in brackets: 'model.max_pools=[2,3],[1,2,3]'",
    )
    parser.add_argument(
        "--task",
        type=int,
        metavar="INT",
        help="number of one combination; without --sweep, the seed",
    )
    parser.add_argument("--tasks", type=int, metavar="INT", help="size of the job array")
    add_run_options(parser, config_to_show(words) if asks_for_help(words) else Config())
    if asks_for_help(words):
        return parser.format_help().rstrip()
    options = parser.parse(words)
    from distvgg.commands.sweep import parse, words_of_task

    found = parse(one_recipe(options.recipe), overrides(options), options.sweep)
    if options.tasks is not None and options.tasks < len(found):
        print(
            f"distvgg: note: {options.tasks} tasks leave some of {len(found)} combinations out:"
            f" --array 0-{len(found) - 1} has all",
            file=sys.stderr,
            flush=True,
        )
    if options.task is None:
        return "\n".join(f"{n}  {' '.join(found.words(n))}" for n in range(len(found)))
    folder, tasks = Path(options.run_dir or "runs/sweep"), options.tasks or len(found)
    return "\n".join(words_of_task(found, options.task, tasks, folder))


def bench(words: list[str]) -> str:
    """Runs `distvgg bench`."""
    parser = Parser(
        "bench",
        """Predicts step time, throughput and efficiency on 1 to 1,024 GPUs from one GPU's speed.

That speed is measured here, in about ten seconds of real steps on synthetic images, or given by
--images_per_sec or --gpu. Links are those of --gpu, or of an H100, unless given. The model is
described in distvgg/distributed/cost_model.py.""",
        usage="[RECIPE] [--gpu NAME] [--json] [--option VALUE ...] [--section.field VALUE ...]",
    )
    parser.add_argument(
        "recipe", nargs="*", metavar="RECIPE", help=f"{RECIPE_HELP} (default: fast)"
    )
    parser.add_argument("--json", action="store_true", help="print the curves as JSON")
    add_model_options(parser, BenchOptions())
    parser.add_config_options(config_to_show([*words, "fast"]))
    if asks_for_help(words):
        return parser.format_help().rstrip()
    options = parser.parse(words)
    recipe = one_recipe(options.recipe or ["fast"])
    of_bench = {n: v for n, v in vars(options).items() if n in BenchOptions.model_fields}
    from distvgg.commands.bench import bench

    return bench(
        load(recipe, overrides(options)),
        recipe,
        validated(BenchOptions, of_bench),
        as_json=options.json,
    )


def _file(text: str) -> Path:
    """Reads the name of a file to write."""
    if not Path(text).name:
        raise argparse.ArgumentTypeError(f"{text!r} is no name of a file to write")
    return Path(text)


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

"""The command line: parses words and calls a command; contains no logic.

Each command is a parser and a function of the parsed options. Invariant: nothing heavy is imported
before it is needed, and a user error is one line on the main process and exit code 2.
"""

import argparse
import io
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, get_args

from distvgg import __version__, environment, preemption
from distvgg.commands.arguments import (
    RECIPE_HELP,
    RUN_USAGE,
    Parser,
    add_model_options,
    add_run_options,
    asks_for_help,
    config_to_show,
    one_recipe,
    overrides,
    resolve,
    train_parser,
    validated,
)
from distvgg.commands.bench_options import BenchOptions
from distvgg.config import Config, SplitName
from distvgg.errors import PeerLostError, RunError, UserError
from distvgg.recipe import load, recipe_names
from distvgg.runs.layout import REPORT_FILE

USAGE = """\
usage: distvgg COMMAND ...

  train RECIPE [--run-dir DIR] [--section.field VALUE ...]   trains, resumes, or shows the result
  evaluate RUN_DIR [--split test|val|train]                  measures a run or a checkpoint
  replay RUN_DIR --step S [--micro-batch K] [--break]        a step again, on one device
  predict RUN_DIR IMAGE... [--top N] [--json]                classes of images and folders of images
  export RUN_DIR --to onnx|safetensors|hub [--out PATH]      the network, for other programs
  compare RUN_DIR... [--out FILE]                            runs as one table, seeds averaged
  curves RUN_DIR... [--out FILE]                             curves of runs in one picture
  report RUN_DIR... [--out FILE] [--watch]                   curves, confusions and more, as a page
  tables RUN_DIR...                                          results over seeds, as Markdown
  sync RUN_DIR...                                            sends rows that W&B lacks
  config RECIPE [--section.field VALUE ...]                  the whole config as YAML
  summary RECIPE [--section.field VALUE ...]                 layers, shapes, parameters, FLOPs
  doctor [RECIPE] [--prepare] [as train]                     what works here, and what to fix
  sweep RECIPE --sweep FIELD=VALUE,VALUE ... [as train]      combinations of values, for a job array
  bench [RECIPE] [--json] [--gpu h100] [as train]            what to expect of 1 to 1,024 GPUs
  launch [--processes N ...] -- RECIPE ... [as train]        one node's processes, as the scripts do

Over several processes:
  accelerate launch --config_file accelerate_config.yaml --num_processes N -m distvgg train ...
Recipes: {recipes}
Options: distvgg COMMAND --help; with the values of a recipe: distvgg train RECIPE --help"""


class Command(NamedTuple):
    """A sub-command.

    Attributes:
        parser: makes the parser; the help shows the values of the given config.
        run: runs the command and returns the text to print.
        default: the recipe where none is given, if any.
    """

    parser: Callable[[Config], Parser]
    run: Callable[[Namespace], str]
    default: tuple[str, ...] = ()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command of the command line and returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    _accept_all_characters()
    if words[:1] != ["train"]:
        environment.set_ranks_aside()
    try:
        if note := environment.provide_home():
            print(f"distvgg: note: {note}", file=sys.stderr, flush=True)
    except UserError as error:
        _complain(error)
        return 2
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
    if words[0] == "train":
        preemption.install()
    try:
        text, code = _run(words[0], words[1:]), 0
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
    if text and environment.rank() == 0:
        try:
            print(text, flush=True)
        except BrokenPipeError:  # `| head` closed the pipe
            _discard_output()
    return code


def _discard_output() -> None:
    """Discards what follows on stdout, which Python would flush again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _accept_all_characters() -> None:
    """Escapes what the encoding of the output lacks, such as names of classes on ASCII."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def _run(name: str, words: Sequence[str]) -> str:
    if name not in COMMANDS:
        raise UserError(f"no command {name!r}: give one of {', '.join(COMMANDS)}, launch")
    command = COMMANDS[name]
    if asks_for_help(words):
        return command.parser(config_to_show([*words, *command.default])).format_help().rstrip()
    return command.run(command.parser(Config()).parse(words))


def _train(options: Namespace) -> str:
    _, config, run_dir = resolve(options)
    environment.refuse_half_a_launcher()
    from distvgg.training.trainer import train

    result = train(config, run_dir)
    if environment.rank():
        return result.text()
    from distvgg.commands.report import write_at_end

    failure = write_at_end(run_dir) if config.track.report else None
    return result.text(run_dir) + (f"\n{failure}" if failure else "")


def _config_parser(shown: Config) -> Parser:
    text = "Prints the whole config of a recipe as YAML, which is itself a recipe."
    parser = Parser("config", text, RUN_USAGE)
    add_run_options(parser, shown)
    return parser


def _config(options: Namespace) -> str:
    return resolve(options)[1].to_yaml().rstrip()


def _summary_parser(shown: Config) -> Parser:
    parser = Parser(
        "summary",
        """Lists the layers of a recipe's network: output shapes, parameters and operations.

Nothing is trained, and no device is needed. Operations are those of convolutions and linear layers
for one image, two for a multiply-add.""",
        "RECIPE [--section.field VALUE ...]",
    )
    add_run_options(parser, shown)
    return parser


def _summary(options: Namespace) -> str:
    _, config, _ = resolve(options)
    from distvgg.commands.summary import summary

    return summary(config)


def _evaluate_parser(_: Config) -> Parser:
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
    return parser


def _evaluate(options: Namespace) -> str:
    from distvgg.commands.evaluate import evaluate_run

    return evaluate_run(options.run_dir, options.split)


def _replay_parser(_: Config) -> Parser:
    parser = Parser(
        "replay",
        """Computes one step of a run again, on one device, whatever number of processes ran it.

Training starts from the newest checkpoint before the step. Rows on the way are compared with those
of the run, to the last bit. With --micro-batch, the command also prints the activations, gradients
and samples of one micro-batch, and draws its images.""",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="folder of the run")
    parser.add_argument(
        "--step", type=int, required=True, metavar="INT", help="as in the rows: the first is 1"
    )
    parser.add_argument(
        "--micro-batch",
        "--micro_batch",
        type=int,
        metavar="INT",
        help="index in the step, from 0; default: all",
    )
    parser.add_argument(
        "--break",
        dest="pause",
        action="store_true",
        help="stop in the debugger before the forward of each micro-batch shown",
    )
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        type=Path,
        help="folder of the picture and the numbers (default: RUN_DIR/replay/step_*)",
    )
    return parser


def _replay(options: Namespace) -> str:
    from distvgg.commands.replay import replay

    return replay(
        options.run_dir, options.step, options.micro_batch, options.out, pause=options.pause
    )


def _predict_parser(_: Config) -> Parser:
    parser = Parser(
        "predict",
        """Prints the most likely classes of images, with their probabilities.

Images may have any size and mode. Folders are searched recursively; their files that are not images
are left out. An image that cannot be read is a line on stderr, and the others are classified. The
exit code is then 1; it is 2 if no image could be read. Runs with eval.tta flip average each image
and its mirror image.""",
    )
    parser.add_argument(
        "run_dir",
        metavar="RUN_DIR",
        type=Path,
        help="folder of a finished run, one of its checkpoints/step_*, or a folder with a copy of"
        " model.safetensors",
    )
    parser.add_argument(
        "images", metavar="IMAGE", nargs="+", help="image files, or folders of them"
    )
    parser.add_argument(
        "--top", type=int, metavar="N", default=5, help="classes of each image (default: 5)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON array")
    return parser


def _predict(options: Namespace) -> str:
    from distvgg.commands.predict import predict

    try:
        predict(options.run_dir, options.images, top=options.top, as_json=options.json)
    except BrokenPipeError:
        _discard_output()
    return ""


def _export_parser(_: Config) -> Parser:
    parser = Parser(
        "export",
        """Writes the network of a run for other programs, with normalisation or its constants.

onnx: one file that takes pixels, uint8, in batches of any size, and is compared with PyTorch before
it is written. safetensors: one file of weights that plain torchvision loads. hub: a folder with a
model card, as huggingface_hub loads it.""",
    )
    parser.add_argument(
        "run_dir", metavar="RUN_DIR", type=Path, help="folder of a run or checkpoint, as in predict"
    )
    parser.add_argument("--to", required=True, choices=("onnx", "safetensors", "hub"), help="form")
    parser.add_argument(
        "--out", metavar="PATH", type=_file, help="file to write, or folder (default: RUN's name)"
    )
    parser.add_argument(
        "--push", metavar="REPO_ID", help="upload the folder of hub to this repository, USER/NAME"
    )
    return parser


def _export(options: Namespace) -> str:
    from distvgg.commands.export import export

    return export(options.run_dir, options.to, options.out, options.push)


def _parser_of_runs(command: str, description: str) -> Parser:
    parser = Parser(command, description)
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", type=Path, help="folders of runs")
    return parser


def _compare_parser(_: Config) -> Parser:
    parser = _parser_of_runs(
        "compare",
        """Compares runs in one table.

The table has the config fields that differ, accuracies, throughput and state, with mean and
standard deviation over runs that differ only in their seed. The command works at any time, also
during runs.""",
    )
    parser.add_argument(
        "--out", metavar="FILE", type=_file, help="also write the table to this file"
    )
    return parser


def _compare(options: Namespace) -> str:
    from distvgg.commands.compare import compare

    return compare(options.run_dirs, options.out)


def _curves_parser(_: Config) -> Parser:
    text = "Draws loss, accuracy, learning rate and throughput of runs."
    parser = _parser_of_runs("curves", text)
    parser.add_argument(
        "--out",
        metavar="FILE",
        type=_file,
        default=Path("curves.svg"),
        help="file to write; its ending says the format (default: curves.svg)",
    )
    return parser


def _curves(options: Namespace) -> str:
    from distvgg.commands.curves import draw

    return draw(options.run_dirs, options.out)


def _report_parser(_: Config) -> Parser:
    parser = _parser_of_runs(
        "report",
        """Writes one HTML page about runs, for a browser; the page requests nothing.

The page has curves, confusions with example images, calibration, time, configs and hashes. Runs
that differ only in their seed are shown as mean and range. The command works at any time, also
during runs.""",
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        type=_file,
        default=Path(REPORT_FILE),
        help=f"file to write (default: {REPORT_FILE})",
    )
    parser.add_argument(
        "--watch",
        action="store_true",
        help="write again whenever the runs change, until all are finished or Ctrl-C; an open page"
        " reloads itself",
    )
    return parser


def _report(options: Namespace) -> str:
    from distvgg.commands.report import report

    return report(options.run_dirs, options.out, watch=options.watch)


def _tables_parser(_: Config) -> Parser:
    return _parser_of_runs(
        "tables",
        """Prints accuracies, costs and confusions of finished runs as Markdown.

Several folders must hold runs whose configs differ only in the seed.""",
    )


def _tables(options: Namespace) -> str:
    from distvgg.commands.tables import tables

    return tables(options.run_dirs)


def _sync_parser(_: Config) -> Parser:
    return _parser_of_runs(
        "sync",
        """Sends the rows that the W&B server lacks.

For runs that were offline or were killed, and for runs without W&B. Sends no row twice.""",
    )


def _sync(options: Namespace) -> str:
    from distvgg.tracking.wandb_sync import sync

    for run_dir in options.run_dirs[:-1]:
        print(sync(run_dir), flush=True)
    return sync(options.run_dirs[-1])


def _doctor_parser(shown: Config) -> Parser:
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
    add_run_options(parser, shown)
    return parser


def _doctor(options: Namespace) -> str:
    config, run_dir = None, Path("runs")
    if options.recipe or overrides(options) or options.prepare or options.run_dir:
        _, config, run_dir = resolve(options)
    if environment.rank():
        return ""  # the main process checks for all processes
    from distvgg.commands.doctor import run_checks

    return run_checks(config, run_dir, prepare=options.prepare)


def _sweep_parser(shown: Config) -> Parser:
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
    add_run_options(parser, shown)
    return parser


def _sweep(options: Namespace) -> str:
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


def _bench_parser(shown: Config) -> Parser:
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
    parser.add_config_options(shown)
    return parser


def _bench(options: Namespace) -> str:
    recipe = one_recipe(options.recipe or COMMANDS["bench"].default)
    config = load(recipe, overrides(options))
    of_bench = {n: v for n, v in vars(options).items() if n in BenchOptions.model_fields}
    bench_options = validated(BenchOptions, of_bench)
    from distvgg.commands.bench import bench

    return bench(config, recipe, bench_options, as_json=options.json)


COMMANDS = {
    "train": Command(train_parser, _train),
    "evaluate": Command(_evaluate_parser, _evaluate),
    "replay": Command(_replay_parser, _replay),
    "predict": Command(_predict_parser, _predict),
    "export": Command(_export_parser, _export),
    "compare": Command(_compare_parser, _compare),
    "curves": Command(_curves_parser, _curves),
    "report": Command(_report_parser, _report),
    "tables": Command(_tables_parser, _tables),
    "sync": Command(_sync_parser, _sync),
    "config": Command(_config_parser, _config),
    "summary": Command(_summary_parser, _summary),
    "doctor": Command(_doctor_parser, _doctor),
    "sweep": Command(_sweep_parser, _sweep),
    "bench": Command(_bench_parser, _bench, ("fast",)),
}


def _file(text: str) -> Path:
    """Reads the name of a file to write."""
    if not Path(text).name:
        raise argparse.ArgumentTypeError(f"{text!r} is no name of a file to write")
    return Path(text)


def _complain(error: Exception, *, at_once: bool = False) -> None:
    """Prints an error once, over all processes.

    All processes usually find the same error. The main process then prints it, and the launcher,
    if there is one, ends the other processes. A process that still exists after 30 seconds has
    found its own error and prints it. A process that lost its peers prints the error immediately
    (`at_once`), and so does one that no launcher ends.
    """
    if rank := environment.rank():
        if not at_once and environment.has_launcher() and preemption.wait(30):
            return
        print(f"distvgg: error on process {rank}: {error}", file=sys.stderr, flush=True)
    else:
        print(f"distvgg: error: {error}", file=sys.stderr, flush=True)

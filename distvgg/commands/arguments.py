"""Command lines: options from the typed schema, parsed by argparse. Imports no torch.

Values stay text here. They are merged over the recipe and validated by pydantic in one place
(`recipe.load`), so that a recipe and a command line give the same message for the same mistake.
"""

import argparse
import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from distvgg.config import TRAIN_FIELDS_OF_0_1, Config, from_text
from distvgg.errors import UserError, nearest
from distvgg.recipe import load, recipe_names

Model = TypeVar("Model", bound=BaseModel)
RUN_USAGE = "RECIPE [--run-dir DIR] [--section.field VALUE ...]"
RECIPE_HELP = "name of a packaged recipe, or path of a YAML file, such as the config.yaml of a run"
_SWITCH_WORDS = {"true", "false", "yes", "no", "on", "off", "1", "0"}
_NAMES = {bool: "{true,false}", int: "INT", float: "FLOAT", str: "TEXT", NoneType: "none"}


class Parser(argparse.ArgumentParser):
    """The parser of one command: errors are user errors, and names may have hyphens."""

    def __init__(self, command: str, description: str, usage: str | None = None) -> None:
        super().__init__(
            prog=f"distvgg {command}",
            usage=usage and f"distvgg {command} {usage}",
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Raises a user error instead of printing the usage.

        Raises:
            UserError: always.
        """
        if found := re.fullmatch(r"argument (--\S+): expected one argument", message):
            raise UserError(f"{found[1]} needs a value: {found[1]} VALUE")
        if found := re.fullmatch(r"the following arguments are required: (.+)", message):
            raise UserError(f"missing {found[1]}: see {self.prog} --help")
        raise UserError(message.removeprefix("argument "))

    def add_config_options(self, config: Config) -> None:
        """Adds an option for each config field, with the values of a config as defaults shown."""
        for name, value in config:
            if isinstance(value, BaseModel):
                title = (type(value).__doc__ or "").split("\n")[0]
                group = self.add_argument_group(name, title.replace("%", "%%"))
                add_model_options(group, value, f"{name}.")
        add_model_options(self, config)
        for name in TRAIN_FIELDS_OF_0_1:
            hidden = argparse.SUPPRESS
            self.add_argument(f"--train.{name}", help=hidden, default=hidden)

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """Parses the words after the command's name. Options that are not given have no attribute.

        Raises:
            UserError: an unknown option, or an option without a value.
        """
        words = self._with_values([_canonical(word) for word in words])
        for word in words:
            name = word.partition("=")[0]
            if name.startswith("--") and name not in self._option_string_actions:
                self._refuse(name.removeprefix("--"))
        return self.parse_intermixed_args(words)

    def _with_values(self, words: Sequence[str]) -> list[str]:
        """Joins options and values where argparse would not separate them from other words.

        A value may begin with a hyphen, and a switch may stand before the recipe.
        """
        joined: list[str] = []
        for word in words:
            before = self._option_string_actions.get(joined[-1]) if joined else None
            is_value = word.startswith("-") and not word.startswith("--") and len(word) > 2
            if before is not None and before.nargs is None and is_value:
                joined[-1] = f"{joined[-1]}={word}"
            elif before is not None and before.nargs == "?" and word.lower() not in _SWITCH_WORDS:
                joined[-1] = f"{joined[-1]}={before.const}"
                joined.append(word)
            else:
                joined.append(word)
        return joined

    def _refuse(self, name: str) -> NoReturn:
        known = [n.removeprefix("--") for n in self._option_string_actions if n.startswith("--")]
        fields = [n for n in known if "." in n]
        if fields and "." in name:
            load("debug", {name: ""})  # raises, with the nearest field
        options = [n for n in known if "." not in n and n != "help"]
        near = nearest(name, [*options, *fields], "--")
        raise UserError(
            f"no option --{name}{near}: give one of"
            f" {', '.join(options)}{', or --section.field VALUE' if fields else ''}"
        )


def add_model_options(group: Any, values: BaseModel, prefix: str = "") -> None:
    """Adds an option for each field of a model that is no model itself.

    Args:
        group: a parser or a group of it.
        values: the defaults that the help shows.
        prefix: before each name.
    """
    for name, field in type(values).model_fields.items():
        value = getattr(values, name)
        if isinstance(value, BaseModel):
            continue
        text = " ".join((field.description or "").split()).replace("%", "%%")
        is_switch = field.annotation is bool
        group.add_argument(
            f"--{prefix}{name}",
            metavar=_metavar(field.annotation),
            help=f"{text} (default: {_text(value)})",
            default=argparse.SUPPRESS,
            **({"nargs": "?", "const": "true"} if is_switch else {}),
        )


def validated(model: type[Model], values: dict[str, str]) -> Model:
    """Returns a model made of the text of its options.

    Raises:
        UserError: a value out of range.
    """
    try:
        return model.model_validate({name: from_text(value) for name, value in values.items()})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if not first["loc"]:
            raise UserError(first["msg"].removeprefix("Value error, ")) from error
        wanted = re.sub(r"^\w+ should", "must", first["msg"])
        raise UserError(f"--{first['loc'][0]} {wanted} (got {first['input']!r})") from error


def train_parser(config: Config) -> Parser:
    """Returns the parser of `distvgg train`, which other commands share."""
    parser = Parser(
        "train",
        """Trains a recipe, or resumes its run.

The same command again resumes an interrupted run, to the same curve, and shows the result of a
finished run. SIGTERM, SIGUSR1, SIGUSR2, Ctrl-C or a file STOP in the run folder stop a run after
the step, with a checkpoint.""",
        usage=RUN_USAGE,
    )
    add_run_options(parser, config)
    return parser


def add_run_options(parser: Parser, config: Config) -> None:
    """Adds the options that say which run is meant: recipe, run folder, config fields."""
    parser.add_argument("recipe", nargs="*", metavar="RECIPE", help=RECIPE_HELP)
    parser.add_argument(
        "--run-dir",
        metavar="DIR",
        help="folder of the run (default: in runs/, named after the recipe and its values, or after"
        " the trial of a W&B sweep)",
    )
    parser.add_config_options(config)


def overrides(options: argparse.Namespace) -> dict[str, str]:
    """Returns the config fields among parsed options, as text by dotted name."""
    plain = {name for name, value in Config() if not isinstance(value, BaseModel)}
    return {name: v for name, v in vars(options).items() if "." in name or name in plain}


def resolve(options: argparse.Namespace) -> tuple[str, Config, Path]:
    """Returns the recipe, config and run folder of the options that `add_run_options` adds.

    Raises:
        UserError: no recipe, an unknown key, a value out of range.
    """
    recipe = one_recipe(options.recipe)
    config = load(recipe, overrides(options))
    run_dir = options.run_dir or trial_run_dir() or default_run_dir(recipe, config)
    return recipe, config, Path(run_dir)


def one_recipe(recipes: Sequence[str]) -> str:
    """Returns the recipe of a command line.

    Raises:
        UserError: no recipe, or more than one.
    """
    if len(recipes) != 1:
        raise UserError(
            f"give one recipe, not {' '.join(recipes) or 'none'}: one of"
            f" {', '.join(recipe_names())}, or the path of a YAML file"
        )
    return recipes[0]


def asks_for_help(words: Sequence[str]) -> bool:
    """Returns True if `-h` or `--help` is among the words."""
    return not {"-h", "--help"}.isdisjoint(words)


def config_to_show(words: Sequence[str]) -> Config:
    """Returns the config whose values a help shows: that of the recipe, if one is given."""
    for word in words:
        if word in recipe_names() or word.endswith((".yaml", ".yml")):
            return load(word)
    return Config()


def trial_run_dir() -> Path | None:
    """Returns the run folder of a trial that W&B's sweep agent starts; None without the agent.

    Two trials may have equal values, so that a name made of the values would not do.
    """
    sweep, run = (os.environ.get(name, "") for name in ("WANDB_SWEEP_ID", "WANDB_RUN_ID"))
    names = all(re.fullmatch(r"[\w-][\w.-]*", name) for name in (sweep, run))
    return Path("runs") / f"sweep-{sweep}" / run if names else None


def default_run_dir(recipe: str, config: Config) -> Path:
    """Returns the default run folder of a config, the same on every process and at any time.

    Its name hashes only the values that differ from the defaults, so that a new field changes no
    name. CUDA graphs, profiles and loaders change no result, and no name. A folder that version
    0.1 named is used if it exists and the new one does not.
    """
    config = config.replace(
        train__cuda_graphs=True,
        train__profile_steps=0,
        data__loader="auto",
        data__workers=None,
    )
    folder, old = (
        Path("runs") / f"{Path(recipe).stem}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        for text in (config.to_yaml(exclude_defaults=True), _yaml_of_0_1(config))
    )
    return old if old.exists() and not folder.exists() else folder


def _yaml_of_0_1(config: Config) -> str:
    """Returns a config as YAML with all fields of version 0.1, which named run folders by it."""
    values = config.model_dump()
    train = values["train"]
    newer = {
        "train": ("cpu_threads", "cuda_graphs", "overfit_batches", "profile_steps"),
        "data": (
            *("image_column", "label_column", "on_error", "max_pixels"),
            *("store", "loader", "workers"),
        ),
        "model": ("name", "layers", "weights"),
        "optim": ("frozen", "trunk_lr_ratio"),
        "augment": ("random_resized_crop", "scale_jitter"),
        "eval": ("crop_ratio",),
        "track": ("wandb_artifact", "report", "also"),
    }
    for section, names in newer.items():
        for name in names:
            del values[section][name]
    at = list(train).index("precision") + 1
    fields = [*train.items()]
    fields.insert(at, ("gradient_compression", "no"))
    fields[-1:-1] = [("start_size", None), ("full_size_at", 0.7)]
    values["train"] = dict(fields)
    return yaml.safe_dump(values, sort_keys=False)


def _canonical(word: str) -> str:
    """Returns a word with the name of an option spelled as the parser has it."""
    if not word.startswith("--") or word == "--":
        return word
    name, equals, value = word.removeprefix("--").partition("=")
    name = name.replace("-", "_")
    return f"--{'run-dir' if name == 'run_dir' else name}{equals}{value}"


def _metavar(annotation: Any) -> str:
    """Returns what the help shows for a value of a type."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "{" + ",".join(map(str, arguments)) + "}"
    if origin in (Union, UnionType):
        return "|".join(map(_metavar, arguments))
    if origin is tuple:
        return "A,B,..."
    return _NAMES.get(annotation, "VALUE")


def _text(value: Any) -> str:
    """Returns a value as it is typed."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return "none" if value in (None, "") else str(value)

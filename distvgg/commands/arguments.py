"""Resolution of command-line words to recipe, config and run folder. Imports no torch."""

import hashlib
from pathlib import Path

import yaml

from distvgg.config import Config, load, recipe_names
from distvgg.errors import UserError


def resolve(words: list[str]) -> tuple[str, Config, Path]:
    """Returns the recipe, config and run folder of a `train` command line.

    Raises:
        UserError: no recipe, an unknown key, a value out of range.
    """
    positional, options = split_options(words)
    run_dir = options.pop("run_dir", None)
    recipe = one_recipe(positional)
    config = load(recipe, options)
    return recipe, config, Path(run_dir) if run_dir else default_run_dir(recipe, config)


def default_run_dir(recipe: str, config: Config) -> Path:
    """Returns the default run folder of a config, the same on every process and at any time.

    Its name hashes only the values that differ from the defaults, so that a new field changes no
    name. A folder that version 0.1 named is used if it exists and the new one does not.
    """
    folder, old = (
        Path("runs") / f"{Path(recipe).stem}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        for text in (config.to_yaml(exclude_defaults=True), _yaml_of_0_1(config))
    )
    return old if old.exists() and not folder.exists() else folder


def _yaml_of_0_1(config: Config) -> str:
    """Returns a config as YAML with all fields of version 0.1, which named run folders by it."""
    values = config.model_dump()
    train = values["train"]
    del train["cpu_threads"]
    at = list(train).index("precision") + 1
    fields = [*train.items()]
    fields.insert(at, ("gradient_compression", "no"))
    fields[-1:-1] = [("start_size", None), ("full_size_at", 0.7)]
    values["train"] = dict(fields)
    return yaml.safe_dump(values, sort_keys=False)


def one_recipe(positional: list[str]) -> str:
    """Returns the recipe among positional words.

    Raises:
        UserError: no recipe, or more than one.
    """
    if len(positional) != 1:
        raise UserError(
            f"give one recipe, not {' '.join(positional) or 'none'}: one of"
            f" {', '.join(recipe_names())}, or the path of a YAML file"
        )
    return positional[0]


def split_options(words: list[str]) -> tuple[list[str], dict[str, str]]:
    """Splits words into positionals and options, `--name VALUE` or `--name=VALUE`.

    Hyphens in a name count as underscores.

    Raises:
        UserError: an option has no value.
    """
    positional: list[str] = []
    options: dict[str, str] = {}
    rest = iter(words)
    for word in rest:
        if word in ("-h", "--help"):
            options["help"] = ""
        elif not word.startswith("--"):
            positional.append(word)
        else:
            name, given, value = word.removeprefix("--").partition("=")
            if not given and (value := next(rest, "--")).startswith("--"):
                raise UserError(f"--{name} needs a value: --{name} VALUE")
            options[name.replace("-", "_")] = value
    return positional, options

"""Recipes: YAML files of config values, the overrides on top, and errors in their words."""

import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from distvgg.config import LACKS, SHORTHANDS, Config, from_text, set_dotted
from distvgg.errors import UserError, nearest


def recipe_names() -> list[str]:
    """Returns the names of the packaged recipes, sorted."""
    folder = resources.files("distvgg") / "recipes"
    names = [file.name for file in folder.iterdir()]
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def load(recipe: str, overrides: Mapping[str, Any] | None = None) -> Config:
    """Returns the config of a recipe with overrides applied.

    Args:
        recipe: the name of a packaged recipe, or the path of a YAML file.
        overrides: dotted field name -> value, text or typed.

    Raises:
        UserError: no such recipe, not YAML, an unknown key or a value out of range.
    """
    values, overrides = _read_recipe(recipe), overrides or {}
    model = values.get("model")
    if isinstance(model, dict):
        table = SHORTHANDS if from_text(overrides.get("model.layers")) is not None else ()
        for name in (*table, *LACKS.get(str(overrides.get("model.name")), ())):
            model.pop(name, None)
    set_dotted(values, overrides)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError(_one_line(error)) from error


def _read_recipe(recipe: str) -> dict[str, Any]:
    path = Path(recipe)
    try:
        if recipe in recipe_names():  # a local file of the same name is given as ./fast
            text = (resources.files("distvgg") / "recipes" / f"{recipe}.yaml").read_text()
        elif path.suffix in (".yaml", ".yml") or path.is_file():
            text = path.read_text()
        else:
            raise UserError(
                f"no recipe {recipe!r}{nearest(recipe, recipe_names())}: give one of"
                f" {', '.join(recipe_names())}, or the path of a YAML file"
            )
        values = yaml.safe_load(text) or {}
    except OSError as error:
        raise UserError(f"cannot read recipe {recipe}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"recipe {recipe} is not valid YAML: {reason}") from error
    if not isinstance(values, dict):
        raise UserError(f"recipe {recipe} must be a mapping of sections, such as `train:`")
    return values


def _one_line(error: ValidationError) -> str:
    """Returns a validation error as one line in the words of the command line."""
    names = list(Config().flat())
    parts = []
    for e in error.errors(include_url=False):
        dotted = ".".join(map(str, e["loc"]))
        if e["type"] == "extra_forbidden":
            near = nearest(dotted, [*names, *Config.model_fields]) or (
                f"; {e['loc'][0]} has "
                + ", ".join(n.split(".", 1)[1] for n in names if n.startswith(f"{e['loc'][0]}."))
                if len(e["loc"]) > 1
                else "; the sections are " + ", ".join(Config.model_fields)
            )
            parts.append(f"unknown key {dotted}{near}")
        elif e["type"] == "value_error":
            parts.append(str(e["ctx"]["error"]))
        else:
            wanted = re.sub(r"^\w+ should", "must", e["msg"])
            parts.append(f"{dotted} {wanted} (got {e['input']!r})")
    return "; ".join(parts)

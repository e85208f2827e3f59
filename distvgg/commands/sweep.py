"""Sweeps over values of config fields: one command line of `train` for each combination.

Owns the syntax of `--sweep FIELD=VALUE,VALUE,...`. Invariant: the command line of a combination
depends only on its number and the words of the sweep. All command lines are checked against the
schema before the first is trained. Imports no torch.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args, get_origin

from pydantic import BaseModel

from distvgg.config import Config
from distvgg.errors import UserError
from distvgg.recipe import load

# A value in brackets is a list.
_VALUE = re.compile(r"\[[^\[\]]*\]|[^,\[\]]+")


@dataclass(frozen=True)
class Sweep:
    """A recipe, fixed options, and the combinations of values of other fields.

    Attributes:
        recipe: the name of a packaged recipe, or the path of a YAML file.
        options: dotted field name -> value as text, for all combinations.
        combinations: the same, of each combination; one empty combination without a sweep.
    """

    recipe: str
    options: dict[str, str]
    combinations: tuple[dict[str, str], ...]

    def __len__(self) -> int:
        """Returns the number of combinations."""
        return len(self.combinations)

    def values(self, number: int) -> dict[str, str]:
        """Returns the config fields of one combination, counted from 0."""
        return self.options | self.combinations[number]

    def words(self, number: int) -> list[str]:
        """Returns the recipe and options of `train` for one combination, counted from 0."""
        return [self.recipe, *(f"--{name}={value}" for name, value in self.values(number).items())]


def parse(recipe: str, options: dict[str, str], sweeps: Sequence[str]) -> Sweep:
    """Reads a sweep and checks each of its combinations.

    Args:
        recipe: the name of a packaged recipe, or the path of a YAML file.
        options: dotted field name -> value, for all combinations.
        sweeps: each is `FIELD=VALUE,VALUE,...`. Each value of a list field is in brackets.

    Raises:
        UserError: malformed, no such field, a value out of range, a field given twice.
    """
    axes: dict[str, tuple[str, ...]] = {}
    for sweep in sweeps:
        name, given, text = sweep.partition("=")
        name = name.replace("-", "_")
        if not given or not text:
            raise UserError(f"--sweep {sweep}: expected FIELD=VALUE,VALUE,...")
        if name in axes or name in options:
            raise UserError(f"--sweep {sweep}: {name} is given twice")
        axes[name] = _values(name, text)
        if len(set(axes[name])) < len(axes[name]):
            raise UserError(f"--sweep {sweep}: a value is given twice")
    if any("\n" in text for text in (*options.values(), *sweeps)):
        raise UserError("a value of a sweep has a line break, which a job array cannot pass on")
    # The last field changes fastest.
    combinations = (dict(zip(axes, v, strict=True)) for v in itertools.product(*axes.values()))
    found = Sweep(recipe, options, tuple(combinations))
    for number in range(len(found)):
        try:
            load(recipe, found.values(number))
        except UserError as error:
            several = [n for n, v in options.items() if "," in v and n not in list_fields()]
            hint = f"; for several values: --sweep {several[0]}=..." if several else ""
            raise UserError(f"{error}{hint}") from error
    return found


def _values(name: str, text: str) -> tuple[str, ...]:
    """Splits `a,b` or `[1,2],[3]` at the commas outside brackets.

    Raises:
        UserError: malformed, or brackets that do not fit the field.
    """
    values = _VALUE.findall(text)
    if ",".join(values) != text:
        raise UserError(f"--sweep {name}={text}: expected values with commas between")
    if name in list_fields():
        if not all(value.startswith("[") for value in values):
            raise UserError(
                f"--sweep {name}={text}: {name} is a list; write each value in brackets, as in"
                f" --sweep '{name}=[2,3],[1,2,3]'"
            )
    elif any(value.startswith("[") for value in values):
        raise UserError(f"--sweep {name}={text}: {name} takes single values, without brackets")
    return tuple(value.strip("[]") or "none" for value in values)


def list_fields() -> set[str]:
    """Returns the dotted names of the config fields that hold a list."""
    return {
        f"{section}.{name}"
        for section, values in Config()
        if isinstance(values, BaseModel)
        for name, field in type(values).model_fields.items()
        if tuple in {get_origin(t) for t in (field.annotation, *get_args(field.annotation))}
    }


def words_of_task(sweep: Sweep, task: int, tasks: int, folder: Path) -> list[str]:
    """Returns the words of `train` for one task of a job array.

    The task trains the combination of its number. Without a sweep, the number is the seed. The run
    folder has the number as its name.

    Args:
        sweep: the sweep of the job array.
        task: number of the task.
        tasks: number of tasks in the array.
        folder: folder that holds all runs of the sweep.

    Raises:
        UserError: more tasks than combinations, or all tasks would train the same run.
    """
    if task < 0 or tasks < 1:
        raise UserError(f"task {task} of {tasks}: expected --task >= 0 and --tasks >= 1")
    where = ["--run-dir", str(folder / str(task))]
    if sweep.combinations == ({},):
        seeded = "seed" in sweep.options
        if seeded and tasks > 1:
            raise UserError(
                f"all {tasks} tasks would train the same run: drop --seed, so that each takes its"
                " number as the seed, or sweep over it: --sweep seed=0,1"
            )
        return [*sweep.words(0), *([] if seeded else [f"--seed={task}"]), *where]
    if task >= (n := len(sweep)):
        raise UserError(f"task {task} of {n} combinations: set --array 0-{n - 1}")
    return [*sweep.words(task), *where]

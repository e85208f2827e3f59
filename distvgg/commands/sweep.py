"""Sweeps over values of config fields: one command line of `train` for each combination.

Owns the syntax of `--sweep FIELD=VALUE,VALUE,...`. Invariant: the command line of a combination
depends only on its number and the words of the sweep. All command lines are checked against the
schema before the first is trained. Imports no torch.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from distvgg.config import Config, load
from distvgg.errors import UserError

# A value in brackets is a list.
_VALUE = re.compile(r"\[[^\[\]]*\]|[^,\[\]]+")


@dataclass(frozen=True)
class Sweep:
    """A recipe, fixed options, and the fields whose values are combined.

    Attributes:
        recipe: the name of a packaged recipe, or the path of a YAML file.
        options: each is `--name=VALUE`.
        axes: dotted field name -> its values, as text; the last axis changes fastest.
    """

    recipe: str
    options: tuple[str, ...]
    axes: dict[str, tuple[str, ...]]

    def __len__(self) -> int:
        """Returns the number of combinations; 1 without axes."""
        return len(list(self._combinations()))

    def words(self, number: int) -> list[str]:
        """Returns the recipe and options of `train` for one combination, counted from 0."""
        return [self.recipe, *self.options, *list(self._combinations())[number]]

    def _combinations(self) -> Iterator[tuple[str, ...]]:
        names = self.axes.keys()
        for values in itertools.product(*self.axes.values()):
            yield tuple(f"--{name}={value}" for name, value in zip(names, values, strict=True))


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
    found = Sweep(recipe, tuple(f"--{k}={v}" for k, v in options.items()), axes)
    for number in range(len(found)):
        values = dict(word[2:].split("=", 1) for word in found.words(number)[1:])
        try:
            load(recipe, values)
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
        f"{section}.{field}"
        for section, values in Config().model_dump().items()
        if isinstance(values, dict)
        for field, value in values.items()
        if isinstance(value, tuple)
    }


def words_of_task(sweep: Sweep, task: int, tasks: int, folder: Path) -> list[str]:
    """Returns the words of `train` for one task of a job array.

    The task trains the combination of its number. Without axes, the number is the seed. The run
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
    words, n = sweep.words(task if task < len(sweep) else 0), len(sweep)
    if not sweep.axes:
        seeded = any(word.startswith("--seed=") for word in sweep.options)
        if seeded and tasks > 1:
            raise UserError(
                f"all {tasks} tasks would train the same run: drop --seed, so that each takes its"
                " number as the seed, or sweep over it: --sweep seed=0,1"
            )
        words += [] if seeded else [f"--seed={task}"]
    elif task >= n:
        raise UserError(f"task {task} of {n} combinations: set --array 0-{n - 1}")
    return [*words, "--run-dir", str(folder / str(task))]

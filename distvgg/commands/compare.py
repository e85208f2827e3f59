"""`distvgg compare`: a table of runs in any state, and a table of configs over their seeds.

Only reads run folders. Takes no lock, since a run that starts at that moment would be refused.
Invariant: every folder is a row; only finished runs enter a mean; validation ranks the runs, test
never does. Imports no torch.
"""

import os
import socket
import statistics
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from textwrap import shorten
from typing import Any

from pydantic import BaseModel, Field

from distvgg import metrics
from distvgg.commands.text_tables import plain_table
from distvgg.config import Config
from distvgg.data.plan import BatchPlan
from distvgg.errors import UserError
from distvgg.recipe import load
from distvgg.runs.files import atomic_write, read_bytes
from distvgg.runs.layout import (
    CHECKPOINTS,
    CONFIG_FILE,
    FAILURE_FILE,
    LOCK_FILE,
    METRICS_FILE,
    REQUEUE_FILE,
    RESULT_FILE,
    checkpoint_dirs,
    refuse_to_overwrite,
)
from distvgg.runs.result import Result, read_result
from distvgg.wording import counted

# Prefixes of fields that name a run or select what it keeps or reads. They change no number of it.
NOT_COMPARED = ("track.", "checkpoint.", "eval.test", "eval.tta")
# Fields of a result in which finished runs of one config may differ.
PROVENANCE = ("data_fingerprint", "num_processes", "hardware", "versions", "commit")
SEED, NOTHING = "seed", "-"
MOST_COLUMNS = 8
COLUMNS_FIRST = frozenset(
    [
        *("data.name", "model.name", "model.depth", "model.width", "optim.name", "optim.lr"),
        *("train.epochs", "train.global_batch_size"),
    ]
)
VAL_TOP1 = f"val/{metrics.TOP1}".encode()


class Progress(BaseModel):
    """The fields of a row of metrics.jsonl that describe an unfinished run."""

    step: int = Field(ge=1)
    epoch: float = Field(gt=0)
    val_top1: float | None = Field(None, alias=f"val/{metrics.TOP1}")


class Failure(BaseModel):
    """The fields of failure.json that the table shows."""

    step: int
    what: str
    value: str
    micro_batch: int | None


@dataclass(frozen=True)
class Entry:
    """The content of a run folder.

    Attributes:
        config: dotted name -> value of the fields that change numbers; empty if it cannot be read.
        best: step and top-1 of the best validation so far.
        settled: True if the folder records the end of the run. Only another launch changes it then.
    """

    name: str
    state: str
    config: dict[str, Any] = field(default_factory=dict)
    result: Result | None = None
    best: tuple[int, float] | None = None
    settled: bool = True


@dataclass(frozen=True)
class Group:
    """Runs whose configs differ only in the seed.

    A seed that was run twice counts once, since it is not a second sample of the spread over seeds.
    """

    entries: list[Entry]

    @property
    def seeds(self) -> int:
        return len({e.config[SEED] for e in self.entries})

    @property
    def finished(self) -> list[Result]:
        return list({e.result.seed: e.result for e in self.entries if e.result}.values())

    @property
    def val(self) -> list[float]:
        return [r.val[metrics.TOP1] for r in self.finished]

    @property
    def test(self) -> list[float]:
        return [r.test[metrics.TOP1] for r in self.finished if r.test]

    @property
    def mean_val(self) -> float:
        """Mean validation top-1; -1.0, which is below any accuracy, if no run is finished."""
        return statistics.mean(self.val) if self.val else -1.0


def compare(run_dirs: Sequence[Path], out: Path | None = None) -> str:
    """Returns the table of some run folders, and also writes it to `out`.

    Args:
        run_dirs: run folders. If a wildcard includes `out` among them, `out` is skipped.
        out: the file to write. None: no file.

    Raises:
        UserError: a folder does not exist, or `out` cannot be written or belongs to a run.
    """
    if out is not None:
        refuse_to_overwrite(out)
    for run_dir in run_dirs:
        if not os.path.exists(run_dir):  # unlike Path.exists, False where it cannot be determined
            raise UserError(f"run folder {run_dir} does not exist: give folders of distvgg train")
    paths = list(dict.fromkeys(Path(os.path.abspath(p)) for p in run_dirs))
    if out is not None:
        paths = [p for p in paths if p != Path(os.path.abspath(out))]
    top = os.path.commonpath([p.parent for p in paths]) if paths else ""
    while True:
        entries = [read(p, str(p.relative_to(top))) for p in paths]
        text = table(entries)
        if out is None:
            return text
        try:
            writer = f"{socket.gethostname()}-{os.getpid()}."
            # A file name that is not UTF-8 keeps its bytes.
            content = text.encode(errors="surrogateescape") + b"\n"
            atomic_write(out, content, writer=writer)
        except OSError as error:
            raise UserError(
                f"cannot write {out} ({error.strerror}): choose another file with --out"
            ) from error
        # Of two processes that end together, the one that read less may have written last.
        again = [read(p, e.name) for p, e in zip(paths, entries, strict=True)]
        if [e for e in again if e.settled] == [e for e in entries if e.settled]:
            return text


def read(run_dir: Path, name: str) -> Entry:
    """Returns the entry of a run folder. Its state describes any damage or other error."""
    try:
        if read_bytes(run_dir / CONFIG_FILE) is None:
            there = os.path.isdir(run_dir)
            return Entry(name, "no run here" if there else "cannot be read: Not a directory")
        flat = load(str(run_dir / CONFIG_FILE))
    except UserError as error:
        used = shorten(f"{CONFIG_FILE} cannot be used: {error}", 100)
        return Entry(name, _unreadable(error) or used)
    config = {k: v for k, v in flat.flat().items() if not k.startswith(NOT_COMPARED)}
    try:
        if (result := read_result(run_dir)) is None:
            return _unfinished(run_dir, name, flat, config)
    except UserError as error:
        damaged = f"{RESULT_FILE} is damaged, or of another version"
        return Entry(name, _unreadable(error) or damaged, config)
    best = int(result.best[metrics.STEP]), result.best[metrics.TOP1]
    return Entry(name, "finished", config, result, best)


def _unreadable(error: UserError) -> str | None:
    """Returns the state of a run of which a file cannot be read; None for another error."""
    cause = error.__cause__
    return f"cannot be read: {cause.strerror}" if isinstance(cause, OSError) else None


def _unfinished(run_dir: Path, name: str, config: Config, compared: dict[str, Any]) -> Entry:
    """Returns the entry of a run without a result.

    On some file systems no file shows whether the run is active. The state therefore has the time
    of the last file change, as an absolute time, since tables are kept.
    """
    rows = _progress(run_dir)
    validated = [(r.step, r.val_top1) for r in rows if r.val_top1 is not None]
    best = max(validated, key=lambda v: v[1], default=None)  # the first of ties, as in training
    if (failure := read_bytes(run_dir / FAILURE_FILE)) is not None:
        return Entry(name, _failed(failure), compared, best=best)
    at = _reached(run_dir, rows, config)
    if read_bytes(run_dir / REQUEUE_FILE) is not None:
        return Entry(name, f"{at} (stopped, to be started again)", compared, best=best)
    # Each launch writes the lock file.
    signs = [run_dir / n for n in (CONFIG_FILE, LOCK_FILE, METRICS_FILE)]
    last = datetime.fromtimestamp(max(p.stat().st_mtime for p in signs if p.exists()))
    state = f"{at} (running or killed, last sign {last:%Y-%m-%d %H:%M})"
    return Entry(name, state, compared, best=best, settled=False)


def _failed(content: bytes) -> str:
    try:
        failure = Failure.model_validate_json(content)
    except ValueError:
        return f"failed ({FAILURE_FILE} is damaged)"
    k = failure.micro_batch
    where = "the sum over micro-batches" if k is None else f"micro-batch {k}"
    return f"failed at step {failure.step}: {failure.what} of {where} is {failure.value}"


def _reached(run_dir: Path, rows: Sequence[Progress], config: Config) -> str:
    """Returns the step that a run has reached and, if known, the number of its steps.

    Rows have their own interval, so a checkpoint may be ahead of the last row. Only rows give the
    number of images, and with it the number of steps.
    """
    saved = [int(p.name.removeprefix("step_")) for p in checkpoint_dirs(run_dir / CHECKPOINTS)]
    step = max([r.step for r in rows] + saved, default=0)
    if not rows:
        return f"step {step}" if step else "no step yet"
    batch = config.train
    images = max(1, round(rows[-1].step * batch.global_batch_size / rows[-1].epoch))
    plan = BatchPlan(images, batch.global_batch_size, batch.micro_batch_size)
    return f"step {step}/{plan.steps(batch.epochs)}"


def _progress(run_dir: Path) -> list[Progress]:
    """Returns the validations so far and the last row, in order.

    Lines that are half written or were damaged by a power loss are skipped. Other lines are not
    parsed, since a run may have a hundred thousand.
    """
    lines = (read_bytes(run_dir / METRICS_FILE) or b"").splitlines()
    rows = list(_parsed(line for line in lines if VAL_TOP1 in line))
    last = next(_parsed(reversed(lines)), None)
    return rows if last is None or last in rows[-1:] else [*rows, last]


def _parsed(lines: Iterable[bytes]) -> Iterator[Progress]:
    for line in lines:
        with suppress(ValueError):
            yield Progress.model_validate_json(line)


def table(entries: Sequence[Entry]) -> str:
    """Returns the runs in the order of their groups' means, the groups, and notes, as text.

    The groups are listed only if some config has several seeds.
    """
    configs = [e.config for e in entries if e.config]
    differ = [k for k in (configs or [{}])[0] if len({str(c[k]) for c in configs}) > 1]
    groups = grouped(entries)
    runs = [e for g in groups for e in g.entries] + [e for e in entries if not e.config]
    keys = [k for k in differ if k != SEED]
    shown = columns_of(keys)
    parts = [plain_table(run_rows(runs, [*shown, *([SEED] if SEED in differ else [])]))]
    if any(g.seeds > 1 for g in groups):
        parts.append(plain_table(group_rows(groups, shown)))
    if notes := notes_on(groups, keys, shown):
        parts.append("\n".join(notes))
    return "\n\n".join(parts)


def columns_of(keys: Sequence[str]) -> list[str]:
    """Returns the fields that get a column: all, or if these are many, those that matter most."""
    first = sorted(keys, key=lambda key: key not in COLUMNS_FIRST)[:MOST_COLUMNS]
    return [key for key in keys if key in first]


def grouped(entries: Sequence[Entry]) -> list[Group]:
    """Groups the runs that have a config by all fields except the seed.

    The group with the best mean on validation comes first.
    """
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.config:
            key = str({k: v for k, v in entry.config.items() if k != SEED})
            groups.setdefault(key, []).append(entry)
    by_seed = [Group(sorted(g, key=lambda e: e.config[SEED])) for g in groups.values()]
    return sorted(by_seed, key=lambda g: -g.mean_val)


def run_rows(entries: Sequence[Entry], differ: Sequence[str]) -> list[list[str]]:
    """Returns a header and a row of cells for each run."""
    late = any(e.best and not (e.result and e.result.steps == e.best[0]) for e in entries)
    step = ["at step"] if late else []  # no column if the last step is the best for all
    rows = [["run", *differ, "val top1", "test top1", "best val top1", *step, "images/s", "state"]]
    for e in entries:
        val, test, speed = NOTHING, NOTHING, NOTHING
        if e.result:
            val = _percent(e.result.val[metrics.TOP1])
            test = _percent(e.result.test[metrics.TOP1]) if e.result.test else NOTHING
            speed = f"{e.result.images_per_sec:8,.0f}" if e.result.images_per_sec else NOTHING
        best = [NOTHING] + [NOTHING] * late
        if e.best:
            best = [_percent(e.best[1])] + [f"{e.best[0]:7}"] * late
        values = [typed(e.config[k]) if e.config else NOTHING for k in differ]
        rows.append([e.name, *values, val, test, *best, speed, e.state])
    return rows


def group_rows(groups: Sequence[Group], keys: Sequence[str]) -> list[list[str]]:
    """Returns a header and a row of cells for each group, the best mean on validation first."""
    ranked = not _other_data(groups)
    rows = [[*keys, "seeds finished", "mean val top1", "mean test top1", ""]]
    for g in groups:
        n, config = len(g.finished), g.entries[0].config
        cells = [_spread(g.val), _spread(g.test) if len(g.test) == n else NOTHING]
        mark = "<- best" if ranked and g is groups[0] and n and len(groups) > 1 else ""
        rows.append([*(typed(config[k]) for k in keys), f"{n} of {g.seeds}", *cells, mark])
    return rows


def notes_on(groups: Sequence[Group], keys: Sequence[str], shown: Sequence[str]) -> list[str]:
    """Returns lines on the spread, on the best group, and on differences of provenance.

    Args:
        groups: best mean first.
        keys: fields in which they differ.
        shown: those that have a column.
    """
    lines = []
    if any(len(g.val) > 1 for g in groups):
        lines.append("\N{PLUS-MINUS SIGN}: sample standard deviation over seeds.")
    ranked = [g for g in groups if g.val]
    if other := _other_data(groups):
        lines.append(f"The runs are of different data ({', '.join(other)}): none is the best.")
    elif ranked and len(groups) > 1:
        config = ranked[0].entries[0].config
        best = ", ".join(f"{k} {typed(config[k])}" for k in keys)
        if len(keys) > len(shown):
            best = ", ".join(e.name for e in ranked[0].entries)
        line = f"Best mean val top1: {best}"
        line += f", over {counted(len(ranked[0].val), 'seed')}"
        if len(ranked) > 1:
            lead = 100 * (ranked[0].mean_val - ranked[1].mean_val)
            line += f", {lead:.2f} points ahead of the next, over"
            line += f" {counted(len(ranked[1].val), 'seed')}"
            if len(ranked[0].val) == len(ranked[1].val) == 1:
                line += "; one seed each shows no spread"
        lines.append(f"{line}.")
    results = [e.result for g in groups for e in g.entries if e.result]
    unlike = [k for k in PROVENANCE if len({str(getattr(r, k)) for r in results}) > 1]
    if unlike:
        lines.append(f"Finished runs also differ in {', '.join(unlike)}: see {RESULT_FILE}.")
    if left_out := [k for k in keys if k not in shown]:
        lines.append(f"Also different, without a column: {', '.join(left_out)}.")
    return lines


def _other_data(groups: Sequence[Group]) -> list[str]:
    """Returns the names of the datasets if these differ; accuracies on them do not compare."""
    configs = [g.entries[0].config for g in groups]
    custom = {c["data.path"] for c in configs if c["data.name"] == "custom"}
    names = {c["data.name"] for c in configs if c["data.name"] != "custom"} | custom
    return sorted(map(str, names)) if len(names) > 1 else []


def _spread(values: Sequence[float]) -> str:
    if len(values) < 2:
        return _percent(values[0]) if values else NOTHING
    mean, deviation = 100 * statistics.mean(values), 100 * statistics.stdev(values)
    return f"{mean:6.2f} \N{PLUS-MINUS SIGN} {deviation:.2f}%"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:6.2f}%"


def typed(value: Any) -> str:
    """Returns a config value as it is typed on the command line."""
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)

"""The trackers of accelerate that `track.also` names, such as trackio and MLflow.

Invariants: none of them ends a run, and none has a row twice in one of its runs. trackio and MLflow
say how many rows they have and continue one run over restarts; the file trackers.json names that
run. Any other tracker gets a new run at each launch, from the checkpoint on.
"""

import json
import os
import secrets
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import tracking as of_accelerate
from accelerate.tracking import GeneralTracker

from distvgg import metrics
from distvgg.config import Config
from distvgg.errors import UserError, first_line
from distvgg.runs.files import atomic_write, read_json
from distvgg.runs.layout import METRICS_FILE, TRACKERS_FILE

# Where the name of the package is not that of the tracker.
PACKAGES = {"comet_ml": "comet-ml"}
COMMANDS = {"trackio": "trackio show --project {project}", "mlflow": "mlflow ui"}
# trackio may send its rows elsewhere, where nobody counts them here.
REMOTE_TRACKIO = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")


def require_others(names: Sequence[str]) -> None:
    """Checks that the packages of trackers are installed.

    Raises:
        UserError: one is not, or accelerate is too old for it.
    """
    for name in names:
        if name not in of_accelerate.LOGGER_TYPE_TO_CLASS:
            raise UserError(
                f"track.also: this version of accelerate has no tracker {name}: pip install -U"
                " accelerate, or --track.also none"
            )
        if find_spec(name) is None:
            package = PACKAGES.get(name, name)
            raise UserError(
                f"track.also: {name} is not installed: pip install {package}, or --track.also none"
            )


class OtherTracker(GeneralTracker):
    """One tracker of accelerate, which is given up at its first failure.

    Args:
        rows: the rows of metrics.jsonl at the start of the launch. Those that the tracker lacks are
            sent.
        say: prints a line for the user.
    """

    requires_logging_directory = False

    def __init__(
        self,
        name: str,
        config: Config,
        run_dir: Path,
        rows: Sequence[metrics.Row],
        say: Callable[[str], None],
    ) -> None:
        self.name = name
        super().__init__()
        self._inner: GeneralTracker | None = None
        self._config, self._run_dir, self._rows, self._say = config, run_dir, rows, say
        self._to_skip = 0

    @property
    def tracker(self) -> Any:
        return self._inner and self._inner.tracker

    def begin(self) -> None:
        """Starts or continues the tracker's run.

        Not `start`, which older versions of accelerate do not call.
        """
        self._guarded(self._begin)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        if self._to_skip:
            self._to_skip -= 1
        elif self._inner is not None:
            self._guarded(self._log, values)

    def finish(self) -> None:
        if self._inner is not None:
            self._guarded(self._inner.finish)

    def curves(self) -> list[str]:
        """Lists the command that shows the curves, if there is one."""
        command = COMMANDS.get(self.name, "")
        return [command.format(project=self._config.track.project)] if command else []

    def _guarded(self, function: Callable[..., None], *args: Any) -> None:
        try:
            function(*args)
        # Whatever a tracker raises, the rows are in metrics.jsonl and the training goes on.
        except Exception as error:
            self._inner = None
            why = first_line(error)
            self._say(f"track.also: {self.name} failed ({why}); rows still go to {METRICS_FILE}")

    def _begin(self) -> None:
        kept = _read(self._run_dir)
        options, there = _continued(self.name, self._config, self._run_dir, kept)
        tracker_class = of_accelerate.LOGGER_TYPE_TO_CLASS[self.name]
        words = [self._config.track.project]
        if tracker_class.requires_logging_directory:
            words.append(str(self._run_dir / self.name))
        inner = tracker_class(*words, **options)
        if hasattr(inner, "start"):  # older versions of accelerate start it when it is made
            inner.start()
        if there is None:
            flat = self._config.flat().items()
            inner.store_init_configuration({k: "none" if v is None else v for k, v in flat})
        self._inner = inner
        if self.name == "mlflow":
            options = {"run_id": inner.tracker.info.run_id}
        if self.name in ("trackio", "mlflow"):
            _write(self._run_dir, kept | {self.name: options.get("run_id") or options["name"]})
            for row in self._rows[there or 0 :]:
                self._log(row)
            self._to_skip = max(0, (there or 0) - len(self._rows))

    def _log(self, row: metrics.Row) -> None:
        assert self._inner is not None
        # trackio reserves the name `step`.
        values = {name: value for name, value in row.items() if name != metrics.STEP}
        self._inner.log(values, step=int(row[metrics.STEP]))


def _continued(
    name: str, config: Config, run_dir: Path, kept: dict[str, str]
) -> tuple[dict[str, Any], int | None]:
    """Returns the options of a tracker, and how many rows its run has; None for a new run."""
    title = config.track.name or run_dir.absolute().name
    if name == "mlflow":
        if name not in kept:
            return {"run_name": title}, None
        import mlflow

        # Every row has an epoch.
        rows = mlflow.MlflowClient().get_metric_history(kept[name], metrics.EPOCH)
        return {"run_id": kept[name]}, len(rows)
    if name == "trackio":
        local = not any(os.environ.get(variable) for variable in REMOTE_TRACKIO)
        continues = name in kept and local
        # trackio knows runs by name; the digits tell apart folders of one name.
        title = kept[name] if continues else f"{title}-{secrets.token_hex(2)}"
        quiet = {"auto_log_gpu": False, "auto_log_cpu": False, "embed": False}
        options = {"name": title, "resume": "allow", **quiet}
        if not continues:
            return options, None
        from trackio.sqlite_storage import SQLiteStorage

        return options, SQLiteStorage.get_log_count(config.track.project, run=title)
    return {}, None


def _read(run_dir: Path) -> dict[str, str]:
    remedy = "the trackers get a new run"
    return read_json(run_dir / TRACKERS_FILE, dict[str, str], remedy) or {}


def _write(run_dir: Path, kept: dict[str, str]) -> None:
    atomic_write(run_dir / TRACKERS_FILE, json.dumps(kept).encode() + b"\n")

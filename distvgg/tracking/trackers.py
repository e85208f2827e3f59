"""Destinations of rows: metrics.jsonl, the terminal or log, W&B, TensorBoard and others.

Every destination, distvgg's own included, is a tracker of accelerate. Rows always go to
`metrics.jsonl` and to the terminal or log.

Invariant: `metrics.jsonl` is written first, flushed row by row, by the main process only. No
destination prompts the user. W&B cannot end a run or delay a run for long. The trackers of
`track.also` cannot end a run either, but they run in this process, which waits for them.
"""

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.tracking import GeneralTracker

from distvgg import metrics
from distvgg.config import Config
from distvgg.errors import UserError
from distvgg.runs.layout import METRICS_FILE
from distvgg.runs.metrics_file import Mark, MetricsFile, read_rows
from distvgg.tracking.console import Best, Console
from distvgg.tracking.others import OtherTracker, require_others
from distvgg.tracking.wandb_process import WandBProcess, start_wandb

if TYPE_CHECKING:
    from accelerate import Accelerator


class Tracking:
    """All destinations of a run. Does nothing on processes other than the main process.

    Args:
        steps: total steps of the run.
        done: steps that are done already.
        mark: the end of metrics.jsonl after `done` steps.
        best: step and top-1 of the best validation so far, if any.
    """

    def __init__(
        self,
        accelerator: "Accelerator",
        config: Config,
        run_dir: Path,
        steps: int,
        done: int = 0,
        mark: Mark = Mark(),  # noqa: B008  frozen
        best: Best | None = None,
    ) -> None:
        self._trackers: list[GeneralTracker] = []
        self._console: Console | None = None
        self._file: MetricsFile | None = None
        self._wandb: WandBProcess | None = None
        self._local = [str(run_dir / METRICS_FILE)]
        if not accelerator.is_main_process:
            return
        self._console = Console(steps, done, best)
        require_others(config.track.also)
        self._file = MetricsFile(run_dir / METRICS_FILE, mark, self.say)
        if config.track.wandb and os.environ.get("WANDB_MODE") != "disabled":
            self._wandb = start_wandb(run_dir, self.say)
        accelerator.log_with = [JsonLines(self._file, self._wandb), self._console]
        if config.track.tensorboard:
            accelerator.log_with.append(require_tensorboard())
            self._local.append(f"tensorboard --logdir {run_dir / 'tensorboard'}")
        rows = read_rows(run_dir / METRICS_FILE) if config.track.also else []
        rows = list(map(metrics.without_clock, rows))
        others = [OtherTracker(n, config, run_dir, rows, self.say) for n in config.track.also]
        for other in others:
            other.begin()
            self._local += other.curves()
        accelerator.log_with += others
        flat = {k: v if v is not None else "none" for k, v in config.flat().items()}
        # Hide TensorBoard's rows of steps after the checkpoint, because those steps run again.
        purge = {"tensorboard": {"purge_step": done + 1}}
        accelerator.init_trackers(config.track.project, flat, purge)
        self._trackers = accelerator.trackers

    def planned_curves(self) -> list[str]:
        """Lists where the curves will be, without waiting for W&B to say where."""
        return self._local + (["W&B, whose line follows"] if self._wandb else [])

    def curves(self) -> list[str]:
        """Lists the places and addresses of the curves."""
        return self._local + (self._wandb.curves() if self._wandb else [])

    def log(self, row: metrics.Row) -> None:
        """Passes a row, with its `step`, to every destination."""
        for tracker in list(self._trackers):
            try:
                tracker.log(row, step=int(row[metrics.STEP]))
            except OSError as error:  # TensorBoard, e.g. on a full disk
                self._trackers.remove(tracker)
                self.say(f"{tracker.name}: {error.strerror}; rows still go to {METRICS_FILE}")

    def mark(self) -> Mark:
        """Returns the end of metrics.jsonl. For the main process."""
        assert self._file is not None
        return self._file.mark()

    def flush(self) -> None:
        """Flushes metrics.jsonl to the disk. For the main process, from any thread.

        Raises:
            OSError: the disk rejects the rows.
        """
        assert self._file is not None
        self._file.flush()

    def step_done(self) -> None:
        """Advances the progress bar by one step."""
        if self._console:
            self._console.advance()

    def say(self, line: str) -> None:
        """Prints a line without breaking the progress bar, on the main process only."""
        if self._console:
            self._console.say(line)


class JsonLines(GeneralTracker):
    """The file metrics.jsonl, and the process that sends it to W&B, as a tracker of accelerate."""

    name = "jsonl"
    requires_logging_directory = False

    def __init__(self, file: MetricsFile, wandb: WandBProcess | None) -> None:
        super().__init__()
        self._file, self._wandb = file, wandb
        self._began = time.monotonic()

    @property
    def tracker(self) -> MetricsFile:
        return self._file

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        passed = time.monotonic() - self._began
        clock = {metrics.UNIX_TIME: round(time.time(), 3), metrics.LAUNCH_SECONDS: round(passed, 3)}
        self._file.append(values | clock)

    def finish(self) -> None:
        self._file.close()
        if self._wandb:
            self._wandb.finish()


def require_tensorboard() -> str:
    """Returns the name of accelerate's TensorBoard tracker.

    Raises:
        UserError: TensorBoard is not installed.
    """
    try:
        import tensorboard  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(
            "track.tensorboard needs TensorBoard: pip install tensorboard, or"
            " --track.tensorboard false"
        ) from error
    return "tensorboard"

"""Where rows go: metrics.jsonl always, a terminal or log, W&B and TensorBoard through accelerate.

Every destination is one of accelerate's trackers, ours included. Invariant: `metrics.jsonl` is
written first, flushed row by row, by the main process only; no destination asks a question, and
W&B, the one that lives elsewhere, cannot end a run or hold it up for long.
"""

import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.tracking import GeneralTracker

from distvgg import metrics
from distvgg.config import Config, UserError
from distvgg.metrics_file import Mark, MetricsFile
from distvgg.run_folder import METRICS_FILE
from distvgg.wandb_tracker import WandB, wandb_mode

if TYPE_CHECKING:
    from accelerate import Accelerator
    from tqdm import tqdm

# Seconds between two lines of training progress where there is no terminal.
CALM = 30.0


class Tracking:
    """All destinations of a run. Silent on every process but the main one.

    Args:
        steps: of the whole run.
        done: steps that are done already.
        mark: the end of metrics.jsonl then.
    """

    def __init__(
        self,
        accelerator: "Accelerator",
        config: Config,
        run_dir: Path,
        steps: int,
        done: int = 0,
        mark: Mark = Mark(),  # noqa: B008  frozen
    ) -> None:
        self._trackers: list[GeneralTracker] = []
        self._console: Console | None = None
        self._file: MetricsFile | None = None
        self.curves = [str(run_dir / METRICS_FILE)]
        if not accelerator.is_main_process:
            return
        self._console = Console(steps, done)
        self._file = MetricsFile(run_dir / METRICS_FILE, mark, self.say)
        accelerator.log_with = [JsonLines(self._file), self._console]
        if config.track.tensorboard:
            accelerator.log_with.append(require_tensorboard())
            self.curves.append(f"tensorboard --logdir {run_dir / 'tensorboard'}")
        mode, why = wandb_mode() if config.track.wandb else ("disabled", "")
        if mode != "disabled":
            wandb = WandB(config, run_dir, mode, why, self.say, self._file.rows)
            accelerator.log_with.append(wandb)
        flat = {k: v if v is not None else "none" for k, v in config.flat().items()}
        # What TensorBoard has of steps after the checkpoint is hidden: they come again.
        purge = {"tensorboard": {"purge_step": done + 1}}
        accelerator.init_trackers(config.track.project, flat, purge)
        self._trackers = accelerator.trackers
        if mode != "disabled":
            self.curves.extend(wandb.curves())

    def log(self, row: metrics.Row) -> None:
        """Hands a row, with its `step`, to every destination."""
        for tracker in list(self._trackers):
            try:
                tracker.log(row, step=int(row[metrics.STEP]))
            except OSError as error:  # TensorBoard's, as of a full disk; the others take it all
                self._trackers.remove(tracker)
                self.say(f"{tracker.name}: {error.strerror}; rows still go to {METRICS_FILE}")

    def mark(self) -> Mark:
        """The end of metrics.jsonl. For the main process."""
        assert self._file is not None
        return self._file.mark()

    def flush(self) -> None:
        """Brings metrics.jsonl to the disk. For the main process, from any thread.

        Raises:
            OSError: the disk does not take it.
        """
        assert self._file is not None
        self._file.flush()

    def step_done(self) -> None:
        """Moves the progress bar."""
        if self._console:
            self._console.advance()

    def say(self, line: str) -> None:
        """Prints a line without tearing the progress bar; on the main process only."""
        if self._console:
            self._console.say(line)


class JsonLines(GeneralTracker):
    """metrics.jsonl as one of accelerate's trackers."""

    name = "jsonl"
    requires_logging_directory = False

    def __init__(self, file: MetricsFile) -> None:
        super().__init__()
        self._file = file

    @property
    def tracker(self) -> MetricsFile:
        return self._file

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self._file.append(values)

    def finish(self) -> None:
        self._file.close()


class Console(GeneralTracker):
    """A progress bar on a terminal; in a log file a line for each evaluation and, no more often
    than every 30 s, one for training."""

    name = "console"
    requires_logging_directory = False

    def __init__(self, steps: int, done: int = 0) -> None:
        super().__init__()
        self._steps = steps
        self._before = done
        self._done = 0  # since then
        self._started = 0.0  # when the first step was done: what came before tells no speed
        self._last_line = -CALM
        self._bar: tqdm[Any] | None = None

    @property
    def tracker(self) -> Any:
        return self._bar

    def advance(self) -> None:
        self._done += 1
        if self._done == 1:
            self._started = time.monotonic()
            self._bar = _progress_bar(self._steps, self._before) if sys.stderr.isatty() else None
        if self._bar is not None:
            self._bar.update()

    def say(self, line: str) -> None:
        with suppress(OSError):  # a log file on a full disk, a terminal that is gone
            if self._bar is not None:
                self._bar.write(line)
            else:
                print(line, flush=True)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        assert step is not None
        if metrics.TRAIN_LOSS not in values:
            self.say(f"{self._where(values)}  {metrics.describe(values)}")
        elif self._bar is not None:
            self._bar.set_postfix_str(metrics.describe(values))
        elif time.monotonic() - self._last_line >= CALM:
            self._last_line = time.monotonic()
            left = ""
            if self._done > 1:
                seconds = (self._last_line - self._started) / (self._done - 1)
                left = f", {_duration(seconds * (self._steps - step))} left"
            self.say(f"{self._where(values)}  {metrics.describe(values)}{left}")

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _where(self, row: metrics.Row) -> str:
        step = f"{row[metrics.STEP]:>{len(str(self._steps))}}/{self._steps}"
        return f"step {step}  epoch {row[metrics.EPOCH]:.2f}"


def _progress_bar(steps: int, done: int) -> "tqdm[Any]":
    from tqdm import tqdm

    return tqdm(total=steps, initial=done, unit="step", dynamic_ncols=True, smoothing=0.1)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def require_tensorboard() -> str:
    """Its name as a tracker of accelerate's.

    Raises:
        UserError: it is not installed.
    """
    try:
        import tensorboard  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(
            "track.tensorboard needs TensorBoard: pip install 'distvgg[tensorboard]', or"
            " --track.tensorboard false"
        ) from error
    return "tensorboard"

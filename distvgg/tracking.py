"""Where rows go: metrics.jsonl always, a terminal or log, W&B and TensorBoard through accelerate.

Every destination is one of accelerate's trackers, ours included. Invariant: `metrics.jsonl` is
written first, flushed row by row, by the main process only; no destination prompts, and none but
the file can end a run.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from accelerate.tracking import GeneralTracker

from distvgg import metrics
from distvgg.config import Config, UserError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from tqdm import tqdm

METRICS_FILE = "metrics.jsonl"
# A W&B server that does not answer is given up after this many seconds; its default is 90.
WANDB_TIMEOUT = 20
# Seconds between two lines of training progress where there is no terminal.
CALM = 30.0


class Tracking:
    """All destinations of a run. Silent on every process but the main one."""

    def __init__(self, accelerator: "Accelerator", config: Config, run_dir: Path, steps: int) -> None:
        self._trackers: list[GeneralTracker] = []
        self._console: Console | None = None
        self.curves = [str(run_dir / METRICS_FILE)]
        if not accelerator.is_main_process:
            return
        self._console = Console(steps)
        accelerator.log_with = [JsonLines(run_dir), self._console]
        init: dict[str, dict[str, Any]] = {}
        if config.track.tensorboard:
            accelerator.log_with.append(_tensorboard())
            self.curves.append(f"tensorboard --logdir {run_dir / 'tensorboard'}")
        mode = _wandb_mode() if config.track.wandb else "disabled"
        if mode != "disabled":
            accelerator.log_with.append("wandb")
            init["wandb"] = _wandb_arguments(config, run_dir, mode)
        flat = {k: v if v is not None else "none" for k, v in config.flat().items()}
        try:
            accelerator.init_trackers(config.track.project, flat, init)
        except Exception as error:
            if mode != "online" or not _is_wandb_error(error):
                raise
            _wandb_offline_instead(accelerator, error, init["wandb"])
            mode = "offline"
            accelerator.init_trackers(config.track.project, flat, init)
        self._trackers = accelerator.trackers
        if mode != "disabled":
            self._follow_wandb(mode)

    def log(self, row: metrics.Row) -> None:
        """Hands a row, with its `step`, to every destination."""
        for tracker in self._trackers:
            # W&B drops rows whose step goes back, as it does after a resume: there `step` is a
            # value, and the axis by define_metric.
            step = None if tracker.name == "wandb" else int(row[metrics.STEP])
            tracker.log(row, step=step)

    def step_done(self) -> None:
        """Moves the progress bar."""
        if self._console:
            self._console.advance()

    def say(self, line: str) -> None:
        """Prints a line without tearing the progress bar; on the main process only."""
        if self._console:
            self._console.say(line)

    def _follow_wandb(self, mode: str) -> None:
        run = next(t for t in self._trackers if t.name == "wandb").tracker
        run.define_metric("*", step_metric=metrics.STEP)
        if mode == "online":
            self.curves.append(run.url)
            self.say(f"W&B: {run.url}")
            return
        folder = run.settings.sync_dir
        self.curves.append(f"wandb sync {folder}")
        self.say(f"W&B: offline. To upload: wandb sync {folder}; to view: wandb leet {folder}")


class JsonLines(GeneralTracker):
    """metrics.jsonl: one JSON object a line, on disk before `log` returns."""

    name = "jsonl"
    requires_logging_directory = False

    def __init__(self, run_dir: Path) -> None:
        super().__init__()
        self._file = (run_dir / METRICS_FILE).open("w")

    @property
    def tracker(self) -> TextIO:
        return self._file

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def finish(self) -> None:
        self._file.close()


class Console(GeneralTracker):
    """A progress bar on a terminal; in a log file a line for each evaluation and, no more often
    than every 30 s, one for training."""

    name = "console"
    requires_logging_directory = False

    def __init__(self, steps: int) -> None:
        super().__init__()
        self._steps = steps
        self._started = time.monotonic()
        self._last_line = -CALM
        self._bar: tqdm[Any] | None = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=steps, unit="step", dynamic_ncols=True, smoothing=0.1)

    @property
    def tracker(self) -> Any:
        return self._bar

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.write(line)
        else:
            print(line, flush=True)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        assert step is not None
        if metrics.TRAIN_LOSS not in values:
            self.say(f"{self._where(values)}  {describe(values)}")
        elif self._bar is not None:
            self._bar.set_postfix_str(describe(values))
        elif time.monotonic() - self._last_line >= CALM:
            self._last_line = time.monotonic()
            left = (self._last_line - self._started) / step * (self._steps - step)
            self.say(f"{self._where(values)}  {describe(values)}, {_duration(left)} left")

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _where(self, row: metrics.Row) -> str:
        return f"step {row[metrics.STEP]:>{len(str(self._steps))}}/{self._steps}  epoch {row[metrics.EPOCH]:.2f}"


def describe(row: metrics.Row) -> str:
    """A row's losses, accuracies and throughput in words."""
    words = []
    for name, value in row.items():
        split, _, metric = name.rpartition("/")
        label = metric if split == "train" else f"{split} {metric}"
        if metric == metrics.LOSS:
            words.append(f"{label} {value:.3f}")
        elif metric in (metrics.TOP1, metrics.TOP5, metrics.SUPERCLASS_TOP1):
            words.append(f"{label} {100 * value:.2f}%")
        elif name == metrics.IMAGES_PER_SEC:
            words.append(f"{value:,.0f} images/s")
    return ", ".join(words)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _tensorboard() -> str:
    try:
        import tensorboard  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(
            "track.tensorboard needs TensorBoard: pip install 'distvgg[tensorboard]', or"
            " --track.tensorboard false"
        ) from error
    return "tensorboard"


def _wandb_mode() -> str:
    """online, offline or disabled: as WANDB_MODE says, else online where there is a key. Never
    asks: W&B's own default waits for ever at a prompt on a terminal."""
    import wandb

    asked = os.environ.get("WANDB_MODE", "")
    if asked in ("offline", "dryrun"):
        return "offline"
    if asked == "disabled":
        return "disabled"
    try:
        return "online" if wandb.login(prompt=False, verify=False) else "offline"
    except wandb.errors.AuthenticationError as error:  # a key of the wrong form
        print(f"W&B: {error}", flush=True)
        return "offline"


def _wandb_arguments(config: Config, run_dir: Path, mode: str) -> dict[str, Any]:
    import wandb

    return {
        "name": config.track.name or run_dir.name,
        "dir": str(run_dir),
        "mode": mode,
        "settings": wandb.Settings(
            init_timeout=WANDB_TIMEOUT,
            # The rows are in metrics.jsonl: an unreachable server must not keep a job from ending.
            finish_timeout=WANDB_TIMEOUT,
            finish_timeout_raises=False,
            console="off",
            silent=True,
        ),
    }


def _is_wandb_error(error: Exception) -> bool:
    import wandb

    return isinstance(error, wandb.errors.CommError | wandb.errors.AuthenticationError)


def _wandb_offline_instead(
    accelerator: "Accelerator", error: Exception, arguments: dict[str, Any]
) -> None:
    """Clears the failed attempt away so that trackers can start again with W&B offline."""
    import wandb

    reason = " ".join(str(error).split())
    print(f"W&B: not reached ({reason[:160]})", flush=True)
    accelerator.trackers.clear()
    wandb.teardown()
    arguments["mode"] = "offline"

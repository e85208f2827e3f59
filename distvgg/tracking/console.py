"""Progress and rows on the terminal."""

import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from accelerate.tracking import GeneralTracker

from distvgg import metrics

if TYPE_CHECKING:
    from tqdm import tqdm


# Seconds between two lines of training progress if there is no terminal.
CALM = 30.0
BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}, {remaining} left{postfix}]"
VAL_TOP1 = f"val/{metrics.TOP1}"


class Best(NamedTuple):
    """The best validation so far: its step and top-1. The earliest of several that are equal."""

    step: int
    top1: float


class Console(GeneralTracker):
    """A progress bar on a terminal, or lines in a log file.

    A log file gets one line for each evaluation, and at most one line for training every 30 s.

    Args:
        steps: total steps of the run.
        done: steps that are done already.
        best: the best validation so far, if any.
    """

    name = "console"
    requires_logging_directory = False

    def __init__(self, steps: int, done: int = 0, best: Best | None = None) -> None:
        super().__init__()
        self._best = best
        self._steps = steps
        self._before = done
        self._done = 0  # steps of this launch
        self._started = 0.0  # end of the first step, from which the speed is measured
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
        with suppress(OSError):  # a log file on a full disk, or a closed terminal
            if self._bar is not None:
                self._bar.write(line)
            else:
                print(line, flush=True)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        assert step is not None
        if metrics.TRAIN_LOSS not in values:
            self.say(f"{self._where(values)}  {metrics.describe(values)}{self._standing(values)}")
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

    def _standing(self, row: metrics.Row) -> str:
        """Returns how a validation compares with those before; empty for other evaluations."""
        top1 = row.get(VAL_TOP1)
        if top1 is None:
            return ""
        if self._best is None or top1 > self._best.top1:
            self._best = Best(int(row[metrics.STEP]), top1)
            return "  <- new best"
        return f"  (best top1 {100 * self._best.top1:.2f}% at step {self._best.step})"

    def _where(self, row: metrics.Row) -> str:
        step = f"{row[metrics.STEP]:>{len(str(self._steps))}}/{self._steps}"
        return f"step {step}  epoch {row[metrics.EPOCH]:.2f}"


def _progress_bar(steps: int, done: int) -> "tqdm[Any]":
    from tqdm import tqdm

    return tqdm(
        total=steps, initial=done, bar_format=BAR, unit="step", dynamic_ncols=True, smoothing=0.1
    )


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

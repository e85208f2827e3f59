"""Weights & Biases, the one destination that lives elsewhere.

Invariant: it asks no question, and neither ends a run nor holds it up for long.
"""

import os
import secrets
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.tracking import WandBTracker
from pydantic import ValidationError

from distvgg import metrics
from distvgg.config import Config, UserError

# W&B's settings where the environment has no others. Its own defaults wait 90 s for a server at
# the start and for ever at the end; and its greeting costs a request, 5 s where nobody answers.
WANDB_DEFAULTS = {
    "WANDB_INIT_TIMEOUT": "20",
    "WANDB_FINISH_TIMEOUT": "20",
    "WANDB_FINISH_TIMEOUT_RAISES": "true",
    "WANDB_CONSOLE": "off",
    "WANDB_SILENT": "true",
}


class WandB(WandBTracker):
    """A W&B run that nobody has to wait for: offline where the server is not reached, given up
    where W&B itself fails, with a line that says so."""

    def __init__(
        self, config: Config, run_dir: Path, mode: str, why: str, say: Callable[[str], None]
    ) -> None:
        name = config.track.name or run_dir.name
        # One id for both attempts: what the first may have left on the server is this same run.
        id = secrets.token_hex(4)
        super().__init__(config.track.project, name=name, dir=str(run_dir), mode=mode, id=id)
        self._why_offline = why
        self._say = say
        self._failed = False

    def start(self) -> None:
        try:
            self._start_online_or_offline()
        except _wandb_failures() as error:
            self._give_up(error)
            return
        # W&B drops rows whose own step goes back, as it does after a resume: `step` is a value.
        self._attempt(self.run.define_metric, "*", step_metric=metrics.STEP)
        if self.run.offline:
            view = f"wandb leet {shlex.quote(self.run.settings.sync_dir)}"
            self._say(
                f"W&B: offline ({self._why_offline}). To upload: {self._upload()}; to view: {view}"
            )
        else:
            self._say(f"W&B: {self.run.url}")

    def curves(self) -> list[str]:
        """Where the curves are, if anywhere: an address, or the command that puts them there."""
        if self._failed:
            return []
        return [self._upload() if self.run.offline else self.run.url]

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._attempt(super().store_init_configuration, values)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self._attempt(super().log, values)

    def finish(self) -> None:
        self._attempt(self._finish)

    def _finish(self) -> None:
        try:
            super().finish()
        except TimeoutError as error:
            self._say(f"W&B: {_one_line(error)} To upload the rest: {self._upload()}")

    def _start_online_or_offline(self) -> None:
        import wandb

        try:
            super().start()
        except wandb.errors.Error as error:
            if self.init_kwargs["mode"] == "offline":
                raise
            self._why_offline = _one_line(error)
            self.init_kwargs["mode"] = "offline"
            wandb.teardown()  # its process refuses a second run of the same id
            super().start()

    def _attempt(self, do: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """Asks something of W&B, unless that failed before."""
        if not self._failed:
            try:
                do(*args, **kwargs)
            except _wandb_failures() as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._failed = True
        self._say(f"W&B: failed ({_one_line(error)}); rows still go to metrics.jsonl")

    def _upload(self) -> str:
        return f"wandb sync {shlex.quote(self.run.settings.sync_dir)}"


def wandb_mode() -> tuple[str, str]:
    """online, offline or disabled, and why if offline: as W&B is set, else online where there is a
    key. Never asks: W&B's own default waits for ever at a prompt on a terminal."""
    for name, value in WANDB_DEFAULTS.items():
        os.environ.setdefault(name, value)
    import wandb
    from wandb.sdk import wandb_setup

    try:
        # wandb.setup() would start W&B's process as well, and hang where that does not start.
        mode = wandb_setup.singleton().settings.mode
        if mode == "disabled":
            return "disabled", ""
        if mode in ("offline", "dryrun"):
            return "offline", "as set"
        if wandb.login(prompt=False, verify=False):
            return "online", ""
        return "offline", "no API key, see wandb login"
    except wandb.errors.AuthenticationError as error:  # a key of the wrong form
        return "offline", _one_line(error)
    except ValidationError as error:
        setting, message = error.errors()[0]["loc"][0], error.errors()[0]["msg"]
        raise UserError(
            f"W&B's setting {setting}: {message}; mend WANDB_{str(setting).upper()}, or"
            " --track.wandb false"
        ) from error


def _wandb_failures() -> tuple[type[Exception], ...]:
    """What comes of a server or of W&B's own process that does not answer, or died."""
    from wandb.errors import Error
    from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError

    return Error, OSError, HandleAbandonedError, MailboxClosedError


def _one_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)

"""Weights & Biases, the only remote destination of rows.

Invariants: W&B never prompts the user and never delays a step. W&B does not end a run, and does not
delay the start or end of a run for long. Each row of metrics.jsonl becomes one item of the W&B
run's history, over any number of restarts.
"""

import atexit
import contextlib
import os
import shlex
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any
from urllib.parse import urlsplit

from accelerate.tracking import WandBTracker
from pydantic import ValidationError

from distvgg import metrics
from distvgg.config import Config
from distvgg.errors import UserError
from distvgg.reachability import behind_proxy, connects
from distvgg.tracking.wandb_ledger import Ledger

# W&B's settings, unless the environment sets them. W&B's own defaults wait 90 s for a server at
# the start and forever at the end. W&B's greeting costs a request, 5 s if no server answers.
WANDB_DEFAULTS = {
    "WANDB_INIT_TIMEOUT": "20",
    "WANDB_FINISH_TIMEOUT": "20",
    "WANDB_FINISH_TIMEOUT_RAISES": "true",
    "WANDB_CONSOLE": "off",
    "WANDB_SILENT": "true",
    # Seconds until offline rows reach the disk (W&B's default is 15). The name is not stable, but
    # W&B ignores a name that it does not know.
    "WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL": "5",
}
# Seconds for the queue at the end of a run, in addition to W&B's own time to upload.
QUEUE_SECONDS = 5.0


class WandB(WandBTracker):
    """A W&B run that never blocks the training.

    The W&B run is offline if the server is unreachable, and is abandoned if W&B itself fails. Both
    cases print one line.

    The client blocks while its process does not read (after some 500 rows). Calls of the client
    therefore wait in a queue for a separate thread. The queue has no limit: a row takes less than
    1 kB. The next launch sends the rows that did not arrive; `Ledger` determines their number.
    """

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        mode: str,
        why: str,
        say: Callable[[str], None],
        written: list[metrics.Row],
    ) -> None:
        """Initialises the tracker; `written` holds the rows of metrics.jsonl so far.

        `log` receives the rows after `written`, in order.
        """
        name = config.track.name or run_dir.name
        # Offline, `resume` makes `wandb sync` append to the server's rows, steps included.
        super().__init__(config.track.project, name=name, dir=str(run_dir), resume="allow")
        self._mode = mode
        self._why_offline = why
        self._say = say
        self._written = written
        self._run_dir = run_dir
        self._ledger = Ledger(run_dir, say)
        self._skip = 0  # number of coming rows that W&B already has
        self._rows = 0  # number of rows that W&B has or was sent
        self._queue: SimpleQueue[Callable[[], Any]] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="distvgg-wandb", daemon=True)
        self._failing = threading.Lock()
        self._failed = self._done = False

    def start(self) -> None:
        try:
            have = self._start_online_or_offline()
        except _wandb_failures() as error:
            self._give_up(error)
            return
        self._rows, self._skip = have, max(0, have - len(self._written))
        # W&B drops rows whose W&B step decreases, as after a resume, so `step` is sent as a value.
        self._later(self.run.define_metric, "*", step_metric=metrics.STEP)
        for row in self._written[have:]:  # rows that a kill lost before W&B received them
            self._send(row)
        self._thread.start()
        atexit.register(self._end, 1)  # for a crash; W&B's own handler waits forever if W&B hangs
        if self.run.offline:
            view = f"wandb leet {shlex.quote(self.run.settings.sync_dir)}"
            upload = upload_command(self._run_dir)
            self._say(f"W&B: offline ({self._why_offline}). To upload: {upload}; to view: {view}")
        else:
            self._say(f"W&B: {self.run.url}")

    def curves(self) -> list[str]:
        """Lists the address of the curves or the command to upload them; empty if W&B failed."""
        if self._failed:
            return []
        return [upload_command(self._run_dir) if self.run.offline else self.run.url]

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._later(super().store_init_configuration, values)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        if self._skip:
            self._skip -= 1
        else:
            self._send(values)

    def finish(self) -> None:
        """Waits for the queue and the upload.

        The limit is `WANDB_FINISH_TIMEOUT` plus `QUEUE_SECONDS`; a timeout of 0 waits forever. A
        run that was stopped early ends like any other, and its next launch continues the W&B run.
        """
        self._end(0)

    def _end(self, exit_code: int) -> None:
        atexit.unregister(self._end)
        if self._failed or self._done:
            return
        limit = self.run.settings.finish_timeout
        self._later(self._finish, exit_code)
        self._thread.join(limit + QUEUE_SECONDS if limit > 0 else None)
        if self._thread.is_alive():
            self._give_up(TimeoutError(f"no answer in {limit + QUEUE_SECONDS:.0f} s"))

    def _start_online_or_offline(self) -> int:
        """Starts the W&B run and returns the W&B run's number of rows."""
        import wandb

        if self._mode == "online":
            self._ledger.before_online()
            self.init_kwargs |= {"mode": "online", "id": self._ledger.id}
            try:
                super().start()
            except wandb.errors.Error as error:
                self._why_offline = _one_line(error)
                wandb.teardown()  # W&B's process refuses a second run with the same id
            else:
                self._ledger.online()
                return int(self.run.starting_step)
        have = self._ledger.offline()
        self.init_kwargs |= {"mode": "offline", "id": self._ledger.id}
        super().start()
        return have

    def _send(self, row: metrics.Row) -> None:
        self._rows += 1
        self._later(self.run.log, row)

    def _later(self, do: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Queues a call to W&B, unless W&B failed before."""
        if not self._failed:
            self._queue.put(partial(do, *args, **kwargs))

    def _work(self) -> None:
        while not (self._failed or self._done):
            try:
                self._queue.get()()
            except _wandb_failures() as error:
                self._give_up(error)

    def _finish(self, exit_code: int) -> None:
        self._done = True
        try:
            self.run.finish(exit_code)
        except TimeoutError as error:
            self._say(f"W&B: {_one_line(error)} Every row is in metrics.jsonl")
        else:
            if not self.run.offline:
                self._ledger.finished_online(self._rows)

    def _give_up(self, error: Exception) -> None:
        with self._failing:
            # The end of W&B's process makes calls that wait for the process fail as well.
            if self._failed:
                return
            self._failed = True
        self._say(f"W&B: failed ({_one_line(error)}); rows still go to metrics.jsonl")
        _end_wandb()


def upload_command(run_dir: Path) -> str:
    """Returns the command that uploads every offline fragment of a run, in order."""
    return f"wandb sync {shlex.quote(str(run_dir / 'wandb'))}"


def wandb_mode() -> tuple[str, str]:
    """Returns "online", "offline" or "disabled", and the reason for "offline".

    A mode set to offline or disabled in W&B's settings is used. Otherwise the mode is online if
    there is an API key and the server is reachable, and offline if not. Never prompts: W&B's own
    default waits forever at a prompt on a terminal.

    Raises:
        UserError: a setting of W&B is invalid.
    """
    for name, value in WANDB_DEFAULTS.items():
        os.environ.setdefault(name, value)
    import wandb
    from wandb.sdk import wandb_setup

    try:
        # wandb.setup() would also start W&B's process, and hang if the process does not start.
        settings = wandb_setup.singleton().settings
        if settings.mode == "disabled":
            return "disabled", ""
        if settings.mode in ("offline", "dryrun"):
            return "offline", "as set"
        if not wandb.login(prompt=False, verify=False):
            return "offline", "no API key, see wandb login"
    except wandb.errors.AuthenticationError as error:  # a malformed key
        return "offline", _one_line(error)
    except ValidationError as error:
        setting, message = error.errors()[0]["loc"][0], error.errors()[0]["msg"]
        raise UserError(
            f"W&B's setting {setting}: {message}; fix WANDB_{str(setting).upper()}, or"
            " --track.wandb false"
        ) from error
    why = _unreachable(wandb_setup.singleton().settings)
    return ("offline", why) if why else ("online", "")


def _unreachable(settings: Any) -> str:
    """Returns why W&B's server is unreachable, or "" if the server may be reachable.

    W&B's client would detect this by itself, but only after WANDB_INIT_TIMEOUT at each launch.
    """
    url = urlsplit(settings.base_url)
    if settings.http_proxy or settings.https_proxy or behind_proxy(url):
        return ""
    host, port = url.hostname or "", url.port or {"http": 80}.get(url.scheme, 443)
    return "" if connects(host, port) else f"no connection to {host}:{port}"


def _wandb_failures() -> tuple[type[Exception], ...]:
    """Returns the exceptions raised if a server or W&B's process died or does not answer."""
    from wandb.errors import Error
    from wandb.sdk.lib.asyncio_manager import AlreadyJoinedError, RunCancelledError
    from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError

    mailbox = HandleAbandonedError, MailboxClosedError
    return Error, OSError, *mailbox, AlreadyJoinedError, RunCancelledError


def _end_wandb() -> None:
    """Kills W&B's process, which would block the interpreter's exit forever if it hangs."""
    import psutil
    import wandb

    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if child.name() == "wandb-core":
                child.kill()
    # Not at exit, where teardown prints a traceback. Teardown raises SystemExit with the exit code
    # of W&B's process.
    with contextlib.suppress(*_wandb_failures(), SystemExit):
        wandb.teardown()


def _one_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)

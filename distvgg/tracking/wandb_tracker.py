"""Weights & Biases, the one destination that lives elsewhere.

Invariants: it asks no question, never holds up a step, and neither ends a run nor holds up its
start or end for long. Each row of metrics.jsonl becomes one item of the W&B run's history, over any
number of restarts.
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

# W&B's settings where the environment has no others. Its own defaults wait 90 s for a server at
# the start and for ever at the end; and its greeting costs a request, 5 s where nobody answers.
WANDB_DEFAULTS = {
    "WANDB_INIT_TIMEOUT": "20",
    "WANDB_FINISH_TIMEOUT": "20",
    "WANDB_FINISH_TIMEOUT_RAISES": "true",
    "WANDB_CONSOLE": "off",
    "WANDB_SILENT": "true",
    # Offline rows reach the disk that often (15 s else). Not a stable name: one that W&B does not
    # know changes nothing.
    "WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL": "5",
}
# What the queue gets at the end of a run, beyond W&B's own time to upload.
QUEUE_SECONDS = 5.0


class WandB(WandBTracker):
    """A W&B run that nobody has to wait for: offline where the server is not reached, given up
    where W&B itself fails, with a line that says so.

    The client blocks while its process does not read (after some 500 rows), so what is asked of it
    waits in a queue, for a thread of its own. The queue has no limit: a row costs less than 1 kB.
    Whatever does not arrive, the next start sends: see `Ledger` for how it knows.
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
        """`written`: the rows of metrics.jsonl so far. `log` gets those after them, in order."""
        name = config.track.name or run_dir.name
        # Offline, `resume` makes `wandb sync` append to what the server has, steps included.
        super().__init__(config.track.project, name=name, dir=str(run_dir), resume="allow")
        self._mode = mode
        self._why_offline = why
        self._say = say
        self._written = written
        self._run_dir = run_dir
        self._ledger = Ledger(run_dir, say)
        self._skip = 0  # of the rows to come, those that W&B has already
        self._rows = 0  # that W&B has, or was handed
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
        # W&B drops rows whose own step goes back, as it does after a resume: `step` is a value.
        self._later(self.run.define_metric, "*", step_metric=metrics.STEP)
        for row in self._written[have:]:  # what a kill lost on the way
            self._send(row)
        self._thread.start()
        atexit.register(self._end, 1)  # a crash; W&B's own waits for ever where that hangs
        if self.run.offline:
            view = f"wandb leet {shlex.quote(self.run.settings.sync_dir)}"
            upload = upload_command(self._run_dir)
            self._say(f"W&B: offline ({self._why_offline}). To upload: {upload}; to view: {view}")
        else:
            self._say(f"W&B: {self.run.url}")

    def curves(self) -> list[str]:
        """Where the curves are, if anywhere: an address, or the command that puts them there."""
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
        """Waits for what is queued and for the upload, `WANDB_FINISH_TIMEOUT` and a little more (0:
        for ever). A run that was stopped early ends like any other; its next start goes on."""
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
        """Returns how many rows the W&B run has."""
        import wandb

        if self._mode == "online":
            self._ledger.before_online()
            self.init_kwargs |= {"mode": "online", "id": self._ledger.id}
            try:
                super().start()
            except wandb.errors.Error as error:
                self._why_offline = _one_line(error)
                wandb.teardown()  # its process refuses a second run of the same id
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
        """Asks something of W&B, unless that failed before."""
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
            if self._failed:  # the end of its process makes what waits for that fail as well
                return
            self._failed = True
        self._say(f"W&B: failed ({_one_line(error)}); rows still go to metrics.jsonl")
        _end_wandb()


def upload_command(run_dir: Path) -> str:
    """What uploads the offline sessions of a run: every fragment, in order."""
    return f"wandb sync {shlex.quote(str(run_dir / 'wandb'))}"


def wandb_mode() -> tuple[str, str]:
    """online, offline or disabled, and why if offline: as W&B is set, else online where there is a
    key and a server that can be reached. Never asks: W&B's own default waits for ever at a prompt
    on a terminal."""
    for name, value in WANDB_DEFAULTS.items():
        os.environ.setdefault(name, value)
    import wandb
    from wandb.sdk import wandb_setup

    try:
        # wandb.setup() would start W&B's process as well, and hang where that does not start.
        settings = wandb_setup.singleton().settings
        if settings.mode == "disabled":
            return "disabled", ""
        if settings.mode in ("offline", "dryrun"):
            return "offline", "as set"
        if not wandb.login(prompt=False, verify=False):
            return "offline", "no API key, see wandb login"
    except wandb.errors.AuthenticationError as error:  # a key of the wrong form
        return "offline", _one_line(error)
    except ValidationError as error:
        setting, message = error.errors()[0]["loc"][0], error.errors()[0]["msg"]
        raise UserError(
            f"W&B's setting {setting}: {message}; mend WANDB_{str(setting).upper()}, or"
            " --track.wandb false"
        ) from error
    why = _unreachable(wandb_setup.singleton().settings)
    return ("offline", why) if why else ("online", "")


def _unreachable(settings: Any) -> str:
    """Why W&B's server cannot be reached, "" where it may be. Its client would find out for itself,
    but in WANDB_INIT_TIMEOUT, at each start."""
    url = urlsplit(settings.base_url)
    if settings.http_proxy or settings.https_proxy or behind_proxy(url):
        return ""
    host, port = url.hostname or "", url.port or {"http": 80}.get(url.scheme, 443)
    return "" if connects(host, port) else f"no connection to {host}:{port}"


def _wandb_failures() -> tuple[type[Exception], ...]:
    """What comes of a server or of W&B's own process that does not answer, or died."""
    from wandb.errors import Error
    from wandb.sdk.lib.asyncio_manager import AlreadyJoinedError, RunCancelledError
    from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError

    mailbox = HandleAbandonedError, MailboxClosedError
    return Error, OSError, *mailbox, AlreadyJoinedError, RunCancelledError


def _end_wandb() -> None:
    """Ends W&B's process, for which the interpreter's exit would wait for ever if it hangs."""
    import psutil
    import wandb

    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if child.name() == "wandb-core":
                child.kill()
    # Now, because at exit it prints a traceback. SystemExit: it hands on its process's exit code.
    with contextlib.suppress(*_wandb_failures(), SystemExit):
        wandb.teardown()


def _one_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)

"""The process that sends the rows of metrics.jsonl to Weights & Biases, as its parent sees it.

Invariants: W&B never prompts the user, never delays a step, and does not end a run. It delays the
end of a run by WANDB_FINISH_TIMEOUT (20 s if unset) plus 11 s at most. The training does not import
the client.
"""

import atexit
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from signal import SIGALRM
from typing import IO

from distvgg import preemption
from distvgg.tracking.wandb_sync import NOTE, finish_timeout, sync_command

COMMAND = (sys.executable, "-m", "distvgg.tracking.wandb_sync")
# Seconds that the process has beyond its own limit.
GRACE_SECONDS = 3.0
FIRST_LINE_SECONDS = 5.0


def start_wandb(run_dir: Path, say: Callable[[str], None]) -> "WandBProcess | None":
    """Starts the process; prints a line and returns None if the system refuses another process."""
    try:
        return WandBProcess(run_dir, say)
    except OSError as error:
        say(f"W&B: failed ({error.strerror}). To upload: {sync_command(run_dir)}")
        return None


class WandBProcess:
    """The process that sends the rows, and its lines on the terminal.

    Args:
        say: prints a line; called from a thread.
    """

    def __init__(self, run_dir: Path, say: Callable[[str], None]) -> None:
        self._run_dir = run_dir
        self._say = say
        self._curves: list[str] = []
        self._last = ""  # line that was not meant for the user, such as a traceback's
        self._spoke = threading.Event()
        self._process = subprocess.Popen(
            [*COMMAND, str(run_dir)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the training
            errors="replace",
        )
        assert self._process.stdout is not None
        self._reader = threading.Thread(
            target=self._read, args=(self._process.stdout,), daemon=True
        )
        self._reader.start()
        atexit.register(self._end, b"")  # for a crash

    def curves(self) -> list[str]:
        """Lists the address of the curves or the command to upload them; empty if W&B is disabled.

        Waits FIRST_LINE_SECONDS at most for W&B's first line.
        """
        if not self._spoke.wait(FIRST_LINE_SECONDS):
            return [sync_command(self._run_dir)]
        return self._curves

    def finish(self) -> None:
        """Says how the training ended, and waits until all is sent."""
        word = preemption.stop_reason() if preemption.requested() else "finished"
        self._end(f"{word}\n".encode())

    def _end(self, word: bytes) -> None:
        atexit.unregister(self._end)
        pipe = self._process.stdin
        assert pipe is not None
        if pipe.closed:
            return
        with suppress(BrokenPipeError):  # the process ended before
            os.write(pipe.fileno(), word)
        pipe.close()
        limit = finish_timeout()
        try:
            code = self._process.wait(limit + GRACE_SECONDS if limit else None)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._reader.join(GRACE_SECONDS)  # the client's process may have the pipe open
        if code:
            why = self._last or f"exit code {code}"
            if code == -SIGALRM:
                why = f"no answer in {limit:.0f} s"
            self._say(f"W&B: failed ({why}). To upload: {sync_command(self._run_dir)}")

    def _read(self, lines: IO[str]) -> None:
        for line in lines:
            if not line.startswith("W&B: "):
                self._last = line.strip() or self._last
                continue
            self._say(line.rstrip())
            if line.startswith(NOTE):
                continue
            url = re.fullmatch(r"W&B: (https?://\S+)\n", line)
            self._curves = [url[1] if url else sync_command(self._run_dir)]
            self._spoke.set()
        self._spoke.set()

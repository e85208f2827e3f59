"""Real trainings in their own processes, started as a user starts them and watched from outside.

Invariant: benchmarks measure the program itself, by the files that it writes and by what the kernel
knows of its processes. No process outlives the block that started it.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from distvgg.metrics import STEP, Row
from distvgg.runs.layout import METRICS_FILE, STOP_FILE

ROOT = Path(__file__).parent.parent
# `fast` without what it has beyond its peers: VGG-16 on CIFAR by SGD, 4 micro-batches of 64 a step.
PLAIN: dict[str, Any] = {
    "model.max_pools": "1,2,3,4,5",
    "model.dropout": 0.5,
    "model.init": "he",
    "train.global_batch_size": 256,
    "train.micro_batch_size": 64,
    "optim.name": "sgd",
    "optim.lr": 0.1,
    "augment.flip": "random",
    "augment.cutmix_alpha": 0,
}
POLL = 0.002  # seconds: of what is timed here, seconds long, it is a thousandth
ROW_TIMEOUT = 600.0  # seconds for a row to come


def words_of(overrides: Mapping[str, Any]) -> list[str]:
    """Overrides as they are typed on a command line."""
    return [word for name, value in overrides.items() for word in (f"--{name}", str(value))]


@dataclass(frozen=True)
class Training:
    """A training under way.

    Attributes:
        began: start of its first process, by `time.perf_counter`.
    """

    folder: Path
    process: "subprocess.Popen[bytes]"
    began: float
    log: Path

    def rows(self) -> list[Row]:
        """The whole rows of metrics.jsonl so far."""
        path = self.folder / METRICS_FILE
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def until_step(self, step: int) -> list[Row]:
        """Waits for a row of this step or a later one; all rows by then.

        Raises:
            SystemExit: the training ended before, or the row does not come.
        """
        end = time.monotonic() + ROW_TIMEOUT
        while not ((rows := self.rows()) and rows[-1][STEP] >= step):
            if self.process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"no row of step {step}:\n{self.log.read_text()}")
            time.sleep(POLL)
        return rows

    def workers(self) -> list[psutil.Process]:
        """The processes that train: the children of a launcher, else the one there is."""
        first = psutil.Process(self.process.pid)
        launched = "accelerate.commands.launch" in first.cmdline()
        return first.children() if launched else [first]


@contextmanager
def training(
    words: Sequence[str], processes: int = 1, env: Mapping[str, str] | None = None
) -> Iterator[Training]:
    """Starts `distvgg train WORDS` in its own folder; requests a stop when the block ends.

    Args:
        words: recipe and options, without --run-dir.
        processes: more than one start under `accelerate launch`.
        env: variables to add to the environment.
    """
    launcher = [
        *("-m", "accelerate.commands.launch", "--num_processes", str(processes)),
        *("--config_file", str(ROOT / "accelerate_config.yaml"), "--main_process_port", "0"),
    ]
    with tempfile.TemporaryDirectory() as temporary:
        folder, log = Path(temporary) / "run", Path(temporary) / "log"
        command = [sys.executable, *(launcher if processes > 1 else ()), "-m", "distvgg", "train"]
        command += [*words, "--run-dir", str(folder)]
        with log.open("w") as output:
            began = time.perf_counter()
            process = subprocess.Popen(
                command,
                env=os.environ | (env or {}),
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            yield Training(folder, process, began, log)
            (folder / STOP_FILE).touch()
            process.wait(ROW_TIMEOUT)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

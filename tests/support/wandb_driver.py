"""A training run that is nothing but its rows, for tests of W&B over restarts.

    wandb_driver.py RUN_DIR WRITTEN TOTAL END

Resumes from a checkpoint after WRITTEN rows and logs those after them, up to TOTAL. END: `finish`;
`wait` to be killed; `crash`; `stop` W&B's processes, log 5,000 rows more, say how long that took,
and finish.
"""

import hashlib
import json
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

from distvgg import metrics
from distvgg.recipe import load
from distvgg.runs.metrics_file import Mark, MetricsFile
from distvgg.tracking.wandb_process import WandBProcess


def row(number: int) -> metrics.Row:
    """Every fifth is an evaluation, of the same step as the row before it."""
    if number % 5 == 4:
        return {"step": number - number // 5, "epoch": 0.5, "val/top1": number / 100}
    return {"step": number + 1 - number // 5, "epoch": 0.5, "train/loss": 1 / (1 + number)}


def main(run_dir: Path, written: int, total: int, end: str) -> None:
    content = b"".join(json.dumps(row(n)).encode() + b"\n" for n in range(written))
    (run_dir / "metrics.jsonl").write_bytes(content)
    (run_dir / "config.yaml").write_text(load("quickstart").to_yaml())
    mark = Mark(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    file = MetricsFile(run_dir / "metrics.jsonl", mark, print)
    wandb = WandBProcess(run_dir, lambda line: print(line, flush=True))
    for n in range(written, total):
        file.append(row(n))
    if end == "wait":
        print("logged", flush=True)
        time.sleep(60)
    if end == "crash":
        raise SystemError("as asked")
    if end == "stop":
        while not (cores := named("wandb-core")):
            time.sleep(0.05)
        for core in cores:
            core.send_signal(signal.SIGSTOP)
        started = time.perf_counter()
        for n in range(total, total + 5000):
            file.append(row(n))
        print("seconds", time.perf_counter() - started, flush=True)
    wandb.finish()
    if end == "stop":
        for core in cores:
            core.kill()  # one that is stopped does not see that its parent is gone


def named(name: str) -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it has just ended
            if process.name() == name:
                found.append(process)
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])

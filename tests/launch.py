"""Starts distvgg as a user does: in processes of its own, by the real launcher."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
# A run of seconds that still has BatchNorm, dropout, augmentation and several micro-batches a step.
TINY = (
    *("--data.train_size", "600", "--data.val_size", "103", "--model.width", "0.05"),
    *("--train.epochs", "1", "--train.global_batch_size", "64", "--train.micro_batch_size", "16"),
    *("--train.precision", "no", "--track.wandb", "false", "--track.every_steps", "1"),
)


def run(
    args: list[str] | tuple[str, ...],
    *,
    processes: int = 1,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float = 120,
    float64: bool = False,
) -> subprocess.CompletedProcess[str]:
    """`python -m distvgg ARGS`, or the same under `accelerate launch` on CPU processes."""
    program = [str(ROOT / "tests" / "float64.py")] if float64 else ["-m", "distvgg"]
    command = [sys.executable, *program]
    if processes > 1:
        command = [
            *(
                sys.executable,
                "-m",
                "accelerate.commands.launch",
                "--num_processes",
                str(processes),
            ),
            *("--config_file", str(ROOT / "accelerate_config.yaml"), "--main_process_port", "0"),
            *program,
        ]
    return subprocess.run(
        [*command, *args],
        # One thread: on busy cores, threads of tiny steps wait for each other most of the time.
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} | (env or {}),
        cwd=cwd,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=timeout,
    )


def train(run_dir: Path, *args: str, recipe: str = "quickstart", **how: Any) -> str:
    """Trains into a folder, must succeed; returns what was printed."""
    done = run(["train", recipe, "--run-dir", str(run_dir), *TINY, *args], **how)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]

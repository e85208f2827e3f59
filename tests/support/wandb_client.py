"""The real W&B client in tests: its commands, and what it adds to a row."""

import json
import os
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from distvgg.metrics import without_clock
from processes import rows
from wandb_server import KEY, WandbServer


def client(command: str, env: dict[str, str] | None = None) -> str:
    """What a command of the W&B client's prints."""
    return subprocess.run(
        [sys.executable, "-m", *shlex.split(command)],
        env=os.environ | (env or {}),
        cwd=os.environ["HOME"],  # it leaves a folder there
        check=True,
        capture_output=True,
        text=True,
    ).stdout


def login(server: WandbServer) -> dict[str, str]:
    return {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}


def own(row: dict[str, Any]) -> dict[str, Any]:
    """A row of W&B's without what the client adds to it."""
    return {name: value for name, value in row.items() if not name.startswith("_")}


def logged(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run as W&B gets them."""
    return [without_clock(row) for row in rows(folder)]


def read_offline(folder: Path) -> list[dict[str, Any]]:
    """The rows of an offline run's file, by the client's own reader."""
    if Version(metadata.version("wandb")) < Version("0.31"):
        pytest.skip("wandb leet, which reads a file, is new in wandb 0.31")
    (file,) = folder.glob("*.wandb")
    printed = client(f"wandb leet inspect --json {shlex.quote(str(file))}")
    records = [json.loads(line) for line in printed.splitlines()]
    return [own(r["history"]["item"]) for r in records if r["type"] == "history"]

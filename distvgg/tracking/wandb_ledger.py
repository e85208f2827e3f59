"""Which W&B run a run folder continues, and how many of its rows that run has.

Invariant: item i of a W&B run's history is row i of metrics.jsonl. So a number is all that a
restart has to know; where nobody can tell it, the folder goes on as a new W&B run, with every row.
"""

import json
import secrets
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distvgg.runs.files import atomic_write

LEDGER_FILE = "run.json"  # under wandb/
READER_SECONDS = 60


class Ledger:
    """The W&B id of a run folder, and what the server had when it was last known.

    A session is one process's time with W&B. Online, the server says how many rows it has. Offline,
    they are counted: those that it had at the end of the last online session, and those in the
    fragments since (`wandb/offline-run-*-ID/run-ID.wandb`), which `wandb sync` appends in order.
    A fragment that a kill left empty or torn is set aside, and its rows are written again: `wandb
    sync` of such a one leaves out all after it, says nothing, and uploads it anew every time.
    Nobody can say what it took of an online session that was killed: an offline session after one
    begins a new W&B run, and the server keeps the old one, cut short. Such a run is all that is
    ever doubled, but for a torn fragment that was uploaded before its restart; no row is dropped.
    """

    def __init__(self, run_dir: Path, say: Callable[[str], None]) -> None:
        self._folder = run_dir / "wandb"
        self._say = say
        self.id = secrets.token_hex(4)
        # Rows on the server; None since an online session began, until it ends well.
        self._uploaded: int | None = 0
        path = self._folder / LEDGER_FILE
        try:
            self.id, self._uploaded = _parse(path.read_bytes())
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            self._new_run(f"{path} is damaged: {error}")

    def before_online(self) -> None:
        """The id is on disk before a server hears of it."""
        self._write()

    def online(self) -> None:
        """An online session began. It sends what the server lacks, so that fragments that were not
        uploaded must not be any more."""
        self._uploaded = None
        self._write()
        for fragment in self._fragments():
            _set_aside(fragment)

    def finished_online(self, rows: int) -> None:
        self._uploaded = rows
        self._write()

    def offline(self) -> int:
        """An offline session begins.

        Returns:
            How many rows the server and the fragments have together: the next fragment's first row.
        """
        if self._uploaded is None:
            self._new_run(f"what the server has of {self.id} is not known")
        try:
            have = (self._uploaded or 0) + self._rows_in_fragments()
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            self._new_run(f"fragments of {self.id} cannot be read: {error}")
            have = 0
        self._write()
        return have

    def _rows_in_fragments(self) -> int:
        """Sets aside the first that is empty or torn, and all after it: rows have no gap."""
        total, whole = 0, True
        for fragment in self._fragments():
            rows = rows_in(fragment)
            uploaded = fragment.with_suffix(".wandb.synced").exists()  # the client's mark
            whole = whole and bool(rows)
            if whole or uploaded:
                total += rows or 0
            else:
                _set_aside(fragment)
        return total

    def _fragments(self) -> list[Path]:
        return sorted(self._folder.glob(f"offline-run-*-{self.id}*/run-{self.id}.wandb"))

    def _new_run(self, why: str) -> None:
        self.id, self._uploaded = secrets.token_hex(4), 0
        self._say(f"W&B: a new run, {self.id}, with every row ({why})")

    def _write(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"id": self.id, "uploaded": self._uploaded})
        atomic_write(self._folder / LEDGER_FILE, content.encode())


def _parse(content: bytes) -> tuple[str, int | None]:
    """The id and the number of rows uploaded.

    Raises:
        ValueError: if a ledger does not look like this.
    """
    values: Any = json.loads(content)
    id, uploaded = (values.get(k) for k in ("id", "uploaded")) if type(values) is dict else ("", 0)
    if not (isinstance(id, str) and len(id) == 8 and set(id) <= set("0123456789abcdef")):
        raise ValueError("no id")
    if not (uploaded is None or (type(uploaded) is int and uploaded >= 0)):
        raise ValueError("no number of rows")
    return id, uploaded


def rows_in(fragment: Path) -> int | None:
    """Counts a fragment's rows by the client's own reader; None where its last record is torn.
    0.7 s, and 0.1 s for every thousand rows."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(fragment)]
    done = subprocess.run(
        command,
        cwd=fragment.parent.parent.parent,  # it logs into a folder wandb/ there
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=True,
        timeout=READER_SECONDS,
    )
    if b"incomplete" in done.stderr or b"corrupt" in done.stderr:
        return None
    types = [json.loads(line)["type"] for line in done.stdout.splitlines()]
    return types.count("history")


def _set_aside(fragment: Path) -> None:
    """Takes the ending from a fragment by which `wandb sync` knows it."""
    fragment.rename(fragment.with_suffix(".superseded"))

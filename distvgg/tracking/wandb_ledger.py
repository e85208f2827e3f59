"""The W&B run that a run folder continues, and the number of rows that the W&B run has.

Invariant: item i of a W&B run's history is row i of metrics.jsonl. A restart therefore needs only
the number of rows. If that number is unknown, the folder continues as a new W&B run with every row.
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
    """The W&B id of a run folder, and the last known number of rows on the server.

    A session is the time that one process uses W&B. Online, the server reports its number of rows.
    Offline, the ledger adds two numbers: the rows on the server at the end of the last online
    session, and the rows in the fragments since. Fragments are the files
    `wandb/offline-run-*-ID/run-ID.wandb`, which `wandb sync` appends in order.

    A fragment that a kill left empty or torn is renamed, and its rows are written again. For such
    a fragment, `wandb sync` silently omits everything after it and uploads it again every time.

    If an online session was killed, the number of rows that the server received is unknown. The
    next offline session then starts a new W&B run, and the server keeps the old run, truncated.

    No row is dropped. Rows are duplicated only by such a new W&B run, and by a torn fragment that
    was uploaded before the restart.
    """

    def __init__(self, run_dir: Path, say: Callable[[str], None]) -> None:
        self._folder = run_dir / "wandb"
        self._say = say
        self.id = secrets.token_hex(4)
        # Rows on the server; None from the start of an online session until its clean end.
        self._uploaded: int | None = 0
        path = self._folder / LEDGER_FILE
        try:
            self.id, self._uploaded = _parse(path.read_bytes())
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            self._new_run(f"{path} is damaged: {error}")

    def before_online(self) -> None:
        """Writes the id to disk before a server receives the id."""
        self._write()

    def online(self) -> None:
        """Records that an online session began, and renames the fragments.

        The session sends the rows that the server lacks. Fragments that were not uploaded must
        therefore not be uploaded later.
        """
        self._uploaded = None
        self._write()
        for fragment in self._fragments():
            _set_aside(fragment)

    def finished_online(self, rows: int) -> None:
        self._uploaded = rows
        self._write()

    def offline(self) -> int:
        """Records that an offline session begins.

        Returns:
            The number of rows on the server and in the fragments, which is the index of the next
            fragment's first row.
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
        """Counts the rows in the fragments, and renames fragments so that rows have no gap.

        The first fragment that is empty or torn is renamed, and all after it. Fragments that were
        uploaded keep their names.
        """
        total, whole = 0, True
        for fragment in self._fragments():
            rows = rows_in(fragment)
            uploaded = fragment.with_suffix(".wandb.synced").exists()  # written by the W&B client
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
    """Returns the id and the number of uploaded rows.

    Raises:
        ValueError: the content is not a ledger.
    """
    values: Any = json.loads(content)
    id, uploaded = (values.get(k) for k in ("id", "uploaded")) if type(values) is dict else ("", 0)
    if not (isinstance(id, str) and len(id) == 8 and set(id) <= set("0123456789abcdef")):
        raise ValueError("no id")
    if not (uploaded is None or (type(uploaded) is int and uploaded >= 0)):
        raise ValueError("no number of rows")
    return id, uploaded


def rows_in(fragment: Path) -> int | None:
    """Returns a fragment's number of rows, or None if the last record is torn.

    Uses the W&B client's own reader, which takes 0.7 s plus 0.1 s for every thousand rows.
    """
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(fragment)]
    done = subprocess.run(
        command,
        cwd=fragment.parent.parent.parent,  # the reader logs into wandb/ of its cwd
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
    """Replaces the suffix by which `wandb sync` recognises a fragment."""
    fragment.rename(fragment.with_suffix(".superseded"))

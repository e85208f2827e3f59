"""`distvgg report`: runs as one HTML page, and the page that `train` leaves in a run folder."""

import os
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from distvgg.errors import UserError, one_line
from distvgg.runs.files import atomic_write
from distvgg.runs.layout import (
    CHECKPOINTS,
    CONFUSION_FILE,
    FAILURE_FILE,
    METRICS_FILE,
    REPORT_FILE,
    RESULT_FILE,
    WEIGHTS_FILE,
    refuse_to_overwrite,
)
from distvgg.wording import counted

POLL = 1.0  # seconds between two looks at the run folders
RELOAD = 5  # seconds after which an open page reads the file again
_WATCHED = (METRICS_FILE, RESULT_FILE, CONFUSION_FILE, FAILURE_FILE, WEIGHTS_FILE, CHECKPOINTS)


def report(run_dirs: Sequence[Path], out: Path, *, watch: bool = False) -> str:
    """Writes the report of runs in any state.

    Args:
        run_dirs: folders of runs.
        out: file to write.
        watch: write again whenever the runs change, until all are finished or Ctrl-C.

    Returns:
        A line for the user.

    Raises:
        UserError: Bokeh is missing, a folder is no run folder, no run has rows, datasets differ,
            or the file cannot be written or belongs to a run.
    """
    _require_bokeh()
    refuse_to_overwrite(out, REPORT_FILE)
    shown = counted(write(run_dirs, out, reload_seconds=RELOAD if watch else None), "run")
    if not watch:
        return f"report of {shown}: {out}"
    print(f"report of {shown}: {out}; Ctrl-C ends the watch", flush=True)
    try:
        _watch(run_dirs, out)
    except KeyboardInterrupt:
        print()
    write(run_dirs, out)  # an open page reloads once more, and then no more
    return f"the watch has ended: {out}"


def write_at_end(run_dir: Path) -> str | None:
    """Writes the report of a run that has just ended into its folder.

    Returns:
        A line for the user if there is no report. Never raises an exception, because the run has
        succeeded.
    """
    report, result = run_dir / REPORT_FILE, run_dir / RESULT_FILE
    try:
        if report.is_file() and report.stat().st_mtime_ns >= result.stat().st_mtime_ns:
            return None  # the run had ended before
        _require_bokeh()
        write([run_dir], report)
    # Whatever Bokeh or a damaged file raises, the run has its result.
    except Exception as error:
        return f"  report: not written ({one_line(error)})"
    return None


def write(run_dirs: Sequence[Path], out: Path, *, reload_seconds: int | None = None) -> int:
    """Writes the report, once; returns how many runs it shows.

    Raises:
        UserError: as in `report`.
    """
    from distvgg.commands.report.page import page
    from distvgg.commands.report.runs import read_runs

    runs = read_runs(run_dirs, lambda line: print(f"note: {line}", file=sys.stderr))
    content = page(runs, reload_seconds=reload_seconds).encode()
    try:
        atomic_write(out, content, writer=f"{socket.gethostname()}-{os.getpid()}.")
    except OSError as error:
        raise UserError(
            f"cannot write {out} ({error.strerror}): choose another file with --out"
        ) from error
    return len(runs)


def _watch(run_dirs: Sequence[Path], out: Path) -> None:
    before = _state(run_dirs)
    while not all(os.path.exists(run_dir / RESULT_FILE) for run_dir in run_dirs):
        time.sleep(POLL)
        if (now := _state(run_dirs)) == before:
            continue
        before = now
        try:
            write(run_dirs, out, reload_seconds=RELOAD)
        except UserError as error:  # e.g. a resumed run that has no rows for a moment
            print(f"note: {error}", flush=True)


def _state(run_dirs: Sequence[Path]) -> list[tuple[int, int]]:
    """Returns times and sizes that change whenever a report would change."""
    found = []
    for run_dir in run_dirs:
        for name in _WATCHED:
            try:
                status = (run_dir / name).stat()
            except OSError:
                found.append((0, 0))
            else:
                found.append((status.st_mtime_ns, status.st_size))
    return found


def _require_bokeh() -> None:
    try:
        import bokeh  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(
            "the report needs Bokeh, which is not installed: pip install bokeh"
        ) from error

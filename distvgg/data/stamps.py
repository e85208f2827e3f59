"""Stamps: what a walk over many files found, valid while no directory changes.

Adding, removing or replacing a file changes the modification time of its directory. A start then
reads the status of each directory, and of a thousand files, in place of each file. A file that is
edited in place changes no directory: `touch` its folder. Where all files are, the thousand show it.
"""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

MIN_FILES = 10_000  # a walk over fewer takes a fraction of a second, and notices edits in place
SAMPLE = 1000  # files, evenly spaced
# Seconds. File systems round times, so that a newer change may look like an older one.
SETTLED = 2.0
# Path below the root, size in bytes, modification time in ns.
FileFacts = tuple[str, int, int]


def read_stamp(path: Path, root: Path) -> str | None:
    """Returns the fingerprint of a stamp, or None if there is none or something changed."""
    try:
        stamp = json.loads(path.read_text())
        for name, changed in stamp["directories"].items():
            if os.stat(root / name).st_mtime_ns != changed:
                return None
        for name, size, changed in stamp["files"]:
            found = os.stat(root / name)
            if (found.st_size, found.st_mtime_ns) != (size, changed):
                return None
        return str(stamp["fingerprint"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def write_stamp(
    path: Path,
    fingerprint: str,
    directories: dict[str, int],
    files: Sequence[FileFacts],
    began: float,
) -> None:
    """Writes a stamp, if the directories were settled and the cache can be written.

    Args:
        path: of the stamp.
        fingerprint: what the walk found.
        directories: modification time in ns, by path below the root.
        files: all that the walk found.
        began: time of the walk's begin in seconds.
    """
    if max(directories.values()) > (began - SETTLED) * 1e9:
        return
    sample = files[:: -(-len(files) // SAMPLE)]
    stamp = {"fingerprint": fingerprint, "directories": directories, "files": sample}
    tmp = path.with_suffix(f".{os.getpid()}.tmp")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        tmp.write_text(json.dumps(stamp))
        tmp.replace(path)

"""Cores that the system grants to this process: by affinity and by the quotas of cgroups.

A machine may have more. `taskset`, SLURM and container runtimes grant a part of them.
"""

import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")


def granted_cores(root: Path = ROOT) -> float:
    """Returns the number of cores that this process may use; a quota may be a fraction.

    Args:
        root: the root of the file system.
    """
    return min([len(os.sched_getaffinity(0)), *_quotas(root)])


def describe_cores(root: Path = ROOT) -> str:
    """Returns the granted cores as text, with those of the machine where they differ."""
    granted, total = granted_cores(root), os.cpu_count()
    return f"{total} cores" if granted == total else f"{granted:.3g} of {total} cores"


def _quotas(root: Path) -> Iterator[float]:
    """Yields the quotas of CPU time of all cgroups that this process is in, in cores."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # a kernel without cgroups
        return
    mounts = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            folders, read = [mounts, mounts / "unified"], _quota_v2
        elif "cpu" in controllers.split(","):
            folders, read = [mounts / name for name in ("cpu", controllers)], _quota_v1
        else:
            continue
        inside = Path(path.lstrip("/"))
        for mount in dict.fromkeys(folders):
            # Each ancestor has a quota too. In a container the path may lie outside of the mount.
            for folder in (inside, *inside.parents):
                try:
                    quota = read(mount / folder)
                except (OSError, ValueError):
                    continue
                if quota:
                    yield quota


def _quota_v2(folder: Path) -> float | None:
    quota, period = (folder / "cpu.max").read_text().split()
    return None if quota == "max" else int(quota) / int(period)


def _quota_v1(folder: Path) -> float | None:
    quota = int((folder / "cpu.cfs_quota_us").read_text())
    return quota / int((folder / "cpu.cfs_period_us").read_text()) if quota > 0 else None

"""Cores that are granted: by affinity, and by the quotas of both versions of cgroups."""

import os
from pathlib import Path

import pytest

from distvgg.cores import describe_cores, granted_cores

BOUND = len(os.sched_getaffinity(0))


def system(root: Path, membership: str, files: dict[str, str]) -> Path:
    for name, text in {"proc/self/cgroup": membership, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/a/b\n", {"sys/fs/cgroup/a/b/cpu.max": "50000 100000\n"}, 0.5),
        ("0::/a/b\n", {"sys/fs/cgroup/a/cpu.max": "25000 100000\n"}, 0.25),  # of an ancestor
        ("0::/a\n", {"sys/fs/cgroup/a/cpu.max": "max 100000\n"}, BOUND),
        ("0::/../other\n", {"sys/fs/cgroup/cpu.max": "50000 100000\n"}, 0.5),  # a container's own
        ("0::/a\n", {"sys/fs/cgroup/unified/a/cpu.max": "50000 100000\n"}, 0.5),
        (
            "4:cpu,cpuacct:/x\n1:memory:/y\n0::/\n",
            {
                "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_quota_us": "50000\n",
                "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_period_us": "100000\n",
            },
            0.5,
        ),
        (
            "4:cpu:/x\n",
            {
                "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000\n",
            },
            BOUND,
        ),
        ("0::/a\n", {"sys/fs/cgroup/a/cpu.max": "99900000 100000\n"}, BOUND),  # above affinity
    ],
)
def test_the_smallest_quota_counts(
    membership: str, files: dict[str, str], expected: float, tmp_path: Path
) -> None:
    assert granted_cores(system(tmp_path, membership, files)) == expected


def test_a_machine_without_cgroups_grants_what_affinity_says(tmp_path: Path) -> None:
    assert granted_cores(tmp_path) == BOUND


def test_the_granted_number_is_said_with_that_of_the_machine_where_they_differ(
    tmp_path: Path,
) -> None:
    half = system(tmp_path, "0::/\n", {"sys/fs/cgroup/cpu.max": "150000 300000\n"})
    assert describe_cores(half) == f"0.5 of {os.cpu_count()} cores"
    none = system(tmp_path / "none", "", {})
    if os.cpu_count() == BOUND:
        assert describe_cores(none) == f"{BOUND} cores"

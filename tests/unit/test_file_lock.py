"""Locks on a file system without flock: who holds one, and when it is taken over."""

import errno
import fcntl
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from distvgg import file_lock
from distvgg.file_lock import HeldError, hold

pytestmark = pytest.mark.usefixtures("no_flock")


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)


def test_a_living_process_keeps_its_lock_until_it_releases_it(tmp_path: Path) -> None:
    lock = hold(tmp_path / ".lock", wait=False)
    assert lock.exclusive
    with pytest.raises(HeldError, match=f"process {os.getpid()} on {socket.gethostname()}") as held:
        hold(tmp_path / ".lock", wait=False)
    assert held.value.remedy() == ""  # it is known to be alive
    lock.release()
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]
    hold(tmp_path / ".lock", wait=True).release()


def link_of(pid: int, host: str, start: str) -> str:
    boot, namespace = file_lock._boot(), file_lock._namespace()
    return f"process {pid} on {host} (boot {boot}, {namespace}, start {start})"


def test_the_lock_of_a_dead_process_is_taken_over_also_where_its_number_is_used_again(
    tmp_path: Path,
) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    for pid, start in ((ended.pid, "1"), (os.getpid(), "1")):
        os.symlink(link_of(pid, socket.gethostname(), start), tmp_path / ".lock.holder")
        hold(tmp_path / ".lock", wait=False).release()
    before = link_of(1, socket.gethostname(), "1").replace(file_lock._boot(), "0-another-boot")
    os.symlink(before, tmp_path / ".lock.holder")
    hold(tmp_path / ".lock", wait=False).release()
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize("wait", [True, False])
def test_the_lock_of_another_host_or_container_is_named_with_how_to_remove_it(
    tmp_path: Path, wait: bool
) -> None:
    link = tmp_path / ".lock.holder"
    inside = link_of(7, socket.gethostname(), "1").replace(file_lock._namespace(), "pid:[1]")
    for target in (link_of(7, "node-b", "1"), inside, "something else"):
        os.symlink(target, link)
        with pytest.raises(HeldError) as held:
            hold(tmp_path / ".lock", wait=wait)
        assert held.value.holder in target
        assert held.value.remedy() == f"; if that process is dead, delete {link}"
        link.unlink()


def test_of_many_that_find_a_dead_process_one_takes_over(tmp_path: Path) -> None:
    os.symlink(link_of(os.getpid(), socket.gethostname(), "1"), tmp_path / ".lock.holder")
    program = (
        "import errno, fcntl, sys, time; from pathlib import Path; from distvgg import file_lock\n"
        "def unsupported(*_): raise OSError(errno.ENOLCK, '')\n"
        "fcntl.flock = unsupported\n"
        "sys.stdin.readline()\n"
        f"try: lock = file_lock.hold(Path({str(tmp_path / '.lock')!r}), wait=False)\n"
        "except file_lock.HeldError: print('refused', flush=True)\n"
        "else: print('taken', flush=True); sys.stdin.readline()\n"
    )
    how = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    started = [subprocess.Popen([sys.executable, "-c", program], **how) for _ in range(8)]
    for process in started:
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.stdout.readline().strip() for process in started]
    for process in started:
        process.communicate("end\n")
    assert sorted(said) == ["refused"] * 7 + ["taken"]
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]  # the exit of the holder released it


def test_a_file_system_without_links_either_locks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refused)
    first, second = (hold(tmp_path / ".lock", wait=False) for _ in range(2))
    assert not first.exclusive
    assert not second.exclusive
    first.release()
    second.release()

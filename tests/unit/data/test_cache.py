"""The cache: an entry is whole or not there. Processes that must die do so by SIGKILL, at points of
the build that the test chooses.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from distvgg.data import cache
from distvgg.data.cache import load_dataset
from distvgg.data.dataset import Dataset
from distvgg.errors import UserError
from made_data import (
    custom,
    made_rows,
    noise,
    write_parquet,
)


def test_a_warm_start_is_instant_and_imports_no_decoder(real: Dataset, cifar100: str) -> None:
    code = f"""
import sys, time
from distvgg.config import DataConfig
from distvgg.data.cache import load_dataset
start = time.perf_counter()
dataset = load_dataset(DataConfig(path={cifar100!r}))
print(len(dataset.train), time.perf_counter() - start)
assert not sys.modules.keys() & {{"datasets", "pyarrow", "PIL", "distvgg.data.decode"}}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    n, seconds = done.stdout.split()
    assert int(n) == 50_000
    assert float(seconds) < 1


def child(
    path: str, cache: Path, *, before: str = "", prefix: tuple[str, ...] = ()
) -> "subprocess.Popen[str]":
    """A process that runs `before`, waits for a line, loads a set and prints its digest."""
    code = f"""
import hashlib, os, signal, sys
import numpy as np
from distvgg.config import DataConfig
from distvgg.data import cache
from distvgg.errors import UserError

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

{before}
sys.stdin.readline()
try:
    dataset = cache.load_dataset(DataConfig(name="custom", path={path!r}))
except UserError as error:
    sys.exit(str(error))
print(hashlib.sha256(np.array(dataset.train.images)).hexdigest(), len(dataset.test))
"""
    return subprocess.Popen(
        [*prefix, sys.executable, "-c", code],
        env=os.environ | {"DISTVGG_CACHE": str(cache)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def two_builds_at_once(path: str, cache: Path, before: str) -> None:
    """Both must succeed, with the same arrays."""
    processes = [child(path, cache, before=before) for _ in range(2)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [p.returncode for p in processes] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0] != ""


def test_two_processes_on_a_cold_cache_decode_once(
    parquet: str, cold: Path, tmp_path: Path
) -> None:
    log = tmp_path / "builds"
    before = f"""
build = cache._build
def logged(*args, **kwargs):
    with open({str(log)!r}, "a") as file:
        file.write("built\\n")
    build(*args, **kwargs)
cache._build = logged
"""
    two_builds_at_once(parquet, cold, before)
    assert log.read_text() == "built\n"


@pytest.mark.parametrize("moment", ["cache.channel_moments", "os.fsync"])
def test_a_killed_build_is_never_read_and_does_not_stay(
    moment: str, parquet: str, cold: Path
) -> None:
    """Killed with images but no metadata written, and with all written but nothing in its place."""
    process = child(parquet, cold, before=f"{moment} = die")
    output = process.communicate("go\n", timeout=60)
    assert process.returncode == -9, output
    assert len(list(cold.glob("*.building"))) == 1
    # A later build removes it, also when it is that of another entry.
    os.utime(next(Path(parquet).iterdir()))
    assert np.array_equal(load_dataset(custom(parquet)).train.images, noise(20, 1))
    assert sorted(p.suffix for p in cold.iterdir()) == ["", ".lock", ".lock"]


def test_a_build_that_still_runs_elsewhere_is_left_alone(parquet: str, cold: Path) -> None:
    cold.mkdir()
    (cold / "other.building").mkdir()
    with cache._locked(cold / "other.lock"):
        load_dataset(custom(parquet))
    assert (cold / "other.building").exists()


def test_a_constant_channel_is_normalised_to_zero() -> None:
    for value in (0, 3, 100, 201):
        images = np.full((5, 32, 32, 3), value, dtype=np.uint8)
        mean, std = cache.channel_moments(images)
        assert mean == pytest.approx([value / 255] * 3)
        assert std == [1, 1, 1]


@pytest.mark.parametrize("file", ["train_images.npy", "test_labels.npy", "meta.json"])
def test_a_truncated_entry_is_built_again(file: str, parquet: str, cold: Path) -> None:
    load_dataset(custom(parquet))
    (entry,) = (p for p in cold.iterdir() if p.is_dir())
    os.truncate(entry / file, (entry / file).stat().st_size // 2)
    assert np.array_equal(load_dataset(custom(parquet)).train.images, noise(20, 1))


def test_a_changed_file_is_decoded_again(parquet: str, cold: Path) -> None:
    before = load_dataset(custom(parquet))
    write_parquet(Path(parquet), made_rows(20, 3), made_rows(10, 2))
    after = load_dataset(custom(parquet))
    assert after.fingerprint != before.fingerprint
    assert np.array_equal(after.train.images, noise(20, 3))


def test_images_are_mapped_and_a_write_to_them_stays_private(parquet: str, cold: Path) -> None:
    images = load_dataset(custom(parquet)).train.images
    assert isinstance(images, np.memmap)
    images[:] = 0
    assert np.array_equal(load_dataset(custom(parquet)).train.images, noise(20, 1))


def test_a_whole_entry_is_read_without_writing(
    parquet: str, cold: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a cache that somebody else filled may be read-only."""
    load_dataset(custom(parquet))
    monkeypatch.setattr(cache, "_locked", None)
    load_dataset(custom(parquet))


def test_without_file_locks_two_builds_at_once_leave_one_entry(parquet: str, cold: Path) -> None:
    before = "cache.lock = lambda *_, **__: False"
    two_builds_at_once(parquet, cold, before)
    assert sorted(p.suffix for p in cold.iterdir()) == ["", ".lock"]


def test_an_unwritable_cache_is_one_clear_line(
    parquet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DISTVGG_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"cannot write .*/file/cache \(Not a dir.*DISTVGG_CACHE"):
        load_dataset(custom(parquet))


@pytest.mark.parametrize("kilobytes", [24, 150])
def test_a_full_disk_is_one_clear_line(parquet: str, tmp_path: Path, kilobytes: int) -> None:
    """A file system in memory, in a namespace of the child's own, fills up while `datasets` copies
    92 kB, and while as much is written as pixels after that."""
    cache = tmp_path / "cache"
    cache.mkdir()
    mount = f"mount -t tmpfs -o size={kilobytes}k tmpfs {cache}"
    unshare = ("unshare", "--user", "--map-root-user", "--mount")
    if not shutil.which("unshare") or subprocess.run([*unshare, "sh", "-c", mount]).returncode:
        pytest.skip("this kernel lets a user mount nothing")
    process = child(parquet, cache, prefix=(*unshare, "sh", "-c", f'{mount} && exec "$@"', "sh"))
    out, err = process.communicate("go\n", timeout=60)
    assert process.returncode == 1, out
    assert err.count("\n") == 1, err
    assert err.startswith(f"cannot write the data cache {cache} (")
    assert "No space left on device" in err

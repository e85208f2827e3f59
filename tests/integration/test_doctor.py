"""What `distvgg doctor` finds of real machines, folders and sets; what `--prepare` is good for."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from disks import small_disk
from distvgg.errors import UserError
from distvgg.recipe import load
from made_data import noise, write_folders
from processes import ROOT, run, tiny

pytestmark = pytest.mark.usefixtures("newcomer")

MACHINE = ["versions", "devices", "precision", "backend", "environment"]
MACHINE += ["cache", "run folder", "W&B"]
NO_HUB = {"HF_ENDPOINT": "http://127.0.0.1:9"}  # a closed port
Findings = dict[str, tuple[str, str]]


def findings(done: subprocess.CompletedProcess[str]) -> Findings:
    """The lines of the checks, by their names: verdict and text. Nothing else may be said but how
    it ends, and that not against the exit code."""
    *lines, last = done.stdout.splitlines() + done.stderr.splitlines()
    card = [line for line in lines if line.startswith(" " * 19)]  # of the data, below its line
    lines = [line for line in lines if line not in card]
    parsed = [re.fullmatch(r"(ok|note|fix) +(\S+(?: \S+)?)  +(.+)", line) for line in lines]
    assert all(parsed), done.stdout + done.stderr
    assert len({match.start(3) for match in parsed if match}) == 1  # aligned
    found = {match[2]: (match[1], match[3]) for match in parsed if match}
    assert not card or "decoded in" in found["data"][1]
    to_fix = [name for name, (verdict, _) in found.items() if verdict == "fix"]
    assert done.returncode == (1 if to_fix else 0)
    if to_fix:
        assert (
            last == f"distvgg: error: {len(to_fix)} of {len(found)} checks found something to fix"
        )
    else:
        assert last == "nothing to fix"
    return found


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small set in a folder: two classes of noise, 96 images to train on and 8 held out."""
    folder = tmp_path_factory.mktemp("images") / "noise"
    splits = {"train": noise(96, 0, side=16), "test": noise(8, 1, side=16)}
    return Path(write_folders(folder, ["class_0", "class_1"], splits))


def of_set(path: Path | str, run_dir: Path) -> list[str]:
    """The words after `train` or `doctor` for a tiny run of a small set."""
    words = ("--data.name", "custom", "--data.path", str(path), "--data.train_size", "none")
    return tiny(run_dir, *words, "--data.val_size", "16", "--model.image_size", "16")[1:]


def test_a_sound_machine_is_told_check_by_check_and_left_as_it_was(tmp_path: Path) -> None:
    found = findings(run(["doctor"], cwd=tmp_path))
    assert list(found) == MACHINE
    assert {verdict for verdict, _ in found.values()} == {"ok", "note"}
    assert "torch" in found["versions"][1]
    assert found["environment"] == ("ok", "nothing that changes numbers")
    verdict, text = found["W&B"]
    assert verdict == "note"
    assert re.fullmatch(r"offline \(.*login.*\); to upload: distvgg sync RUN_DIR", text)
    assert list(tmp_path.iterdir()) == []


def test_sample_in_the_documentation_has_these_checks() -> None:
    text = (ROOT / "docs" / "usage.md").read_text()
    sample = re.search(r"\$ distvgg doctor .+\n([\s\S]+?)```", text)
    assert sample
    lines = [re.fullmatch(r"(?:ok  |note|fix )  (.{11})  .+", x) for x in sample[1].splitlines()]
    names = [line[1].rstrip() for line in lines if line]
    assert names == [*MACHINE[:5], "processes", "data", *MACHINE[5:]]


def test_in_the_place_of_train_it_checks_that_very_run_once_for_all_processes(
    tmp_path: Path,
) -> None:
    words = tiny(tmp_path / "run", "--track.tensorboard", "true")
    found = findings(run(["doctor", *words[1:]], processes=2))
    assert list(found) == [*MACHINE[:5], "processes", "data", *MACHINE[5:], "TensorBoard"]
    assert found["precision"][1].startswith("no (train.precision no on")
    assert found["processes"] == ("ok", "1 or 2 or 4 (global batch 64 / micro-batch 16)")
    assert found["W&B"] == ("ok", "off, as set")
    assert not (tmp_path / "run").exists()


def test_what_train_would_refuse_is_to_fix_and_says_how(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    found = findings(
        run(
            [
                *("doctor", "quickstart", "--data.name", "custom", "--train.precision", "fp16"),
                *("--data.path", f"{tmp_path}/gone", "--run-dir", f"{file}/below"),
            ],
            env={
                **{"DISTVGG_CACHE": f"{file}/cache", "WANDB_INIT_TIMEOUT": "soon"},
                **{"WORLD_SIZE": "3", "RANK": "0", "MASTER_ADDR": "127.0.0.1"},
            },
        )
    )
    to_fix = {name: text for name, (verdict, text) in found.items() if verdict == "fix"}
    for name, remedy in {
        "precision": "take bf16, no or auto",
        "processes": "start 1 or 2 or 4 processes",
        "data": "gone is not a folder: give one that holds Parquet files",
        "cache": "(Not a directory): set DISTVGG_CACHE to a writable folder",
        "run folder": "(Not a directory): choose another with --run-dir",
        "W&B": "fix WANDB_INIT_TIMEOUT, or --track.wandb false",
    }.items():
        assert remedy in to_fix.pop(name)
    assert not to_fix


def test_a_set_on_the_hub_without_a_network_is_to_fix_in_seconds(tmp_path: Path) -> None:
    started = time.monotonic()
    env = NO_HUB | {"DISTVGG_CACHE": str(tmp_path), "HF_HOME": str(tmp_path / "hf")}
    verdict, text = findings(run(["doctor", "fast"], env=env))["data"]
    assert time.monotonic() - started < 15
    assert verdict == "fix"
    assert "run distvgg doctor RECIPE --prepare on a machine with a network" in text


def test_a_folder_once_prepared_is_looked_at_but_not_read(tmp_path: Path, images: Path) -> None:
    """Names, sizes and times of its files are all that a training asks of it then."""
    source = shutil.copytree(images, tmp_path / "set")
    words, env = of_set(source, tmp_path / "run"), {"DISTVGG_CACHE": str(tmp_path / "cache")}
    note = findings(run(["doctor", *words], env=env))["data"]
    assert note == (
        "note",
        f"{source} is not decoded yet: the first start does so, or --prepare now",
    )
    first = findings(run(["doctor", *words, "--prepare"], env=env))
    assert first["data"][0] == "ok"
    (entry,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    assert first["data"][1].startswith(f"decoded in {entry}, 0.1 MiB: 80 train, 16 val, 8 test")
    for file in source.rglob("*.png"):
        stat = file.stat()
        file.write_bytes(bytes(stat.st_size))
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    before = entry.stat().st_mtime_ns
    assert findings(run(["doctor", *words, "--prepare"], env=env))["data"] == first["data"]
    assert entry.stat().st_mtime_ns == before
    done = run(["train", *words], env=env)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def known_to_the_client(tmp_path: Path, images: Path) -> Path:
    """A folder for HF_HOME in which the hub's client finds a set `maker/noise` without a network,
    as if it had been fetched before."""
    home = tmp_path / "hf"
    fetch = "import sys, datasets; datasets.load_dataset(sys.argv[1], cache_dir=sys.argv[2])"
    command = [sys.executable, "-c", fetch, str(images), str(home / "datasets")]
    subprocess.run(command, check=True, capture_output=True)
    (home / "datasets" / "noise").rename(home / "datasets" / "maker___noise")
    return home


def test_a_set_on_the_hub_once_prepared_needs_no_network_and_no_client(
    tmp_path: Path, known_to_the_client: Path
) -> None:
    words = of_set("maker/noise", tmp_path / "run")
    env = NO_HUB | {"DISTVGG_CACHE": str(tmp_path / "cache"), "HF_HOME": str(known_to_the_client)}
    assert findings(run(["doctor", *words], env=env))["data"][0] == "note"
    assert findings(run(["doctor", *words, "--prepare"], env=env))["data"][0] == "ok"
    shutil.rmtree(known_to_the_client)
    done = run(["train", *words], env=env)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "more", [(), ("--optim.name", "muon", "--optim.momentum", "0", "--optim.ema_decay", "0.9")]
)
def test_the_room_that_checkpoints_take_is_theirs_to_a_hundredth(
    tmp_path: Path, images: Path, more: tuple[str, ...]
) -> None:
    from distvgg.commands import doctor

    words = ("--model.width", "0.5", "--checkpoint.keep", "1", *more)
    done = run(["train", *of_set(images, tmp_path / "run"), *words])
    assert done.returncode == 0, done.stderr
    weights = (tmp_path / "run" / "model.safetensors").stat().st_size
    (step,) = (tmp_path / "run" / "checkpoints").iterdir()
    checkpoint = sum(file.stat().st_size for file in step.iterdir())
    need = doctor.run_bytes(load(str(tmp_path / "run" / "config.yaml")), classes=2)
    assert need == pytest.approx(3 * checkpoint + weights, rel=0.01)


def test_a_disk_without_room_for_the_checkpoints_is_to_fix(tmp_path: Path) -> None:
    from distvgg.commands import doctor

    with small_disk(tmp_path / "disk", "10m") as disk:
        with pytest.raises(UserError, match=r"10\.0 MiB free, and checkpoints take .*: make room"):
            doctor.run_folder(disk / "run", load("fast"), entry=None)
        assert list(disk.iterdir()) == []


@pytest.mark.parametrize(
    ("vendor", "kind", "expected"),
    [("0x10de", "0x030200", True), ("0x10de", "0x040300", False), ("0x1002", "0x030000", False)],
    ids=["3D controller", "its sound card", "another maker's"],
)
def test_an_nvidia_gpu_is_known_without_its_driver(
    tmp_path: Path, vendor: str, kind: str, expected: bool
) -> None:
    from distvgg.distributed.device import has_nvidia_hardware

    device = tmp_path / "sys" / "bus" / "pci" / "devices" / "0000:01:00.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text(f"{vendor}\n")
    (device / "class").write_text(f"{kind}\n")
    assert has_nvidia_hardware(tmp_path) is expected

"""CheckpointManager that exist whole or not at all, and the damage that they are refused for."""

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from disks import file_size_limit, small_disk
from distvgg.config import ModelConfig, OptimConfig
from distvgg.models.vgg import VGG
from distvgg.optim.build import build_optimizer
from distvgg.training.checkpoint import (
    Checkpoint,
    CheckpointManager,
    CorruptCheckpointError,
    load_optimizer_tensors,
    optimizer_tensors,
    read,
)

FILES = ("manifest.json", "model.safetensors", "state.safetensors")


def save(
    folder: Path, *steps: int, keep: int = 2, best: int | None = None, size: int = 10
) -> CheckpointManager:
    """Saves some steps, each whole before the next."""
    checkpoints = CheckpointManager(folder, keep)
    for step in steps:
        checkpoints.save(
            step,
            {"w": torch.full((size,), float(step))},
            {"m": torch.ones(3, dtype=torch.float64)},
            {"step": step, "loss": 0.1},
            best=best,
            flush=lambda: None,
        )
        checkpoints.wait()
    return checkpoints


def newest(checkpoints: CheckpointManager, said: list[str] | None = None) -> Checkpoint | None:
    return checkpoints.newest(lambda _: None, (said if said is not None else []).append)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_what_was_saved_is_read(tmp_path: Path) -> None:
    found = newest(save(tmp_path, 7, 12))
    assert found is not None
    assert (found.name, found.progress) == ("step_00000012", {"step": 12, "loss": 0.1})
    from safetensors.torch import load

    torch.testing.assert_close(load(found.model), {"w": torch.full((10,), 12.0)})
    assert load(found.state)["m"].dtype == torch.float64


def test_the_snapshot_is_of_the_moment(tmp_path: Path) -> None:
    """What happens to the tensors while the thread still waits does not get into the file."""
    checkpoints, weights = CheckpointManager(tmp_path, 2), torch.ones(10)

    def later() -> None:
        weights.fill_(5.0)

    checkpoints.save(1, {"w": weights}, {}, {}, best=None, flush=later)
    found = newest(wait(checkpoints))
    assert found is not None
    from safetensors.torch import load

    assert load(found.model)["w"].tolist() == [1.0] * 10


def test_a_second_save_waits_for_the_first_and_the_loop_for_none(tmp_path: Path) -> None:
    checkpoints, released, order = CheckpointManager(tmp_path, 2), threading.Event(), []

    def slow() -> None:
        released.wait(30)
        order.append("first written")

    checkpoints.save(1, {"w": torch.ones(1)}, {}, {}, best=None, flush=slow)
    order.append("loop goes on")
    threading.Timer(0.2, released.set).start()
    checkpoints.save(*(2, {"w": torch.ones(1)}, {}, {}), best=None, flush=lambda: None)
    order.append("second begun")
    checkpoints.wait()
    assert order == ["loop goes on", "first written", "second begun"]
    assert names(tmp_path) == ["step_00000001", "step_00000002"]


def test_the_exit_of_the_process_waits_for_a_save(tmp_path: Path) -> None:
    program = (
        "import time, torch; from pathlib import Path\n"
        "from distvgg.training.checkpoint import CheckpointManager\n"
        f"CheckpointManager(Path({str(tmp_path)!r}), 2).save(1, {{'w': torch.ones(1)}}, {{}}, {{}},"
        " best=None, flush=lambda: time.sleep(0.5))"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    assert read(tmp_path / "step_00000001").name == "step_00000001"


def wait(checkpoints: CheckpointManager) -> CheckpointManager:
    checkpoints.wait()
    return checkpoints


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3, 4, 5, keep=2, best=2)
    assert names(tmp_path) == ["step_00000002", "step_00000004", "step_00000005"]


def test_the_best_is_kept_until_a_better_one_is_really_there(tmp_path: Path) -> None:
    checkpoints = save(tmp_path, 1, best=1)
    keys = {"w": torch.ones(10)}, {"m": torch.ones(3, dtype=torch.float64)}, {}

    def disk_is_full() -> None:
        raise OSError(28, "No space left on device")

    checkpoints.save(2, *keys, best=2, flush=disk_is_full)
    for step in (3, 4, 5):
        checkpoints.save(step, *keys, best=2, flush=lambda: None)
    checkpoints.wait()
    assert checkpoints.saved == 5
    assert names(tmp_path) == ["step_00000001", "step_00000004", "step_00000005"]


def test_what_nobody_foresaw_is_not_taken_for_a_saved_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints, tracebacks = save(tmp_path, 1), []
    monkeypatch.setattr(threading, "excepthook", tracebacks.append)

    def fails() -> None:
        raise MemoryError

    checkpoints.save(2, {"w": torch.ones(10)}, {}, {}, best=None, flush=fails)
    checkpoints.wait()
    assert checkpoints.saved == 1
    assert len(tracebacks) == 1
    assert str(checkpoints.failure()).startswith("checkpoint step_00000002 failed")


def test_any_flipped_bit_is_found(tmp_path: Path) -> None:
    """Every bit of the manifest; a thousand of each other file."""
    save(tmp_path, 3)
    folder = tmp_path / "step_00000003"
    chosen = np.random.default_rng(0)
    for name in FILES:
        sound = (folder / name).read_bytes()
        bits = np.arange(8 * len(sound))
        if name != "manifest.json":
            bits = chosen.choice(bits, min(1000, len(bits)), replace=False)
        for bit in map(int, bits):
            damaged = bytearray(sound)
            damaged[bit // 8] ^= 1 << bit % 8
            (folder / name).write_bytes(damaged)
            with pytest.raises(CorruptCheckpointError, match=name):
                read(folder)
        (folder / name).write_bytes(sound)
    read(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_or_missing_file_is_found(tmp_path: Path, name: str) -> None:
    save(tmp_path, 3)
    path = tmp_path / "step_00000003" / name
    content = path.read_bytes()
    for size in {0, 1, len(content) // 2, len(content) - 1}:
        path.write_bytes(content[:size])
        with pytest.raises(CorruptCheckpointError, match=name):
            read(path.parent)
    path.write_bytes(content + b"\0")
    with pytest.raises(CorruptCheckpointError, match=name):
        read(path.parent)
    path.unlink()
    with pytest.raises(CorruptCheckpointError, match=f"{name} is missing"):
        read(path.parent)
    path.mkdir()
    with pytest.raises(CorruptCheckpointError, match=f"{name} cannot be read"):
        read(path.parent)


def test_damaged_ones_are_refused_by_name_and_the_newest_sound_one_taken(tmp_path: Path) -> None:
    checkpoints = save(tmp_path, 1, 2, 3, 4, keep=9)
    (tmp_path / "step_00000004" / "model.safetensors").unlink()
    shutil.rmtree(tmp_path / "step_00000003")
    (tmp_path / "step_00000003").mkdir()
    said: list[str] = []
    found = newest(checkpoints, said)
    assert found is not None
    assert found.name == "step_00000002"
    assert said == [
        "checkpoint step_00000004 refused: model.safetensors is missing",
        "checkpoint step_00000003 refused: manifest.json is missing",
    ]
    # What was refused is kept until the run gets there again, and does not count for `keep`.
    save(tmp_path, 3, keep=2)
    assert names(tmp_path) == ["step_00000002", "step_00000003", "step_00000004"]
    assert newest(CheckpointManager(tmp_path, 2)) == read(tmp_path / "step_00000003")
    save(tmp_path, 4, keep=2)
    assert names(tmp_path) == ["step_00000003", "step_00000004"]
    assert newest(CheckpointManager(tmp_path, 2)) == read(tmp_path / "step_00000004")


def test_a_manifest_of_a_later_format_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("distvgg.training.checkpoint.FORMAT", 2)
        save(tmp_path, 1)
    with pytest.raises(CorruptCheckpointError, match="its format is 2, this version reads 1"):
        read(tmp_path / "step_00000001")


def test_what_a_kill_left_is_removed_and_never_read(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "step_00000001").rename(tmp_path / ".step_00000002.tmp")
    (tmp_path / ".step_00000001.old").mkdir()
    assert newest(CheckpointManager(tmp_path, 2)) is None
    assert names(tmp_path) == []


def test_a_full_disk_costs_the_new_checkpoint_only(tmp_path: Path) -> None:
    size = 100_000
    with small_disk(tmp_path / "disk", "2m") as disk:
        save(disk, 1, 2, size=size)
        (disk / "hog").write_bytes(bytes(1024 * 1024))
        before = names(disk)
        failed = save(disk, 3, size=size)
        assert failed.failure() == (
            "checkpoint step_00000003 failed: No space left on device; the one before it stands"
        )
        assert failed.failure() is None  # told once
        assert names(disk) == before
        assert newest(failed) == read(disk / "step_00000002")
        (disk / "hog").unlink()
        save(disk, 4, size=size)
        assert names(disk) == ["step_00000002", "step_00000004"]


def test_so_does_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with file_size_limit(100_000):
        failed = save(tmp_path, 2, size=100_000)
    assert "File too large" in str(failed.failure())
    assert names(tmp_path) == ["step_00000001"]


def test_what_a_checkpoint_counts_on_is_on_the_disk_before_it(tmp_path: Path) -> None:
    """A crash of the machine between the two must not leave a manifest that counts on lost rows."""
    seen: list[list[str]] = []
    checkpoints = CheckpointManager(tmp_path, 2)
    checkpoints.save(
        *(1, {"w": torch.ones(1)}, {}, {}), best=None, flush=lambda: seen.append(names(tmp_path))
    )
    checkpoints.wait()
    assert seen == [[]]

    def fails() -> None:
        raise OSError(28, "No space left on device")

    checkpoints.save(2, {"w": torch.ones(1)}, {}, {}, best=None, flush=fails)
    checkpoints.wait()
    assert "step_00000002 failed: No space" in str(checkpoints.failure())
    assert names(tmp_path) == ["step_00000001"]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_an_optimizer_goes_on_from_its_tensors(name: str) -> None:
    """Three steps, then two more from what was kept, equal five: with filters in NHWC order."""

    def start() -> tuple[VGG, torch.optim.Optimizer, dict[torch.Tensor, str]]:
        torch.manual_seed(0)
        model = VGG(ModelConfig(depth=11, width=0.05), 10).to(memory_format=torch.channels_last)
        optimizer = build_optimizer(model, OptimConfig(name=name, lr=0.01))
        return model, optimizer, {p: n for n, p in model.named_parameters()}

    def step(model: VGG, optimizer: torch.optim.Optimizer, number: int) -> None:
        for i, p in enumerate(model.parameters()):
            g = torch.Generator().manual_seed(100 * number + i)
            p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=g))
        optimizer.step()

    model, optimizer, labels = start()
    for number in range(3):
        step(model, optimizer, number)
    kept = {k: v.clone() for k, v in optimizer_tensors(optimizer, labels).items()}
    again, optimizer_again, labels_again = start()
    again.load_state_dict(model.state_dict())
    load_optimizer_tensors(optimizer_again, labels_again, kept)
    for number in range(3, 5):
        step(model, optimizer, number)
        step(again, optimizer_again, number)
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    assert all(key.split(".", 1)[1] in dict(model.named_parameters()) for key in kept)


def test_nothing_in_a_checkpoint_is_code(tmp_path: Path) -> None:
    """Two files of tensors and one of JSON: there is no pickle to load."""
    save(tmp_path, 1)
    folder = tmp_path / "step_00000001"
    assert names(folder) == sorted(FILES)
    assert set(json.loads((folder / "manifest.json").read_text())) == {"body", "sha256"}
    for name in FILES[1:]:
        content = (folder / name).read_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        assert all({"dtype", "shape", "data_offsets"} == set(v) for v in header.values())

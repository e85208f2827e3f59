"""Training on streamed photographs: the bits of any number of processes and any restart."""

import json
import re
import signal
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

import distvgg
from benchmarks.runs import differences
from configs import tiny
from distvgg.commands.arguments import default_run_dir
from distvgg.runs.folder import check_same_config
from processes import Started, assert_same_run, descendants, train

# Width and steps are small, so that a start takes longer than the training.
SMALL = ("--model.width", "0.05", "--model.head_width", "64", "--data.resize", "112")
SMALL += ("--model.image_size", "112")
ARGS = ("--data.train_size", "none", "--train.epochs", "1.2", "--train.global_batch_size", "32")
ARGS += ("--train.micro_batch_size", "8", "--eval.batch_size", "9", "--eval.every_epochs", "0.5")
ARGS += ("--optim.warmup_epochs", "0", "--augment.cutmix_alpha", "1")
ARGS += ("--checkpoint.every_steps", "2")


def write_photographs(folder: Path) -> str:
    """160 JPEG files for training and 40 for validation, of varied sizes, in four classes."""
    rng = np.random.default_rng(0)
    for split, n in {"train": 160, "val": 40}.items():
        for i in range(n):
            size = tuple(rng.integers(180, 500, 2).tolist())
            small = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
            small[:, :, i % 4 % 3] //= 1 + i % 4
            path = folder / split / "abcd"[i % 4] / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(path, quality=85)
    return str(folder)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_photographs(tmp_path_factory.mktemp("photographs"))


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {"DISTVGG_CACHE": str(tmp_path_factory.mktemp("cache"))}


@pytest.fixture(scope="module")
def alone(photographs: str, env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one process with one worker."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    words = (*ARGS, *SMALL, "--data.path", photographs, "--data.workers", "1")
    said = train(folder, *words, recipe="imagenet", env=env)
    assert "loader stream, because each epoch crops the original images anew" in said
    assert re.search(r"train: 160 images of 4 classes", said)
    return folder


def test_photographs_train_to_the_same_bits_over_a_stop_and_another_number_of_processes(
    photographs: str, env: dict[str, str], alone: Path, tmp_path: Path
) -> None:
    words = (*ARGS, *SMALL, "--data.path", photographs)
    folder = tmp_path / "run"
    started = Started(
        folder, *words, "--data.workers", "1", recipe="imagenet", processes=2, env=env
    )
    started.until_step(2)
    for process in descendants(started.process.pid):  # as a scheduler does: readers must go on
        process.send_signal(signal.SIGTERM)
    _, output = started.end()
    assert "stopped after step" in output, output
    assert (folder / "REQUEUE").exists()
    said = train(folder, *words, "--data.workers", "0", recipe="imagenet", env=env)
    assert "resumed after step" in said
    assert_same_run(folder, alone)


def test_a_damaged_cache_ends_a_run_at_once_and_leaves_no_process(
    photographs: str, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    words = (*ARGS, *SMALL, "--data.path", photographs, "--data.workers", "2")
    args = (*words, "--train.epochs", "99")
    env = {"DISTVGG_CACHE": str(cache)}
    started = Started(tmp_path / "run", *args, recipe="imagenet", env=env)
    started.until_step(2)
    processes = descendants(started.process.pid)
    assert len(processes) >= 2
    (shard,) = cache.glob("*/train_files_0000.bin")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 2000] = bytes(2000)
    with shard.open("r+b") as file:
        file.write(content)
    code, output = started.end(30)
    assert code == 2, output
    assert f"cannot read an image of the data cache ({shard.parent}, row " in output
    assert not psutil.wait_procs(processes, 5)[1]


def test_a_classifier_sees_what_evaluation_saw(
    photographs: str, env: dict[str, str], alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resized to 128 and cropped to 112; the accuracy of the run is that of its classifier."""
    monkeypatch.setenv("DISTVGG_CACHE", env["DISTVGG_CACHE"])
    measured = distvgg.evaluate(alone, "val")
    classifier = distvgg.load(alone)
    files = sorted(Path(photographs).glob("val/*/*.jpg"))
    found = list(classifier.classify_all(files, top=1))
    hits = sum(
        isinstance(p, list) and p[0][0] == f.parent.name for p, f in zip(found, files, strict=True)
    )
    top1 = json.loads((alone / "result.json").read_text())["val"]["top1"]
    assert abs(hits / len(files) - top1) <= 1 / len(files)  # of rounding, at most one image
    assert measured["top1"] == top1


@pytest.mark.long
def test_the_full_network_trains_on_photographs_and_resumes(
    photographs: str, env: dict[str, str], tmp_path: Path
) -> None:
    words = ("--data.train_size", "none", "--model.width", "1", "--data.path", photographs)
    words += ("--train.global_batch_size", "16", "--train.micro_batch_size", "8")
    words += ("--train.epochs", "0.3", "--optim.warmup_epochs", "0")
    words += ("--checkpoint.every_steps", "1")
    train(tmp_path / "alone", *words, recipe="imagenet", env=env, timeout=1500)
    started = Started(tmp_path / "run", *words, recipe="imagenet", env=env)
    started.until_step(2, 900)
    started.kill()
    train(tmp_path / "run", *words, recipe="imagenet", env=env, timeout=1500)
    assert differences(tmp_path / "run", tmp_path / "alone") == []


def test_a_loader_changes_no_weight_and_may_change_within_a_run(tmp_path: Path) -> None:
    """On the decoded set, which both loaders can read."""
    config = tiny(data__train_size=100, train__epochs=2, augment__trivial=True, eval__test=False)
    folders = {}
    for loader in ("device", "stream"):
        chosen = config.replace(data__loader=loader, data__workers=0)
        folders[loader] = tmp_path / loader
        distvgg.train(chosen, folders[loader])
    assert_same_run(folders["stream"], folders["device"])
    again = config.replace(data__loader="stream", data__workers=3)
    kept = check_same_config(folders["device"], again)
    assert (kept.data.loader, kept.data.workers) == ("stream", 3)
    assert default_run_dir("mine", again) == default_run_dir("mine", config)

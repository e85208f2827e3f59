"""`distvgg replay`: micro-batches that other numbers of processes ran, again on one device."""

import json
import math
import re
from pathlib import Path

import pytest
from PIL import Image

from made_data import noise, write_folders
from processes import TINY, rows, run, train

# Mixed and plain micro-batches, dropout, an EMA, a row for every step; checkpoints far apart.
ARGS = (
    *("--train.epochs", "3", "--model.dropout", "0.3", "--optim.name", "muon"),
    *("--augment.cutmix_alpha", "1", "--augment.mix_probability", "0.5"),
    *("--optim.ema_decay", "0.9", "--checkpoint.every_steps", "10"),
)


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replay") / "run"
    train(folder, *ARGS, processes=2)
    return folder


def replay(folder: Path, *args: str, code: int = 0) -> str:
    done = run(["replay", str(folder), *args])
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def equal_steps(said: str) -> list[int]:
    assert "DIFFERENT" not in said, said
    (found,) = re.findall(r"equal to the logged row to the last bit: step (.+)", said)
    return [int(step) for step in found.split(", ")]


def test_a_step_of_two_processes_has_the_logged_loss(on_two: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in on_two.rglob("*") if "replay" not in p.parts}
    said = replay(on_two, "--step", "24")
    assert equal_steps(said) == [21, 22, 23, 24]
    losses = re.findall(r"^ +\d +(\S+) +\S+% +\S+ +-$", said, re.MULTILINE)
    (logged,) = (r["train/loss"] for r in rows(on_two) if r["step"] == 24 and "train/loss" in r)
    assert math.fsum(map(float, losses)) / 4 == pytest.approx(logged, rel=1e-5)
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_a_micro_batch_in_detail(on_two: Path) -> None:
    said = replay(on_two, "--step", "23", "--micro-batch", "3")
    assert equal_steps(said) == [21, 22, 23]
    stem = on_two / "replay" / "step_00000023" / "micro_batch_3"
    found = json.loads(Path(f"{stem}.json").read_text())
    assert f"loss {found['loss']:.6g}, gradient norm {found['gradient_norm']:.6g}" in said
    assert len(found["samples"]) == 16
    mean = math.fsum(sample["loss"] for sample in found["samples"]) / 16
    assert found["loss"] == pytest.approx(mean, rel=1e-5)
    norms = found["gradients"].values()
    assert found["gradient_norm"] == pytest.approx(math.hypot(*norms))
    assert found["activations"][0]["shape"] == [16, 3, 32, 32]
    assert found["activations"][-1]["layer"] == "classifier.6 Linear"
    with Image.open(f"{stem}.png") as picture:
        assert picture.width > 16 * 32
        assert len(picture.getcolors(1 << 20) or []) > 1000  # images, not a blank page


def test_rows_of_several_steps_are_compared_at_their_end_and_files_are_named(
    tmp_path: Path,
) -> None:
    classes = ["cat", "dog", "owl"]
    path = write_folders(tmp_path / "set", classes, {"train": noise(360, 0)})
    data = ("--data.name", "custom", "--data.path", path, "--data.val_size", "60")
    data += ("--data.train_size", "none", "--train.epochs", "4", "--track.every_steps", "8")
    train(tmp_path / "run", *data, processes=2)
    said = replay(tmp_path / "run", "--step", "10", "--micro-batch", "1")  # from initial weights
    assert equal_steps(said) == [8, 16]
    numbers = tmp_path / "run" / "replay" / "step_00000010" / "micro_batch_1.json"
    for sample in json.loads(numbers.read_text())["samples"]:
        name, number = re.fullmatch(r"train/(\w+)/(\d+)\.png", sample["file"]).groups()
        assert name == sample["class"]
        before = 120 * classes.index(name)
        assert before + sorted(map(str, range(120))).index(number) == sample["index"]
    assert re.search(r" train/\w+/\d+\.png\n", said)


def test_a_row_that_is_not_what_the_step_gives_is_named(on_two: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text((on_two / "config.yaml").read_text())
    lines = (on_two / "metrics.jsonl").read_text().splitlines()
    nth = next(n for n, line in enumerate(lines) if json.loads(line)["step"] == 2)
    row = json.loads(lines[nth])
    loss = row["train/loss"]
    row["train/loss"] = math.nextafter(loss, 0)
    lines[nth] = json.dumps(row)
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n" + '{"step": 99, "train/l')
    said = replay(folder, "--step", "3")
    assert f"DIFFERENT from the logged row: step 2: train/loss {loss!r}, logged" in said
    assert "to the last bit: step 1, 3" in said


def test_a_run_that_is_not_finite_says_how_to_see_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    hot = ("--optim.lr", "1e20", "--optim.warmup_epochs", "0", "--model.batch_norm", "false")
    done = run(["train", "quickstart", *TINY, *hot, "--run-dir", str(folder)])
    assert done.returncode == 1
    (words,) = re.findall(r"To look into it: distvgg (replay .+)", done.stderr)
    failure = json.loads((folder / "failure.json").read_text())
    again = run(words.split())
    assert again.returncode == 0, again.stderr
    assert f"step {failure['step']}: the {failure['what']} " in again.stdout
    assert "DIFFERENT" not in again.stdout
    detail = next((folder / "replay").rglob("*.json"), None)
    if failure["micro_batch"] is not None:
        assert detail is not None
        assert any(a["non_finite"] for a in json.loads(detail.read_text())["activations"])


def test_break_stops_before_the_forward(on_two: Path) -> None:
    import subprocess
    import sys

    words = ("replay", str(on_two), "--step", "21", "--micro-batch", "1", "--break")
    done = subprocess.run(
        [sys.executable, "-m", "distvgg", *words],
        input="p batch.k, tuple(batch.images.shape)\nc\n",
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert "(1, (16, 3, 32, 32))" in done.stdout
    assert equal_steps(done.stdout) == [21]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--step", "0"), "--step 0: the rows of .+ go from step 1 to 29"),
        (("--step", "30"), "--step 30: the rows of .+ go from step 1 to 29"),
        (("--step", "3", "--micro-batch", "4"), "a step has micro-batches 0 to 3"),
        ((), "missing --step"),
    ],
)
def test_what_was_never_run_is_refused(on_two: Path, args: tuple[str, ...], said: str) -> None:
    error = replay(on_two, *args, code=2)
    assert re.search(said, error)
    assert error.count("\n") == 1


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    assert "is no run folder: it has no config.yaml" in replay(tmp_path, "--step", "1", code=2)

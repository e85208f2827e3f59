"""What is told of finished runs: test read once or not at all, confusion, tables in Markdown.

The runs are those of the recipe `debug`, which has everything on.
"""

import ast
import json
import math
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

import distvgg
from distvgg.commands.evaluate import evaluate_run
from distvgg.commands.tables import tables
from distvgg.data.cache import load_dataset
from distvgg.data.dataset import train_val_indices
from distvgg.errors import UserError
from distvgg.models.flops import training_flops
from distvgg.models.vgg import build_vgg
from distvgg.recipe import load
from distvgg.runs.confusion import read_confusion
from processes import CPU, rows, run

# Kept from the recipe: flip, checkpoints, rows. Less is trained, and of test all is measured.
LESS = ("--train.epochs", "1", "--model.width", "0.02")


def debug(folder: Path, *args: str, **how: int) -> str:
    words = ["train", "debug", "--run-dir", str(folder), *LESS, *args]
    done = run(words, **how)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two seeds; the second on two processes."""
    folder = tmp_path_factory.mktemp("runs")
    debug(folder / "seed0")
    debug(folder / "seed1", "--seed", "1", processes=2)
    return [folder / "seed0", folder / "seed1"]


def refused(path: Path) -> str:
    """What is said to who wants test of it."""
    with pytest.raises(UserError) as error:
        evaluate_run(path, "test")
    return str(error.value)


def test_the_confusion_of_a_run_is_that_of_its_test_split(finished: list[Path]) -> None:
    for folder in finished:
        confusion, last = read_confusion(folder), rows(folder)[-1]
        assert confusion is not None
        assert (confusion.split, len(confusion.class_names)) == ("test", 100)
        assert sum(map(sum, confusion.counts)) == last["test/count"] == 2000
        correct = sum(row[i] for i, row in enumerate(confusion.counts))
        assert correct / 2000 == last["test/top1"]


def test_a_run_folder_alone_is_enough_to_use_the_weights(finished: list[Path]) -> None:
    """PyTorch and what lies in the folder, on the pixels and names of the test split."""
    config = load("debug", {"model.width": 0.02})
    test, names = load_dataset(config.data).test, load_dataset(config.data).class_names
    for folder in finished:
        kept = json.loads((folder / "preprocessing.json").read_text())
        checkpoints = sorted(folder.glob("checkpoints/*/model.safetensors"))
        for weights in (folder / "model.safetensors", *checkpoints):
            with safe_open(weights, "pt") as file:
                assert json.loads(file.metadata()["preprocessing"]) == kept
        assert kept["stored_size"] == [*test.images.shape[1:3]]
        assert kept["image_size"] == config.model.image_size
        assert kept["class_names"] == names
        model = distvgg.load_model(folder)
        x = (torch.from_numpy(test.images) / 255 - torch.tensor(kept["mean"])) / torch.tensor(
            kept["std"]
        )
        with torch.inference_mode():
            found = model(x.permute(0, 3, 1, 2)).argmax(1)
        top1 = (found == torch.from_numpy(test.labels)).float().mean().item()
        assert abs(top1 - rows(folder)[-1]["test/top1"]) < 0.003  # float32 here, bf16 there


def test_in_python_a_run_is_loaded_and_measured_again(
    finished: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import distvgg; print(distvgg.evaluate({str(finished[0])!r}))"],
        env=os.environ | CPU,
        capture_output=True,
        text=True,
        check=True,
    )
    found = ast.literal_eval(done.stdout)
    last = rows(finished[0])[-1]
    assert {f"test/{k}": v for k, v in found.items()}.items() <= last.items()
    checkpoint = distvgg.load_model(sorted(finished[0].glob("checkpoints/*"))[-1])
    final = distvgg.load_model(finished[0])
    for name, value in final.state_dict().items():
        assert torch.equal(value, checkpoint.state_dict()[name])
    with pytest.raises(UserError, match="is not the folder of a finished run"):
        distvgg.load_model(tmp_path)
    with pytest.raises(UserError, match="expected one of test, val, train"):
        distvgg.evaluate(finished[0], "dev")
    monkeypatch.chdir(sorted(finished[0].glob("checkpoints/step_*"))[-1].parent)
    assert distvgg.load_model(Path(sorted(os.listdir())[-1])).training is False


def test_the_mirrors_accuracy_stands_beside_the_plain_one_in_every_row(
    finished: list[Path],
) -> None:
    for folder in finished:
        for row in rows(folder):
            assert [k for k in row if k.endswith("/tta_top1")] == [
                f"{k.split('/')[0]}/tta_top1" for k in row if k.endswith("/top5")
            ]
        result = json.loads((folder / "result.json").read_text())
        top1 = {r["step"]: r["val/top1"] for r in rows(folder) if "val/top1" in r}
        assert result["best"]["top1"] == max(top1.values())
        assert result["test"]["tta_top1"] == rows(folder)[-1]["test/tta_top1"]


def test_evaluate_gives_the_numbers_of_the_run_and_the_worst_pairs(finished: list[Path]) -> None:
    folder = finished[0]
    test = rows(folder)[-1]
    done = run(["evaluate", str(folder)])
    assert done.returncode == 0, done.stderr
    first, *lines = done.stdout.splitlines()
    assert f"test tta_top1 {100 * test['test/tta_top1']:.2f}%" in first
    assert f"calibration error {100 * test['test/calibration_error']:.2f}%" in first
    assert [line for line in lines if "taken for another" in line] == [
        f"{what} taken for another, and how many images:" for what in ("class", "superclass")
    ]
    assert len(re.findall(r" class_\d\d as class_\d\d +\d+", done.stdout)) == 10


def test_what_was_trained_on_is_measured_as_it_is(tmp_path: Path) -> None:
    config = load("debug", {"model.width": 0.02})
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    dataset = load_dataset(config.data)
    model = build_vgg(config.model, dataset.num_classes, seed=0).eval()
    model.classifier[-1].weight.data *= 100  # or else all images look alike
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    trained, held_out = train_val_indices(dataset.train.labels, config.data)

    def loss(rows: np.ndarray) -> str:
        x = (dataset.train.images[rows] / 255 - dataset.mean) / dataset.std
        labels = torch.from_numpy(dataset.train.labels[rows])
        with torch.inference_mode():
            logits = model(torch.from_numpy(x).float().permute(0, 3, 1, 2))
        return f"{F.cross_entropy(logits, labels):.3f}"

    assert loss(trained) != loss(held_out)
    said = run(["evaluate", str(tmp_path), "--split", "train"]).stdout
    assert f"train loss {loss(trained)}, top1" in said


def test_test_is_for_the_final_weights_alone(finished: list[Path], tmp_path: Path) -> None:
    folder = finished[0]
    checkpoint = sorted((folder / "checkpoints").iterdir())[0]
    assert "test is for the final weights of a run alone: take --split val" in refused(checkpoint)
    cut = tmp_path / "cut"  # between the weights and the result
    cut.mkdir()
    for name in ("config.yaml", "model.safetensors"):
        (cut / name).write_bytes((folder / name).read_bytes())
    assert "is not finished, and test is read at the end" in refused(cut)


def test_a_run_that_is_not_to_read_test_does_not_and_cannot_be_made_to(tmp_path: Path) -> None:
    folder = tmp_path / "search"
    said = debug(folder, "--eval.test", "false")
    assert "  test  not read\n" in said
    assert not any(name.startswith("test/") for row in rows(folder) for name in row)
    assert json.loads((folder / "result.json").read_text())["test"] is None
    confusion = read_confusion(folder)
    assert confusion is not None
    assert confusion.split == "val"
    correct = sum(row[i] for i, row in enumerate(confusion.counts))
    assert correct / 100 == rows(folder)[-1]["val/top1"]
    assert "eval.test false, which keeps test out of model selection" in refused(folder)
    again = run(["train", str(folder / "config.yaml"), "--run-dir", str(folder)])
    assert "  test  not read" in again.stdout


def cells(text: str) -> dict[str, list[str]]:
    """The rows of all tables by their first cell, the last of equals."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    return {first.strip(): [cell.strip() for cell in rest] for first, *rest in lines}


def test_the_tables_of_one_run(finished: list[Path]) -> None:
    done = run(["tables", str(finished[0])])
    assert done.returncode == 0, done.stderr
    found = cells(done.stdout)
    result = json.loads((finished[0] / "result.json").read_text())
    p = result["test"]["top1"]
    assert found["top-1"] == [f"{100 * p:.2f} ± {100 * math.sqrt(p * (1 - p) / 2000):.2f}%"]
    assert found["top-1 with the mirror image"][0].startswith(
        f"{100 * result['test']['tta_top1']:.2f} ±"
    )
    assert found["calibration error"] == [f"{100 * result['test']['calibration_error']:.2f}%"]
    assert found["images trained on"] == [f"{4 * 64:,}"]
    model = load(str(finished[0] / "config.yaml")).model
    assert float(found["floating-point operations of training"][0]) == pytest.approx(
        256 * training_flops(model, 100), rel=0.01
    )
    assert sum(re.fullmatch(r"class_\d\d as class_\d\d", name) is not None for name in found) == 10


def test_the_tables_of_several_seeds(finished: list[Path]) -> None:
    found = cells(tables(finished))
    results = [json.loads((f / "result.json").read_text()) for f in finished]
    top5 = [100 * r["test"]["top5"] for r in results]
    deviation = statistics.stdev(top5)
    shown = [float(cell.removesuffix("%")) for cell in found["top-5"][2:]]
    expected = [statistics.mean(top5), deviation, deviation / math.sqrt(2)]
    assert shown == pytest.approx(expected, abs=0.0051)
    assert found["test, 2,000 images"][:2] == ["seed 0", "seed 1"]
    assert "taken for another in test, 4,000 images of 2 runs" in found


def test_what_the_tables_refuse(finished: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run here"):
        tables([finished[0], tmp_path])
    with pytest.raises(UserError, match="a seed is there twice"):
        tables([finished[0], finished[0]])
    other = tmp_path / "other"
    other.mkdir()
    for name in ("config.yaml", "result.json"):
        text = (finished[0] / name).read_text()
        (other / name).write_text(text.replace("lr: 0.05", "lr: 0.06"))
    with pytest.raises(UserError, match="differ in more than their seed"):
        tables([finished[0], other])


def test_curves_are_drawn_into_one_picture(finished: list[Path], tmp_path: Path) -> None:
    picture = tmp_path / "curves.svg"
    done = run(["curves", *map(str, finished), "--out", str(picture)])
    assert done.returncode == 0, done.stderr
    text = picture.read_text()
    assert text.count("</svg>") == 1
    assert "seed0 val/loss" in text
    done = run(["curves", str(tmp_path), "--out", str(picture)])
    assert done.returncode == 2
    assert "has no metrics.jsonl" in done.stderr

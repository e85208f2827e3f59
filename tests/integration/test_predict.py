"""`distvgg predict` and `distvgg.load`: the network as evaluation has it, on files as they are."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import distvgg
from distvgg.config import Config
from distvgg.data.cache import load_dataset
from distvgg.data.dataset import Dataset, train_val_indices
from distvgg.data.loader import DeviceImages
from distvgg.errors import UserError
from distvgg.models.classifier import Classifier
from distvgg.recipe import load
from made_data import noise, png, write_folders
from processes import CPU, run, train

# Less than all max-pools, which no shape of the weights tells.
NETWORK = ("--model.max_pools", "2,4,5", "--optim.lr", "0.02")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on synthetic images, whose input is larger than they are."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    train(folder, *NETWORK, "--model.image_size", "40", "--eval.test", "false")
    return folder


@pytest.fixture(scope="module")
def mirrored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on oblong images of a folder, cropped to squares, with flip."""
    folder = tmp_path_factory.mktemp("mirrored")
    splits = {"train": noise(300, 0, side=48)[:, :, :36], "test": noise(10, 1, side=48)[:, :, :36]}
    path = write_folders(folder / "set", [f"made {i}" for i in range(10)], splits)
    data = ("--data.name", "custom", "--data.path", path, "--data.resize", "24")
    sizes = ("--data.train_size", "200", "--data.val_size", "50", "--model.image_size", "24")
    train(folder / "run", *NETWORK, *data, *sizes, "--eval.tta", "flip")
    return folder / "run"


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, cifar100: str) -> Path:
    """A finished run on CIFAR-100."""
    folder = tmp_path_factory.mktemp("real") / "run"
    data = ("--data.name", "cifar100", "--data.path", cifar100)
    train(folder, *NETWORK, *data, "--eval.test", "false")
    return folder


def measured(run_dir: Path, flip: bool) -> tuple[Config, Dataset, np.ndarray, torch.Tensor]:
    """The rows of the validation split, and their probabilities as evaluation computes them."""
    config = load(str(run_dir / "config.yaml"))
    dataset = load_dataset(config.data)
    _, rows = train_val_indices(dataset.train.labels, config.data)
    pixels = DeviceImages(dataset, dataset.train, config.model.image_size, torch.device("cpu"))
    with torch.no_grad():
        x = pixels.plain(torch.from_numpy(rows))
        model = distvgg.load_model(run_dir)
        logits = (model(x) + model(x.flip(3))) / 2 if flip else model(x)
    return config, dataset, rows, logits.softmax(1)


def files_of(config: Config, dataset: Dataset, rows: np.ndarray, folder: Path) -> list[str]:
    """The files of some images of the train split: those of the folder, or written as PNG."""
    if config.data.name == "custom":
        # Read in the order of their paths.
        files = sorted(Path(config.data.path or "").glob("train/*/*.png"))
        assert len(files) == len(dataset.train)
        return [str(files[i]) for i in rows]
    files = [folder / f"{i:05}.png" for i in rows]
    for file, i in zip(files, rows, strict=True):
        file.write_bytes(png(dataset.train.images[i]))
    return [str(file) for file in files]


@pytest.mark.parametrize("name", ["plain", "mirrored", "real"])
def test_images_of_the_validation_split_are_predicted_as_evaluation_does(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    run_dir = request.getfixturevalue(name)
    config, dataset, rows, expected = measured(run_dir, flip=name == "mirrored")
    files = files_of(config, dataset, rows, tmp_path)
    done = run(["predict", str(run_dir), *files, "--json"])
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert [f["image"] for f in found] == files
    for one, probabilities in zip(found, expected, strict=True):
        best = probabilities.topk(5)
        assert one["classes"][0]["class"] == dataset.class_names[best.indices[0]]
        values = torch.tensor([c["probability"] for c in one["classes"]])
        torch.testing.assert_close(values, best.values, rtol=1e-5, atol=1e-7)
    # The same numbers as those of the run: its share of correct predictions.
    metric = "tta_top1" if name == "mirrored" else "top1"
    labels = [dataset.class_names[dataset.train.labels[i]] for i in rows]
    hits = [f["classes"][0]["class"] == label for f, label in zip(found, labels, strict=True)]
    last = [row for row in distvgg.read_metrics(run_dir) if f"val/{metric}" in row][-1]
    assert sum(hits) / len(hits) == last[f"val/{metric}"]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with two images, a text, a link to an image, and one that is damaged."""
    folder = tmp_path / "photos"
    (folder / "b").mkdir(parents=True)
    image = Image.fromarray(noise(1, 0, side=200)[0][:90])
    image.convert("CMYK").save(folder / "b" / "large.jpg")
    image.convert("L").save(folder / "grey.webp")
    (folder / "link.png").symlink_to(folder / "grey.webp")
    (folder / "notes.txt").write_text("no image")
    (folder / "cut.png").write_bytes(png(noise(1, 1)[0])[:900])
    os.mkfifo(folder / "pipe")
    return folder


def test_a_broken_image_is_one_line_and_the_others_go_on(plain: Path, photos: Path) -> None:
    done = run(["predict", str(plain), str(photos), "--top", "2"])
    assert done.returncode == 1
    header, *lines = done.stdout.splitlines()
    assert header.split() == ["image", "class", "probability"]
    files = [line.split()[0] for line in lines[::2]]
    assert files == [str(photos / name) for name in ("b/large.jpg", "grey.webp", "link.png")]
    assert lines[3] == lines[5]  # the second class of one image, by its name and by a link
    assert len({len(line) for line in lines}) == 1
    broken, left_out, last = done.stderr.splitlines()
    assert broken.startswith(f"distvgg: error: {photos}/cut.png cannot be decoded: ")
    assert left_out == f"distvgg: note: left out in {photos}: 1 file without an image"
    assert last == "distvgg: error: 1 of 4 images could not be read"


def test_one_image_that_cannot_be_read_is_one_line(plain: Path, photos: Path) -> None:
    for name, why in (("cut.png", "cannot be decoded"), ("x.png", "cannot be read: No such file")):
        assert f"{photos}/{name} {why}" in mistake(plain, photos / name)
    assert "notes.txt is not an image" in mistake(plain, photos / "notes.txt")
    done = run(["predict", str(plain), *[str(photos / n) for n in ("cut.png", "x")], "--json"])
    assert (done.returncode, json.loads(done.stdout)) == (2, [])
    assert done.stderr.endswith("none of 2 files could be read as an image\n")


def mistake(run_dir: Path, image: Path | str, *words: str) -> str:
    """The one line that refuses a prediction."""
    done = run(["predict", str(run_dir), str(image), *words])
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    return done.stderr


def test_a_reader_that_has_read_enough_is_no_error(plain: Path, photos: Path) -> None:
    image = photos / "grey.webp"
    words = f"{sys.executable} -m distvgg predict {plain} {f'{image} ' * 300} | head -1"
    done = subprocess.run(
        ["bash", "-c", words], env=os.environ | CPU, capture_output=True, text=True, timeout=60
    )
    assert (done.stdout.split()[0], done.stderr) == ("image", "")


def test_prediction_imports_nothing_that_only_training_needs(plain: Path, photos: Path) -> None:
    unused = {"accelerate", "datasets", "pyarrow", "torchvision", "wandb", "sympy"}
    probe = (
        "import sys, distvgg.cli\n"
        f"code = distvgg.cli.main(['predict', {str(plain)!r}, {str(photos / 'grey.webp')!r}])\n"
        f"print(code, sorted({unused} & set(sys.modules)))"
    )
    assert run((), program=("-c", probe)).stdout.splitlines()[-1] == "0 []"


@pytest.fixture
def image(photos: Path) -> Path:
    return photos / "grey.webp"


def test_a_copy_of_the_weights_alone_is_enough(plain: Path, image: Path, tmp_path: Path) -> None:
    expected = distvgg.load(plain).classify(image)
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(plain / "model.safetensors", alone)
    (checkpoint,) = (plain / "checkpoints").iterdir()
    for folder in (alone, checkpoint):
        assert distvgg.load(folder).classify(image) == expected


def test_a_loaded_network_takes_paths_images_and_arrays(plain: Path, image: Path) -> None:
    state = torch.random.get_rng_state()
    model = distvgg.load(str(plain))
    assert torch.equal(torch.random.get_rng_state(), state)
    opened = Image.open(image)
    x = model.preprocess(image)
    assert (x.shape, x.dtype) == ((3, 40, 40), torch.float32)
    for same in (str(image), opened, np.asarray(opened)):
        assert torch.equal(model.preprocess(same), x)
    model.train()  # dropout and BatchNorm of a training must not enter a prediction
    found = model.classify(image, top=1000)
    assert model.training
    model.eval()
    logits = model(x[None])
    torch.testing.assert_close(logits.softmax(1)[0].max().item(), found[0][1])
    assert sorted(name for name, _ in found) == sorted(model.class_names)
    assert sum(p for _, p in found) == pytest.approx(1)
    assert list(model.state_dict()) == list(distvgg.load_model(plain).state_dict())
    with pytest.raises(
        UserError, match=r"an image is a path, a PIL image, or a uint8 array .+, not float64"
    ):
        model.classify(np.zeros((3, 3, 7)))


def test_many_images_are_read_a_batch_at_a_time(plain: Path, image: Path) -> None:
    read = 0

    def images() -> Iterator[Path]:
        nonlocal read
        for _ in range(1000):
            read += 1
            yield image

    found = distvgg.load(plain).classify_all(images())
    next(found)
    assert 0 < read < 200


def copy_of(run_dir: Path, folder: Path) -> Path:
    shutil.copytree(run_dir, folder, ignore=shutil.ignore_patterns("checkpoints"))
    return folder


def refused(folder: Path) -> str:
    """The line that refuses to load a folder."""
    with pytest.raises(UserError) as error:
        distvgg.load(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_runs_that_cannot_be_used_are_one_line(plain: Path, image: Path, tmp_path: Path) -> None:
    assert "run folder /nowhere does not exist" in refused(Path("/nowhere"))
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has no model.safetensors: give" in refused(empty)
    assert "no files in" in mistake(plain, empty)
    assert "--top must be at least 1" in mistake(plain, image, "--top", "0")
    begun = tmp_path / "begun"
    shutil.copytree(plain, begun)
    (begun / "model.safetensors").unlink()
    assert "its newest checkpoint, " in (line := refused(begun))
    assert distvgg.load(line.rsplit(maxsplit=1)[1]).class_names


def test_weights_that_do_not_fit_are_one_line(plain: Path, tmp_path: Path) -> None:
    folder = copy_of(plain, tmp_path / "run")
    weights, config = folder / "model.safetensors", folder / "config.yaml"
    written = config.read_text()
    config.write_text(written.replace("depth: 11", "depth: 13"))
    assert "cannot be loaded: Error(s) in loading state_dict" in refused(folder)
    config.write_text(written.replace("depth:", "deepness:"))
    assert "unknown key model.deepness" in refused(folder)
    # As an earlier version wrote them: without a description, and without class names.
    config.unlink()
    constants = json.loads((folder / "preprocessing.json").read_text())
    kept = {n: constants[n] for n in ("mean", "std", "stored_size", "image_size", "class_names")}
    (folder / "preprocessing.json").write_text(json.dumps(kept))
    assert "does not describe its network" in refused(folder)
    config.write_text(written)
    assert distvgg.load(folder).class_names[0] == "class_00"
    (folder / "preprocessing.json").write_text(json.dumps(kept | {"class_names": ["one"]}))
    assert "100 outputs, and its preprocessing 1 class names" in refused(folder)
    (folder / "preprocessing.json").write_text("{")
    assert "preprocessing.json is damaged" in refused(folder)
    (folder / "preprocessing.json").unlink()
    save_file(load_file(weights), weights)
    assert "does not say how images become input" in refused(folder)
    save_file({"fc.weight": torch.zeros(2)}, weights)
    shutil.copy(plain / "preprocessing.json", folder)
    assert "has no layer classifier" in refused(folder)
    weights.write_bytes(b"none")
    assert "model.safetensors cannot be loaded" in refused(folder)


def test_without_class_names_classes_are_numbers(plain: Path, image: Path, tmp_path: Path) -> None:
    folder = copy_of(plain, tmp_path / "run")
    constants = json.loads((folder / "preprocessing.json").read_text())
    del constants["class_names"]
    (folder / "preprocessing.json").write_text(json.dumps(constants))
    done = run(["predict", str(folder), str(image), "--json"])
    assert (
        done.stderr == f"distvgg: note: {folder} has no class names: classes are numbers from 0\n"
    )
    (found,) = json.loads(done.stdout)
    named = distvgg.load(plain).classify(image)
    assert [int(c["class"]) for c in found["classes"]] == [int(name[-2:]) for name, _ in named]
    assert isinstance(distvgg.load(folder), Classifier)


def test_a_name_of_any_bytes_is_printed(plain: Path, image: Path, tmp_path: Path) -> None:
    odd = os.fsencode(tmp_path) + b"/\xff\xc3\xa9.webp"
    shutil.copy(image, odd)
    for env in ({}, {"PYTHONIOENCODING": "ascii"}):
        done = subprocess.run(
            [sys.executable, "-m", "distvgg", "predict", plain, odd, "--top", "1"],
            env=os.environ | CPU | env,
            capture_output=True,
            timeout=60,
        )
        assert (done.returncode, done.stderr) == (0, b"")
        assert rb"/\xff" in done.stdout

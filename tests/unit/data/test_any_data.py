"""What users bring: what is read is what they meant, or a line says what was not.

Each test is a kind of data set that public reports of other trainers describe.
"""

import os
import pickle
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from distvgg.data import images
from distvgg.data.cache import load_dataset
from distvgg.data.dataset import train_and_val
from distvgg.data.images import cover
from distvgg.errors import UserError
from made_data import custom, made_rows, noise, png, with_names, write_folders, write_parquet

pytestmark = pytest.mark.usefixtures("cold")


@pytest.fixture
def cold(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache outside of the folders that are read."""
    monkeypatch.setenv("DISTVGG_CACHE", str(tmp_path_factory.mktemp("cache")))


COLOURS = {"cat": (200, 10, 10), "dog": (10, 200, 10), "bird": (10, 10, 200)}


def put(path: Path, colour: str, ending: str = "png", side: int = 32) -> None:
    """Writes an image whose colour tells its class."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), COLOURS[colour]).save(path, ending)


def learned(path: Path | str, **fields: Any) -> dict[str, list[tuple[str, str]]]:
    """The (class, colour) pairs of each split as they would be trained on."""
    dataset = load_dataset(custom(str(path), **fields))
    found = {}
    for name in ("train", "val", "test"):
        split = getattr(dataset, name)
        if split is not None:
            colours = [
                min(COLOURS, key=lambda c, p=pixel: np.abs(np.subtract(COLOURS[c], p)).sum())
                for pixel in split.images[:, 16, 16].astype(int)
            ]
            names = [dataset.class_names[label] for label in split.labels]
            found[name] = list(zip(names, colours, strict=True))
    return found


def right(pairs: list[tuple[str, str]]) -> bool:
    return all(name == colour for name, colour in pairs)


def coloured(names: list[str]) -> list[dict[str, Any]]:
    images = [np.full((32, 32, 3), COLOURS[name], np.uint8) for name in names]
    return [{"bytes": png(image), "path": None} for image in images]


def refusal(path: Path | str, **fields: Any) -> str:
    with pytest.raises(UserError) as raised:
        load_dataset(custom(str(path), **fields))
    assert "\n" not in str(raised.value)
    return str(raised.value)


def notes(path: Path | str, **fields: Any) -> str:
    found = load_dataset(custom(str(path), **fields)).notes
    # Those of `put` are equal within a class.
    return "; ".join(note for note in found if not note.startswith("copies of other images"))


# Tables


def test_classes_of_splits_are_joined_by_name(tmp_path: Path) -> None:
    train = ["bird", "cat", "dog"] * 4
    test = ["cat", "dog", "dog"]
    tables = []
    for of, names in ((train, ["bird", "cat", "dog"]), (test, ["cat", "dog"])):
        rows = {"img": coloured(of), "label": [names.index(name) for name in of]}
        tables.append(with_names(pa.table(rows), names))
    found = learned(write_parquet(tmp_path / "set", *tables))
    assert right(found["train"])
    assert right(found["test"])
    assert [name for name, _ in found["test"]] == test


def test_a_split_without_names_beside_one_with_names_is_refused(tmp_path: Path) -> None:
    named = with_names(pa.table({"img": coloured(["cat", "dog"]), "label": [0, 1]}), ["cat", "dog"])
    path = write_parquet(tmp_path / "set", named, made_rows(2, label=[0, 1]))
    assert "(test split) has no class names, but the train split has" in refusal(path)


@pytest.mark.parametrize(
    ("values", "classes", "note"),
    [
        ([1, 2, 3], ["1", "2", "3"], "labels 1, 2, 3 are numbered 0 to 2"),
        ([0, 5, 9], ["0", "5", "9"], "labels 0, 5, 9 are numbered 0 to 2"),
        ([0, 1, 2], ["0", "1", "2"], ""),
        (["dog", "bird", "cat"], ["bird", "cat", "dog"], ""),
        ([0.0, 1.0, 2.0], ["0", "1", "2"], ""),
        ([True, False, True], ["False", "True"], ""),
    ],
)
def test_labels_are_taken_by_value(
    tmp_path: Path, values: list[Any], classes: list[str], note: str
) -> None:
    path = write_parquet(tmp_path / "set", made_rows(12, label=values * 4), None)
    dataset = load_dataset(custom(path))
    assert dataset.class_names == classes
    named = [dataset.class_names[label] for label in dataset.train.labels]
    assert named == [str(int(v) if isinstance(v, float) else v) for v in values * 4]
    assert note in "; ".join(dataset.notes)
    assert bool(dataset.notes) is bool(note)


def test_hidden_test_labels_leave_the_test_split_out(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "set", made_rows(), made_rows(5, label=[-1] * 5))
    dataset = load_dataset(custom(path))
    assert dataset.test is None
    assert dataset.notes == ("the labels of the test split are all -1 (hidden): it is not used",)


def test_two_image_columns_are_ambiguous(tmp_path: Path) -> None:
    rows = {"mask": made_rows(20, 1)["img"]} | made_rows(20, 2)
    path = write_parquet(tmp_path / "set", rows, None)
    assert "has the image columns mask and img: choose one with --data.image_column" in refusal(
        path
    )
    images = load_dataset(custom(path, image_column="img")).train.images
    assert np.array_equal(images, noise(20, 2))
    said = refusal(path, image_column="image")
    assert "has no column image, only mask, img, label: change data.image_column" in said


def test_columns_of_any_name_are_found_by_type(tmp_path: Path) -> None:
    rows = made_rows()
    path = write_parquet(
        tmp_path / "a", {"pixel_values": rows["img"], "class": rows["label"]}, None
    )
    assert np.array_equal(load_dataset(custom(path)).train.labels, rows["label"])
    two = {"image": rows["img"], "age": rows["label"], "kind": rows["label"][::-1]}
    path = write_parquet(tmp_path / "b", two, None)
    assert "no single label column (age and kind may be): choose one with" in refusal(path)
    labels = load_dataset(custom(path, label_column="kind")).train.labels
    assert np.array_equal(labels, rows["label"][::-1])


def test_a_card_that_describes_another_copy_does_not_matter(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "set", made_rows(), None)
    (tmp_path / "set" / "README.md").write_text(
        "---\ndataset_info:\n  splits:\n  - name: train\n    num_bytes: 9\n"
        "    num_examples: 50000\n  download_size: 1\n  dataset_size: 9\n---\n"
    )
    assert len(load_dataset(custom(path)).train) == 20


def test_a_validation_split_is_the_validation_split(tmp_path: Path) -> None:
    for name in ("validation", "val"):
        root = tmp_path / name
        for split, n in (("train", 6), (name, 3), ("test", 2)):
            for i in range(n):
                for colour in COLOURS:
                    put(root / split / colour / f"{i}.png", colour)
        config = custom(str(root), val_size=5)
        dataset = load_dataset(config)
        train, of, val = train_and_val(dataset, config)
        assert (len(train), len(val), len(dataset.test or ())) == (18, 9, 6)
        assert of is dataset.val
        assert all(right(pairs) for pairs in learned(root).values())


def test_a_validation_split_in_place_of_test_is_no_test(tmp_path: Path) -> None:
    write_folders(tmp_path / "set", ["a", "b"], {"train": noise(8, 0), "val": noise(4, 1)})
    dataset = load_dataset(custom(str(tmp_path / "set")))
    assert dataset.test is None
    assert len(dataset.val or ()) == 4


# Folders


def test_the_folder_below_the_split_is_the_class_however_deep(tmp_path: Path) -> None:
    for where in ("cat/kaggle", "cat/wild", "dog/kaggle", "dog/show/more"):
        put(tmp_path / "train" / where / "0.png", where.partition("/")[0])
    found = learned(tmp_path)["train"]
    assert right(found)
    assert [name for name, _ in found] == ["cat", "cat", "dog", "dog"]


def test_folders_without_splits_are_the_train_split(tmp_path: Path) -> None:
    for colour in COLOURS:
        put(tmp_path / colour / "0.png", colour)
    assert right(learned(tmp_path)["train"])


def test_links_are_followed_and_a_circle_is_an_error(tmp_path: Path) -> None:
    store, root = tmp_path / "store", tmp_path / "set"
    for colour in COLOURS:
        put(store / colour / "0.png", colour)
    (root / "train").mkdir(parents=True)
    for colour in COLOURS:
        (root / "train" / colour).symlink_to(store / colour)
    found = learned(root)["train"]
    assert right(found)
    assert len(found) == 3
    (store / "cat" / "again").symlink_to(root / "train")
    assert "is a link to a folder above it: remove the link" in refusal(root)


def test_files_are_recognised_by_content_and_the_rest_is_counted(tmp_path: Path) -> None:
    train = tmp_path / "train"
    put(train / "cat" / "0.png", "cat")
    put(train / "cat" / "no_ending", "cat")
    put(train / "dog" / "photo.image", "dog", "jpeg")
    for name, text in (("0.json", "{not json"), ("0.txt", "\udcff"), (".DS_Store", "x")):
        (train / "cat" / name).write_bytes(os.fsencode(text))
    (train / "cat" / "dangling.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "notes.md").write_text("mine")
    os.mkfifo(train / "cat" / "pipe.png")  # a read would wait for ever
    found = learned(tmp_path)["train"]
    assert right(found)
    assert len(found) == 3
    assert notes(tmp_path) == (
        "left out of train: 1 a dangling link, 1 a pipe or device, 1 beside the split folders,"
        " 1 hidden, 1 not an image (.json), 1 not an image (.txt)"
    )


def test_a_class_may_begin_with_underscores(tmp_path: Path) -> None:
    for name in ("__cat", "dog"):
        put(tmp_path / "train" / name / "0.png", name.strip("_"))
    assert [name for name, _ in learned(tmp_path)["train"]] == ["__cat", "dog"]


def test_names_that_differ_in_case_are_refused(tmp_path: Path) -> None:
    for where in ("train/Cat", "train/dog", "test/cat"):
        put(tmp_path / where / "0.png", "cat")
    assert "(test split) has class cat, which the train split lacks" in refusal(tmp_path)
    put(tmp_path / "train" / "cat" / "0.png", "cat")
    assert "has classes that differ only in case, Cat and cat: give them one" in refusal(tmp_path)


def test_two_unicode_forms_of_a_name_are_one_class(tmp_path: Path) -> None:
    name = "Kätzchen"
    for split, form in (("train", "NFC"), ("test", "NFD")):
        put(tmp_path / split / unicodedata.normalize(form, name) / "0.png", "cat")  # type: ignore[arg-type]
        put(tmp_path / split / "dog" / "0.png", "dog")
    dataset = load_dataset(custom(str(tmp_path)))
    assert dataset.class_names == [unicodedata.normalize("NFC", name), "dog"]
    assert dataset.test is not None
    assert dataset.test.labels.tolist() == [0, 1]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_metadata_file_gives_the_classes(tmp_path: Path, kind: str) -> None:
    train = tmp_path / "train"
    order = ["cat", "dog", "bird", "dog"]
    for i, colour in enumerate(order):
        put(train / f"{i}.png", colour)
    lines = [f'{{"file_name": "{i}.png", "label": "{c}"}}' for i, c in enumerate(order)]
    if kind == "csv":
        lines = ["file_name,label", *(f"{i}.png,{c}" for i, c in enumerate(order))]
    (train / f"metadata.{kind}").write_text("\n".join(lines))
    found = learned(tmp_path)["train"]
    assert [name for name, _ in found] == order
    assert right(found)


def test_a_metadata_file_of_ones_own_is_ignored_and_counted(tmp_path: Path) -> None:
    for colour in COLOURS:
        put(tmp_path / "train" / colour / "0.png", colour)
    (tmp_path / "train" / "metadata.csv").write_text("who,when,camera\nme,2024,old\n")
    assert right(learned(tmp_path)["train"])
    assert notes(tmp_path) == "left out of train: 1 metadata"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("file_name,label\n0.png,cat\n1.png,\n", "row 2 has no label of a file"),
        ("file_name,label\n0.png,cat\n0.png,dog\n", "0.png has two classes"),
        ("file_name,label\n9.png,cat\n", "has no image of a class, only files left out"),
    ],
)
def test_a_metadata_file_that_names_no_class_of_a_file_is_refused(
    tmp_path: Path, text: str, said: str
) -> None:
    for i in range(2):
        put(tmp_path / "train" / f"{i}.png", "cat")
    (tmp_path / "train" / "metadata.csv").write_text(text)
    assert said in refusal(tmp_path)


def test_tables_beside_images_are_refused_and_hidden_ones_do_not_count(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        put(tmp_path / "train" / name / "indoor" / "0.png", name)
        put(tmp_path / "train" / name / "outdoor" / "1.png", name)
    (tmp_path / ".git").mkdir()
    write_parquet(tmp_path / ".git", {"x": [1]}, None)
    assert right(learned(tmp_path)["train"])
    write_parquet(tmp_path / "train", {"x": [1]}, None)
    assert "holds both tables (.parquet) and images (train/cat/indoor/0.png)" in refusal(tmp_path)


def test_a_test_split_of_files_that_are_no_images_is_refused(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        put(tmp_path / "train" / name / "0.png", name)
    (tmp_path / "test" / "cat").mkdir(parents=True)
    (tmp_path / "test" / "cat" / "0.heic").write_bytes(b"unknown")
    said = refusal(tmp_path)
    assert "test has no image of a class, only files left out (1 not an image (.heic))" in said


def test_names_of_images_within_a_table_are_kept(tmp_path: Path) -> None:
    images = [image | {"path": f"{n}.png"} for n, image in enumerate(coloured(["cat", "dog"]))]
    write_parquet(tmp_path, {"img": images, "label": ["cat", "dog"]}, None)
    assert load_dataset(custom(str(tmp_path))).train.file_names() == ["0.png", "1.png"]


def test_each_table_is_in_one_split(tmp_path: Path) -> None:
    rows = {"img": coloured(["cat", "dog"]), "label": ["cat", "dog"]}
    write_parquet(tmp_path / "a", rows, None)
    (file,) = (tmp_path / "a").iterdir()
    shutil.copy(file, file.with_name("more.parquet"))
    assert "more.parquet is in 0 splits" in refusal(tmp_path / "a")
    file.with_name("more.parquet").unlink()
    file.rename(file.with_name("my_train_test_data.parquet"))
    assert "my_train_test_data.parquet is in 2 splits" in refusal(tmp_path / "a")


def test_a_folder_of_tables_whose_name_is_a_pattern_is_refused(tmp_path: Path) -> None:
    rows = {"img": coloured(["cat", "dog"]), "label": ["cat", "dog"]}
    for name in ("h*", "hother"):
        write_parquet(tmp_path / name, rows, None)
    assert "give the folder a name without *, ? and [" in refusal(tmp_path / "h*")


def test_a_limit_on_pixels_is_part_of_what_was_read(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        put(tmp_path / "train" / name / "0.png", name, side=32)
        put(tmp_path / "train" / name / "1.png", name, side=40)
    small = {"resize": 32, "on_error": "skip", "max_pixels": 1100}
    assert len(learned(tmp_path, **small)["train"]) == 2
    assert len(learned(tmp_path, resize=32, on_error="skip")["train"]) == 4


def test_a_name_is_spelled_as_in_cifar_only_in_cifar(tmp_path: Path) -> None:
    for name in ("cra", "dog"):
        put(tmp_path / "train" / name / "0.png", "dog")
    assert load_dataset(custom(str(tmp_path))).class_names == ["cra", "dog"]


def test_labels_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    for label in (float("nan"), float("inf")):
        write_parquet(tmp_path / "a", {"img": coloured(["cat"] * 2), "label": [1.0, label]}, None)
        assert "is of type double" in refusal(tmp_path / "a")


def test_a_class_folder_whose_name_is_no_text_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "train" / "cat" / "0.png", "cat")
    os.rename(tmp_path / "train" / "cat", os.fsencode(tmp_path / "train") + b"/\xff")
    put(tmp_path / "train" / "dog" / "0.png", "dog")
    assert "has characters that no name has: rename it" in refusal(tmp_path)


def test_circles_of_links_end_at_once(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        put(tmp_path / "train" / name / "0.png", name)
        for link in ("one", "two", "three"):
            (tmp_path / "train" / name / link).symlink_to("..")
    assert "is a link to a folder above it" in refusal(tmp_path)


def test_a_strip_of_pixels_takes_no_more_than_its_centre(tmp_path: Path) -> None:
    image = Image.new("RGB", (1, 300_000), COLOURS["cat"])
    assert np.asarray(cover(image, 224, 224)).shape == (224, 224, 3)
    # Where both ways are possible, they differ by rounding.
    photo = Image.fromarray(noise(1, 0, side=80)[0]).resize((90, 400), Image.Resampling.BICUBIC)
    whole = np.asarray(cover(photo, 64, 64)).astype(int)
    with mock.patch.object(images, "MAX_COVERING", 0):
        assert np.abs(np.asarray(cover(photo, 64, 64)).astype(int) - whole).max() <= 12


def test_what_teaches_nothing_is_refused_with_the_layout(tmp_path: Path) -> None:
    put(tmp_path / "one" / "train" / "cat" / "0.png", "cat")
    assert "has one class, cat, which teaches nothing: put the images" in refusal(tmp_path / "one")
    put(tmp_path / "flat" / "train" / "0.png", "cat")
    said = refusal(tmp_path / "flat")
    assert "has 1 images outside of class folders: put the images of each class in a" in said
    packed = tmp_path / "packed"
    packed.mkdir()
    shutil.make_archive(str(packed / "images"), "zip", tmp_path / "one")
    assert "holds no data: unpack images.zip first" in refusal(packed)


# Images


def test_photographs_are_turned_upright(tmp_path: Path) -> None:
    upright = np.zeros((32, 32, 3), np.uint8)
    upright[:16] = 250  # bright above, dark below
    for name, turns, orientation in (("a", 0, 1), ("b", 1, 6), ("c", 2, 3), ("d", 3, 8)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / "train" / ("x" if name in "ab" else "y") / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.rot90(upright, turns)).save(path, exif=exif)
    images = load_dataset(custom(str(tmp_path))).train.images
    assert all(np.array_equal(image, upright) for image in images)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_white(tmp_path: Path, mode: str) -> None:
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[..., 3] = 255
    pixels[:8, :, 3] = 0  # hidden black
    image = Image.fromarray(pixels)
    if mode == "P":
        image = image.quantize(4)
    elif mode == "LA":
        image = image.convert("LA")
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        image.save(tmp_path / "train" / name / "0.png")
    stored = load_dataset(custom(str(tmp_path))).train.images[0]
    assert (stored[:8] == 255).all()
    assert (stored[8:] == 0).all()


def test_a_huge_image_is_read_up_to_a_limit_that_is_an_option(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        put(tmp_path / "train" / name / "0.png", name)
    huge = tmp_path / "train" / "cat" / "huge.png"
    Image.new("1", (14_000, 14_000)).save(huge)
    assert load_dataset(custom(str(tmp_path), resize=32)).train.images.shape == (3, 32, 32, 3)
    said = refusal(tmp_path, resize=16, max_pixels=100_000_000)
    assert "14000x14000 pixels are more than data.max_pixels 100000000" in said


def truncated(tmp_path: Path, damaged: int, whole: int = 20) -> Path:
    for i in range(whole):
        put(tmp_path / "train" / ("cat", "dog")[i % 2] / f"{i:03}.png", ("cat", "dog")[i % 2])
    for i in range(damaged):
        path = tmp_path / "train" / "cat" / f"broken{i:02}.png"
        path.write_bytes(png(noise(1, i)[0])[:1500])
    return tmp_path


def test_damaged_images_are_named_in_one_go(tmp_path: Path) -> None:
    said = refusal(truncated(tmp_path, damaged=12))
    assert "12 of 32 images: image 10 (" in said
    assert said.count("cannot be decoded") == 10
    assert "broken09.png" in said
    assert "broken10.png" not in said
    assert said.endswith("...; fix or drop them, or leave them out with --data.on_error skip")


def test_damaged_images_can_be_left_out(tmp_path: Path) -> None:
    root = truncated(tmp_path, damaged=3)
    found = learned(root, on_error="skip")["train"]
    assert right(found)
    assert len(found) == 20
    assert notes(root, on_error="skip") == "left out of train: 3 damaged"
    train = load_dataset(custom(str(root), on_error="skip")).train
    files = train.file_names()
    assert files is not None
    assert {str(Path(file).parent) for file in files} == {"train/cat", "train/dog"}
    for file, image in zip(files, train.images, strict=True):
        assert np.array_equal(np.asarray(Image.open(root / file)), image)
    assert "3 of 23 images" in refusal(root)  # what skip wrote does not count


def test_many_copies_are_a_note(tmp_path: Path) -> None:
    images = noise(20, 0)
    write_folders(tmp_path, ["a", "b"], {"train": np.concatenate([images, images[:2]])})
    found = load_dataset(custom(str(tmp_path)))
    assert "copies of others in train: 2 images" in found.card
    (note,) = found.notes
    assert note.startswith(
        "copies of other images in train: 2 of 22; validation, if it is held out"
    )


def test_the_card_counts_classes_sizes_and_shared_images(tmp_path: Path) -> None:
    images = noise(24, 0)
    write_folders(tmp_path / "set", ["a", "b"], {"train": images[:20], "test": images[16:]})
    for i, image in enumerate(noise(90, 3, side=40)):
        path = tmp_path / "set" / "train" / "b" / f"large{i}.png"
        path.write_bytes(png(image if i else image[..., 0]))
    dataset = load_dataset(custom(str(tmp_path / "set"), resize=32))
    assert dataset.card == (
        "train: 110 images of 2 classes, from 10 (a) to 100 (b) each",
        "test: 8 images of 2 classes, 4 each",
        "sizes: 90 of 40x40, 28 of 32x32",
        "modes before conversion to RGB: 117 RGB, 1 L",
        "in train and in test: 4 images",
    )
    assert dataset.notes == ("classes are not balanced: a has 10 images, b 100",)


# The original files of CIFAR


def python_files(folder: Path, images: np.ndarray, fine: list[int], coarse: list[int]) -> None:
    folder.mkdir()
    data = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    for name in ("train", "test"):
        content = {b"data": data, b"fine_labels": fine, b"coarse_labels": coarse}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    names = {b"fine_label_names": [b"a", b"b"], b"coarse_label_names": [b"all"]}
    (folder / "meta").write_bytes(pickle.dumps(names, protocol=2))


def binary_files(folder: Path, images: np.ndarray, fine: list[int], coarse: list[int]) -> None:
    folder.mkdir()
    data = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    records = np.concatenate([np.array([coarse, fine], np.uint8).T, data], axis=1)
    for name in ("train", "test"):
        (folder / f"{name}.bin").write_bytes(records.tobytes())
    (folder / "fine_label_names.txt").write_text("a\nb\n")
    (folder / "coarse_label_names.txt").write_text("all\n")


@pytest.mark.parametrize(
    ("name", "write"), [("cifar-100-python", python_files), ("cifar-100-binary", binary_files)]
)
@pytest.mark.parametrize("below", [True, False])
def test_the_original_files_of_cifar_are_read(
    tmp_path: Path, name: str, write: Callable[..., None], below: bool
) -> None:
    images = noise(6, 0)
    write(tmp_path / name, images, [0, 1] * 3, [0] * 6)
    dataset = load_dataset(custom(str(tmp_path if below else tmp_path / name)))
    assert dataset.class_names == ["a", "b"]
    assert dataset.superclass_names == ["all"]
    assert dataset.test is not None
    for split in (dataset.train, dataset.test):
        assert np.array_equal(split.images, images)
        assert split.labels.tolist() == [0, 1] * 3


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("fine_labels", [0]),
        ("fine_labels", [0.0, 1.5]),
        ("coarse_labels", [0]),
        ("data", [[0] * 3072] * 2),
        ("data", np.zeros((2, 3072))),
        ("data", np.zeros((1, 3072), np.uint8)),
    ],
)
def test_damaged_files_of_cifar_are_one_line(tmp_path: Path, key: str, value: Any) -> None:
    folder = tmp_path / "cifar-100-python"
    python_files(folder, noise(2, 0), [0, 1], [0, 0])
    content = pickle.loads((folder / "train").read_bytes(), encoding="bytes")
    content = {k.decode() if isinstance(k, bytes) else k: v for k, v in content.items()}
    (folder / "train").write_bytes(pickle.dumps(content | {key: value}))
    said = refusal(tmp_path)
    assert f"{folder / 'train'} cannot be read: " in said
    assert said.endswith("; download and unpack it again")


def test_a_missing_file_of_cifar_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for name in ("batches.meta.txt", "data_batch_1.bin", "data_batch_2.bin", "test_batch.bin"):
        (folder / name).touch()
    said = f"{folder} has no file data_batch_3.bin, but others of cifar-10-batches-bin: download"
    assert said in refusal(tmp_path)


def photos(folder: Path, lists: dict[str, str]) -> Path:
    """A folder of 30 images and lists of them, of which {} is the place of its rows."""
    (folder / "photos").mkdir(parents=True)
    for i, image in enumerate(noise(30, 0)):
        (folder / "photos" / f"{i:02}.png").write_bytes(png(image))
    for name, text in lists.items():
        (folder / name).write_text(text)
    return folder


def listing(of: range, header: str = "image,label", row: str = "photos/{i:02}.png,0{c}") -> str:
    return "\n".join([header, *(row.format(i=i, c=i % 2) for i in of)]) + "\n"


@pytest.mark.parametrize(
    ("header", "row"),
    [
        ("image,label", "photos/{i:02}.png,0{c}"),
        ("id, path, class", '{i}, "./photos/../photos/{i:02}.png" , 0{c} '),
        ("\N{BYTE ORDER MARK}file_name,kind", "{root}/photos/{i:02}.png,0{c}"),
    ],
)
def test_lists_of_images_give_the_splits(tmp_path: Path, header: str, row: str) -> None:
    root = tmp_path / "set"
    row = row.replace("{root}", str(root))
    lists = {"Train.csv": listing(range(18), header, row)}
    tabs = listing(range(18, 28), header, row).replace(",", "\t")
    found = load_dataset(custom(str(photos(root, lists | {"val.TSV": tabs}))))
    assert found.class_names == ["00", "01"]  # text, as it is written
    assert found.train.labels.tolist() == [i % 2 for i in range(18)]
    assert np.array_equal(found.train.images, noise(30, 0)[:18])
    assert found.train.file_names() == [f"photos/{i:02}.png" for i in range(18)]
    assert found.val is not None
    assert np.array_equal(found.val.images, noise(30, 0)[18:28])
    assert found.notes == ("left out of train: 2 in no list",)


@pytest.mark.parametrize(
    ("lists", "said"),
    [
        ({"train.csv": listing(range(40))}, "10 of 40 files are not in "),
        ({"train.csv": "image,label\n../x.png,a\n"}, "such as ../x.png: paths are relative"),
        ({"train.csv": "image,label\n"}, "train.csv has no rows: list the images"),
        ({"train.csv": "image\na.png\n"}, "has no column of classes, only image: add one named"),
        ({"train.csv": "image;label\na;b\n"}, "separate them by commas, not by ';'"),
        ({"train.tsv": listing(range(9))}, "separate them by tabs, not by ','"),
        ({"train.csv": listing(range(9)) + "photos/03.png,00\n"}, "has two classes: drop one"),
        ({"train.csv": listing(range(9)) + "a.png,x,y\n"}, "row 10 has more values than columns"),
        ({"train.csv": listing(range(9)) + "a.png,\n"}, "row 10 has no label of a file"),
        (
            {"train.csv": listing(range(9), "image,label,label")},
            "has 2 columns that may be the label",
        ),
        (
            {"train.csv": listing(range(9), "image,path,label")},
            "2 columns that may be the image, of",
        ),
        (
            {"train.csv": listing(range(9), "image,a,b", "{i},{c},0")},
            "2 columns that may be the la",
        ),
        ({f"{n}.csv": listing(range(9)) for n in ("val", "train")}, "is in train.csv and in val.c"),
        ({f"train.{e}": listing(range(9)) for e in ("csv", "CSV")}, "has two lists of one split"),
        ({"test.csv": listing(range(9))}, "has lists of test only: add train.csv"),
        ({"train.csv": listing(range(9)), "test/a": ""}, "and the folder test/: give all splits"),
    ],
)
def test_lists_that_are_no_lists_are_one_line(
    tmp_path: Path, lists: dict[str, str], said: str
) -> None:
    (tmp_path / "test").mkdir() if "test/a" in lists else None
    assert said in refusal(photos(tmp_path, lists))


def test_a_table_beside_class_folders_may_be_somebodys_own(tmp_path: Path) -> None:
    write_folders(tmp_path, ["a", "b"], {"train": noise(20, 0)})
    for folder in (tmp_path / "train").iterdir():
        folder.rename(tmp_path / folder.name)
    (tmp_path / "train").rmdir()
    (tmp_path / "train.csv").write_text("epoch,loss\n1,2.5\n")
    assert notes(tmp_path) == "left out of train: 1 not an image (.csv)"


def test_images_of_a_table_are_below_data_path(tmp_path: Path) -> None:
    outside = photos(tmp_path / "elsewhere", {}) / "photos"
    rows = {"image": [str(outside / f"{i:02}.png") for i in range(20)], "label": [0, 1] * 10}
    (tmp_path / "set").mkdir()
    pq.write_table(pa.table(rows), tmp_path / "set" / "train.parquet")
    assert "is outside of data.path, where a change of it would not be noticed" in refusal(
        tmp_path / "set"
    )
    (tmp_path / "set" / "photos").symlink_to(outside)
    rows["image"] = [f"photos/{i:02}.png" for i in range(20)]
    pq.write_table(pa.table(rows), tmp_path / "set" / "train.parquet")
    found = load_dataset(custom(str(tmp_path / "set"))).train
    assert np.array_equal(found.images, noise(30, 0)[:20])


def test_a_pickle_that_would_run_code_does_not(tmp_path: Path) -> None:
    python_files(tmp_path / "cifar-100-python", noise(2, 0), [0, 1], [0, 0])

    class Runs:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / "cifar-100-python" / "meta").write_bytes(pickle.dumps(Runs()))
    assert "mkdir, which no CIFAR file does; download and unpack it again" in refusal(tmp_path)
    assert not (tmp_path / "ran").exists()

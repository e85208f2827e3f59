"""Rows that the `datasets` library reads -> checked arrays on disk; the classes of CIFAR-100.

Owns everything that can be wrong with a user's images. Imported only when the cache is cold.
Invariant: whatever `write` leaves behind has one image shape, labels in range, and a superclass for
every class or for none.
"""

import io
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image, UnidentifiedImageError

from distvgg.config import DataConfig, UserError

# Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009. Both labels of the
# official files number these names in alphabetical order.
CIFAR100_SUPERCLASSES = {
    "aquatic_mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food_containers": "bottle bowl can cup plate",
    "fruit_and_vegetables": "apple mushroom orange pear sweet_pepper",
    "household_electrical_devices": "clock keyboard lamp telephone television",
    "household_furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large_carnivores": "bear leopard lion tiger wolf",
    "large_man-made_outdoor_things": "bridge castle house road skyscraper",
    "large_natural_outdoor_scenes": "cloud forest mountain plain sea",
    "large_omnivores_and_herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium_mammals": "fox porcupine possum raccoon skunk",
    "non-insect_invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small_mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles_1": "bicycle bus motorcycle pickup_truck train",
    "vehicles_2": "lawn_mower rocket streetcar tank tractor",
}
# The hub's metadata of CIFAR-100 has lost a letter.
SPELLING = {"cra": "crab"}
# What the two named sets must be: images of this side, in this many classes.
SIDE = {"cifar100": 32, "cifar10": 32}
CLASSES = {"cifar100": 100, "cifar10": 10}
LABEL_COLUMNS = ("fine_label", "label", "labels")


def write(config: DataConfig, source: str, folder: Path) -> dict[str, Any]:
    """Decodes a folder or hub id into `{train,test}_{images,labels,superclasses}.npy`.

    Returns:
        class_names, superclass_names, superclass_of, mean and std, ready for JSON.

    Raises:
        UserError: the source cannot be read, or holds an image or label that does not fit.
    """
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".arrow.") as scratch:
        splits = _read(config, source, scratch)
        if "train" not in splits:
            raise UserError(f"{source} has no train split, only {', '.join(splits)}")
        held_out = next((s for s in ("test", "validation", "valid") if s in splits), None)
        named = {"train": splits["train"]} | ({"test": splits[held_out]} if held_out else {})
        image, label = _columns(source, named["train"])
        class_names = _class_names(config, source, named["train"], label)
        shape: tuple[int, ...] | None = None
        if config.name in SIDE:
            side = config.resize or SIDE[config.name]
            shape = (side, side, 3)
        for name, rows in named.items():
            where = f"{source} ({name} split)"
            if not len(rows):
                raise UserError(f"{where} holds no images")
            labels = _labels(where, rows[label], class_names)
            np.save(folder / f"{name}_labels.npy", labels)
            if "coarse_label" in rows.column_names and label != "coarse_label":
                coarse = np.asarray(rows["coarse_label"], dtype=np.int64)
                np.save(folder / f"{name}_superclasses.npy", coarse)
            shape = _write_images(where, rows, image, config, shape, folder / f"{name}_images.npy")
        superclass_names = _names_of(named["train"], "coarse_label")
    mean, std = channel_moments(np.load(folder / "train_images.npy", mmap_mode="r"))
    superclass_names, superclass_of = _superclasses(source, folder, class_names, superclass_names)
    return {
        "class_names": class_names,
        "superclass_names": superclass_names,
        "superclass_of": superclass_of,
        "mean": mean,
        "std": std,
    }


def channel_moments(images: np.ndarray) -> tuple[list[float], list[float]]:
    """Per-channel mean and standard deviation in 0..1 of [n, height, width, 3] uint8, from exact
    histograms."""
    counts = np.zeros((3, 256), dtype=np.int64)
    for block in np.array_split(images, max(1, len(images) // 4096)):
        for channel in range(3):
            counts[channel] += np.bincount(block[..., channel].ravel(), minlength=256)
    levels = np.arange(256) / 255
    mean = counts @ levels / counts.sum(1)
    std = np.sqrt(counts @ levels**2 / counts.sum(1) - mean**2)
    return mean.tolist(), std.tolist()


def _read(config: DataConfig, source: str, scratch: str) -> dict[str, Any]:
    """The splits of a folder or hub id, images undecoded."""
    import datasets

    local = Path(source).is_dir()
    if not local and not _is_hub_id(source):
        raise UserError(
            f"data.path {source} is not a folder: give one that holds Parquet files or one folder"
            " of images per class, or a hub id such as uoft-cs/cifar100"
        )
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    arguments: dict[str, Any] = {}
    if local:
        # The Arrow copy is scratch: what is kept is the decoded cache, by our own fingerprint.
        arguments["cache_dir"] = scratch
    elif not _hub_answers():
        # Otherwise the client retries for 23 s before it says that there is no network.
        import huggingface_hub

        datasets.config.HF_HUB_OFFLINE = True
        huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        with redirect_stderr(io.StringIO()):
            found = datasets.load_dataset(source, **arguments)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        if not local:
            raise UserError(
                f"cannot reach {source} on the hub and it is not cached ({reason}): give a local"
                " copy with --data.path FOLDER, point HF_HOME at a cache that holds it, or take"
                " --data.name synthetic"
            ) from error
        if isinstance(error, FileNotFoundError):
            raise UserError(
                f"data.path {source} holds no data: it needs Parquet files, or one folder of"
                " images per class below train/ and test/"
            ) from error
        raise UserError(f"data.path {source} cannot be read: {reason}") from error
    return {name: _undecoded(rows) for name, rows in found.items()}


def _undecoded(rows: Any) -> Any:
    import datasets

    for name, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
    return rows


def _is_hub_id(source: str) -> bool:
    parts = source.split("/")
    return len(parts) == 2 and all(parts) and not source.startswith((".", "~"))


def _hub_answers() -> bool:
    if os.environ.get("HF_HUB_OFFLINE") or any(p in os.environ for p in ("https_proxy", "HTTPS_PROXY")):
        return True  # the client knows what to do
    import huggingface_hub

    host = urlsplit(huggingface_hub.constants.ENDPOINT).hostname or ""
    try:
        socket.create_connection((host, 443), timeout=5).close()
    except OSError:
        return False
    return True


def _columns(source: str, rows: Any) -> tuple[str, str]:
    """The names of the image and the label column."""
    import datasets

    images = [n for n, f in rows.features.items() if isinstance(f, datasets.Image)]
    # Parquet that was not written by `datasets` has no Image feature, but the same structure.
    images += [n for n in ("img", "image") if n in rows.column_names]
    labels = [n for n in LABEL_COLUMNS if n in rows.column_names]
    if not images or not labels:
        missing = "image column" if not images else f"label column ({', '.join(LABEL_COLUMNS)})"
        raise UserError(f"{source} has no {missing}: its columns are {', '.join(rows.column_names)}")
    return images[0], labels[0]


def _names_of(rows: Any, column: str) -> list[str]:
    names = getattr(rows.features.get(column), "names", None) or []
    return [SPELLING.get(n, n) for n in names]


def _class_names(config: DataConfig, source: str, rows: Any, label: str) -> list[str]:
    names = _names_of(rows, label)
    expected = CLASSES.get(config.name)
    if not names:
        top = max(rows[label], default=-1)
        names = [str(i) for i in range(expected or top + 1)]
        if config.name == "cifar100":
            names = sorted(n for s in CIFAR100_SUPERCLASSES.values() for n in s.split())
    if expected is not None and len(names) != expected:
        raise UserError(
            f"{source} has {len(names)} classes, {config.name} has {expected}: give its folder as"
            " data.path, or --data.name custom"
        )
    return names


def _labels(where: str, values: Any, class_names: list[str]) -> np.ndarray:
    values = list(values)
    for i, value in enumerate(values):
        if not isinstance(value, int) or not 0 <= value < len(class_names):
            raise UserError(
                f"{where}: image {i} has label {value}, out of range 0 to {len(class_names) - 1}:"
                " mend or drop that row"
            )
    return np.asarray(values, dtype=np.int64)


def _write_images(
    where: str,
    rows: Any,
    column: str,
    config: DataConfig,
    shape: tuple[int, ...] | None,
    path: Path,
) -> tuple[int, ...]:
    """Decodes into [n, height, width, 3] uint8; the first image sets the shape if none is given."""
    out: np.ndarray | None = None
    for i, image in enumerate(_decoded(where, rows, column, config.resize)):
        if out is None:
            shape = shape or image.shape
            out = np.lib.format.open_memmap(path, "w+", np.uint8, (len(rows), *shape))
        if image.shape != shape:
            assert shape is not None
            raise UserError(
                f"{where}: image {i} is {image.shape[1]}x{image.shape[0]} pixels, expected"
                f" {shape[1]}x{shape[0]}: mend it, or bring all to one size with"
                f" --data.resize {min(shape[:2])}"
            )
        out[i] = image
    assert out is not None and shape is not None
    out.flush()
    return shape


def _decoded(where: str, rows: Any, column: str, resize: int | None) -> Iterator[np.ndarray]:
    i = 0
    for batch in rows.iter(batch_size=1000):
        for value in batch[column]:
            try:
                raw = value["bytes"] or Path(value["path"]).read_bytes()
                image = Image.open(io.BytesIO(raw)).convert("RGB")
            except (UnidentifiedImageError, OSError, SyntaxError, TypeError, KeyError) as error:
                raise UserError(
                    f"{where}: image {i} cannot be decoded ({error}): mend or drop it"
                ) from error
            yield np.asarray(_square(image, resize) if resize else image)
            i += 1


def _square(image: Image.Image, side: int) -> Image.Image:
    scale = side / min(image.size)
    width, height = (max(side, round(s * scale)) for s in image.size)
    left, top = (width - side) // 2, (height - side) // 2
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return resized.crop((left, top, left + side, top + side))


def _superclasses(
    source: str, folder: Path, class_names: list[str], superclass_names: list[str]
) -> tuple[list[str], list[int] | None]:
    """The superclass of each class: from the data's own column, or by name where the classes are
    CIFAR-100's (an image folder keeps only one label)."""
    if not (folder / "train_superclasses.npy").exists():
        of = {n: s for s, names in CIFAR100_SUPERCLASSES.items() for n in names.split()}
        if set(class_names) != set(of):
            return [], None
        superclass_names = list(CIFAR100_SUPERCLASSES)
        table = [superclass_names.index(of[n]) for n in class_names]
        for file in folder.glob("*_labels.npy"):
            labels = np.asarray(table, dtype=np.int64)[np.load(file)]
            np.save(folder / file.name.replace("_labels", "_superclasses"), labels)
        return superclass_names, table
    fine = np.load(folder / "train_labels.npy")
    coarse = np.load(folder / "train_superclasses.npy")
    top = len(superclass_names) or int(coarse.max()) + 1
    if coarse.min() < 0 or coarse.max() >= top:
        raise UserError(f"{source}: a coarse_label is out of range 0 to {top - 1}: mend that row")
    table_of = np.zeros(len(class_names), dtype=np.int64)
    table_of[fine] = coarse
    if (wrong := np.flatnonzero(table_of[fine] != coarse)).size:
        i = int(wrong[0])
        raise UserError(
            f"{source}: image {i} puts class {class_names[fine[i]]} in superclass {coarse[i]},"
            f" others in {table_of[fine[i]]}: mend its coarse_label"
        )
    return superclass_names or [str(i) for i in range(top)], table_of.tolist()

"""Streamed images: the bytes of the loaders that hold them, whoever reads them and when."""

import io
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from distvgg.config import Config
from distvgg.data import encoded
from distvgg.data.cache import load_dataset
from distvgg.data.dataset import Dataset
from distvgg.data.encoded import EncodedImages
from distvgg.data.loader import MicroBatch
from distvgg.data.loaders import Loaders, choose_loader
from distvgg.data.plan import BatchPlan
from distvgg.data.views import random_resized_box, scale_jitter_box
from distvgg.errors import UserError
from distvgg.recipe import load
from made_data import custom, noise, write_folders

CPU = torch.device("cpu")
ALL = {
    "augment__flip": "alternating",
    "augment__trivial": True,
    "augment__cutout": 4,
    "augment__cutmix_alpha": 1.0,
    "augment__mix_probability": 0.8,
}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """60 smooth images of varied sizes and modes, in four classes, as JPEG and PNG."""
    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for split, n in {"train": 40, "test": 20}.items():
        for i in range(n):
            width, height = rng.integers(30, 90, 2).tolist()
            small = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
            image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
            path = folder / split / "abcd"[i % 4] / f"{i}.{'png' if i % 5 == 4 else 'jpg'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.convert("L" if i % 7 == 3 else "RGB").save(path)
    return str(folder)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTVGG_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def config_of(path: str, **changes: object) -> Config:
    data = custom(path, resize=24, val_size=4).model_dump()
    base = Config().replace(
        data=data,
        model__image_size=24,
        train__global_batch_size=24,
        train__micro_batch_size=4,
        train__epochs=9,
        eval__batch_size=7,
    )
    return base.replace(**changes)


def loaders_of(config: Config, streams: bool, dataset: Dataset | None = None) -> Loaders:
    return Loaders(config, dataset or load_dataset(config.data), CPU, streams=streams)


def steps_of(
    config: Config, steps: list[int], *, streams: bool, world_size: int = 1
) -> list[list[MicroBatch]]:
    """The micro-batches of some steps, over all ranks."""
    found: list[list[MicroBatch]] = [[] for _ in steps]
    for rank in range(world_size):
        loaders = loaders_of(config, streams)
        plan = BatchPlan(37, 24, 4, world_size)
        loader = loaders.training(np.arange(1, 38), plan, rank)
        for batches, step in zip(found, steps, strict=True):
            batches += loader.micro_batches(step)
        loaders.close()
    return found


def assert_equal(ones: list[list[MicroBatch]], others: list[list[MicroBatch]]) -> None:
    assert len(ones) == len(others)
    for one, other in zip(ones, others, strict=True):
        for a, b in zip(one, other, strict=True):
            for x, y in zip(a, b, strict=True):
                assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


@pytest.mark.parametrize(("store", "padding"), [("decoded", 4), ("encoded", 4), ("encoded", 0)])
def test_a_stream_has_the_bytes_of_images_on_the_device(
    photographs: str, store: str, padding: int
) -> None:
    """Also across epochs, and in evaluation."""
    config = config_of(photographs, **ALL, data__workers=0, augment__crop_padding=padding)
    steps = [0, 1, 2, 7, 3]
    held = steps_of(config, steps, streams=False)
    streamed = config.replace(data__store=store)
    assert_equal(steps_of(streamed, steps, streams=True, world_size=2), held)
    batches = []
    for of, streams in ((config, False), (streamed, True)):
        dataset = load_dataset(of.data)
        assert dataset.test is not None
        loaders = loaders_of(of, streams, dataset)
        batches.append(list(loaders.evaluation(dataset.test, None).batches(1, 2)))
    for (i, x, labels), (j, y, others) in zip(*batches, strict=True):
        assert i == j
        assert torch.equal(x, y)
        assert torch.equal(labels, others)


CROPS = [
    {"augment__random_resized_crop": 0.2, "augment__crop_padding": 0},
    {"augment__scale_jitter": (30, 48), "augment__crop_padding": 0},
]


@pytest.mark.parametrize("crops", CROPS, ids=["random resized crop", "scale jitter"])
def test_crops_depend_on_nothing_but_seed_epoch_and_sample(
    photographs: str, crops: dict[str, object]
) -> None:
    config = config_of(photographs, data__store="encoded", data__workers=0, **crops)
    alone = steps_of(config, [0, 1, 2, 3], streams=True)
    assert_equal(steps_of(config, [2, 0], streams=True, world_size=3), [alone[2], alone[0]])
    seen = {int(row) for batch in alone[0] for row in batch.rows}
    pictures = {
        (int(r), bytes(x.numpy()))
        for s in alone
        for b in s
        for r, x in zip(b.rows, b.images, strict=True)
    }
    assert len(pictures) > 2 * len(seen)  # other crops in other epochs
    other = steps_of(config.replace(seed=1), [0], streams=True)
    assert not torch.equal(other[0][0].images, alone[0][0].images)


def test_workers_change_no_byte_and_are_shared_by_training_and_evaluation(
    photographs: str,
) -> None:
    """Steps out of order, and an evaluation in between, begin the workers' sequence again."""
    config = config_of(photographs, data__store="encoded", **CROPS[0])
    dataset, rows, plan = load_dataset(config.data), np.arange(1, 38), BatchPlan(37, 24, 4)
    assert dataset.test is not None
    steps, found = [0, 1, 5, 2, 3], []
    before = torch.get_rng_state()
    for workers in (0, 2):
        loaders = loaders_of(config.replace(data__workers=workers), True, dataset)
        loader = loaders.training(rows, plan, 0)
        first = [loader.micro_batches(step) for step in steps]
        evaluated = [x for _, x, _ in loaders.evaluation(dataset.test, None).batches(0, 1)]
        found.append(([*first, loader.micro_batches(4)], evaluated))
        loaders.close()
    assert torch.equal(torch.get_rng_state(), before)
    assert_equal(found[0][0], found[1][0])
    assert all(map(torch.equal, found[0][1], found[1][1]))


def test_evaluation_crops_the_centre_as_torchvision(photographs: str) -> None:
    config = config_of(photographs, data__store="encoded", data__workers=0, eval__crop_ratio=0.75)
    dataset = load_dataset(config.data)
    (_, images, _), *_ = (
        loaders_of(config, True, dataset).evaluation(dataset.train, np.array([3])).batches(0, 1)
    )
    assert isinstance(dataset.train.images, EncodedImages)
    image = Image.open(io.BytesIO(dataset.train.images.content(3))).convert("RGB")
    theirs = v2.Compose([v2.Resize(32), v2.CenterCrop(24)])(image)
    mean, std = np.array(dataset.mean), np.array(dataset.std)
    ours = (images[0].permute(1, 2, 0).numpy() * std + mean) * 255
    # torchvision rounds the longer side down, this package to the nearest pixel.
    assert np.abs(ours - np.asarray(theirs)).mean() < 2


def test_random_resized_crops_are_distributed_as_torchvisions() -> None:
    size, n = (120, 70), 4000
    ours = np.array([random_resized_box(size, 0.08, 0, 0, i) for i in range(n)])
    torch.manual_seed(0)
    image = torch.empty(3, size[1], size[0])
    theirs = np.array(
        [v2.RandomResizedCrop.make_params(v2.RandomResizedCrop(9), [image]) for _ in range(n)],
        dtype=object,
    )
    boxes = np.array(
        [(p["left"], p["top"], p["left"] + p["width"], p["top"] + p["height"]) for p in theirs]
    )
    for column in range(4):
        a, b = np.sort(ours[:, column]), np.sort(boxes[:, column])
        grid = np.arange(max(size) + 1)
        gap = (
            np.abs(np.searchsorted(a, grid, "right") - np.searchsorted(b, grid, "right")).max() / n
        )
        assert gap < 1.95 * math.sqrt(2 / n)  # Kolmogorov and Smirnov at 0.1%


def test_scale_jitter_shows_a_square_of_every_scale_at_every_place() -> None:
    boxes = np.array([scale_jitter_box((90, 60), 24, (30, 48), 0, 0, i) for i in range(2000)])
    sides = boxes[:, 2] - boxes[:, 0]
    np.testing.assert_allclose(sides, boxes[:, 3] - boxes[:, 1])
    scales, counts = np.unique(np.round(24 * 60 / sides, 6), return_counts=True)
    assert scales.tolist() == list(range(30, 49))
    assert counts.min() > 60
    assert boxes.min() >= 0
    assert (boxes.max(0) <= [90, 60, 90, 60]).all()
    assert boxes[:, 2].max() > 89
    assert boxes[:, 0].min() < 1


def test_shards_hold_the_files_and_their_moments(
    photographs: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(encoded, "SHARD_BYTES", 2000)
    monkeypatch.setenv("DISTVGG_CACHE", str(tmp_path))
    data = custom(photographs, resize=24)
    decoded = load_dataset(data)
    kept = load_dataset(data.model_copy(update={"store": "encoded"}))
    assert isinstance(kept.train.images, EncodedImages)
    assert kept.train.images.shape == decoded.train.images.shape
    assert np.array_equal(kept.train.images[:], decoded.train.images)
    assert (kept.mean, kept.std) == (decoded.mean, decoded.std)
    files = {path.read_bytes() for path in Path(photographs).glob("train/*/*")}
    assert {kept.train.images.content(row) for row in range(40)} == files
    shards = list(tmp_path.glob("*/train_files_*.bin"))
    assert len(shards) > 5
    assert max(shard.stat().st_size for shard in shards) < 2000 + max(map(len, files))


def test_damaged_images_are_refused_at_once_or_left_out(tmp_path: Path) -> None:
    path = write_folders(tmp_path / "set", ["a", "b"], {"train": noise(20, 0), "test": noise(4, 1)})
    for i in (2, 7):
        file = Path(path) / "train" / "a" / f"{i}.png"
        file.write_bytes(file.read_bytes()[:500])
    data = custom(path, store="encoded", resize=16, val_size=2)
    with pytest.raises(UserError, match=r"2 of 20 images: image 2 .*2\.png.*image 7 "):
        load_dataset(data)
    dataset = load_dataset(data.model_copy(update={"on_error": "skip"}))
    assert len(dataset.train) == len(dataset.train.images) == 18


def test_a_full_disk_chooses_encoded_and_little_memory_chooses_the_stream(
    photographs: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = config_of(photographs)
    dataset = load_dataset(config.data)
    assert choose_loader(config, dataset, CPU) == (False, "")
    monkeypatch.setattr("distvgg.data.loaders._free_memory", lambda device: 10_000)
    choice = choose_loader(config, dataset, CPU)
    assert choice.streams
    assert "images do not fit the device" in choice.note
    assert not choose_loader(config.replace(data__loader="device"), dataset, CPU).streams
    monkeypatch.setattr("distvgg.data.decode.ROOM", 1e-12)
    monkeypatch.setenv("DISTVGG_CACHE", str(tmp_path))
    small = load_dataset(config.data)
    assert isinstance(small.train.images, EncodedImages)
    assert any("would not fit the disk" in note for note in small.notes)
    crops = config.replace(data__store="encoded", **CROPS[0])
    with pytest.raises(UserError, match=r"data\.loader device .* crop the original"):
        choose_loader(crops.replace(data__loader="device"), small, CPU)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data.resize": "none"}, "needs the side of its crops: set --data.resize"),
        ({"data.store": "auto"}, "set --data.store encoded"),
        ({"augment.scale_jitter": "256,512"}, "are both on"),
        ({"augment.scale_jitter": "512,256"}, "the smaller first"),
        ({"augment.random_resized_crop": "0", "augment.scale_jitter": "200,512"}, "raise it"),
    ],
)
def test_what_crops_cannot_do_without_is_said(changes: dict[str, str], words: str) -> None:
    base = {"data.name": "custom", "data.path": "photos", "data.store": "encoded"}
    base |= {"data.resize": "224", "augment.random_resized_crop": "0.08"}
    assert load("fast", base)
    with pytest.raises(UserError, match=words):
        load("fast", base | changes)


def test_a_changed_cache_is_one_line(
    photographs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTVGG_CACHE", str(tmp_path))
    config = config_of(photographs, data__store="encoded", data__workers=0)
    dataset = load_dataset(config.data)
    (shard,) = tmp_path.glob("*/train_files_*.bin")
    shard.write_bytes(bytes(shard.stat().st_size))
    loader = loaders_of(config, True, dataset).training(np.arange(1, 38), BatchPlan(37, 24, 4), 0)
    with pytest.raises(UserError, match=r"cannot read an image of the data cache .* builds it"):
        loader.micro_batches(0)

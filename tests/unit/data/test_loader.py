"""The loaders: what a step computes on is a function of (seed, step, k), wherever it runs."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distvgg.config import Config
from distvgg.data.dataset import Dataset, Split
from distvgg.data.loader import DeviceImages, DeviceLoader, EvalLoader, MicroBatch
from distvgg.data.plan import BatchPlan
from distvgg.errors import UserError

CPU = torch.device("cpu")


def dataset(n: int, side: int = 32) -> Dataset:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, side, side, 3), dtype=np.uint8)
    split = Split(images, rng.integers(0, 10, n), None)
    return Dataset(split, None, list("abcdefghij"), [], None, (0.5,) * 3, (0.25,) * 3, "")


def loader(config: Config, n: int, world_size: int = 1, rank: int = 0) -> DeviceLoader:
    rows = np.arange(0, 2 * n, 2)  # training rows are not all rows
    plan = BatchPlan(n, config.train.global_batch_size, config.train.micro_batch_size, world_size)
    data = dataset(2 * n)
    return DeviceLoader(config, DeviceImages(data, data.train, 32, CPU), rows, plan, rank)


def equal(a: MicroBatch, b: MicroBatch) -> bool:
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(a, b, strict=True)
    )


@settings(max_examples=25)
@given(n=st.integers(5, 90), step=st.integers(0, 40))
def test_micro_batches_do_not_depend_on_ranks(n: int, step: int) -> None:
    """n below 24: a step takes more than one epoch."""
    config = Config().replace(train__global_batch_size=24, train__micro_batch_size=4)
    alone = loader(config, n).micro_batches(step)
    for world_size in (2, 3, 6):
        shared = [
            batch
            for rank in range(world_size)
            for batch in loader(config, n, world_size, rank).micro_batches(step)
        ]
        assert all(map(equal, alone, shared))
        assert [b.k for b in shared] == list(range(6))


ALL = {
    "augment__flip": "alternating",
    "augment__trivial": True,
    "augment__cutout": 8,
    "augment__mixup_alpha": 0.2,
    "augment__cutmix_alpha": 1.0,
    "augment__mix_probability": 0.8,
}


@pytest.mark.parametrize(
    "changes", [*({k: v} for k, v in ALL.items() if "probability" not in k), ALL]
)
def test_no_augmentation_depends_on_ranks(changes: dict[str, object]) -> None:
    config = Config().replace(
        train__epochs=3, train__global_batch_size=24, train__micro_batch_size=6, **changes
    )
    n, steps = 40, 5
    moved = False
    for step in range(steps):
        alone = loader(config, n).micro_batches(step)
        for world_size in (2, 4):
            ranks = [loader(config, n, world_size, rank) for rank in range(world_size)]
            shared = [batch for rank in ranks for batch in rank.micro_batches(step)]
            assert all(map(equal, alone, shared))
        off = loader(config.replace(augment=Config().augment), n)
        for a, b in zip(alone, off.micro_batches(step), strict=True):
            assert torch.equal(a.rows, b.rows)
            assert a.dropout_seed == b.dropout_seed
            moved = moved or not torch.equal(a.images, b.images)
    assert moved


def test_labels_are_mixed_as_images_are() -> None:
    """Where a box is another's, so is the label; the larger share is the one to be hit."""
    config = Config().replace(
        train__global_batch_size=16, train__micro_batch_size=8, augment__cutmix_alpha=1.0
    )
    plain = config.replace(augment__cutmix_alpha=0.0)
    seen = set()
    for step in range(10):
        pairs = zip(
            loader(config, 90).micro_batches(step),
            loader(plain, 90).micro_batches(step),
            strict=True,
        )
        for batch, before in pairs:
            assert batch.partner_labels is not None
            assert before.partner_labels is None
            assert torch.equal(batch.labels, before.labels)
            replaced = (batch.images != before.images).any(1).float().mean((1, 2))
            assert (replaced <= 1 - batch.lam + 1e-6).all()
            for image in range(8):
                # Whose pixels came in: found by comparing with each of the micro-batch.
                other = batch.images[image] != before.images[image]
                alike = [
                    i
                    for i in range(8)
                    if torch.equal(batch.images[image][other], before.images[i][other])
                ]
                labels = {int(before.labels[i]) for i in alike}
                assert int(batch.partner_labels[image]) in labels
            main = batch.labels if batch.lam >= 0.5 else batch.partner_labels
            assert batch.hard_labels is main
            seen.add(batch.lam >= 0.5)
    assert seen == {True, False}


def test_an_epoch_holds_every_training_row_once_with_its_label() -> None:
    config = Config().replace(train__global_batch_size=8, train__micro_batch_size=4)
    data, source = loader(config, 40), dataset(80)
    batches = [batch for step in range(5) for batch in data.micro_batches(step)]
    seen = torch.cat([b.rows for b in batches])
    assert sorted(seen.tolist()) == list(range(0, 80, 2))
    for batch in batches:
        assert torch.equal(batch.labels, torch.from_numpy(source.train.labels)[batch.rows])
        assert batch.images.shape == (4, 3, 32, 32)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert len({b.dropout_seed for b in batches}) == len(batches)


def test_steps_may_be_asked_for_in_any_order() -> None:
    """Resume is nothing but asking for a later step first."""
    config = Config().replace(train__global_batch_size=8, train__micro_batch_size=4)
    forwards, backwards = loader(config, 11), loader(config, 11)
    ahead = {step: forwards.micro_batches(step) for step in range(12)}
    for step in reversed(range(12)):
        assert all(map(equal, ahead[step], backwards.micro_batches(step)))


def test_the_order_is_no_function_of_the_augmentation() -> None:
    plain = Config().replace(augment__crop_padding=0, augment__flip=False)
    a, b = (loader(c, 600).micro_batches(0)[0] for c in (Config(), plain))
    assert torch.equal(a.rows, b.rows)
    assert not torch.equal(a.images, b.images)


@given(n=st.integers(1, 60), batch_size=st.integers(1, 70), world_size=st.integers(1, 9))
def test_evaluation_takes_every_image_once(n: int, batch_size: int, world_size: int) -> None:
    data = dataset(n, side=4)
    evaluation = EvalLoader(DeviceImages(data, data.train, 4, CPU), None, batch_size)
    shared = [b for rank in range(world_size) for b in evaluation.batches(rank, world_size)]
    assert sorted(i for i, _, _ in shared) == list(range(len(evaluation)))
    labels = torch.cat([labels for _, _, labels in sorted(shared, key=lambda b: b[0])])
    assert torch.equal(labels, torch.from_numpy(data.train.labels))


@pytest.mark.parametrize("field", ["crop_padding", "cutout"])
def test_what_is_as_wide_as_the_images_is_refused(field: str) -> None:
    config = Config().replace(**{f"augment__{field}": 32})
    with pytest.raises(UserError, match=rf"{field} 32 must be less than .* 32 pixels"):
        loader(config, 600)

"""Augmentation against a slow reference: torchvision's own pad, crop and flip, image by image."""

import numpy as np
import torch
import torchvision.transforms.v2.functional as reference
from hypothesis import given, settings
from hypothesis import strategies as st

from distvgg.augment import Draws, draw_epoch, normalise, view
from distvgg.config import AugmentConfig


def random_images(n: int, height: int, width: int) -> torch.Tensor:
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.integers(0, 256, (n, height, width, 3), dtype=np.uint8))


@settings(max_examples=30)
@given(
    height=st.integers(6, 20),
    width=st.integers(6, 20),
    padding=st.integers(0, 5),
    seed=st.integers(0, 1000),
)
def test_view_equals_pad_crop_flip(height: int, width: int, padding: int, seed: int) -> None:
    images = random_images(9, height, width)
    config = AugmentConfig(crop_padding=padding)
    draws = draw_epoch(config, seed, epoch=0, n_samples=5)
    index = torch.tensor([8, 0, 3, 3, 1])
    out = view(images, index, draws, padding)
    for i in range(5):
        image = images[index[i]].permute(2, 0, 1)
        padded = reference.pad(image, [padding] * 4, padding_mode="reflect")
        expected = reference.crop(padded, int(draws.top[i]), int(draws.left[i]), height, width)
        if draws.flip[i]:
            expected = reference.horizontal_flip(expected)
        assert torch.equal(out[i].permute(2, 0, 1), expected)


def test_normalise_equals_torchvision() -> None:
    images = random_images(4, 32, 32)
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.25, 0.3])
    chw = reference.to_dtype(images.permute(0, 3, 1, 2), torch.float32, scale=True)
    expected = reference.normalize(chw, mean.tolist(), std.tolist())
    torch.testing.assert_close(normalise(images, mean, std, 32), expected)
    torch.testing.assert_close(
        normalise(images, mean, std, 24), reference.resize(expected, [24, 24], antialias=True)
    )
    assert normalise(images, mean, std, 32).is_contiguous(memory_format=torch.channels_last)


def test_draws_belong_to_seed_epoch_and_sample_and_use_the_whole_range() -> None:
    config = AugmentConfig(crop_padding=4)
    first = draw_epoch(config, 0, 0, 10_000)
    again = draw_epoch(config, 0, 0, 10_000)
    assert all(map(torch.equal, first, again))
    for other in (draw_epoch(config, 0, 1, 10_000), draw_epoch(config, 1, 0, 10_000)):
        assert not torch.equal(first.top, other.top)
    for offsets in (first.top, first.left):
        counts = torch.bincount(offsets, minlength=9)
        assert len(counts) == 9
        assert (counts - 10_000 / 9).abs().max() < 5 * 100 / 3  # five standard deviations
    assert abs(first.flip.float().mean() - 0.5) < 5 * 0.005


def test_switched_off_it_changes_nothing() -> None:
    images = random_images(3, 8, 8)
    draws = draw_epoch(AugmentConfig(crop_padding=0, flip=False), 0, 0, 3)
    assert torch.equal(view(images, torch.arange(3), draws, 0), images)
    assert isinstance(draws.take(slice(1)), Draws)

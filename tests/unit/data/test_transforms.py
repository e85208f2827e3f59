"""Augmentation against slow references, image by image: torchvision's own where it has one."""

import itertools

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as reference
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import v2

from distvgg.config import AugmentConfig
from distvgg.data.mixing import MixParams, draw_mix_params, mix
from distvgg.data.transforms import (
    AugmentParams,
    crop_and_flip,
    cutout,
    draw_epoch,
    normalise,
    resize,
)


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
    params = draw_epoch(config, seed, epoch=0, n_samples=5)
    index = torch.tensor([8, 0, 3, 3, 1])
    out = crop_and_flip(images, index, params, padding)
    for i in range(5):
        image = images[index[i]].permute(2, 0, 1)
        padded = reference.pad(image, [padding] * 4, padding_mode="reflect")
        expected = reference.crop(padded, int(params.top[i]), int(params.left[i]), height, width)
        if params.flip[i]:
            expected = reference.horizontal_flip(expected)
        assert torch.equal(out[i].permute(2, 0, 1), expected)


def test_normalise_equals_torchvision() -> None:
    images = random_images(4, 32, 32)
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.25, 0.3])
    chw = reference.to_dtype(images.permute(0, 3, 1, 2), torch.float32, scale=True)
    expected = reference.normalize(chw, mean.tolist(), std.tolist())
    ours = normalise(images, mean, std)
    torch.testing.assert_close(ours, expected)
    assert resize(ours, 32) is ours
    smaller = resize(ours, 24)
    torch.testing.assert_close(smaller, reference.resize(expected, [24, 24], antialias=True))
    for x in (ours, smaller):
        assert x.is_contiguous(memory_format=torch.channels_last)


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


def test_alternating_flips_show_each_image_both_ways_in_any_two_epochs() -> None:
    config = AugmentConfig(flip="alternating")
    flips = [draw_epoch(config, 0, epoch, 10_000).flip for epoch in range(4)]
    assert abs(flips[0].float().mean() - 0.5) < 5 * 0.005
    for a, b in itertools.pairwise(flips):
        assert torch.equal(a, ~b)


def test_one_kind_of_draw_does_not_move_another() -> None:
    plain = draw_epoch(AugmentConfig(), 0, 3, 50)
    full = draw_epoch(AugmentConfig(cutout=8, trivial=True), 0, 3, 50)
    assert all(map(torch.equal, plain[:3], full[:3]))
    alone = draw_epoch(AugmentConfig(flip="alternating", cutout=8), 0, 3, 50)
    assert torch.equal(alone.cutout_center, full.cutout_center)
    assert torch.equal(alone.top, full.top)


def channels_last(n: int, side: int) -> torch.Tensor:
    """[n, 3, side, side] random floats, NHWC in memory."""
    rng = torch.Generator().manual_seed(0)
    return torch.randn(n, side, side, 3, generator=rng).permute(0, 3, 1, 2)


@settings(max_examples=30)
@given(height=st.integers(6, 20), width=st.integers(6, 20), size=st.integers(1, 12))
def test_cutout_equals_erasing(height: int, width: int, size: int) -> None:
    cutout_center = draw_epoch(AugmentConfig(cutout=size), height, width, 6).cutout_center
    images = channels_last(6, 20)[:, :, :height, :width]
    out = cutout(images.clone(), cutout_center, size)
    for i in range(6):
        y, x = (
            int(cutout_center[i, 0] * height) - size // 2,
            int(cutout_center[i, 1] * width) - size // 2,
        )
        top, left = max(0, y), max(0, x)
        expected = reference.erase(
            images[i], top, left, y + size - top, x + size - left, torch.zeros(())
        )
        assert torch.equal(out[i], expected)


def test_the_centre_of_a_hole_is_any_pixel_alike() -> None:
    centre = (draw_epoch(AugmentConfig(cutout=8), 0, 0, 20_000).cutout_center * 10).long()
    for at in centre.unbind(1):
        counts = torch.bincount(at, minlength=10)
        assert len(counts) == 10
        assert (counts - 2000).abs().max() < 5 * (2000 * 0.9) ** 0.5


@pytest.mark.parametrize("shift", [1, 3])
def test_mixing_equals_torchvisions_with_the_partner_before(shift: int) -> None:
    """torchvision pairs each image with its neighbour: given two, it makes one mixture."""
    images = channels_last(5, 16)
    boxes = ((2, 9, 0, 13), (0, 16, 0, 16), (4, 4, 4, 4))
    for mixture in (MixParams(shift, 0.3, None), *(MixParams(shift, 0.0, box) for box in boxes)):
        ours = mix(images.clone(), mixture)
        assert ours.is_contiguous(memory_format=torch.channels_last)
        for i in range(5):
            # Its `transform` blends image i with image i - 1 of a batch.
            pair = torch.stack([images[i - shift], images[i]])
            labels = torch.tensor([0, 1])
            if mixture.box is None:
                params = {"lam": mixture.lam}
                theirs = v2.MixUp(num_classes=2)
            else:
                top, bottom, left, right = mixture.box
                params = {"box": (left, top, right, bottom), "lam_adjusted": mixture.lam}
                theirs = v2.CutMix(num_classes=2)
            out = theirs.transform(pair, params | {"labels": labels, "batch_size": 2})
            torch.testing.assert_close(ours[i], out[1])


def test_a_box_leaves_its_share_and_lies_anywhere() -> None:
    config = AugmentConfig(cutmix_alpha=1.0)
    covered = torch.zeros(16, 16)
    for step in range(500):
        drawn = draw_mix_params(config, 0, step, 0, 8, 16)
        assert drawn is not None
        assert drawn.box is not None
        top, bottom, left, right = drawn.box
        assert 0 <= top <= bottom <= 16
        assert 0 <= left <= right <= 16
        inside = torch.zeros(16, 16)
        inside[top:bottom, left:right] = 1
        assert drawn.lam == pytest.approx(1 - inside.mean().item())
        covered += inside
    assert covered.min() > 0


@pytest.mark.parametrize("alpha", [0.001, 0.2, 1.0, 3.0])
def test_weights_are_beta_and_shifts_uniform(alpha: float) -> None:
    config = AugmentConfig(mixup_alpha=alpha)
    drawn = [draw_mix_params(config, 0, step, 1, 5, 32) for step in range(2000)]
    shares = np.array([mixture.lam for mixture in drawn if mixture])
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(shares.mean() - 0.5) < 5 * (variance / 2000) ** 0.5
    assert shares.var() == pytest.approx(variance, rel=0.1)
    shifts = np.bincount([mixture.shift for mixture in drawn if mixture], minlength=5)
    assert shifts[0] == 0  # no image with itself
    assert abs(shifts[1:] - 500).max() < 5 * (500 * 0.75) ** 0.5


def test_how_often_micro_batches_are_mixed_and_how() -> None:
    config = AugmentConfig(mixup_alpha=0.2, cutmix_alpha=1.0, mix_probability=0.6)
    drawn = [draw_mix_params(config, 0, step, 0, 8, 32) for step in range(2000)]
    mixed = [mixture for mixture in drawn if mixture]
    cut = [mixture for mixture in mixed if mixture.box]
    assert abs(len(mixed) - 1200) < 5 * (2000 * 0.24) ** 0.5
    assert abs(len(cut) - len(mixed) / 2) < 5 * (len(mixed) / 4) ** 0.5
    assert draw_mix_params(AugmentConfig(), 0, 0, 0, 8, 32) is None


def test_switched_off_it_changes_nothing() -> None:
    images = random_images(3, 8, 8)
    params = draw_epoch(AugmentConfig(crop_padding=0, flip="no"), 0, 0, 3)
    assert torch.equal(crop_and_flip(images, torch.arange(3), params, 0), images)
    assert isinstance(params.take(slice(1)), AugmentParams)

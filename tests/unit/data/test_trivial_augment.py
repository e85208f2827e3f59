"""TrivialAugment against torchvision's, image by image and to the last bit."""

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode, v2

from distvgg.config import AugmentConfig
from distvgg.data.transforms import draw_epoch, trivial_augment
from distvgg.data.trivial_augment import BINS, LEVELS, OPS, apply_ops

WIDE = v2.TrivialAugmentWide()
THEIRS = dict(zip(OPS, WIDE._AUGMENTATION_SPACE, strict=True))


def pictures(n: int, height: int, width: int) -> torch.Tensor:
    """Noise, every third in few and low values, every third grey, one of a single value."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, height, width, 3), dtype=np.uint8)
    images[::3] = images[::3] // 40 + rng.integers(0, 150, (len(images[::3]), 1, 1, 1))
    images[1::3] = images[1::3, :, :, :1]
    images[2] = 7
    return torch.from_numpy(images)


def expected(image: torch.Tensor, op: str, level: int) -> torch.Tensor:
    magnitudes, signed = WIDE._AUGMENTATION_SPACE[THEIRS[op]]
    table = magnitudes(BINS, *image.shape[:2])
    magnitude = 0.0 if table is None else float(table[level % BINS])
    if signed and level >= BINS:
        magnitude = -magnitude
    out = WIDE._apply_image_or_video_transform(
        image.permute(2, 0, 1), THEIRS[op], magnitude, InterpolationMode.NEAREST, WIDE._fill
    )
    return out.permute(1, 2, 0)


def test_the_operations_are_torchvisions() -> None:
    assert [name.replace("_", "") for name in OPS] == [name.lower() for name in THEIRS.values()]


@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 20)])
@pytest.mark.parametrize("op", OPS)
def test_each_operation_at_each_level(op: str, height: int, width: int) -> None:
    images = pictures(LEVELS, height, width)
    before = images.clone()
    counts = [len(images) if name == op else 0 for name in OPS]
    out = apply_ops(images, counts, torch.arange(LEVELS))
    for level in range(LEVELS):
        assert torch.equal(out[level], expected(images[level], op, level)), level
    assert torch.equal(images, before)


def test_a_batch_of_all_operations_keeps_its_order() -> None:
    params = draw_epoch(AugmentConfig(trivial=True), seed=0, epoch=0, n_samples=100)
    assert len(set(params.trivial[:, 0].tolist())) == len(OPS)
    images = pictures(100, 24, 24)
    out = trivial_augment(images, params)
    for i, (op, level) in enumerate(params.trivial.tolist()):
        assert torch.equal(out[i], expected(images[i], list(OPS)[op], level)), (i, op, level)


def test_operations_and_levels_are_uniform() -> None:
    n = 62_000
    op, level = draw_epoch(AugmentConfig(trivial=True), 0, 0, n).trivial.unbind(1)
    for drawn, of in ((op, len(OPS)), (level, LEVELS)):
        counts = torch.bincount(drawn, minlength=of)
        assert len(counts) == of
        deviation = (n / of * (1 - 1 / of)) ** 0.5
        assert (counts - n / of).abs().max() < 5 * deviation

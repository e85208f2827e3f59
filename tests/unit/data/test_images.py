"""One image of any mode becomes upright RGB."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError

from distvgg.data.images import cover, decode_upright, upright_rgb
from made_data import noise, png

PIXELS = noise(1, 0, side=9)[0][:7]  # 7 high, 9 wide
GREY = PIXELS[..., 0]
ORIENTATION = 0x0112


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def in_three(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=2)


def half_transparent() -> tuple[bytes, np.ndarray]:
    alpha = np.where(np.arange(9) < 4, 255, 0).astype(np.uint8) * np.ones((7, 1), np.uint8)
    image = Image.fromarray(np.dstack([PIXELS, alpha]))
    return encoded(image, "PNG"), np.where(alpha[..., None] > 0, PIXELS, 255)


def transparent_palette() -> tuple[bytes, np.ndarray]:
    image = Image.new("P", (3, 2), 1)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((0, 0), 0)
    expected = np.full((2, 3, 3), (40, 50, 60), np.uint8)
    expected[0, 0] = 255
    return encoded(image, "PNG", transparency=0), expected


def grey_of_16_bits_of_which_one_is_transparent() -> tuple[bytes, np.ndarray]:
    values = GREY.astype(np.uint16) * 257
    first = int(values[0, 0])
    expected = np.where(values == first, 255, GREY).astype(np.uint8)
    return encoded(Image.fromarray(values), "PNG", transparency=first), in_three(expected)


def lying(orientation: int, turned: np.ndarray) -> tuple[bytes, np.ndarray]:
    """An image whose pixels lie turned, as a camera stores them, and which is `PIXELS` upright."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    image = Image.fromarray(np.ascontiguousarray(turned))
    return encoded(image, "PNG", exif=exif), PIXELS


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (png(PIXELS), PIXELS),
        (png(GREY), in_three(GREY)),
        (png(np.dstack([PIXELS, np.full_like(GREY, 255)])), PIXELS),
        half_transparent(),
        transparent_palette(),
        grey_of_16_bits_of_which_one_is_transparent(),
        (png(GREY.astype(np.uint16) * 257), in_three(GREY)),
        (encoded(Image.fromarray(GREY.astype(np.int32) * 257), "TIFF"), in_three(GREY)),
        (encoded(Image.fromarray(255 - PIXELS).convert("CMYK"), "TIFF"), 255 - PIXELS),
        (encoded(Image.fromarray(GREY > 99), "PNG"), in_three((GREY > 99) * np.uint8(255))),
        lying(3, PIXELS[::-1, ::-1]),
        lying(6, np.rot90(PIXELS)),
        lying(5, PIXELS.transpose(1, 0, 2)),
    ],
    ids=[
        *("RGB", "grey", "opaque", "half-transparent", "palette", "transparent grey"),
        *("16 bits", "32 bits, 16 used"),
        *("CMYK", "black and white", "upside down", "lying", "transposed"),
    ],
)
def test_an_image_of_any_mode_becomes_upright_rgb(data: bytes, expected: np.ndarray) -> None:
    image = decode_upright(data)
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), expected)


@pytest.mark.parametrize("values", [GREY / np.float32(3), GREY.astype(np.int32) << 20])
def test_pixels_of_unknown_range_are_refused(values: np.ndarray) -> None:
    with pytest.raises(ValueError, match="convert it to 8 bits"):
        upright_rgb(Image.fromarray(values))


def test_damaged_files_are_value_errors_and_other_files_are_told_apart() -> None:
    jpeg = encoded(Image.fromarray(noise(1, 0)[0]), "JPEG")
    flipped = bytearray(png(noise(1, 0)[0]))
    flipped[200] ^= 1
    for data in (jpeg[: len(jpeg) // 2], bytes(flipped)):
        with pytest.raises(ValueError, match=r"truncated|checksum"):
            decode_upright(data)
    for data in (b"", b"some text"):
        with pytest.raises(UnidentifiedImageError):
            decode_upright(data)


@pytest.mark.parametrize("size", [(50, 40), (40, 50), (8, 31), (32, 32), (300, 3)])
def test_covering_keeps_the_centre_and_the_proportions(size: tuple[int, int]) -> None:
    """The left half is black, so that the outer quarters of the result are of one colour."""
    width, height = size
    image = Image.new("RGB", size)
    image.paste((255, 255, 255), (width // 2, 0, width, height))
    found = np.asarray(cover(image, 16, 24))
    assert found.shape == (16, 24, 3)
    assert (found[:, :6] == 0).all()
    assert (found[:, -6:] == 255).all()

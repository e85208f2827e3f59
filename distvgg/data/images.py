"""Decoding of one encoded image, for the data cache and for predictions.

Imports neither torch nor the libraries that read datasets.
"""

import io
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from distvgg.config import MAX_PIXELS
from distvgg.errors import one_line

PNG = b"\x89PNG\r\n\x1a\n"
# Modes of one channel of 16 bits. Pillow before 11 reads a PNG of 16 bits as mode I.
_DEEP = ("I", "I;16", "I;16B", "I;16L", "I;16N")
MODE = "mode before conversion"  # in the `info` of an image
# Pixels of a resized image from which only the part that is kept is computed, by other rounding.
# An image of 1x300,000 pixels would take 45 GB at 224x224.
MAX_COVERING = 2**27
_ORIENTATION = 0x0112  # tag of EXIF
_opening = threading.Lock()  # Pillow's limit on pixels is a global variable


def decode_upright(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes a file of any format that Pillow reads into an upright RGB image.

    Raises:
        UnidentifiedImageError: the format is unknown.
        ValueError: the content is damaged, its pixels have no known range, or there are more than
            `max_pixels`.
    """
    try:
        if data.startswith(PNG):
            check_png(data)
        with any_size():
            image: Image.Image = Image.open(io.BytesIO(data))
        if image.width * image.height > max_pixels:
            raise ValueError(
                f"{image.width}x{image.height} pixels are more than data.max_pixels {max_pixels}"
            )
        return upright_rgb(image)
    except UnidentifiedImageError:
        raise
    except Exception as error:  # corrupt bytes make Pillow raise any type
        raise ValueError(one_line(error)) from error


def upright_rgb(image: Image.Image) -> Image.Image:
    """Converts an image of any mode to RGB, turned upright as its EXIF data says.

    Transparent pixels are composited on white. Of 16 bits a channel, the upper 8 are kept, as
    Pillow does for colour images. Of several frames, the first is taken. `info[MODE]` of the result
    is the mode that the image had.

    Raises:
        ValueError: the pixels are floats, or integers of more than 16 bits.
    """
    mode = image.mode
    plain = mode == "RGB" and "transparency" not in image.info
    if plain and image.getexif().get(_ORIENTATION, 1) == 1:
        image.load()  # without the copies of a conversion
    else:
        image = _to_rgb(ImageOps.exif_transpose(image))
    image.info[MODE] = mode
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("its pixels are floats of unknown range: convert it to 8 bits a channel")
    if image.mode in _DEEP:
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError("more than 16 bits a channel: convert it to 8 bits")
        upper = (values >> 8).astype(np.uint8)
        transparent = image.info.get("transparency")  # one value of grey, in a PNG
        return Image.fromarray(np.where(values == transparent, 255, upper)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def cover(image: Image.Image, height: int, width: int, ratio: float = 1.0) -> Image.Image:
    """Resizes an image to cover `height` x `width` pixels, and crops the centre to that size.

    Below 1, `ratio` leaves a border: the image covers the size divided by `ratio`.
    """
    scale = max(width / ratio / image.width, height / ratio / image.height)
    covering = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    left, top = (covering[0] - width) // 2, (covering[1] - height) // 2
    if covering[0] * covering[1] > MAX_COVERING:
        x, y = image.width / covering[0], image.height / covering[1]
        box = left * x, top * y, (left + width) * x, (top + height) * y
        return image.resize((width, height), Image.Resampling.BILINEAR, box)
    resized = image.resize(covering, Image.Resampling.BILINEAR)
    return resized.crop((left, top, left + width, top + height))


@contextmanager
def any_size() -> Iterator[None]:
    """Lifts Pillow's limit on pixels, for which `max_pixels` stands."""
    with _opening:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def check_png(data: bytes) -> None:
    """Raises ValueError if the checksum of a pixel chunk is wrong.

    Pillow checks the checksums of all other chunks only. Of 10,000 bits flipped in CIFAR-100's
    files, 88 changed pixels without an error.
    """
    at = len(PNG)
    while at < len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4])
        chunk = data[at + 4 : end]
        if chunk.startswith(b"IDAT") and zlib.crc32(chunk) != int.from_bytes(data[end : end + 4]):
            raise ValueError("a wrong checksum")
        at = end + 4

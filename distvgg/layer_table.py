"""The notation of `model.layers`: the convolutions and max-pools of a VGG as one list.

Owns what an entry may be, and its canonical form. An entry is one of:

- `256`: a 3x3 convolution with 256 output channels and one pixel of padding;
- `1x1-256`: a 1x1 convolution with 256 output channels, as in column C of the paper;
- `M`: a max-pool over 2x2 pixels, which halves the grid side.

Imports no torch.
"""

import re
from collections.abc import Iterable

Table = tuple[int | str, ...]

POOL = "M"
MAX_CHANNELS = 1 << 14  # two such layers in a row have 10 GB of weights
_CONVOLUTION = re.compile(r"(1x1-)?([1-9][0-9]*)")
_EXPECTED = "expected channels of a 3x3 convolution, 1x1-CHANNELS, or M for a max-pool"


def read_table(entries: Iterable[object]) -> Table:
    """Returns a table with its entries in canonical form: int, `1x1-N` or `M`.

    Raises:
        ValueError: an entry is unknown or too wide, or there is no convolution.
    """
    table = tuple(map(_entry, entries))
    if all(entry == POOL for entry in table):
        raise ValueError(
            "model.layers: no convolution (expected at least one); begin with its channels, as in"
            " 64,M,128,M"
        )
    return table


def convolution(entry: int | str) -> tuple[int, int]:
    """Returns the side of the filters and the output channels of an entry that is no max-pool."""
    found = _CONVOLUTION.fullmatch(str(entry))
    assert found, entry
    return (1 if found[1] else 3), int(found[2])


def max_pools(image_size: int) -> int:
    """Returns the largest number of max-pools for images of `image_size` pixels.

    Five are allowed at any size: with images below 32 pixels, the last one is given a single pixel
    and leaves that pixel unchanged.
    """
    return max(5, image_size.bit_length() - 1)


def _entry(value: object) -> int | str:
    text = str(value).strip()
    found = _CONVOLUTION.fullmatch(text)
    if found and (len(found[2]) > 5 or int(found[2]) > MAX_CHANNELS):
        raise ValueError(
            f"model.layers: {text[:20]} (expected at most {MAX_CHANNELS} channels); give fewer"
        )
    if found:
        return text if found[1] else int(text)
    if text != POOL:
        raise ValueError(f"model.layers: {value!r} ({_EXPECTED}); {_remedy(text)}")
    return POOL


def _remedy(text: str) -> str:
    """Returns what to write in place of an unknown entry."""
    if not text:
        return "drop a comma"
    if re.search(r"[0-9M]\s*[;:|\s]\s*[0-9M]", text):
        return "separate the entries by commas"
    # The side of the filters in the notations of the paper and of others.
    bare, sides = re.subn(r"1x1|conv1(?=\D)", "", text, flags=re.IGNORECASE)
    bare = re.sub(r"3x3|conv3(?=\D)", "", bare, flags=re.IGNORECASE)
    bare = re.sub(r"\.0*$", "", bare)
    numbers = list(map(int, re.findall(r"[0-9]{1,9}", bare)))
    channels = numbers[0] if len(numbers) == 1 else None
    if channels is None:
        return f"write {POOL}" if text[0] in "mMpP" else "write one of these"
    if not channels:
        return "drop it, or give at least one channel"
    return f"write {'1x1-' if sides else ''}{channels}"

"""Tables for the terminal and for Markdown, by the library tabulate."""

from collections.abc import Sequence
from typing import Literal

from tabulate import tabulate

Rows = Sequence[Sequence[str]]


Side = Literal["left", "right"]


def plain_table(rows: Rows, align: Side | Sequence[Side] = "left") -> str:
    """Returns rows with aligned columns, two spaces apart.

    Args:
        rows: the cells; the first row is the header.
        align: of all columns, or of each.
    """
    columns = [align] * len(rows[0]) if isinstance(align, str) else list(align)
    text = tabulate(rows, tablefmt="plain", disable_numparse=True, colalign=columns)
    return "\n".join(line.rstrip() for line in text.splitlines())


def markdown_table(header: Sequence[str], rows: Rows) -> str:
    """Returns a Markdown table with its first column to the left and the others to the right."""
    columns = ["left", *["right"] * (len(header) - 1)]
    return tabulate(rows, header, tablefmt="pipe", disable_numparse=True, colalign=columns)

"""docs/api.md: its code runs as it is written and prints what it says, and it has every name."""

import re
from pathlib import Path

import pytest

import distvgg
from made_data import noise, png
from pages import run_page
from processes import ROOT

TEXT = (ROOT / "docs" / "api.md").read_text()


@pytest.mark.variant
@pytest.mark.usefixtures("newcomer")
def test_the_code_runs_in_order_and_prints_what_the_page_says(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    small, large = noise(1, 0)[0], noise(1, 1, side=300)[0]
    (tmp_path / "cat.png").write_bytes(png(large))
    (tmp_path / "photos" / "0.png").write_bytes(png(small))
    (tmp_path / "photos" / "broken.png").write_bytes(png(small)[:1000])
    run_page(TEXT, tmp_path)


def test_the_page_lists_every_public_name() -> None:
    table = re.search(r"\| name \|.*?\n\n", TEXT, re.DOTALL)
    assert table
    assert {*re.findall(r"`distvgg\.(\w+)", table[0])} == {*distvgg.__all__} - {"__version__"}


def test_the_files_that_the_page_links_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)", TEXT)
    assert links
    for link in links:
        assert (ROOT / "docs" / link).is_file(), link

"""docs/models.md: its commands run as they are written, and its tables are the networks' own."""

import re
import shlex
from pathlib import Path

import pytest

from distvgg.commands.arguments import resolve, train_parser
from distvgg.commands.sweep import parse
from distvgg.config import Config, ModelConfig
from distvgg.models.vgg import layers_of_table
from pages import blocks, run_page
from processes import ROOT

TEXT = (ROOT / "docs" / "models.md").read_text()


@pytest.mark.variant
@pytest.mark.usefixtures("newcomer")
def test_the_code_runs_in_order_and_prints_what_the_page_says(tmp_path: Path) -> None:
    run_page(TEXT, tmp_path)


def test_the_columns_are_those_of_their_shorthands() -> None:
    found = re.findall(
        r"^\| [A-E] \| (?:`--model\.depth (\d+)`)? *\| `(\S+)` \|$", TEXT, re.MULTILINE
    )
    assert [depth for depth, _ in found] == ["11", "13", "", "16", "19"]
    for depth, layers in found:
        table = ModelConfig(layers=layers)
        if depth:
            assert layers_of_table(table) == layers_of_table(ModelConfig(depth=depth))
        else:
            assert f'C = "{layers}"' in TEXT


def test_the_commands_that_need_a_dataset_have_options_that_exist() -> None:
    commands = [line for _, text in blocks(TEXT, "console") for line in text.splitlines()]
    train, sweep = (shlex.split(line.removeprefix("$ distvgg ")) for line in commands)
    _, config, _ = resolve(train_parser(Config()).parse(train[1:]))
    assert config.model.layers
    assert len(parse(sweep[1], {}, sweep[3:])) == 2


def test_the_table_beside_the_papers_is_what_the_page_prints() -> None:
    printed = re.findall(r"^# prints: .: ([\d,]+) parameters, (\S+) GFLOP$", TEXT, re.MULTILINE)
    paper, here, flops = (
        re.search(rf"^\| {name} \| (.+) \|$", TEXT, re.MULTILINE)[1].split(" | ")
        for name in (
            "million parameters, table 2 of the paper",
            "million parameters, here",
            "forward GFLOP, here",
        )
    )
    millions = [int(parameters.replace(",", "")) / 1e6 for parameters, _ in printed]
    assert paper == [f"{m:.0f}" for m in millions] == ["133", "133", "134", "138", "144"]
    assert here == [f"{m:.1f}" for m in millions]
    assert flops == [giga for _, giga in printed]


def test_the_files_that_the_page_links_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)", TEXT) if "://" not in link]
    assert links
    for link in links:
        assert (ROOT / "docs" / link).is_file(), link

"""docs/tutorial.md: its commands run as they are written, and what it says of the code holds.

Blocks marked `bash` and `python` run here, and print what their comments `# prints:` say. Blocks
marked `console` need a checkout, a GPU or a dataset: their options must exist.
"""

import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest
import torch

from distvgg.commands.arguments import resolve, train_parser
from distvgg.config import Config
from distvgg.recipe import load
from pages import blocks, run_page
from processes import ROOT

PAGE = ROOT / "docs" / "tutorial.md"
TEXT = PAGE.read_text()
VGG_FILE = ROOT / "distvgg" / "models" / "vgg.py"


@pytest.mark.variant
@pytest.mark.usefixtures("newcomer")
def test_the_commands_run_in_order_and_print_what_the_page_says(tmp_path: Path) -> None:
    run_page(TEXT, tmp_path)
    assert (tmp_path / "curves.svg").stat().st_size > 0


def test_the_commands_that_need_a_gpu_have_options_that_exist() -> None:
    commands = [line for _, text in blocks(TEXT, "console") for line in text.splitlines()]
    trainings = [
        found[1]
        for line in commands
        if (found := re.fullmatch(r"\$ (?:distvgg train|\./launch/multi_gpu\.sh) (.+)", line))
    ]
    assert len(trainings) == len(commands) - 2  # the first two make the environment
    for words in trainings:
        recipe, config, _ = resolve(train_parser(Config()).parse(shlex.split(words)))
        assert recipe == "tutorial"
        assert config != load("tutorial")


def test_the_table_of_hyperparameters_is_the_recipe() -> None:
    table = re.findall(r"`((?:train|optim)\.\w+) (\S+)`", TEXT)
    assert len(table) >= 10
    assert load("tutorial", dict(table)) == load("tutorial")


def test_the_files_that_the_page_links_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)", TEXT)
    assert len(links) > 10
    for link in links:
        assert (PAGE.parent / link).is_file(), link


def test_the_example_of_another_layer_gives_a_network() -> None:
    before, after = re.findall(r"`(layers\.append\(.+?\))`", TEXT)
    source = VGG_FILE.read_text()
    assert source.count(before) == 1
    changed = ModuleType("changed")
    exec(compile(source.replace(before, after), str(VGG_FILE), "exec"), changed.__dict__)
    network = changed.build_vgg(load("debug").model, num_classes=100, seed=0)
    assert any(isinstance(layer, torch.nn.GELU) for layer in network.features)
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 100)

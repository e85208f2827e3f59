"""The summary and the operations of a network against the network itself and torch's counter."""

import re
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from distvgg.commands.summary import summary
from distvgg.config import ModelConfig
from distvgg.errors import UserError
from distvgg.models.flops import training_flops
from distvgg.models.freezing import freeze
from distvgg.models.summary import layers_of
from distvgg.models.vgg import VGG
from distvgg.recipe import load, recipe_names

MODELS = {name: load(name).model for name in recipe_names()} | {
    "odd sides": ModelConfig(image_size=17, depth=19, batch_norm=False, width=0.3),
    "torchvision's": ModelConfig(image_size=224, pool_size=7, head_width=4096),
    "column C": ModelConfig(
        layers="64,64,M,128,128,M,256,256,1x1-256,M,512,512,1x1-512,M,512,512,1x1-512,M",
        **{"image_size": 224, "pool_size": 7, "head_width": 4096, "batch_norm": False},
    ),
    "AlexNet": ModelConfig(name="alexnet", image_size=227, pool_size=6, batch_norm=False),
    "AlexNet at its smallest": ModelConfig(name="alexnet", image_size=63, width=0.3),
    "LeNet-5": ModelConfig(name="lenet5"),
    "LeNet-5 at odd sides": ModelConfig(name="lenet5", image_size=17, batch_norm=False),
    "a table": ModelConfig(layers=["M", 32, "1x1-16", "M", 5, 5, "M"], width=0.7, image_size=49),
}


@pytest.mark.parametrize("name", MODELS)
def test_totals_are_those_of_the_network(name: str) -> None:
    config = MODELS[name]
    layers = layers_of(config, 100)
    with torch.device("meta"):
        model = VGG(config, 100).eval()  # BatchNorm in training rejects one image of 1 x 1
        image = torch.empty(1, 3, config.image_size, config.image_size)
    assert sum(x.parameters for x in layers) == sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    assert sum(x.flops for x in layers) == counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        model(image).sum().backward()
    assert training_flops(config, 100) == counter.get_total_flops()
    modules = dict(model.named_modules())
    # Where there is no BatchNorm and no dropped max-pool, no layer is left out.
    assert [x.name for x in layers] == [
        n
        for n, m in modules.items()
        if not list(m.children()) and not isinstance(m, torch.nn.Identity)
    ]


@pytest.mark.parametrize(
    "frozen", [("features",), ("features.0", "features.1"), ("features.4", "classifier.6.weight")]
)
def test_frozen_layers_save_the_operations_of_their_gradients(frozen: tuple[str, ...]) -> None:
    config = MODELS["fast"]
    with torch.device("meta"):
        model = VGG(config, 100)
        freeze(model, frozen)
        model.eval()
        image = torch.empty(1, 3, config.image_size, config.image_size)
    with FlopCounterMode(display=False) as counter:
        model(image).sum().backward()
    assert training_flops(config, 100, frozen) == counter.get_total_flops()
    assert training_flops(config, 100, frozen) < training_flops(config, 100)


def test_shapes_are_those_of_a_forward_pass() -> None:
    config = load("fast", {"model.width": "0.05"}).model
    model, seen = VGG(config, 10).eval(), {}
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda _, __, output, name=name: seen.update({name: tuple(output.shape[1:])})
        )
    model(torch.zeros(2, 3, config.image_size, config.image_size))
    assert {x.name: x.shape for x in layers_of(config, 10)}.items() <= seen.items()


def test_the_table_has_a_row_for_each_layer_and_totals() -> None:
    config = load("fast")
    text = summary(config)
    assert re.search(r"^features\.0 +Conv2d +64 x 32 x 32 +1,728 +3\.54$", text, re.MULTILINE)
    assert f"training    {training_flops(config.model, 100):,} FLOP an image" in text
    with pytest.raises(UserError, match="--prepare"):
        summary(load("fast", {"data.name": "custom", "data.path": "/nowhere"}))


def test_the_command_needs_no_data_and_shows_overrides() -> None:
    words = ["summary", "quickstart", "--model.depth", "13"]
    done = subprocess.run(
        [sys.executable, "-m", "distvgg", *words], capture_output=True, text=True, check=True
    )
    assert "VGG-13-BN for images of 32x32 pixels and 100 classes" in done.stdout

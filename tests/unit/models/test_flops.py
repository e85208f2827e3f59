"""FLOPs against torch's own counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from distvgg.config import ModelConfig, load, recipe_names
from distvgg.models.flops import training_flops
from distvgg.models.vgg import VGG

MODELS = {name: load(name).model for name in recipe_names()} | {
    "odd sides": ModelConfig(image_size=17, depth=19, batch_norm=False, width=0.3),
    "torchvision's": ModelConfig(image_size=224, pool_size=7, head_width=4096),
}


@pytest.mark.parametrize("name", MODELS)
def test_counts_equal_those_of_torch(name: str) -> None:
    config = MODELS[name]
    with torch.device("meta"):
        model = VGG(config, 100).eval()  # BatchNorm in training rejects one image of 1 x 1
        image = torch.empty(1, 3, config.image_size, config.image_size)
    with FlopCounterMode(display=False) as counter:
        model(image).sum().backward()
    assert training_flops(config, 100) == counter.get_total_flops()

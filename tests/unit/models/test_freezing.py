"""Which parameters a pattern freezes, and what of the network then stays as it is."""

import pytest
import torch
from torch import Tensor

from distvgg.config import ModelConfig, OptimConfig
from distvgg.distributed.reduction_plan import TreePlan
from distvgg.distributed.tree_sum import ExchangeQueue
from distvgg.errors import UserError
from distvgg.models.ema import EMA
from distvgg.models.freezing import describe_frozen, freeze
from distvgg.models.vgg import VGG, build_vgg
from distvgg.optim.build import build_optimizer, parameter_groups, set_lr
from distvgg.recipe import load

CONFIG = ModelConfig(depth=11, width=0.05)


def frozen(*patterns: str) -> VGG:
    vgg = build_vgg(CONFIG, 10, seed=0)
    freeze(vgg, patterns)
    return vgg


def still(vgg: VGG) -> list[str]:
    return [name for name, p in vgg.named_parameters() if not p.requires_grad]


def test_a_pattern_names_a_module_a_parameter_or_several() -> None:
    names = [name for name, _ in build_vgg(CONFIG, 10, seed=0).named_parameters()]
    assert still(frozen("features")) == [n for n in names if n.startswith("features.")]
    # Not features.11, which begins with the same characters.
    assert still(frozen("features.1")) == ["features.1.weight", "features.1.bias"]
    assert still(frozen("features.1.bias", "features.?.weight")) == [
        *("features.0.weight", "features.1.weight", "features.1.bias"),
        *("features.4.weight", "features.5.weight", "features.8.weight", "features.9.weight"),
    ]
    assert still(frozen("*.bias")) == [n for n in names if n.endswith(".bias")]
    assert load("fast", {"optim.frozen": "features.1, features.0"}).optim.frozen == (
        *("features.0", "features.1"),
    )


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("feature", "'feature', did you mean features?"),
        ("features.99", "'features.99', did you mean features.9?"),
        ("features.2", "'features.2'"),  # a ReLU
        ("classifer.6", "'classifer.6', did you mean classifier.6?"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_name(
    pattern: str, said: str
) -> None:
    with pytest.raises(UserError) as error:
        frozen("features.0", pattern)
    assert f"no parameter matches {said}" in str(error.value)
    assert "\n" not in str(error.value)


def test_something_must_be_trained() -> None:
    with pytest.raises(UserError, match=r"nothing would be trained: leave out .* classifier\.6"):
        frozen("features", "classifier")


def test_batchnorm_of_frozen_layers_keeps_its_statistics_in_training() -> None:
    vgg, images = frozen("features"), torch.randn(4, 3, 32, 32)
    for layer in vgg.features:
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.normal_()
    vgg.eval()
    expected, before = vgg.features(images), {k: v.clone() for k, v in vgg.state_dict().items()}
    vgg.train()
    assert vgg.classifier.training
    assert torch.equal(vgg.features(images), expected)
    assert all(torch.equal(v, before[k]) for k, v in vgg.state_dict().items())
    assert describe_frozen(vgg, ["features"]).endswith("statistics of 8 BatchNorm layers")
    # Where a weight is trained, the layer measures as ever.
    partly = frozen("*.bias").train()
    partly(images)
    assert any(v.any() for k, v in partly.state_dict().items() if k.endswith("running_mean"))


def test_the_average_of_frozen_weights_is_the_weights() -> None:
    vgg = frozen("features.0", "features.1")
    vgg.features[1].running_var.fill_(0.3)
    ema = EMA(vgg, decay=0.5)
    for step in range(9):
        with torch.no_grad():
            vgg.classifier[6].weight.add_(1)
        ema.update(step)
    queue = ExchangeQueue(torch.device("cpu"))
    ema.measure(torch.randn(6, 4, 3, 32, 32), TreePlan(3), queue, step=9)
    for name, value in vgg.state_dict().items():
        same = torch.equal(value, ema.network.state_dict()[name])
        assert same or not name.startswith(("features.0.", "features.1.")), name
    assert not torch.equal(vgg.classifier[6].weight, ema.network.classifier[6].weight)


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
def test_the_optimizer_has_only_what_is_trained_and_the_trunk_its_rate(name: str) -> None:
    vgg = frozen("features.0", "features.1", "classifier.0")
    config = OptimConfig(name=name, lr=0.2, trunk_lr_ratio=0.1)
    optimizer = build_optimizer(vgg, config)
    set_lr(optimizer, 0.2)
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    learned = {n: p for n, p in vgg.named_parameters() if p.requires_grad}
    assert rates.keys() == {id(p) for p in learned.values()}
    for key, p in learned.items():
        muon = name == "muon" and p.ndim > 1 and key != "classifier.6.weight"
        rate = config.muon_lr if muon else 0.2
        expected = rate * (0.1 if key.startswith("features.") else 1)
        assert rates[id(p)] == pytest.approx(expected), key


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
def test_a_step_moves_all_but_what_is_frozen(name: str) -> None:
    for patterns in (("features.0", "features.5"), ("features", "classifier.0", "classifier.3")):
        vgg = frozen(*patterns)
        optimizer = build_optimizer(vgg, OptimConfig(name=name, weight_decay=0.1))
        before = {n: p.detach().clone() for n, p in vgg.named_parameters()}
        loss: Tensor = vgg.train()(torch.randn(4, 3, 32, 32)).square().sum()
        loss.backward()
        optimizer.step()
        moved = {n for n, p in vgg.named_parameters() if not torch.equal(p, before[n])}
        # Where BatchNorm follows, a bias has no effect, and here no decay: it may stay.
        weights = {n for n in before if n.endswith(".weight")}
        assert moved & weights == weights - set(still(vgg))
        assert not moved & set(still(vgg))


def test_without_the_ratio_the_groups_are_those_of_before() -> None:
    vgg = build_vgg(CONFIG, 10, seed=0)
    for name, count in (("sgd", 2), ("adamw", 2), ("muon", 3)):
        assert len(parameter_groups(vgg, OptimConfig(name=name))) == count

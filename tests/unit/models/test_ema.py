"""The average of the weights against its definition and against torch's own."""

import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from distvgg.config import ModelConfig
from distvgg.distributed.reduction_plan import TreePlan
from distvgg.distributed.tree_sum import ExchangeQueue
from distvgg.models.ema import EMA
from distvgg.models.vgg import build_vgg


def test_the_average_follows_its_definition() -> None:
    vgg = build_vgg(ModelConfig(depth=11, width=0.05), 10, seed=0).double()
    average = EMA(vgg, decay=0.5)
    expected = [p.detach().clone() for p in vgg.parameters()]
    torch.manual_seed(0)
    decays = [1 / 10, 2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15, 7 / 16, 8 / 17, 0.5, 0.5]
    for step, decay in enumerate(decays):
        for p in vgg.parameters():
            p.data += torch.randn_like(p)
        average.update(step)
        expected = [
            decay * e + (1 - decay) * p for e, p in zip(expected, vgg.parameters(), strict=True)
        ]
    found = list(average.network.parameters())
    torch.testing.assert_close(found, [e.detach() for e in expected])
    assert not any(p.requires_grad for p in found)


def test_batchnorm_measures_what_torchs_update_bn_does() -> None:
    vgg = build_vgg(ModelConfig(depth=11, width=0.05), 10, seed=0).double()
    average = EMA(vgg, decay=0.5)
    torch.manual_seed(0)
    batches = torch.randn(6, 8, 3, 32, 32, dtype=torch.float64)
    queue = ExchangeQueue(torch.device("cpu"))
    average.measure(batches, TreePlan(3), queue, step=7)  # two steps of three
    assert average.measured_at == 7
    update_bn(batches, vgg)
    for ours, theirs in zip(average.network.modules(), vgg.modules(), strict=True):
        if isinstance(ours, nn.BatchNorm2d):
            torch.testing.assert_close(ours.running_mean, theirs.running_mean)
            torch.testing.assert_close(ours.running_var, theirs.running_var)
        assert not ours.training


def test_without_batchnorm_there_is_nothing_to_measure() -> None:
    vgg = build_vgg(ModelConfig(depth=11, width=0.05, batch_norm=False), 10, seed=0)
    average = EMA(vgg, decay=0.5)
    queue = ExchangeQueue(torch.device("cpu"))
    average.measure(torch.randn(2, 4, 3, 32, 32), TreePlan(2), queue, step=1)
    assert average.measured_at == 1

"""The learning rate and the parameter groups."""

import math

import pytest
import torch

from distvgg.config import ModelConfig, OptimConfig
from distvgg.models.vgg import build_vgg
from distvgg.optim.build import build_optimizer, parameter_groups, set_lr
from distvgg.optim.schedule import lr_at


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("cosine", [0.04, 0.4, 0.4, 0.2, 0.4 * (1 + math.cos(math.pi * 89 / 90)) / 2]),
        ("linear", [0.04, 0.4, 0.4, 0.2, 0.4 / 90]),
        ("constant", [0.04, 0.4, 0.4, 0.4, 0.4]),
        ("step", [0.04, 0.4, 0.4, 0.004, 0.0004]),
    ],
)
def test_the_curve_is_pinned_at_five_points(schedule: str, expected: list[float]) -> None:
    config = OptimConfig(lr=0.4, schedule=schedule)
    curve = [lr_at(s, config, steps=100, warmup_steps=10) for s in (0, 9, 10, 55, 99)]
    assert curve == pytest.approx(expected)


@pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning")  # SequentialLR, torch 2.7
def test_the_curve_equals_torchs_schedulers() -> None:
    """Against torch's own linear warm-up and cosine, stepped one by one."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 8, total_iters=7)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=42)
    both = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], [8])
    for step in range(50):
        assert lr_at(step, OptimConfig(lr=0.3), 50, 8) == pytest.approx(
            optimizer.param_groups[0]["lr"], rel=1e-6, abs=1e-9
        )
        optimizer.step()
        both.step()


def test_a_run_of_nothing_but_warm_up_reaches_the_peak() -> None:
    assert lr_at(4, OptimConfig(lr=1.0), steps=5, warmup_steps=5) == 1.0


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
@pytest.mark.parametrize("decay", [True, False])
def test_groups_hold_each_parameter_once_with_its_decay_and_rate(name: str, decay: bool) -> None:
    model = build_vgg(ModelConfig(depth=11, width=0.05), 10, seed=0)
    config = OptimConfig(name=name, lr=0.2, weight_decay=0.5, decay_norm_and_bias=decay)
    groups = {id(p): g for g in parameter_groups(model, config) for p in g["params"]}
    assert len(groups) == sum(len(g["params"]) for g in parameter_groups(model, config))
    last = model.classifier[-1].weight
    for p in model.parameters():
        group = groups.pop(id(p))
        if p.ndim > 1 and name == "muon" and p is not last:
            assert group["orthogonalised"]
            continue
        assert group["weight_decay"] == (0.5 if p.ndim > 1 or decay else 0.0)
        assert group["lr"] == 0.2
    assert not groups


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_step_equals_the_papers_update(name: str) -> None:
    """One parameter, two steps: SGD with Nesterov's momentum and AdamW written out by hand."""
    config = OptimConfig(name=name, lr=0.1, momentum=0.9, weight_decay=0.01)
    layer = torch.nn.Linear(1, 1, bias=False)
    w = layer.weight.data.fill_(1.0).item()
    optimizer = build_optimizer(layer, config)
    m = v = 0.0
    for t, grad in enumerate([0.5, -0.25], start=1):
        set_lr(optimizer, 0.1)
        layer.weight.grad = torch.full((1, 1), grad)
        optimizer.step()
        if name == "sgd":
            g = grad + 0.01 * w
            m = g if t == 1 else 0.9 * m + g
            w -= 0.1 * (g + 0.9 * m)
        else:
            w *= 1 - 0.1 * 0.01
            m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
            w -= 0.1 * (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.999**t)) + 1e-8)
        assert layer.weight.item() == pytest.approx(w, rel=1e-5)

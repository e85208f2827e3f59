"""Muon against its definition and against torch's; who computes what."""

import math

import pytest
import torch
from torch import Tensor, nn

from distvgg.config import ModelConfig, OptimConfig
from distvgg.distributed.reduction_plan import Ranks
from distvgg.distributed.shared_results import PartitionedCompute
from distvgg.models.vgg import build_vgg
from distvgg.optim.build import build_optimizer, set_lr, skip_step_if
from distvgg.optim.muon import A, B, C, orthogonalise
from tree_sums import over_ranks


@pytest.mark.parametrize("shape", [(7, 20), (20, 7), (9, 9)])
@pytest.mark.parametrize("steps", [1, 3, 5])
def test_orthogonalise_equals_the_definition(shape: tuple[int, int], steps: int) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64)
    x = matrix / matrix.norm()
    for _ in range(steps):
        gram = x @ x.T
        x = A * x + (B * gram + C * gram @ gram) @ x
    torch.testing.assert_close(orthogonalise(matrix, steps), x, rtol=1e-5, atol=1e-6)


def test_all_directions_come_out_equally_long() -> None:
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(64, 200), full_matrices=False)
    matrix = u @ torch.diag(torch.logspace(0, -1.5, 64)) @ v
    for dtype in (torch.float32, torch.bfloat16):
        values = torch.linalg.svdvals(orthogonalise(matrix.to(dtype), 5).float())
        assert values.min() > 0.6
        assert values.max() < 1.3
    assert torch.isfinite(orthogonalise(torch.zeros(3, 5), 3)).all()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon is new in torch 2.9")
def test_steps_equal_torchs_muon_and_sgd() -> None:
    """torch's takes matrices and keeps their size free, so it gets filters laid flat, brought to
    their norm before each step. It iterates in bf16, to about 1%, and so its steps differ by 1%."""
    config = OptimConfig(name="muon", lr=0.1, muon_lr=0.03, weight_decay=0.01)
    model = build_vgg(ModelConfig(depth=11, width=0.1, init="dirac"), 10, seed=0)
    model = model.to(memory_format=torch.channels_last)
    ours = build_optimizer(model, config, "no")
    filters = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)][:-1]
    rest = [p for p in model.parameters() if not any(p is f for f in filters)]
    flat = [nn.Parameter(w.detach().flatten(1).clone()) for w in filters]
    copies = [nn.Parameter(p.detach().clone()) for p in rest]
    muon = torch.optim.Muon(
        flat, lr=0.03, weight_decay=0.0, momentum=0.6, ns_steps=3, adjust_lr_fn=None
    )
    sgd = torch.optim.SGD(copies, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
    torch.manual_seed(1)
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        for w, reference in zip(filters, flat, strict=True):
            assert w.grad is not None
            reference.grad = w.grad.flatten(1).clone()
            reference.data *= math.sqrt(len(w)) / reference.data.norm()
        for p, copy in zip(rest, copies, strict=True):
            copy.grad = p.grad
        before = [w.detach().clone() for w in flat]
        for optimizer in (ours, muon, sgd):
            optimizer.step()
        for w, reference, old in zip(filters, flat, before, strict=True):
            # torch lengthens the step of matrices that are taller than wide.
            stretch = math.sqrt(max(1, len(w) / w[0].numel()))
            expected = (reference - old) / stretch
            change = w.flatten(1) - old
            assert (change - expected).norm() < 0.02 * expected.norm()
            reference.data.copy_(w.flatten(1))
        torch.testing.assert_close(rest, [c.detach() for c in copies])


def test_the_learning_rates_of_both_keep_their_ratio() -> None:
    model = build_vgg(ModelConfig(depth=11, width=0.05), 10, seed=0)
    optimizer = build_optimizer(model, OptimConfig(name="muon", lr=0.2, muon_lr=0.05))
    set_lr(optimizer, 0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.025, 0.1, 0.1]


def test_a_failed_step_changes_nothing() -> None:
    model = build_vgg(ModelConfig(depth=11, width=0.05), 10, seed=0)
    optimizer = build_optimizer(model, OptimConfig(name="muon"))

    def step(failed: float) -> list[Tensor]:
        skip_step_if(optimizer, torch.tensor(failed))
        optimizer.step()
        buffers = [optimizer.state[p]["momentum_buffer"] for p in model.parameters()]
        return [t.clone() for t in (*model.parameters(), *buffers)]

    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = step(0.0)
    for p in model.parameters():
        p.grad = torch.full_like(p, math.nan)
    assert all(map(torch.equal, before, step(1.0)))


@pytest.mark.parametrize("levels", [(), (2,), (3,), (2, 2), (8,), (4, 16)])
def test_each_result_is_computed_by_one_rank_and_reaches_all(levels: tuple[int, ...]) -> None:
    costs = [9.0, 1.0, 4.0, 4.0, 4.0, 4.0, 2.0, 2.0]
    shapes = [(2, int(c)) for c in costs]
    world_size = math.prod(levels)
    ranks = [
        PartitionedCompute(
            shapes, costs, torch.float32, torch.device("cpu"), Ranks(rank, world_size, levels)
        )
        for rank in range(world_size)
    ]
    assert sorted(i for rank in ranks for i in rank.mine) == list(range(len(costs)))
    loads = [sum(costs[i] for i in rank.mine) for rank in ranks]
    assert max(loads) <= sum(costs) / world_size + max(costs)
    for rank in ranks:
        for i in rank.mine:
            assert rank[i].shape == shapes[i]
            rank[i].fill_(i)
    sent, _ = over_ranks([rank.exchange() for rank in ranks])
    for rank in ranks:
        assert all((rank[i] == i).all() for i in range(len(costs)))
    # What it computed, and the shards that it hands on: however many ranks there are.
    numbers = sum(math.prod(shape) for shape in shapes)
    for rank, elements in zip(ranks, sent, strict=True):
        own = sum(math.prod(shapes[i]) for i in rank.mine)
        assert elements <= own + numbers + 2 * world_size

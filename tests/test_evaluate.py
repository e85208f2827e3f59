"""Evaluation: integer counts against a plain reference, equal to the bit for any split of work."""

import contextlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distvgg.data import Dataset, Split
from distvgg.evaluate import evaluate
from distvgg.loader import EvalLoader, Pixels
from distvgg.metrics import Row

CPU = torch.device("cpu")
N, CLASSES, SIDE = 211, 10, 8


class Linear(nn.Module):
    """A network whose answers are known: logits are a fixed linear map of the pixels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.map = nn.Linear(3 * SIDE * SIDE, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.map(images.flatten(1))


@pytest.fixture(scope="module")
def data() -> Dataset:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (N, SIDE, SIDE, 3), dtype=np.uint8)
    superclass_of = np.arange(CLASSES) // 2
    labels = rng.integers(0, CLASSES, N)
    split = Split(images, labels, superclass_of[labels])
    names = [str(i) for i in range(CLASSES)]
    return Dataset(split, None, names, names[:5], superclass_of, (0.5,) * 3, (0.25,) * 3, "")


def eval_loader(data: Dataset, rows: np.ndarray | None, batch_size: int) -> EvalLoader:
    return EvalLoader(Pixels(data, data.train, SIDE, CPU), rows, batch_size)


def reference(model: nn.Module, data: Dataset) -> dict[str, float]:
    """Image by image, with numpy."""
    loss, top1, top5, superclass = 0.0, 0, 0, 0
    assert data.superclass_of is not None
    for image, label in zip(data.train.images, data.train.labels, strict=True):
        x = torch.from_numpy((image / 255 - 0.5) / 0.25).float().permute(2, 0, 1)[None]
        logits = model(x).detach().numpy()[0].astype(np.float64)
        ranked = np.argsort(-logits)
        loss += np.log(np.exp(logits).sum()) - logits[label]
        top1 += ranked[0] == label
        top5 += label in ranked[:5]
        superclass += data.superclass_of[ranked[0]] == data.superclass_of[label]
    return {"loss": loss / N, "top1": top1 / N, "top5": top5 / N, "superclass_top1": superclass / N}


@pytest.mark.parametrize("batch_size", [1, 37, 211, 500])
def test_metrics_equal_a_plain_reference(data: Dataset, batch_size: int) -> None:
    model = Linear()
    loader = eval_loader(data, None, batch_size)
    row = evaluate(model, loader, data.superclass_of)
    expected = reference(model, data)
    assert row.pop("count") == N
    assert row.pop("loss") == pytest.approx(expected.pop("loss"), rel=1e-6)
    assert row == expected


def test_the_sum_over_any_number_of_ranks_is_the_same_to_the_bit(data: Dataset) -> None:
    model = Linear()
    loader = eval_loader(data, np.arange(0, N, 3), 7)
    alone = evaluate(model, loader, data.superclass_of)

    def shared(rank: int, world_size: int, reduce: Callable[[Tensor], Tensor]) -> Row:
        return evaluate(
            model,
            loader,
            data.superclass_of,
            rank=rank,
            world_size=world_size,
            sum_over_ranks=reduce,
        )

    for world_size in (2, 3, 4, 20):
        total = torch.zeros(len(loader), 5, dtype=torch.float64)
        for rank in range(world_size):
            with contextlib.suppress(AssertionError):  # a rank's own part does not hold all images
                shared(rank, world_size, total.add_)
        assert shared(0, world_size, lambda _rows, total=total: total) == alone


def test_a_lost_image_is_noticed(data: Dataset) -> None:
    loader = eval_loader(data, None, 50)
    with pytest.raises(AssertionError, match="evaluated 111 images of 211"):
        evaluate(Linear(), loader, None, rank=0, world_size=2)


def test_without_superclasses_there_is_no_such_metric(data: Dataset) -> None:
    loader = eval_loader(data, None, 50)
    assert "superclass_top1" not in evaluate(Linear(), loader, None)


def test_the_model_is_left_in_its_mode(data: Dataset) -> None:
    loader = eval_loader(data, None, 50)
    model = Linear()
    for mode in (True, False):
        model.train(mode)
        evaluate(model, loader, None)
        assert model.training is mode

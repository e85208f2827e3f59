"""Evaluation: counts against a plain reference, equal to the bit for any split of work; which
numbers a run and `distvgg evaluate` give, and which they refuse."""

import contextlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distvgg.data.dataset import Dataset, Split
from distvgg.data.loader import DeviceImages, EvalLoader
from distvgg.training.evaluation import (
    CALIBRATION_BINS,
    COLUMNS,
    Evaluation,
    calibration_sums,
    evaluate,
)

CPU = torch.device("cpu")
N, CLASSES, SIDE = 211, 10, 8


class Linear(nn.Module):
    """A network whose answers are known: logits are a fixed linear map of the pixels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
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
    return EvalLoader(DeviceImages(data, data.train, SIDE, CPU), rows, batch_size)


def logits_of(model: nn.Module, image: np.ndarray) -> np.ndarray:
    """Of one image, float64."""
    x = torch.from_numpy((image / 255 - 0.5) / 0.25).float().permute(2, 0, 1)[None]
    return model(x).detach().numpy()[0].astype(np.float64)


def reference(model: nn.Module, data: Dataset) -> tuple[dict[str, float], np.ndarray]:
    """Image by image, with numpy: the metrics, and the confusion matrix."""
    loss, top1, top5, superclass, tta = 0.0, 0, 0, 0, 0
    confidences, correct = [], []
    confusion = np.zeros((CLASSES, CLASSES), dtype=np.int64)
    assert data.superclass_of is not None
    for image, label in zip(data.train.images, data.train.labels, strict=True):
        logits = logits_of(model, image)
        ranked = np.argsort(-logits)
        loss += np.log(np.exp(logits).sum()) - logits[label]
        top1 += ranked[0] == label
        top5 += label in ranked[:5]
        superclass += data.superclass_of[ranked[0]] == data.superclass_of[label]
        tta += np.argmax((logits + logits_of(model, image[:, ::-1].copy())) / 2) == label
        confusion[label, ranked[0]] += 1
        confidences.append(np.exp(logits).max() / np.exp(logits).sum())
        correct.append(ranked[0] == label)
    metrics = {"loss": loss, "top1": top1, "top5": top5, "superclass_top1": superclass}
    metrics |= {"tta_top1": tta, "calibration_error": N * calibration_error(confidences, correct)}
    return {name: value / N for name, value in metrics.items()}, confusion


def calibration_error(confidences: list[float], correct: list[bool]) -> float:
    """Guo et al., 2017, equations 2 and 3, literally."""
    error = 0.0
    for b in range(15):
        low, high = b / 15, (b + 1) / 15
        within = [i for i, c in enumerate(confidences) if low < c <= high]
        if within:
            accuracy = sum(correct[i] for i in within) / len(within)
            confidence = sum(confidences[i] for i in within) / len(within)
            error += len(within) / len(correct) * abs(accuracy - confidence)
    return error


@pytest.mark.parametrize("batch_size", [1, 37, 211, 500])
def test_metrics_equal_a_plain_reference(data: Dataset, batch_size: int) -> None:
    model = Linear()
    loader = eval_loader(data, None, batch_size)
    row, confusion, reliability = evaluate(model, loader, CLASSES, data.superclass_of, flip=True)
    expected, counts = reference(model, data)
    assert row.pop("count") == N
    for name in ("loss", "calibration_error"):  # sums of what float32 rounds
        assert row.pop(name) == pytest.approx(expected.pop(name), rel=1e-6)
    assert row == expected
    assert row["tta_top1"] != row["top1"]
    assert confusion.dtype == np.int64
    np.testing.assert_array_equal(confusion, counts)
    assert reliability.sum(0).tolist() == [N, confusion.trace()]


def test_the_mirror_changes_no_other_number(data: Dataset) -> None:
    loader = eval_loader(data, None, 50)
    plain = evaluate(Linear(), loader, CLASSES, data.superclass_of).row
    both = evaluate(Linear(), loader, CLASSES, data.superclass_of, flip=True).row
    assert both.keys() - plain.keys() == {"tta_top1"}
    assert plain.items() < both.items()


def test_calibration_over_all_bins_and_at_their_edges() -> None:
    torch.manual_seed(0)
    logits = 8 * torch.rand(500, 1, dtype=torch.float64) * torch.randn(500, 30).double()
    correct = torch.rand(500) < 0.5
    confidence = logits.softmax(1).amax(1)
    assert {int(b) for b in (confidence * 15).floor()} == set(range(15))
    sums = calibration_sums(logits, correct).view(3, CALIBRATION_BINS)
    hit_sums, confidence_sums, images = sums
    assert hit_sums.sum() == correct.sum()
    binned = (confidence * 15).ceil().long() - 1
    assert images.tolist() == binned.bincount(minlength=15).tolist()
    ours = float((hit_sums - confidence_sums).abs().sum()) / 500
    expected = calibration_error(confidence.tolist(), correct.tolist())
    assert ours == pytest.approx(expected, rel=1e-12)
    # A confidence of 1/3 is the upper edge of the fifth bin, 1 that of the last.
    edges = torch.tensor([[0.0, 0.0, 0.0], [1e3, 0.0, 0.0]], dtype=torch.float64)
    sums = calibration_sums(edges, torch.tensor([True, False])).view(3, CALIBRATION_BINS)
    assert sums[0].nonzero().flatten().tolist() == [4]
    assert sums[1].nonzero().flatten().tolist() == [4, 14]
    assert sums[2].nonzero().flatten().tolist() == [4, 14]


def test_the_sum_over_any_number_of_ranks_is_the_same_to_the_bit(data: Dataset) -> None:
    model = Linear()
    loader = eval_loader(data, np.arange(0, N, 3), 7)
    alone = evaluate(model, loader, CLASSES, data.superclass_of, flip=True)

    def shared(rank: int, world_size: int, reduce: Callable[[Tensor], Tensor]) -> Evaluation:
        return evaluate(
            model,
            loader,
            CLASSES,
            data.superclass_of,
            flip=True,
            rank=rank,
            world_size=world_size,
            sum_over_ranks=reduce,
        )

    for world_size in (2, 3, 4, 20):
        total = torch.zeros(len(loader) * COLUMNS + CLASSES**2, dtype=torch.float64)
        for rank in range(world_size):
            with contextlib.suppress(AssertionError):  # a rank's own part does not hold all images
                shared(rank, world_size, total.add_)
        found = shared(0, world_size, lambda _sums, total=total: total)
        assert found.row == alone.row
        np.testing.assert_array_equal(found.confusion, alone.confusion)
        np.testing.assert_array_equal(found.reliability, alone.reliability)


def test_a_lost_image_is_noticed(data: Dataset) -> None:
    loader = eval_loader(data, None, 50)
    with pytest.raises(AssertionError, match="evaluated 111 images of 211"):
        evaluate(Linear(), loader, CLASSES, None, rank=0, world_size=2)


def test_without_superclasses_there_is_no_such_metric(data: Dataset) -> None:
    loader = eval_loader(data, None, 50)
    assert "superclass_top1" not in evaluate(Linear(), loader, CLASSES, None).row


def test_the_model_is_left_in_its_mode(data: Dataset) -> None:
    loader = eval_loader(data, None, 50)
    model = Linear()
    for mode in (True, False):
        model.train(mode)
        evaluate(model, loader, CLASSES, None)
        assert model.training is mode

        def stop() -> None:
            raise InterruptedError

        with pytest.raises(InterruptedError):
            evaluate(model, loader, CLASSES, None, between=stop)
        assert model.training is mode

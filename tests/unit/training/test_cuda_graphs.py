"""Micro-batches by replays: the logic on a CPU, where recording again stands for a CUDA graph.

tests/gpu/test_gpu.py has the graphs themselves.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from accelerate.state import AcceleratorState

from configs import tiny
from distvgg.config import Config
from distvgg.errors import RunError
from distvgg.training import setup, trainer
from distvgg.training.cuda_graphs import Computed, StepGraphs
from processes import assert_same_run, rows

T = TypeVar("T")
MIXED = {"augment__cutmix_alpha": 1.0, "augment__mixup_alpha": 0.5, "augment__mix_probability": 0.5}


class Rerun:
    """Replays by computing again from the same input buffers, into the same output buffers."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def warm_up(self, compute: Callable[[], T]) -> T:
        return compute()

    def capture(self, compute: Callable[[], T]) -> tuple[Callable[[], None], T]:
        self.captures += 1
        computed = compute()
        buffers = computed.tensors() if isinstance(computed, Computed) else ()
        for buffer in buffers:
            buffer.fill_(torch.nan)  # a capture computes nothing

        def replay() -> None:
            self.replays += 1
            again = compute()
            if isinstance(again, Computed):
                for buffer, value in zip(buffers, again.tensors(), strict=True):
                    buffer.copy_(value)

        return replay, computed


@pytest.fixture(autouse=True)
def _no_accelerator_left_over() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def train(
    config: Config, folder: Path, recorder: Rerun | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    graphs = recorder and StepGraphs(recorder)
    monkeypatch.setattr(setup, "_build_graphs", lambda *_: graphs)
    trainer.train(config, folder)


def config_of(**changes: object) -> Config:
    base = {"model__dropout": 0.5, "train__precision": "no", "track__every_steps": 1}
    return tiny(**(base | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        MIXED,
        MIXED | {"train__precision": "bf16", "optim__name": "muon", "optim__ema_decay": 0.9},
        {"train__label_smoothing": 0.1, "optim__clip_norm": 0.5, "model__batch_norm": False},
        {"optim__frozen": "features.0,features.1,features.4,classifier.3.bias"},
    ],
    ids=["plain", "mixed", "mixed, bf16, Muon, EMA", "clipped, without BatchNorm", "frozen"],
)
def test_replays_train_the_run_of_eager_micro_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object]
) -> None:
    config, recorder = config_of(**changes), Rerun()
    train(config, tmp_path / "eager", None, monkeypatch)
    train(config, tmp_path / "replayed", recorder, monkeypatch)
    assert_same_run(tmp_path / "eager", tmp_path / "replayed")
    micro_batches = rows(tmp_path / "eager")[-1]["step"] * 4
    kinds = 2 if "augment__mix_probability" in changes else 1
    parts = 2 if config.optim.name == "muon" else 0  # of the optimizer
    assert recorder.captures == kinds + parts
    # The first of a kind is replayed for the comparison only.
    assert recorder.replays == micro_batches + parts * micro_batches // 4


def test_a_resume_in_the_middle_records_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(**MIXED, checkpoint__every_steps=3)
    train(config, tmp_path / "eager", None, monkeypatch)

    class DiesLater(Rerun):
        def capture(self, compute: Callable[[], T]) -> tuple[Callable[[], None], T]:
            replay, computed = super().capture(compute)

            def dying() -> None:
                if self.replays == 20:
                    raise KeyboardInterrupt
                replay()

            return dying, computed

    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run", DiesLater(), monkeypatch)
    assert not (tmp_path / "run" / "result.json").exists()
    assert any((tmp_path / "run" / "checkpoints").iterdir())
    train(config, tmp_path / "run", Rerun(), monkeypatch)
    assert_same_run(tmp_path / "eager", tmp_path / "run")


class Unrecordable(Rerun):
    def capture(self, compute: Callable[[], T]) -> tuple[Callable[[], None], T]:
        self.captures += 1
        raise RuntimeError("CUDA out of memory.\nTried to allocate 20.00 MiB.")


class Unequal(Rerun):
    """Gives a gradient that differs in its last bit."""

    def capture(self, compute: Callable[[], T]) -> tuple[Callable[[], None], T]:
        replay, computed = super().capture(compute)

        def wrong() -> None:
            replay()
            assert isinstance(computed, Computed)
            last = computed.gradients[-1]
            last.copy_(torch.nextafter(last, torch.full_like(last, 10.0)))

        return wrong, computed


@pytest.mark.parametrize(
    ("recorder", "reason"),
    [
        (Unrecordable, "CUDA out of memory."),
        (Unequal, "the graph of a micro-batch gives other bits than its operations"),
    ],
)
def test_without_a_usable_graph_the_run_is_the_same_and_a_line_says_why(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    recorder: type[Rerun],
    reason: str,
) -> None:
    config, made = config_of(**MIXED), recorder()
    train(config, tmp_path / "eager", None, monkeypatch)
    capsys.readouterr()
    train(config, tmp_path / "run", made, monkeypatch)
    assert_same_run(tmp_path / "eager", tmp_path / "run")
    assert made.captures == 1
    said = [line for line in capsys.readouterr().out.splitlines() if "CUDA graphs" in line]
    assert said == [f"no CUDA graphs, the step runs eagerly with the same bits: {reason}"]


@pytest.mark.parametrize("frozen", ["", "features.0,features.1"])
def test_a_step_that_is_not_finite_is_diagnosed_as_without_graphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frozen: str
) -> None:
    config, said = config_of(optim__lr=1e20, optim__warmup_epochs=0, optim__frozen=frozen), []
    for name, recorder in (("eager", None), ("replayed", Rerun())):
        with pytest.raises(RunError) as error:
            train(config, tmp_path / name, recorder, monkeypatch)
        said.append(str(error.value).replace(str(tmp_path / name), ""))
    assert said[0] == said[1]
    assert "is nan at learning rate" in said[0] or "is inf at learning rate" in said[0]


def test_each_image_size_has_a_graph(tmp_path: Path) -> None:
    run = setup.build(config_of(), tmp_path / "run")
    recorder = Rerun()
    graphs = StepGraphs(recorder)
    graphs.start_step(run)
    for side in (32, 48, 32, 48):
        (batch, *_) = run.loader.micro_batches(0)
        images = torch.nn.functional.interpolate(batch.images, size=side)
        computed = graphs.run(run, batch._replace(images=images))
        assert computed is not None
        torch.manual_seed(batch.dropout_seed)
        assert torch.equal(run.model(images), computed.logits)
    assert recorder.captures == 2
    assert recorder.replays == 4
    run.accelerator.end_training()


@pytest.mark.parametrize("wrong", [False, True])
def test_an_update_has_taken_place_once_whatever_its_graph_gives(wrong: bool) -> None:
    class Recorder(Rerun):
        def capture(self, compute: Callable[[], T]) -> tuple[Callable[[], None], T]:
            replay, computed = super().capture(compute)
            return other_step if wrong else replay, computed

    def other_step() -> None:
        weights.add_(2)

    def step() -> None:
        weights.add_(gradient)

    weights, gradient, other = torch.zeros(3), torch.ones(3), torch.ones(3)
    recorder = Recorder()
    graphs = StepGraphs(recorder)
    for number in range(1, 4):
        graphs.update(step, (gradient,), (weights,))
        assert weights.tolist() == [number] * 3
    assert recorder.captures == 1
    failure = graphs.failure()
    if wrong:
        assert failure is not None
        assert "the graph of an update gives other bits" in failure
        return
    assert failure is None
    graphs.update(step, (other,), (weights,))  # what it reads lies elsewhere
    assert recorder.captures == 2

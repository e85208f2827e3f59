"""The training step against a plain loop; precision; what a run leaves behind."""

import json
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import nn

from configs import tiny
from distvgg.data.plan import BatchPlan
from distvgg.distributed.device import resolve_precision
from distvgg.errors import UserError
from distvgg.models.flops import training_flops
from distvgg.models.vgg import VGG
from distvgg.optim.schedule import lr_at
from distvgg.recipe import load
from distvgg.training import trainer
from distvgg.training.checkpoint import CheckpointManager
from distvgg.training.setup import build
from distvgg.training.step import train_step
from distvgg.training.trainer import due, evaluation_due
from processes import TINY, rows, run, train


@pytest.fixture(autouse=True)
def _no_accelerator_left_over() -> Iterator[None]:
    """accelerate keeps its state for a process's lifetime; a user's process has one run."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_step_equals_a_plain_loop(tmp_path: Path) -> None:
    """torch alone, without accelerate: the same micro-batches in, the same losses, weights and
    BatchNorm statistics out, clipping and label smoothing included."""
    config = tiny(optim__clip_norm=0.5, train__label_smoothing=0.1, optim__lr=0.05)
    run = build(config, tmp_path / "run")
    reference = VGG(config.model, run.dataset.num_classes)
    reference.load_state_dict(run.vgg.state_dict())
    sgd = torch.optim.SGD(
        reference.parameters(), lr=1, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    norms = [m for m in reference.modules() if isinstance(m, nn.BatchNorm2d)]
    for step in range(4):
        micro_batches = run.loader.micro_batches(step)
        lr = lr_at(step, config.optim, 100, 10)
        train_step(run, step, micro_batches, lr)
        run.monitor.drain()
        loss = run.meter.read()["train/loss"]

        before = [(m.running_mean.clone(), m.running_var.clone()) for m in norms]
        statistics, expected = [], 0.0
        sgd.zero_grad()
        for batch in micro_batches:
            for m in norms:
                m.reset_running_stats()
                m.momentum = 1.0  # then the buffers are the micro-batch's own statistics
            torch.manual_seed(batch.dropout_seed)
            logits = reference(batch.images)
            mean = F.cross_entropy(logits, batch.labels, label_smoothing=0.1) / len(micro_batches)
            mean.backward()
            expected += mean.item()
            statistics.append([(m.running_mean.clone(), m.running_var.clone()) for m in norms])
        expected_norm = nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        sgd.param_groups[0]["lr"] = lr
        sgd.step()
        for i, m in enumerate(norms):
            for buffer, old, new in zip(
                (m.running_mean, m.running_var),
                before[i],
                map(torch.stack, zip(*(s[i] for s in statistics), strict=True)),
                strict=True,
            ):
                buffer.copy_(0.9 * old + 0.1 * new.mean(0))

        assert loss == pytest.approx(expected, rel=1e-5)
        assert run.monitor.grad_norm == pytest.approx(expected_norm.item(), rel=1e-4)
        for name, value in reference.state_dict().items():
            if not name.endswith("num_batches_tracked"):
                ours = run.vgg.state_dict()[name]
                torch.testing.assert_close(ours, value, rtol=1e-4, atol=1e-5, msg=name)
    run.accelerator.end_training()


def test_mixed_labels_are_a_soft_target(tmp_path: Path) -> None:
    """The loss is the cross-entropy with both labels' shares, smoothed; a hit is the larger's."""
    config = tiny(augment__mixup_alpha=1.0, augment__cutmix_alpha=1.0, train__label_smoothing=0.1)
    run = build(config, tmp_path / "run")
    classes = run.dataset.num_classes
    for step in range(3):
        micro_batches = run.loader.micro_batches(step)
        loss, correct = 0.0, 0
        run.vgg.train()
        with torch.no_grad():
            for batch in micro_batches:
                torch.manual_seed(batch.dropout_seed)
                logits = run.vgg(batch.images)
                first, other = (
                    F.one_hot(labels, classes).float()
                    for labels in (batch.labels, batch.partner_labels)
                )
                target = batch.lam * first + (1 - batch.lam) * other
                loss += F.cross_entropy(logits, target, reduction="sum", label_smoothing=0.1).item()
                larger = batch.labels if batch.lam > 0.5 else batch.partner_labels
                correct += (logits.argmax(1) == larger).sum().item()
        train_step(run, step, micro_batches, lr=0.05)
        run.monitor.drain()
        row = run.meter.read()
        assert row["train/loss"] == pytest.approx(loss / 64, rel=1e-5)
        assert row["train/top1"] == correct / 64
    run.accelerator.end_training()


def test_bf16_is_real_and_close_to_float32(tmp_path: Path) -> None:
    for precision in ("no", "bf16"):
        train(tmp_path / precision, "--train.precision", precision)
    full, mixed = (
        [r["train/loss"] for r in rows(tmp_path / p) if "train/loss" in r] for p in ("no", "bf16")
    )
    assert full != mixed
    np.testing.assert_allclose(mixed, full, rtol=0.02)
    # Master weights stay in float32.
    weights = load_file(tmp_path / "bf16" / "model.safetensors")
    assert {v.dtype for k, v in weights.items() if "num_batches" not in k} == {torch.float32}


def test_bf16_computes_in_bf16(tmp_path: Path) -> None:
    run = build(tiny(train__precision="bf16"), tmp_path / "run")
    seen: set[torch.dtype] = set()
    for layer in (run.vgg.features[0], run.vgg.classifier[-1]):
        layer.register_forward_hook(lambda _m, _i, out: seen.add(out.dtype))
    logits = run.model(run.loader.micro_batches(0)[0].images)
    assert seen == {torch.bfloat16}
    assert logits.dtype == torch.float32  # the loss is computed in full precision
    run.accelerator.end_training()


def test_auto_precision_is_resolved_and_kept_with_the_run(tmp_path: Path) -> None:
    train(tmp_path / "run", "--train.precision", "auto", "--train.epochs", "0.1")
    expected = resolve_precision("auto", torch.device("cpu"))
    assert load(str(tmp_path / "run" / "config.yaml")).train.precision == expected
    if hasattr(torch.cpu, "get_capabilities"):  # not in torch 2.7
        has = torch.cpu.get_capabilities()
        assert (expected == "bf16") == (has["avx512_bf16"] or has["amx_bf16"])


def test_the_launchers_precision_wins_over_auto_only() -> None:
    cpu = torch.device("cpu")
    assert resolve_precision("auto", cpu, "bf16") == "bf16"
    assert resolve_precision("no", cpu, "bf16") == "no"
    assert resolve_precision("auto", cpu, "no") == resolve_precision("auto", cpu)
    with pytest.raises(UserError, match="fp16 needs a CUDA GPU"):
        resolve_precision("auto", cpu, "fp16")


def test_a_run_leaves_its_config_metrics_weights_and_result(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    said = train(folder, "--eval.every_epochs", "0.5", "--track.every_steps", "4")
    files = {p.name for p in folder.iterdir()}
    assert files == {
        *("config.yaml", "metrics.jsonl", "model.safetensors", "confusion.json", "result.json"),
        *("preprocessing.json", "checkpoints", ".lock"),
    }
    # 10 steps; rows of training every 4 and at the end, of validation twice, of test once.
    table = rows(folder)
    steps = {s: [r["step"] for r in table if f"{s}/loss" in r] for s in ("train", "val", "test")}
    assert steps == {"train": [4, 8, 10], "val": [5, 10], "test": [10]}
    expected = {"train/loss", "train/top1", "train/lr", "train/grad_norm", "step", "epoch"}
    expected |= {"perf/images_per_sec", "perf/step_ms", "perf/data_wait_ms", "perf/tflops"}
    clock = {"perf/unix_time", "perf/launch_seconds"}
    expected |= clock
    assert set(table[0]) == expected
    metrics = ("loss", "top1", "top5", "superclass_top1", "calibration_error", "count")
    expected = {f"test/{m}" for m in metrics} | clock
    assert {k for k in table[-1] if "/" in k} == expected

    result = json.loads((folder / "result.json").read_text())
    assert result["test"] == {m: table[-1][f"test/{m}"] for m in metrics}
    assert result["val"]["count"] == 103
    assert result["versions"]["torch"] == version("torch")
    assert result["train_size"] == 600
    (line,) = (line for line in said.splitlines() if line.startswith("  test"))
    assert f"top1 {100 * result['test']['top1']:.2f}%" in line
    top1 = {r["step"]: r["val/top1"] for r in table if "val/top1" in r}
    assert result["best"] == {"step": max(top1, key=top1.__getitem__), "top1": max(top1.values())}
    assert (folder / "checkpoints" / f"step_{result['best']['step']:08}").exists()

    # The weights alone, loaded as torchvision's names have them, give the reported numbers.
    config = load(str(folder / "config.yaml"))
    model = VGG(config.model, 100)
    model.load_state_dict(load_file(folder / "model.safetensors"))


def test_a_run_with_every_augmentation_counts_its_operations(tmp_path: Path) -> None:
    train(
        tmp_path / "run",
        *("--augment.flip", "alternating", "--augment.trivial", "true", "--augment.cutout", "8"),
        *("--augment.mixup_alpha", "0.2", "--augment.cutmix_alpha", "1"),
    )
    table = [r for r in rows(tmp_path / "run") if "perf/tflops" in r]
    assert len(table) == 9  # the first step has no time
    for row in table:
        an_image = row["perf/tflops"] / row["perf/images_per_sec"] * 1e12
        assert an_image == pytest.approx(training_flops(tiny().model, 100))


def test_evaluation_comes_at_the_epochs_asked_for_and_at_the_end() -> None:
    plan = BatchPlan(n_samples=1000, global_batch_size=64, micro_batch_size=64)

    def steps(epochs: float, every: float) -> list[int]:
        total = plan.steps(epochs)
        return [s for s in range(1, total + 1) if evaluation_due(s, every, plan, total)]

    assert steps(2, 1) == [16, 32]
    assert steps(2.5, 1) == [16, 32, 40]
    assert steps(1, 0.3) == [5, 10, 15, 16]
    assert steps(1, 10) == [16]
    assert steps(0.001, 0.001) == [1]
    assert steps(3, 0.01) == steps(3, 1e-12) == list(range(1, 48))
    # 0.1 * 3 is more than 0.3 in binary.
    exact = BatchPlan(n_samples=640, global_batch_size=64, micro_batch_size=64)
    assert [s for s in range(1, 31) if evaluation_due(s, 0.3, exact, 30)] == list(range(3, 31, 3))


def test_due_at_the_cadence_and_at_the_end() -> None:
    assert [s for s in range(1, 11) if due(s, 4, 10)] == [4, 8, 10]


def test_anomaly_detection_and_nchw_train_too(tmp_path: Path) -> None:
    done = run(
        [
            *("train", "quickstart", "--run-dir", str(tmp_path / "run"), *TINY),
            *("--train.epochs", "0.1", "--train.detect_anomaly", "true"),
            *("--train.channels_last", "false", "--model.batch_norm", "false"),
            *("--optim.name", "adamw", "--optim.lr", "0.001"),
        ]
    )
    assert done.returncode == 0, done.stderr


def test_throughput_counts_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = CheckpointManager.save

    def slow(*args: Any, **kwargs: Any) -> None:
        time.sleep(1)
        save(*args, **kwargs)

    monkeypatch.setattr(CheckpointManager, "save", slow)
    trainer.train(tiny(checkpoint__every_steps=2, train__epochs=0.6), tmp_path / "run")
    milliseconds = [row["perf/step_ms"] for row in rows(tmp_path / "run") if "perf/step_ms" in row]
    assert len(milliseconds) >= 4
    assert max(milliseconds) < 1000


def test_two_runs_of_different_precision_in_one_process(tmp_path: Path) -> None:
    for precision in ("no", "bf16"):
        config = tiny(train__precision=precision, train__epochs=0.1)
        result = trainer.train(config, str(tmp_path / precision))
        assert result.precision == precision

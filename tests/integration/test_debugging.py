"""Debugging aids of a training: a few fixed batches, and a profile of some steps."""

import json
import re
from pathlib import Path

import pytest

from processes import assert_same_run, rows, train

PLAIN = ("--model.dropout", "0", "--train.label_smoothing", "0", "--eval.test", "false")


@pytest.mark.variant
def test_two_fixed_batches_are_learned_on_any_number_of_processes(tmp_path: Path) -> None:
    args = (*PLAIN, "--model.width", "0.2", "--train.overfit_batches", "2", "--train.epochs", "3")
    said = train(tmp_path / "one", *args)
    assert re.search(
        r"^overfit: loss 0\.\d+, top1 100\.00% on 2 fixed batches after 29 steps:"
        r" the network learns them$",
        said,
        re.MULTILINE,
    )
    losses = [r["train/loss"] for r in rows(tmp_path / "one") if "train/loss" in r]
    assert losses[-1] < 0.1 < 3 < losses[0]
    train(tmp_path / "two", *args, processes=2)
    assert_same_run(tmp_path / "one", tmp_path / "two")


def test_batches_that_are_not_learned_get_reasons_and_a_profile_changes_nothing(
    tmp_path: Path,
) -> None:
    args = ("--train.overfit_batches", "1", "--train.epochs", "2", "--model.dropout", "0.5")
    args += ("--train.label_smoothing", "0.1", "--augment.cutmix_alpha", "1")
    train(tmp_path / "plain", *args)
    said = train(tmp_path / "profiled", *args, "--train.profile_steps", "4")
    assert_same_run(tmp_path / "plain", tmp_path / "profiled")
    (line,) = re.findall(r"^overfit: .+$", said, re.MULTILINE)
    assert "(label smoothing allows 0.778 at best): not near zero" in line
    assert "Set to 0 what keeps it from that (model.dropout 0.5, augment.cutmix_alpha 1)" in line

    operators = re.findall(r"^ +([\d.]+) +([\d.]+)% +[\d.]+ calls  (\S+)", said, re.MULTILINE)
    assert len(operators) == 10
    milliseconds = [float(ms) for ms, _, _ in operators]
    assert milliseconds == sorted(milliseconds, reverse=True)
    assert any("conv" in name for _, _, name in operators)
    trace = json.loads((tmp_path / "profiled" / "profile.json").read_text())["traceEvents"]
    steps = {e["name"] for e in trace if e.get("name", "").startswith("ProfilerStep#")}
    assert steps == {f"ProfilerStep#{n}" for n in range(11, 15)}


def test_a_run_that_is_too_short_for_a_profile_says_so(tmp_path: Path) -> None:
    said = train(tmp_path / "run", "--train.profile_steps", "4")
    assert "profile: 10 steps are left, too few for 11 of warm-up and 4 of" in said
    assert not (tmp_path / "run" / "profile.json").exists()


@pytest.mark.parametrize(("smoothing", "least"), [(0.0, 0.0), (0.1, 0.7778)])
def test_the_least_loss_is_the_entropy_of_the_target(smoothing: float, least: float) -> None:
    import torch
    import torch.nn.functional as F

    from distvgg.training.overfit import least_loss

    target = torch.full((100,), smoothing / 100, dtype=torch.float64)
    target[3] += 1 - smoothing
    logits = target.clamp(1e-30).log()[None]
    expected = F.cross_entropy(logits, torch.tensor([3]), label_smoothing=smoothing).item()
    assert least_loss(smoothing, 100) == pytest.approx(expected, abs=1e-9)
    assert least_loss(smoothing, 100) == pytest.approx(least, abs=1e-4)

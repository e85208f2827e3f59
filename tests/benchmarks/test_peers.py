"""The comparison with other training loops: every row, and that all do the same job."""

import json
import os
import subprocess
import sys
import time
from typing import Any

import pytest
import torch

from benchmarks import peers
from benchmarks.runs import PLAIN
from distvgg.errors import RunError
from distvgg.models.small_conv import Conv3x3
from distvgg.models.vgg import build_vgg
from distvgg.recipe import load
from processes import CPU, ROOT

pytest.importorskip("timm")


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """What `--quick` prints and writes."""
    out = tmp_path_factory.mktemp("peers") / "peers.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.peers", "--quick", "--out", str(out)],
        cwd=ROOT,
        env=os.environ | CPU,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(out.read_text())


@pytest.mark.variant
def test_every_loop_has_a_row_and_a_ratio_to_distvgg(quick: tuple[str, dict[str, Any]]) -> None:
    printed, findings = quick
    assert len(printed.splitlines()) == 2 + len(findings["rows"])
    found = {row["name"]: row for row in findings["rows"]}
    assert set(peers_of("cpu")) == set(found)
    reference = found["distvgg"]["rounds"][0]
    for row in found.values():
        assert row["label"] in printed
        (speed,) = row["rounds"]
        assert speed > 0
        assert row["ratio_to_distvgg"] == pytest.approx(speed / reference, abs=0.002)
        assert row["distvgg_to_it"] == pytest.approx(reference / speed, rel=0.01)


@pytest.mark.variant
def test_the_report_says_what_was_measured_and_on_what(quick: tuple[str, dict[str, Any]]) -> None:
    findings = quick[1]
    assert findings["command"].startswith("python -m benchmarks.peers --quick")
    assert findings["versions"]["torch"] == torch.__version__.split("+")[0]
    assert findings["data"] == "synthetic"
    assert findings["hardware"]
    assert findings["steps"] == 2


def test_what_a_loop_cannot_do_alike_stands_in_its_row() -> None:
    batches = {name: case.batch for name, case in peers_of("cpu").items()}
    assert batches["tutorial"] == "16"
    assert batches["fixed-parts"] == batches["distvgg"] == "4 x 64"
    whole = set(batches) - {"tutorial", "fixed-parts", "distvgg", "distvgg-1"}
    assert {batches[n] for n in whole} == {"256"}
    on_gpu = peers_of("cuda")
    assert on_gpu["tutorial"].batch == "64"
    assert on_gpu["distvgg"].label == "distvgg, 1 process"
    assert "distvgg-1" not in on_gpu


@pytest.mark.variant
def test_the_network_of_the_loops_is_ours_of_torchs_layers() -> None:
    job = peers.Job(load("quickstart"), batch_size=4, forward_size=4, workers=0)
    theirs = peers.network(peers.TrainImages(job.config), job)
    ours = build_vgg(job.config.model, 100, job.config.seed)
    assert not any(isinstance(layer, Conv3x3) for layer in theirs.modules())
    images = torch.randn(4, 3, 32, 32)
    torch.manual_seed(0)
    expected = ours(images)
    torch.manual_seed(0)
    torch.testing.assert_close(theirs(images), expected)


def test_a_batch_in_parts_makes_the_step_of_the_whole() -> None:
    config = load("fast", PLAIN).replace(
        model__width=0.05, model__batch_norm=False, model__dropout=0.0, train__precision="no"
    )
    images, labels = torch.randn(32, 3, 32, 32), torch.arange(32)
    before = torch.nn.utils.parameters_to_vector(build_vgg(config.model, 100, 0).parameters())
    after = []
    for forward_size in (32, 8):
        job = peers.Job(config, batch_size=32, forward_size=forward_size, workers=1)
        model = build_vgg(config.model, 100, seed=0)
        peers.plain_step(model, peers.sgd(model, job), images, labels, job)
        after.append(torch.nn.utils.parameters_to_vector(model.parameters()))
    assert (after[0] - before).abs().max() > 1e-4
    torch.testing.assert_close(after[0], after[1], rtol=0, atol=1e-6)


def test_the_first_steps_do_not_count() -> None:
    def loop(job: peers.Job) -> peers.Steps:
        for seconds in (0.5, 0.05, 0.05):
            time.sleep(seconds)
            yield job.batch_size

    job = peers.Job(load("fast"), batch_size=10, forward_size=10, workers=1)
    assert 50 < peers.timed(loop, job, warmup=1, steps=2) <= 200


@pytest.mark.variant
def test_a_training_that_fails_says_what_it_said() -> None:
    config = load("fast", {"data.name": "custom", "data.path": "/nowhere/to/be/found"})
    with pytest.raises(RunError, match="/nowhere/to/be/found"):
        peers.distvgg(config, processes=1, steps=2)


def peers_of(device: str) -> dict[str, peers.Case]:
    job = peers.Job(load("fast"), batch_size=256, forward_size=64, workers=2)
    return peers.cases(job, torch.device(device), warmup=3, steps=8)

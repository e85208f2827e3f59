"""The benchmarks of what is not training, in their quick form: each runs as its page says, finds
what it is to find, and what the project claims of memory and of decoding is true of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import input_path, startup
from benchmarks.costs import PARTS
from distvgg.data.loader import DeviceImages, DeviceLoader
from distvgg.data.plan import BatchPlan
from distvgg.recipe import load
from processes import run_module


def quick(name: str, out: Path, *words: str) -> dict[str, Any]:
    """What a benchmark found in its quick form."""
    printed = run_module(f"benchmarks.{name}", "--quick", *words, "--out", str(out))
    assert printed.startswith("| "), printed
    findings: dict[str, Any] = json.loads(out.read_text())
    assert findings["command"].startswith(f"python -m benchmarks.{name} --quick")
    return findings


@pytest.mark.benchmark
def test_the_input_path_is_faster_than_torchvisions(tmp_path: Path) -> None:
    found = quick("input_path", tmp_path / "out.json", "--workers", "1")
    # On one worker and any number of cores; the factor itself is for a machine that is idle.
    assert found["ratio"]["torchvision"] > 2


@pytest.mark.parametrize("peer", [input_path.Views, input_path.TensorViews])
def test_a_peer_makes_what_we_make(peer: type[Any]) -> None:
    """Each of its views is one of the 162 that our draws can give of the same image."""
    dataset, rows = input_path.noise(8), np.arange(8)
    torch.manual_seed(0)  # the peer draws from the global generator
    views = peer(dataset, rows)
    items = [views[row] for row in rows]
    collate = views.collate or torch.utils.data.default_collate
    images, labels = collate(items)
    config = load("fast").replace(
        train__global_batch_size=8, train__micro_batch_size=8, augment__cutmix_alpha=0
    )
    pixels = DeviceImages(dataset, dataset.train, 32, torch.device("cpu"))
    loader = DeviceLoader(config, pixels, rows, BatchPlan(8, 8, 8), rank=0)
    ours = [loader.micro_batches(step)[0] for step in range(1500)]
    assert labels.tolist() == dataset.train.labels.tolist()
    for row in rows:
        all_views = torch.cat([batch.images[batch.rows == row] for batch in ours])
        distance = (all_views - images[row]).abs().amax((1, 2, 3)).min()
        assert distance < 1e-5, row


def test_an_epoch_of_both_sides_is_as_many_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rates are images over seconds of whole epochs, batch by batch."""
    seen: list[int] = []

    def count(batches: Any, device: torch.device) -> float:
        seen.append(sum(len(labels) for _, labels in batches))
        return 1.0

    monkeypatch.setattr(input_path, "images_per_sec", count)
    dataset, rows, cpu = input_path.noise(512), np.arange(512), torch.device("cpu")
    ours = input_path.device_loader(load("fast"), dataset, rows, cpu)
    views = input_path.TensorViews(dataset, rows)
    theirs = input_path.data_loader(views, views.collate, 256, 1, cpu)
    for epoch in (ours, theirs, ours, theirs):
        epoch()
    assert seen == [512] * 4


@pytest.mark.benchmark
def test_what_starting_costs(tmp_path: Path) -> None:
    parts = ("first_step", "imports", "help", "decode")
    found = quick("startup", tmp_path / "out.json", "--parts", *parts)
    start, imports = found["first_step"], found["imports"]
    # Half as much again is the promise. Each is started once, beside whatever else runs.
    assert 0.5 < start["ratios"][f"{startup.FIRST} / {startup.STEPPED}"] < 2
    assert {"torch", "distvgg"} <= imports.keys()
    unused = {"datasets", "pyarrow", "torchvision", "wandb", "torch._dynamo", "bokeh", "pandas"}
    assert not imports.keys() & unused
    assert all(seconds["median"] < 2 for seconds in found["help"].values())
    # Two on an empty cache: one makes the images, the other waits and reads.
    (both,) = found["decode"]
    waits, makes = sorted(both["cpu_seconds"])
    assert both["entries"] == 1
    assert waits < 0.7 * makes


@pytest.mark.variant
def test_processes_that_train_share_the_pages_of_the_cache(tmp_path: Path) -> None:
    (two,) = quick("startup", tmp_path / "out.json", "--parts", "memory")["memory"]
    assert len(two["pss_mib"]) == 2
    for rss in two["rss_mib"]:  # each sees the train split, which is most of the set
        assert 0.5 * two["set_mib"] < rss
    assert sum(two["pss_mib"]) < 1.1 * max(two["rss_mib"])


@pytest.mark.benchmark
def test_what_more_costs(tmp_path: Path) -> None:
    plot = tmp_path / "costs.svg"
    found = quick("costs", tmp_path / "out.json", "--plot", str(plot))
    assert {*PARTS} <= found.keys()
    assert found["processes"]["ratio"] > 0.5
    shares = found["cadence"]["shares"]
    assert shares["rows, W&B offline"] < 0.01
    assert 0 < shares["validation"] < 1
    small, large = found["growth"]["step_ms"].values()
    assert large["median"] < 2 * small["median"]
    assert plot.read_text().count("</svg>") == 1

"""The benchmark of streamed photographs, for a few of them."""

import json
from pathlib import Path

import pytest

from processes import run_module


@pytest.mark.variant
def test_both_loaders_are_timed_by_turns(tmp_path: Path) -> None:
    out = tmp_path / "stream.json"
    words = "--images", "300", "--rounds", "2", "--workers", "1", "--out", str(out)
    said = run_module("benchmarks.stream_loader", *words)
    assert "| distvgg StreamLoader" in said
    found = json.loads(out.read_text())
    assert (found["images"], found["workers"]) == (300, 1)
    rates = found["images_per_sec"]
    assert {"distvgg StreamLoader", "torchvision ImageFolder"} == set(rates)
    assert all(1 < rate["median"] < 100_000 for rate in rates.values())
    assert 0.1 < found["ratios"]["images_per_sec"] < 10

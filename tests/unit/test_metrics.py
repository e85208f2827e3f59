"""docs/metrics.md: it explains every metric and every key of a result, and its samples are real."""

import dataclasses
import re

from distvgg import metrics
from distvgg.commands.summary import summary
from distvgg.recipe import load
from distvgg.runs.result import Result
from processes import ROOT

TEXT = (ROOT / "docs" / "metrics.md").read_text()
EXPLAINED = set(re.findall(r"^\| `([^`]+)` \| .{10,} \|$", TEXT, re.MULTILINE))


def test_every_metric_and_every_key_of_a_result_is_explained() -> None:
    names = {v for k, v in vars(metrics).items() if k.isupper() and isinstance(v, str)}
    assert {"train/loss", "perf/tflops", "top5", "tta_top1"} <= names
    keys = {field.name for field in dataclasses.fields(Result)}
    assert names | keys <= EXPLAINED


def test_the_sample_of_a_summary_is_what_is_printed() -> None:
    (sample,) = re.findall(r"^```\n(VGG-11[^`]+)```", TEXT, re.MULTILINE)
    assert summary(load("quickstart")).endswith(sample.rstrip())
    # The sample of a training is that network's.
    parameters = re.search(r"parameters +([\d,]+),", sample)
    assert parameters is not None
    assert f"network    VGG-11-BN at 32x32, {parameters[1]} parameters, 0.0587 GFLOP" in TEXT

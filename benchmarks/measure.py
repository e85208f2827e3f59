"""What the benchmarks share: cases measured in turns, their spread, and reports with provenance.

Invariant: every case of a benchmark is measured in every round, so that a machine that slows down
for a while slows all alike; what is compared are ratios within a round.
"""

import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from distvgg.runs.provenance import commit, hardware, versions

Samples = dict[str, list[float]]


def in_turns(cases: Mapping[str, Callable[[], float]], rounds: int) -> Samples:
    """Measures each case once a round, every other round in reverse order.

    Returns:
        For each case what it returned, [rounds].
    """
    samples: Samples = {name: [] for name in cases}
    for nth in range(rounds):
        for name in sorted(cases, key=list(cases).index, reverse=nth % 2 == 1):
            samples[name].append(cases[name]())
            print(f"round {nth + 1}/{rounds}  {name}  {samples[name][-1]:,.4g}", file=sys.stderr)
    return samples


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest, to four digits."""
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def ratio(samples: Samples, of: str, to: str) -> float:
    """The median over rounds of one case's value divided by another's in the same round."""
    pairs = zip(samples[of], samples[to], strict=True)
    return round(statistics.median(a / b for a, b in pairs), 3)


def report(device: torch.device, **findings: Any) -> dict[str, Any]:
    """Findings with what they were measured on, when, and by which command."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    words = [f"python -m {module.name}" if module else sys.argv[0], *sys.argv[1:]]
    return {
        "command": " ".join(words),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "hardware": hardware(device),
        "versions": versions(),
        "commit": commit(),
    } | findings


def save(findings: Mapping[str, Any], path: Path | None) -> None:
    """Writes a report as JSON, if there is somewhere to write it to."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(findings, indent=2) + "\n")

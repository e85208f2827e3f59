"""What a finished run leaves: its weights, and its final numbers with their provenance.

Invariant: `result.json` is written last and whole, so that it exists exactly when the run is done.
Reading one imports no torch.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from distvgg import metrics
from distvgg.config import Config
from distvgg.data.plan import BatchPlan
from distvgg.runs.files import atomic_write, read_json
from distvgg.runs.layout import RESULT_FILE, WEIGHTS_FILE
from distvgg.runs.provenance import commit, hardware, versions

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

    from distvgg.data.dataset import Dataset


@dataclass(frozen=True)
class Result:
    """Final numbers; `val` and `test` hold the metrics' bare names, `test` is None where it was
    not read: `eval.test` is off, or the data has no test split. `best` is the step of the
    checkpoint with the highest validation top-1; `starts` has (step, processes) of each start that
    the numbers came of."""

    seed: int
    steps: int
    epochs: float
    train_size: int
    val: metrics.Row
    best: metrics.Row
    test: metrics.Row | None
    images_per_sec: float | None
    num_processes: int
    starts: list[tuple[int, int]]
    precision: str
    hardware: str
    data_fingerprint: str
    versions: dict[str, str]
    commit: str | None
    curves: list[str]

    def __post_init__(self) -> None:
        named = [r for r in (self.val, self.test, self.best) if r is not None]
        if metrics.STEP not in self.best or any(metrics.TOP1 not in r for r in named):
            raise ValueError("a metric that every run has is missing")

    def text(self) -> str:
        """The result for a reader: throughput, accuracies, where the curves are."""
        speed = f" at {self.images_per_sec:,.0f} images/s" if self.images_per_sec else ""
        lines = [f"done: {self.steps:,} steps, {self.epochs:.2f} epochs{speed}"]
        for split, row in (("val", self.val), ("test", self.test)):
            measured = "not read"
            if row is not None:
                measured = f"{metrics.describe(row)} of {row[metrics.COUNT]:,} images"
            lines.append(f"  {split:<5} {measured}")
        if self.best[metrics.STEP] != self.steps:
            top1, step = 100 * self.best[metrics.TOP1], self.best[metrics.STEP]
            lines.append(f"  best  val top1 {top1:.2f}%, at step {step}")
        return "\n".join([*lines, f"  curves: {'; '.join(self.curves)}"])

    @staticmethod
    def of(
        config: Config,
        dataset: "Dataset",
        plan: BatchPlan,
        accelerator: "Accelerator",
        val: metrics.Row,
        best: metrics.Row,
        test: metrics.Row | None,
        starts: list[tuple[int, int]],
        images_per_sec: float | None,
        curves: list[str],
    ) -> "Result":
        steps = plan.steps(config.train.epochs)
        return Result(
            seed=config.seed,
            steps=steps,
            epochs=plan.epoch(steps),
            train_size=plan.n_samples,
            val=val,
            best=best,
            test=test,
            images_per_sec=images_per_sec,
            num_processes=plan.world_size,
            starts=starts,
            precision=accelerator.mixed_precision,
            hardware=hardware(accelerator.device),
            data_fingerprint=dataset.fingerprint,
            versions=versions(),
            commit=commit(),
            curves=curves,
        )


def read_result(run_dir: Path) -> Result | None:
    """The result of a finished run, None for one that is not.

    Raises:
        UserError: the file is damaged.
    """
    remedy = "the same command goes on from the last checkpoint"
    return read_json(run_dir / RESULT_FILE, Result, remedy)


def save_result(result: Result, run_dir: Path) -> None:
    """Writes `result.json`, whole or not at all."""
    atomic_write(run_dir / RESULT_FILE, json.dumps(asdict(result), indent=2).encode() + b"\n")


def save_weights(model: Mapping[str, "Tensor"], metadata: Mapping[str, str], run_dir: Path) -> None:
    """Writes `model.safetensors`, keys and layout as torchvision's VGG has them."""
    from safetensors.torch import save

    tensors = {k: v.cpu().contiguous() for k, v in model.items()}
    atomic_write(run_dir / WEIGHTS_FILE, save(tensors, dict(metadata)))

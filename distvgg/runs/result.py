"""Output of a finished run: its weights, and its final numbers with their provenance.

Invariant: `result.json` is written last and atomically, so that the file exists exactly when the
run is done. Reading a result imports no torch.
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
from distvgg.runs.initial_weights import InitialWeights
from distvgg.runs.layout import REPORT_FILE, RESULT_FILE, WEIGHTS_FILE
from distvgg.runs.provenance import commit, hardware, versions
from distvgg.wording import counted

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

    from distvgg.data.dataset import Dataset


@dataclass(frozen=True)
class Result:
    """Final numbers of a run.

    Attributes:
        val: metrics by name, without the prefix of the split.
        best: step and top-1 of the checkpoint with the highest validation top-1.
        test: as `val`; None if test was not read, because `eval.test` is off or the data has no
            test split.
        starts: (step, world size) of each launch that contributed to the numbers.
        initial_weights: what the run started from; None: all layers started anew.
        frozen, trunk_lr_ratio: the fields of the section `optim`.
    """

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
    initial_weights: InitialWeights | None = None
    frozen: tuple[str, ...] = ()
    trunk_lr_ratio: float = 1.0

    def __post_init__(self) -> None:
        measured = [row for row in (self.val, self.test) if row is not None]
        missing = {metrics.STEP, metrics.TOP1} - self.best.keys()
        if missing or any({metrics.COUNT, metrics.TOP1} - row.keys() for row in measured):
            raise ValueError("a metric that every run has is missing")

    def text(self, run_dir: Path | None = None) -> str:
        """Formats the result as text: throughput, accuracies, and where report and curves are.

        Args:
            run_dir: the run folder, whose report and weights are named. None: neither.
        """
        speed = f" at {self.images_per_sec:,.0f} images/s" if self.images_per_sec else ""
        lines = [f"done: {counted(self.steps, 'step')}, {self.epochs:.2f} epochs{speed}"]
        for split, row in (("val", self.val), ("test", self.test)):
            measured = "not read"
            if row is not None:
                measured = f"{metrics.describe(row)} of {row[metrics.COUNT]:,} images"
            lines.append(f"  {split:<5} {measured}")
        if self.best[metrics.STEP] != self.steps:
            top1, step = 100 * self.best[metrics.TOP1], self.best[metrics.STEP]
            lines.append(f"  best  val top1 {top1:.2f}%, at step {step}")
        kept = {"report": REPORT_FILE, "weights": WEIGHTS_FILE} if run_dir else {}
        for what, name in kept.items():
            if run_dir is not None and (run_dir / name).exists():
                lines.append(f"  {what}: {run_dir / name}")
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
        initial_weights: InitialWeights | None,
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
            initial_weights=initial_weights,
            frozen=config.optim.frozen,
            trunk_lr_ratio=config.optim.trunk_lr_ratio,
        )


def read_result(run_dir: Path) -> Result | None:
    """Returns the result of a finished run, or None if the run is not finished.

    Raises:
        UserError: the file is corrupt.
    """
    remedy = "the same command resumes from the last checkpoint"
    return read_json(run_dir / RESULT_FILE, Result, remedy)


def save_result(result: Result, run_dir: Path) -> None:
    """Writes `result.json` atomically."""
    atomic_write(run_dir / RESULT_FILE, json.dumps(asdict(result), indent=2).encode() + b"\n")


def save_weights(model: Mapping[str, "Tensor"], metadata: Mapping[str, str], run_dir: Path) -> None:
    """Writes `model.safetensors` with the keys and layout of torchvision's VGG."""
    from safetensors.torch import save

    tensors = {k: v.cpu().contiguous() for k, v in model.items()}
    atomic_write(run_dir / WEIGHTS_FILE, save(tensors, dict(metadata)))

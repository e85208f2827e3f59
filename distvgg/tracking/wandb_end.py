"""Upload of the end of a run to W&B: final numbers, confusion matrix, report and weights.

Invariant: all of it goes to the summary or is an artifact, never to the history, whose items are
the rows of metrics.jsonl. Sent twice, it replaces itself: a summary has one value for each name,
and W&B makes no new version of an artifact with the same content.
"""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from distvgg import metrics
from distvgg.errors import UserError
from distvgg.runs.confusion import Confusion, by_superclass, read_confusion
from distvgg.runs.layout import (
    CONFIG_FILE,
    CONFUSION_FILE,
    PREPROCESSING_FILE,
    REPORT_FILE,
    RESULT_FILE,
    WEIGHTS_FILE,
)
from distvgg.runs.result import Result, read_result

if TYPE_CHECKING:
    from wandb import Run

BEST = "best/"
BEST_TOP1, BEST_STEP = f"{BEST}val/{metrics.TOP1}", f"{BEST}{metrics.STEP}"
CONFUSION, REPORT = "confusion_matrix", "report"
# The names that W&B's own confusion matrix chart reads.
COLUMNS = ("Actual", "Predicted", "nPredictions")


def digest(run_dir: Path, *, weights: bool) -> str:
    """Returns a hash of all that `send` sends, without the bytes of the weights.

    The weights of a result never change.
    """
    found = hashlib.sha256(b"weights" if weights else b"")
    for name in (RESULT_FILE, CONFUSION_FILE, REPORT_FILE):
        path = run_dir / name
        found.update(hashlib.sha256(path.read_bytes() if path.exists() else b"").digest())
    return found.hexdigest()


def send(run: "Run", run_dir: Path, *, weights: bool) -> None:
    """Sends the end of a finished run.

    Args:
        run: the W&B run.
        run_dir: the run folder, with its result.
        weights: send weights and preprocessing as an artifact as well.

    Raises:
        UserError: a file of the run folder is corrupt or gone.
    """
    import wandb

    result = read_result(run_dir)
    assert result is not None
    run.summary.update(summary(result))
    if confusion := read_confusion(run_dir):
        run.summary[CONFUSION] = wandb.Table(columns=list(COLUMNS), data=cells(confusion))
    if (report := run_dir / REPORT_FILE).exists():
        with report.open(encoding="utf-8") as file:
            run.summary[REPORT] = wandb.Html(file, inject=False)
    if weights:
        artifact = wandb.Artifact(f"model-{run.id}", type="model", metadata=summary(result))
        for name in (WEIGHTS_FILE, PREPROCESSING_FILE):
            if not (run_dir / name).exists():
                raise UserError(
                    f"{run_dir / name} is gone: put it back, or set track.wandb_artifact to false"
                    f" in {CONFIG_FILE}"
                )
            artifact.add_file(str(run_dir / name), name=name, policy="immutable")
        run.log_artifact(artifact)


def summary(result: Result) -> metrics.Row:
    """Returns the final numbers of a run by name, with the best validation and its step."""
    found = {BEST_TOP1: result.best[metrics.TOP1], BEST_STEP: result.best[metrics.STEP]}
    for split, row in (("val", result.val), ("test", result.test)):
        found |= {f"{split}/{name}": value for name, value in (row or {}).items()}
    return found


def cells(confusion: Confusion) -> list[list[str | int]]:
    """Returns (true class, predicted class, images) of each pair that occurs.

    Superclasses stand for classes where the data has superclasses.
    """
    coarse = by_superclass(confusion) or confusion
    names = coarse.class_names
    return [
        [names[true], names[predicted], images]
        for true, row in enumerate(coarse.counts)
        for predicted, images in enumerate(row)
        if images
    ]

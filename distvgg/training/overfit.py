"""The verdict of a run on a few fixed batches."""

import math

from distvgg import metrics
from distvgg.config import LACKS, Config
from distvgg.runs.layout import METRICS_FILE
from distvgg.runs.metrics_file import read_rows
from distvgg.training.state import Run
from distvgg.wording import counted

NEAR_ZERO = 0.1
"""Loss above the least possible one that counts as learned."""


def overfit_verdict(run: Run) -> str:
    """Returns a line on whether the last row's loss came near zero, and if not, what holds it up.

    For the main process, after all rows are written.
    """
    rows = [r for r in read_rows(run.folder / METRICS_FILE) if metrics.TRAIN_LOSS in r]
    loss, top1 = rows[-1][metrics.TRAIN_LOSS], rows[-1][metrics.TRAIN_TOP1]
    least = least_loss(run.config.train.label_smoothing, run.dataset.num_classes)
    line = (
        f"overfit: loss {loss:.3f}, top1 {top1:.2%} on"
        f" {counted(run.config.train.overfit_batches, 'fixed batch')}"
        f" after {counted(run.steps, 'step')}"
    )
    if least:
        line += f" (label smoothing allows {least:.3f} at best)"
    if loss - least < NEAR_ZERO:
        return f"{line}: the network learns them"
    hindered = hindrances(run.config)
    advice = f"Set to 0 what keeps it from that ({', '.join(hindered)}), or " if hindered else ""
    return f"{line}: not near zero. {advice}raise train.epochs, or try another optim.lr"


def least_loss(label_smoothing: float, classes: int) -> float:
    """Returns the least cross-entropy with smoothed labels: the entropy of the target."""
    off = label_smoothing / classes
    on = 1 - label_smoothing + off
    return 0.0 - sum(n * p * math.log(p) for n, p in ((1, on), (classes - 1, off)) if p > 0)


def hindrances(config: Config) -> list[str]:
    """Lists the fields that keep a network from learning a few batches by heart."""
    values = {
        "model.dropout": 0 if "dropout" in LACKS[config.model.name] else config.model.dropout,
        "augment.mixup_alpha": config.augment.mixup_alpha,
        "augment.cutmix_alpha": config.augment.cutmix_alpha,
    }
    return [f"{name} {value:g}" for name, value in values.items() if value]

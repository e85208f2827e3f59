"""Names of all metrics, and the text form of a row. Imports no torch."""

STEP, EPOCH = "step", "epoch"
TRAIN_LOSS, TRAIN_TOP1, TRAIN_LR = "train/loss", "train/top1", "train/lr"
TRAIN_GRAD_NORM = "train/grad_norm"
TRAIN_SKIPPED = "train/skipped_steps"  # fp16 only
IMAGES_PER_SEC, STEP_MS, DATA_WAIT_MS = (
    "perf/images_per_sec",
    "perf/step_ms",
    "perf/data_wait_ms",
)
TFLOPS = "perf/tflops"  # achieved, summed over all processes
# When a row was written. Only metrics.jsonl has them.
UNIX_TIME, LAUNCH_SECONDS = "perf/unix_time", "perf/launch_seconds"
# With prefix val/ or test/. superclass_top1 exists only if the data has superclasses, tta_top1 only
# if requested.
LOSS, TOP1, TOP5, SUPERCLASS_TOP1, COUNT = "loss", "top1", "top5", "superclass_top1", "count"
CALIBRATION_ERROR, TTA_TOP1 = "calibration_error", "tta_top1"
Row = dict[str, float | int]


def without_clock(row: Row) -> Row:
    """Returns a row without the time at which it was written, as other destinations take it."""
    return {name: value for name, value in row.items() if name not in (UNIX_TIME, LAUNCH_SECONDS)}


def describe(row: Row) -> str:
    """Formats a row's losses, accuracies and throughput as text."""
    words = []
    for name, value in row.items():
        split, _, metric = name.rpartition("/")
        label = f"{split} {metric}" if split in ("val", "test") else metric
        if metric == LOSS:
            words.append(f"{label} {value:.3f}")
        elif metric in (TOP1, TOP5, SUPERCLASS_TOP1, TTA_TOP1):
            words.append(f"{label} {100 * value:.2f}%")
        elif name == IMAGES_PER_SEC:
            words.append(f"{value:,.0f} images/s")
    return ", ".join(words)

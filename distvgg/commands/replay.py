"""`distvgg replay`: one step of a run again, on one device.

Samples, augmentation, dropout and learning rate are functions of the step, so that any micro-batch
that any rank computed can be computed again from the checkpoint before it.

Owns the copy of the run's beginning, the comparison with the logged rows, and the picture of a
micro-batch. Invariant: of the run folder, only `replay/` is written.
"""

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from distvgg import environment, metrics
from distvgg.commands.text_tables import plain_table
from distvgg.config import Config
from distvgg.data.loader import MicroBatch
from distvgg.errors import UserError
from distvgg.optim.schedule import lr_at
from distvgg.recipe import load
from distvgg.runs.files import read_json
from distvgg.runs.layout import (
    CHECKPOINTS,
    CONFIG_FILE,
    FAILURE_FILE,
    INITIAL_WEIGHTS_FILE,
    METRICS_FILE,
    checkpoint_dirs,
    run_of,
)
from distvgg.runs.metrics_file import read_rows
from distvgg.runs.preprocessing import Preprocessing
from distvgg.training.inspection import Inspection, inspect_micro_batch
from distvgg.training.nan_monitor import NonFiniteError
from distvgg.training.setup import build
from distvgg.training.state import Run, warmup_steps
from distvgg.training.step import train_step
from distvgg.training.trainer import due, train_row
from distvgg.wording import counted

COMPARED = (metrics.TRAIN_LOSS, metrics.TRAIN_TOP1, metrics.TRAIN_LR, metrics.TRAIN_GRAD_NORM)
SHOWN = 8  # samples with the highest losses
TILE, COLUMNS = 72, 16  # pixels of an image in the picture, images in a row


@dataclass
class Comparison:
    """Rows of the run that the replay has computed again.

    Attributes:
        equal: steps whose row is equal to the last bit.
        different: a line for each row that is not.
    """

    equal: list[int] = field(default_factory=list)
    different: list[str] = field(default_factory=list)

    def add(self, logged: metrics.Row, again: metrics.Row) -> None:
        """Compares a row of training metrics."""
        step = int(again[metrics.STEP])
        names = [name for name in COMPARED if logged.get(name) != again[name]]
        if not names:
            self.equal.append(step)
        for name in names:
            self.different.append(
                f"step {step}: {name} {again[name]!r}, logged {logged.get(name)!r}"
            )


def replay(
    run_dir: Path, step: int, micro_batch: int | None, out: Path | None, *, pause: bool
) -> str:
    """Computes a step of a run again, and describes it.

    Args:
        run_dir: folder of the run, finished or not.
        step: number of the step as in the rows, from 1.
        micro_batch: index of the micro-batch to show in detail; None lists all of them.
        out: folder for the picture and the numbers; None: `replay/step_*` of the run folder.
        pause: stop in the debugger before the forward of the micro-batch.

    Raises:
        UserError: no run folder; the run did not reach the step; the step has no such micro-batch;
            or there are several processes.
    """
    if environment.world_size() > 1:
        raise UserError("replay computes all micro-batches on one device: start it as one process")
    run_dir = run_of(run_dir)
    if not (run_dir / CONFIG_FILE).exists():
        raise UserError(f"{run_dir} is no run folder: it has no {CONFIG_FILE}")
    config = load(str(run_dir / CONFIG_FILE))
    count = config.train.global_batch_size // config.train.micro_batch_size
    if micro_batch is not None and not 0 <= micro_batch < count:
        raise UserError(f"--micro-batch {micro_batch}: a step has micro-batches 0 to {count - 1}")
    logged = {
        int(row[metrics.STEP]): row
        for row in read_rows(run_dir / METRICS_FILE)
        if metrics.TRAIN_LOSS in row
    }
    reached = max([*logged, _failed_step(run_dir), 0])
    if not reached:
        raise UserError(f"{run_dir} has no row of training yet: let it train first")
    if not 1 <= step <= reached:
        raise UserError(f"--step {step}: the rows of {run_dir} go from step 1 to {reached}")
    with _run_before(run_dir, config, step) as run:
        lines = [f"note: {note}" for note in run.notes]
        start = f"checkpoint step_{run.state.step:08d}" if run.state.step else "the initial weights"
        print(
            f"from {start}: {counted(step - 1 - run.state.step, 'step')} on the way to step {step}",
            file=sys.stderr,
            flush=True,
        )
        compared = Comparison()
        while run.state.step < step - 1:
            _take_step(run, logged, compared)
        batches = run.loader.micro_batches(step - 1)
        wanted = batches if micro_batch is None else [batches[micro_batch]]
        found = [_inspect(run, batch, pause) for batch in wanted]
        ending = _end(run, logged, compared)
        folder = out or run_dir / "replay" / f"step_{step:08d}"
        if micro_batch is None:
            lines.append(_list_of_micro_batches(step, wanted, found))
        else:
            lines.append(_details(run, step, wanted[0], found[0], folder))
        return "\n".join([*lines, *ending])


@contextmanager
def _run_before(run_dir: Path, config: Config, step: int) -> Iterator[Run]:
    """Builds the run at its newest checkpoint before a step, in a temporary folder.

    The folder links to the checkpoints and the rows, so that a run under way is not disturbed.
    """
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        (folder / CHECKPOINTS).mkdir(parents=True)
        config = config.replace(train__cuda_graphs=False, track__wandb=False)
        (folder / CONFIG_FILE).write_text(config.to_yaml())
        if (run_dir / METRICS_FILE).exists():
            (folder / METRICS_FILE).symlink_to((run_dir / METRICS_FILE).absolute())
        if (run_dir / INITIAL_WEIGHTS_FILE).exists():
            initial = (run_dir / INITIAL_WEIGHTS_FILE).absolute()
            (folder / INITIAL_WEIGHTS_FILE).symlink_to(initial)
        for path in checkpoint_dirs(run_dir / CHECKPOINTS):
            if int(path.name.removeprefix("step_")) < step:
                (folder / CHECKPOINTS / path.name).symlink_to(path.absolute())
        run = build(config, folder)
        try:
            yield run
        finally:
            run.loaders.close()
            assert run.lock is not None
            run.lock.release()
            run.accelerator.end_training()


def _take_step(run: Run, logged: dict[int, metrics.Row], compared: Comparison) -> None:
    """Takes the next step as the training loop does, and compares the row that is due after it.

    Raises:
        NonFiniteError: as in training.
    """
    config, state = run.config, run.state
    lr = lr_at(state.step, config.optim, run.steps, warmup_steps(run))
    train_step(run, state.step, run.loader.micro_batches(state.step), lr)
    state.step += 1
    run.monitor.drain()
    if due(state.step, config.track.every_steps, run.steps):
        row = train_row(run, lr)
        if state.step in logged:
            compared.add(logged[state.step], row)


def _inspect(run: Run, batch: MicroBatch, pause: bool) -> Inspection:
    if pause:
        print("run, batch: next is inspect_micro_batch, which calls run.model(batch.images)")
        breakpoint()
    return inspect_micro_batch(run, run.vgg, batch)


def _end(run: Run, logged: dict[int, metrics.Row], compared: Comparison) -> list[str]:
    """Goes on to the row that covers the step, and returns how the replay compares with the run."""
    last = max(logged, default=0)
    try:
        _take_step(run, logged, compared)
        while run.state.step not in logged and run.state.step < last:
            _take_step(run, logged, compared)
    except NonFiniteError as error:
        what = "gradient"
        if error.micro_batch is not None:
            what = f"loss of micro-batch {error.micro_batch}"
        return [*_verdict(compared), f"step {error.step + 1}: the {what} is {error.value}"]
    return _verdict(compared)


def _verdict(compared: Comparison) -> list[str]:
    lines = []
    if compared.equal:
        steps = ", ".join(map(str, compared.equal[-5:]))
        lines.append(f"equal to the logged row to the last bit: step {steps}")
    lines += [f"DIFFERENT from the logged row: {line}" for line in compared.different[:5]]
    return lines


def _list_of_micro_batches(step: int, batches: list[MicroBatch], found: list[Inspection]) -> str:
    rows = [["micro-batch", "loss", "top1", "gradient norm", "not finite"]]
    for batch, inspection in zip(batches, found, strict=True):
        m = len(batch.labels)
        correct = int((inspection.logits.argmax(1) == batch.hard_labels).sum())
        bad = [a.layer for a in inspection.activations if a.non_finite]
        rows.append(
            [
                *(str(batch.k), f"{inspection.loss / m:.6g}", f"{correct / m:.2%}"),
                *(f"{inspection.gradient_norm:.6g}", bad[0] if bad else "-"),
            ]
        )
    return f"step {step}\n{plain_table(rows, 'right')}"


def _details(run: Run, step: int, batch: MicroBatch, found: Inspection, folder: Path) -> str:
    """Writes the picture and the numbers of a micro-batch, and returns the tables."""
    samples = _samples(run, step, batch, found)
    mixed = "" if batch.partner_labels is None else f", mixed ({batch.lam:.3f} of the first label)"
    layers = [["layer", "output", "mean", "std", "min", "max", "zeros", "not finite"]]
    layers += [
        [
            *(a.layer, "x".join(map(str, a.shape))),
            *(f"{v:.4g}" for v in (a.mean, a.std, a.smallest, a.largest)),
            *(f"{a.zeros:.1%}", str(a.non_finite)),
        ]
        for a in found.activations
    ]
    gradients = [["gradient of", "norm"], *([n, f"{v:.4g}"] for n, v in found.gradients.items())]
    hardest = sorted(samples, key=_hardness, reverse=True)[:SHOWN]
    columns = ["index", "class", "partner", "predicted", "loss"]
    columns += ["file"] if samples[0]["file"] is not None else []
    table = [columns, *([_cell(s[c]) for c in columns] for s in hardest)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stem = folder / f"micro_batch_{batch.k}"
        _picture(batch.images, samples, run.preprocessing).save(f"{stem}.png")
        numbers = {
            "step": step,
            "micro_batch": batch.k,
            "loss": found.loss / len(batch.labels),
            "gradient_norm": found.gradient_norm,
            "lam": batch.lam,
            "dropout_seed": batch.dropout_seed,
            "samples": samples,
            "activations": [asdict(a) for a in found.activations],
            "gradients": found.gradients,
        }
        Path(f"{stem}.json").write_text(json.dumps(numbers, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {folder} ({error.strerror}): give --out FOLDER") from error
    return "\n\n".join(
        [
            f"step {step}, micro-batch {batch.k}: loss {found.loss / len(batch.labels):.6g},"
            f" gradient norm {found.gradient_norm:.6g}{mixed}",
            plain_table(layers, "right"),
            plain_table(gradients),
            f"samples with the highest losses, of {len(samples)}\n" + plain_table(table),
            f"images: {stem}.png\nnumbers: {stem}.json",
        ]
    )


def _samples(run: Run, step: int, batch: MicroBatch, found: Inspection) -> list[dict[str, Any]]:
    """Returns index in the train split, file, labels, prediction and loss of each sample."""
    names, files = run.preprocessing.class_names, run.dataset.train.file_names()
    partners = [None] * len(batch.labels)
    if batch.partner_labels is not None:
        partners = [names[label] for label in batch.partner_labels.tolist()]
    values = zip(
        run.loader.rows(step - 1, batch.k).tolist(),
        batch.labels.tolist(),
        partners,
        found.logits.argmax(1).tolist(),
        found.sample_losses.tolist(),
        strict=True,
    )
    return [
        {
            "index": row,
            "file": files and files[row],
            "class": names[label],
            "partner": partner,
            "predicted": names[predicted],
            "loss": loss,
        }
        for row, label, partner, predicted, loss in values
    ]


def _picture(images: Tensor, samples: list[dict[str, Any]], used: Preprocessing) -> Image.Image:
    """Draws the augmented images with their labels: [m, 3, s, s], normalised."""
    std, mean = (torch.tensor(v, dtype=torch.float32)[:, None, None] for v in (used.std, used.mean))
    pixels = ((images.detach().float().cpu() * std + mean).clamp(0, 1) * 255).round().byte()
    rows = math.ceil(len(pixels) / COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (TILE + 4), rows * (TILE + 18)), "white")
    draw = ImageDraw.Draw(sheet)
    for n, (image, sample) in enumerate(zip(pixels, samples, strict=True)):
        left, top = n % COLUMNS * (TILE + 4), n // COLUMNS * (TILE + 18)
        tile = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        sheet.paste(tile.resize((TILE, TILE), Image.Resampling.NEAREST), (left, top))
        draw.text((left, top + TILE + 2), str(sample["class"])[:11], fill="black")
    return sheet


def _failed_step(run_dir: Path) -> int:
    """Returns the step at which the run became non-finite, or 0."""
    remedy = "delete it, and replay any step that has a row"
    failure = read_json(run_dir / FAILURE_FILE, dict[str, Any], remedy)
    return int(failure["step"]) if failure else 0


def _hardness(sample: dict[str, Any]) -> float:
    loss = float(sample["loss"])
    return math.inf if math.isnan(loss) else loss


def _cell(value: object) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

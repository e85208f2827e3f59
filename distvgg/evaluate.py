"""Exact evaluation: every image once, for any number of processes.

Invariant: numbers are integer counts and float64 sums by batch, reduced once and added in the order
of the batches, so that the result is the same to the last bit for any number of processes, given
the same weights. The count is asserted against the dataset's size.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from distvgg import metrics
from distvgg.checkpoint import DamageError, read
from distvgg.config import UserError, load
from distvgg.data import load_dataset, train_val_indices
from distvgg.distributed import left_in_order, place, start, summing
from distvgg.loader import EvalLoader, Pixels
from distvgg.model import VGG
from distvgg.run_folder import CHECKPOINTS, CONFIG_FILE, WEIGHTS_FILE

if TYPE_CHECKING:
    from accelerate import Accelerator

_LOSS, _TOP1, _TOP5, _SUPERCLASS, _COUNT = range(5)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: EvalLoader,
    superclass_of: np.ndarray | None,
    *,
    rank: int = 0,
    world_size: int = 1,
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda x: x,
    between: Callable[[], None] = lambda: None,
) -> metrics.Row:
    """Loss, top-1, top-5 and superclass top-1 of a model over all batches of a loader.

    A prediction's superclass is that of its most likely class. Every rank must call it; the model
    is the bare module, not its DDP wrapper, and is left in the mode that it was in.

    Args:
        superclass_of: [classes] int64, the superclass of each class; None leaves that metric out.
        between: called before each batch, equally often on every rank; may raise to leave.

    Returns:
        The metrics' bare names with their means over the split, and `count`.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    # One row a batch: each rank fills its own, the others' stay zero, and adding zero is exact.
    rows = torch.zeros(len(loader), 5, dtype=torch.float64, device=device)
    table = None if superclass_of is None else torch.from_numpy(superclass_of).to(device)
    batches = loader.batches(rank, world_size)
    for _ in range(-(-len(loader) // world_size)):
        between()
        if (batch := next(batches, None)) is None:
            break  # the last round, in which this rank has none
        i, images, labels = batch
        logits = model(images).to(torch.promote_types(torch.float32, images.dtype))
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = best == labels[:, None]
        rows[i, _LOSS] = F.cross_entropy(logits, labels, reduction="none").double().sum()
        rows[i, _TOP1] = hits[:, 0].sum()
        rows[i, _TOP5] = hits.any(1).sum()
        if table is not None:
            rows[i, _SUPERCLASS] = (table[best[:, 0]] == table[labels]).sum()
        rows[i, _COUNT] = len(labels)
    model.train(was_training)
    sums = sum_over_ranks(rows).cpu().sum(0).tolist()
    count = int(sums[_COUNT])
    assert count == loader.n_samples, f"evaluated {count} images of {loader.n_samples}"
    result: metrics.Row = {
        metrics.LOSS: sums[_LOSS] / count,
        metrics.TOP1: sums[_TOP1] / count,
        metrics.TOP5: sums[_TOP5] / count,
    }
    if table is not None:
        result[metrics.SUPERCLASS_TOP1] = sums[_SUPERCLASS] / count
    return result | {metrics.COUNT: count}


def evaluate_over_ranks(
    accelerator: "Accelerator",
    model: nn.Module,
    loader: EvalLoader,
    superclass_of: np.ndarray | None,
    between: Callable[[], None] = lambda: None,
) -> metrics.Row:
    """`evaluate`, its batches shared out among all processes."""
    return evaluate(
        model,
        loader,
        superclass_of,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        sum_over_ranks=summing(accelerator),
        between=between,
    )


@left_in_order()
def evaluate_run(path: Path, split: Literal["val", "test"]) -> metrics.Row:
    """Measures the weights of a finished run, or of any of a run's checkpoints, again: reads only
    the run folder and the data.

    Args:
        path: a run folder, or one of its `checkpoints/step_*`.

    Raises:
        UserError: neither of these, damaged, or no such split in its data.
    """
    run_dir = path.parent.parent if path.parent.name == CHECKPOINTS else path
    if not (run_dir / CONFIG_FILE).exists() or not (path / WEIGHTS_FILE).exists():
        raise UserError(
            f"{path} is not the folder of a finished run, nor a checkpoint: it needs {CONFIG_FILE}"
            f" and {WEIGHTS_FILE}, which distvgg train leaves there"
        )
    config = load(str(run_dir / CONFIG_FILE))
    accelerator = start(config)
    dataset = load_dataset(config.data)
    rows = None
    data = dataset.test
    if split == "val":
        data, rows = dataset.train, train_val_indices(dataset.train.labels, config.data)[1]
    if data is None:
        raise UserError(f"{config.data.path} has no test split: take --split val")
    model = VGG(config.model, dataset.num_classes)
    try:
        content = (path / WEIGHTS_FILE).read_bytes() if path == run_dir else read(path).model
        model.load_state_dict(safetensors.torch.load(content))
    except (SafetensorError, RuntimeError, DamageError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path / WEIGHTS_FILE} cannot be loaded: {reason}") from error
    place(model, accelerator, config)
    model = accelerator.prepare_model(model, evaluation_mode=True)
    pixels = Pixels(dataset, data, config.model.image_size, accelerator.device)
    loader = EvalLoader(pixels, rows, config.eval.batch_size)
    row = evaluate_over_ranks(accelerator, model, loader, dataset.superclass_of)
    accelerator.end_training()
    return {f"{split}/{name}": value for name, value in row.items()}

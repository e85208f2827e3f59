"""`distvgg evaluate`: evaluation of the weights of a run."""

from pathlib import Path
from typing import get_args

import safetensors.torch
from safetensors import SafetensorError

from distvgg import metrics
from distvgg.config import Config, SplitName
from distvgg.data.cache import load_dataset
from distvgg.data.dataset import train_and_val
from distvgg.distributed.device import place
from distvgg.distributed.peer_failure import clean_shutdown, translate_peer_failure
from distvgg.distributed.process_group import prepare_model, start
from distvgg.errors import UserError, one_line
from distvgg.models.pretrained import run_with_weights
from distvgg.models.vgg import VGG
from distvgg.runs.confusion import Confusion, by_superclass, describe_pairs
from distvgg.runs.layout import WEIGHTS_FILE
from distvgg.runs.result import read_result
from distvgg.training.checkpoint import CorruptCheckpointError, read
from distvgg.training.evaluation import Evaluation, evaluate_over_ranks
from distvgg.training.setup import open_loaders


def evaluate(path: str | Path, split: SplitName = "test") -> metrics.Row:
    """Evaluates the weights of a run. Reads only the run folder and the data.

    Args:
        path: the folder of a finished run, or one of its `checkpoints/step_*`.
        split: test, only for the final weights of a finished run; val; or train, the images trained
            on, without augmentation.

    Returns:
        The metrics by their bare names: `loss`, `top1`, `top5`, `calibration_error`, `count` and,
        where the data has superclasses, `superclass_top1`.

    Raises:
        UserError: `path` is neither of these, or corrupt; the data has no such split; or test must
            not be read.
    """
    found, _ = _measure(Path(path), split)
    return found.row


def evaluate_run(path: Path, split: SplitName) -> str:
    """Returns the metrics of `evaluate` and the most frequently confused classes, as text."""
    return describe(*_measure(path, split))


@clean_shutdown()
@translate_peer_failure()
def _measure(path: Path, split: SplitName) -> tuple[Evaluation, Confusion]:
    if split not in get_args(SplitName):
        raise UserError(f"split {split!r}: expected one of {', '.join(get_args(SplitName))}")
    run_dir, config = run_with_weights(path)
    if split == "test":
        _refuse_test(path, run_dir, config)
    accelerator = start(config)
    dataset = load_dataset(config.data)
    data, rows = dataset.test, None
    if split != "test":
        train, val_split, val = train_and_val(dataset, config.data)
        data, rows = (dataset.train, train) if split == "train" else (val_split, val)
    if data is None:
        raise UserError(f"{config.data.path} has no test split: take --split val")
    model = VGG(config.model, dataset.num_classes)
    try:
        content = (path / WEIGHTS_FILE).read_bytes() if path == run_dir else read(path).model
        model.load_state_dict(safetensors.torch.load(content))
    except (SafetensorError, RuntimeError, OSError, CorruptCheckpointError) as error:
        raise UserError(f"{path / WEIGHTS_FILE} cannot be loaded: {one_line(error)}") from error
    place(model, accelerator, config)
    prepared = prepare_model(accelerator, model)
    loaders, _ = open_loaders(config, dataset, accelerator)
    try:
        loader, flip = loaders.evaluation(data, rows), config.eval.tta == "flip"
        found = evaluate_over_ranks(accelerator, prepared, loader, dataset, flip=flip)
    finally:
        loaders.close()
    accelerator.end_training()
    return found, Confusion.of(dataset, split, found.confusion, found.reliability)


def _refuse_test(path: Path, run_dir: Path, config: Config) -> None:
    """Raises UserError unless test may be read.

    Test may evaluate the final weights of a finished run again, which is no choice between weights.
    Any other evaluation on test could be used to choose.
    """
    if path != run_dir:
        raise UserError(
            f"{path} is a checkpoint, and test is for the final weights of a run alone: take"
            " --split val"
        )
    if not config.eval.test:
        raise UserError(
            f"{run_dir} was trained with eval.test false, which keeps test out of model selection:"
            " use --split val, or train the chosen recipe with --eval.test true in a new folder"
        )
    if read_result(run_dir) is None:
        raise UserError(
            f"{run_dir} is not finished, and test is read at the end: finish it with the same"
            " training command, or take --split val"
        )


def describe(found: Evaluation, confusion: Confusion) -> str:
    """Returns an evaluation as text."""
    row = {f"{confusion.split}/{name}": value for name, value in found.row.items()}
    error = 100 * found.row[metrics.CALIBRATION_ERROR]
    unsaid = "train " if confusion.split == "train" else ""  # omitted, as in training rows
    parts = [
        f"{unsaid}{metrics.describe(row)}, calibration error {error:.2f}%",
        describe_pairs(confusion, "class"),
    ]
    if (coarse := by_superclass(confusion)) is not None:
        parts.append(describe_pairs(coarse, "superclass"))
    return "\n".join(parts)

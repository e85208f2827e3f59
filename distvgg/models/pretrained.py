"""Trained networks from run folders."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError, safe_open
from torch import Tensor

from distvgg.config import Config
from distvgg.errors import UserError, one_line
from distvgg.models.vgg import VGG
from distvgg.recipe import load
from distvgg.runs.layout import CHECKPOINTS, CONFIG_FILE, WEIGHTS_FILE, checkpoint_dirs, run_of

Network = TypeVar("Network", bound=VGG)


def load_model(path: str | Path) -> VGG:
    """Loads the weights of a run into its network, on the CPU and in evaluation mode.

    The network's input is [n, 3, image_size, image_size] float32, normalised according to
    `preprocessing.json` of the run folder. Its output is [n, classes] logits.

    Args:
        path: the folder of a finished run, or one of its `checkpoints/step_*`.

    Raises:
        UserError: `path` is neither of these folders, or its files are corrupt.
    """
    path = Path(path)
    _, config = run_with_weights(path)
    weights, _ = read_weights(path / WEIGHTS_FILE)
    return with_weights(lambda outputs: VGG(config.model, outputs), weights, path / WEIGHTS_FILE)


def read_weights(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors and the metadata of a safetensors file.

    Raises:
        UserError: the file cannot be read, or is no safetensors file.
    """
    try:
        with safe_open(file, "pt") as content:
            names = content.keys()
            return {name: content.get_tensor(name) for name in names}, content.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file} cannot be loaded: {one_line(error)}; copy it anew from where it was trained,"
            " or give one of the run's checkpoints/step_*"
        ) from error


def with_weights(
    make: Callable[[int], Network], weights: Mapping[str, Tensor], file: Path
) -> Network:
    """Returns a network with weights loaded, on the CPU and in evaluation mode.

    Args:
        make: makes the network with a given number of outputs.
        weights: its tensors by torchvision's keys.
        file: of the weights, for messages.

    Raises:
        UserError: the weights are not those of this network.
    """
    last = max((name for name in weights if name.startswith("classifier.")), default=None)
    if last is None:
        raise UserError(
            f"{file} cannot be loaded: it has no layer classifier.*, so that it is not a network of"
            " distvgg"
        )
    try:
        model = make(len(weights[last]))
        model.load_state_dict(weights)
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(
            f"{file} cannot be loaded: {one_line(error)}; it has other weights than its run's"
            " network: copy it anew from that run"
        ) from error
    return model.eval()


def check_has_weights(folder: Path) -> None:
    """Checks that a folder holds weights.

    Raises:
        UserError: it does not, or does not exist. The message names the newest checkpoint, if any.
    """
    if not os.path.isdir(folder):
        raise UserError(f"run folder {folder} does not exist: give a folder of distvgg train")
    if os.path.exists(folder / WEIGHTS_FILE):
        return
    saved = [
        path for path in checkpoint_dirs(folder / CHECKPOINTS) if (path / WEIGHTS_FILE).exists()
    ]
    if saved:
        raise UserError(
            f"{folder} has no {WEIGHTS_FILE}, because its run is not finished: finish it with the"
            f" same training command, or take its newest checkpoint, {saved[-1]}"
        )
    raise UserError(
        f"{folder} has no {WEIGHTS_FILE}: give the folder of a finished run, or a checkpoint"
    )


def run_with_weights(path: Path) -> tuple[Path, Config]:
    """Returns the run folder and the config of a path that holds weights.

    Args:
        path: the folder of a finished run, or one of its `checkpoints/step_*`.

    Raises:
        UserError: neither of these.
    """
    run_dir = run_of(path)
    if not (run_dir / CONFIG_FILE).exists() or not (path / WEIGHTS_FILE).exists():
        raise UserError(
            f"{path} is not the folder of a finished run, nor a checkpoint: it needs {CONFIG_FILE}"
            f" and {WEIGHTS_FILE}, which distvgg train leaves there"
        )
    return run_dir, load(str(run_dir / CONFIG_FILE))

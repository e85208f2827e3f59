"""Trained networks from run folders."""

from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError

from distvgg.config import Config, load
from distvgg.errors import UserError
from distvgg.models.vgg import VGG
from distvgg.runs.layout import CONFIG_FILE, WEIGHTS_FILE, run_of


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
    try:
        weights = safetensors.torch.load_file(path / WEIGHTS_FILE)
        *_, last = (name for name in weights if name.startswith("classifier."))
        model = VGG(config.model, num_classes=len(weights[last]))
        model.load_state_dict(weights)
    except (SafetensorError, RuntimeError, ValueError, TypeError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path / WEIGHTS_FILE} cannot be loaded: {reason}") from error
    return model.eval()


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

"""Initial weights from another training: read once, the same on every rank.

Invariant: a run that has a checkpoint does not read `model.weights` again.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import safetensors.torch
import torch
from torch import Tensor

from distvgg.config import Config
from distvgg.distributed.collectives import broadcast_bytes, broadcast_from_main
from distvgg.models.freezing import freeze, learned_parameters
from distvgg.models.transfer import check_trunk, choose, normalisation_note
from distvgg.models.vgg import VGG
from distvgg.models.weight_sources import read_source
from distvgg.runs.initial_weights import (
    InitialWeights,
    keep_initial_weights,
    read_initial_weights,
)
from distvgg.runs.layout import CHECKPOINTS, checkpoint_dirs
from distvgg.runs.preprocessing import Preprocessing

if TYPE_CHECKING:
    from accelerate import Accelerator


def check_start(config: Config, folder: Path) -> None:
    """Checks `optim.frozen`, and that `model.weights` fits, before the run folder is made.

    A mistake so leaves no folder that belongs to the mistaken config.

    Raises:
        UserError: a pattern matches no parameter; the weights cannot be read, or do not fit, and
            the run has no checkpoint.
    """
    with torch.device("meta"):
        vgg = VGG(config.model, 1)
    freeze(vgg, config.optim.frozen)
    if config.model.weights is not None and not checkpoint_dirs(folder / CHECKPOINTS):
        check_trunk(read_source(config.model.weights), vgg.state_dict(), config.model)


def load_initial_weights(
    vgg: VGG,
    config: Config,
    preprocessing: Preprocessing,
    folder: Path,
    accelerator: "Accelerator",
    *,
    resumed: bool,
) -> tuple[InitialWeights | None, list[str]]:
    """Loads `model.weights` into a network on the CPU, and records them in the run folder.

    A collective operation: the main process reads the source and sends the tensors to all ranks.
    In a resumed run, it only reads the record.

    Returns:
        The record; None without `model.weights`, or if a resumed run has lost it. And lines for the
        user.

    Raises:
        UserError: the weights cannot be read, do not fit the network, or are not those of the run's
            first start.
    """
    name = config.model.weights
    if name is None:
        return None, [] if resumed else without_effect(vgg, config, None)
    if resumed:
        return broadcast_from_main(accelerator, lambda: read_initial_weights(folder)), []
    tensors: dict[str, Tensor] = {}

    def read() -> tuple[InitialWeights, list[str]]:
        source = read_source(name)
        network, class_names = vgg.state_dict(), preprocessing.class_names
        record, chosen = choose(source, network, config.model, class_names)
        keep_initial_weights(record, folder)
        tensors.update(chosen)
        note = normalisation_note(source, preprocessing)
        return record, [note] if note else []

    record, notes = broadcast_from_main(accelerator, read)
    content = safetensors.torch.save(tensors) if accelerator.is_main_process else None
    content = broadcast_bytes(accelerator, content)
    vgg.load_state_dict(safetensors.torch.load(content), strict=False)
    return record, notes + without_effect(vgg, config, record)


def without_effect(vgg: VGG, config: Config, record: InitialWeights | None) -> list[str]:
    """Returns a line for each option of this kind that does not do what it seems to do."""
    lines = []
    frozen = [name for name, p in vgg.named_parameters() if not p.requires_grad]
    loaded = record.loaded if record else []
    random = [n for n in frozen if not {n.partition(".")[0], n.rpartition(".")[0]} & {*loaded}]
    if random:
        layers = ", ".join(dict.fromkeys(name.rpartition(".")[0] for name in random))
        where = "model.weights is none" if record is None else "not in model.weights"
        lines.append(f"optim.frozen: initial weights of the seed stay in {layers} ({where})")
    if config.optim.trunk_lr_ratio != 1 and not learned_parameters(vgg.features):
        lines.append("optim.trunk_lr_ratio has no effect, because all of features is frozen")
    return lines

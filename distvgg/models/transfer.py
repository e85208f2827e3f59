"""Selection of the pretrained tensors that a network loads.

`features` fits as a whole or is refused. Each linear layer is taken if its shape fits, and the last
one only if its classes are the same; the others start anew.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distvgg.config import Config, ModelConfig
from distvgg.errors import UserError
from distvgg.models.freezing import freeze
from distvgg.models.vgg import VGG
from distvgg.models.weight_sources import Source, read_source
from distvgg.runs.initial_weights import InitialWeights
from distvgg.runs.preprocessing import Preprocessing

_COUNTER = "num_batches_tracked"  # without effect: a checkpoint counts the steps of its own run
# Fields of a network that do not change the keys and shapes of `features`.
_ELSEWHERE = {"weights", "head_width", "max_pools", "pool_size", "dropout", "image_size", "init"}
_SHOWN = 3  # differing keys in a message


def choose(
    source: Source, network: Mapping[str, Tensor], config: ModelConfig, class_names: Sequence[str]
) -> tuple[InitialWeights, dict[str, Tensor]]:
    """Chooses what a network takes from a source.

    Args:
        source: the trained weights.
        network: the state of the network, which gives keys, shapes and dtypes.
        config: of the network.
        class_names: of its outputs; empty if unknown.

    Returns:
        The record of the choice, and the tensors in the dtypes of the network.

    Raises:
        UserError: `features` does not fit.
    """
    ours, theirs = _without_counters(network), _without_counters(source.tensors)
    check_trunk(source, network, config)
    taken = [name for name in ours if name.startswith("features.")]
    loaded, new = ["features"], dict[str, str]()
    head = _by_layer(ours, "classifier.")
    for layer, names in head.items():
        is_last = layer == list(head)[-1]
        why = _misfit(names, theirs, ours)
        if not why and is_last and source.class_names and class_names:
            why = "" if list(source.class_names) == list(class_names) else "other classes there"
        if why:
            new[layer] = why
        else:
            loaded.append(layer)
            taken += names
    tensors = {name: theirs[name].to(ours[name].dtype).contiguous() for name in taken}
    unused = [layer for layer in _by_layer(theirs) if layer not in _by_layer(ours)]
    return InitialWeights(source.name, loaded, new, unused, _sha256(tensors)), tensors


def preview(
    config: Config, num_classes: int, class_names: Sequence[str]
) -> tuple[VGG, InitialWeights | None]:
    """Returns a config's network without values, and what it would take from `model.weights`.

    Args:
        config: of a run.
        num_classes: number of the network's outputs.
        class_names: of its outputs; empty if unknown.

    Raises:
        UserError: as `read_source`, `choose` and `freeze` do.
    """
    with torch.device("meta"):
        vgg = VGG(config.model, num_classes)
    freeze(vgg, config.optim.frozen)
    if config.model.weights is None:
        return vgg, None
    source = read_source(config.model.weights)
    return vgg, choose(source, vgg.state_dict(), config.model, class_names)[0]


def normalisation_note(source: Source, used: Preprocessing) -> str | None:
    """Returns a line if a source's input was normalised by other constants than the data's own."""
    if source.moments is None:
        return None
    here, there = (
        " ".join(f"{value:.3f}" for values in moments for value in values)
        for moments in ((used.mean, used.std), source.moments)
    )
    if here == there:
        return None
    return (
        f"{source.name} was trained on input normalised by mean and std {there}; this run has those"
        f" of its data, {here}, to which layers that are trained adapt"
    )


def check_trunk(source: Source, network: Mapping[str, Tensor], config: ModelConfig) -> None:
    """Checks that `features` of a source has the keys and shapes of the network's.

    Args:
        source: the trained weights.
        network: the state of the network.
        config: of the network.

    Raises:
        UserError: it has not, or has values that are not finite.
    """
    ours, theirs = _without_counters(network), _without_counters(source.tensors)
    names = [n for n in dict.fromkeys([*ours, *theirs]) if n.startswith("features.")]
    if not any(name in theirs for name in names):
        raise UserError(
            f"model.weights {source.name} has no layer features.*, so that it is no VGG: give"
            " weights with torchvision's keys"
        )
    differ = [(name, why) for name in names if (why := _difference(name, theirs, ours))]
    if not differ:
        return
    shown = "; ".join(f"{name}: {why}" for name, why in differ[:_SHOWN])
    more = f"; {len(differ) - _SHOWN} more" if len(differ) > _SHOWN else ""
    here = config.model_dump()
    options = [
        f"--model.{field} {_as_typed(value)}"
        for field, value in source.model.items()
        if field in here and field not in _ELSEWHERE and here[field] != value
    ]
    advice = " ".join(options) or "the model.* options of the network that they are of"
    raise UserError(
        f"model.weights {source.name} does not fit features.* ({shown}{more}): set {advice}, or"
        " leave model.weights out"
    )


def _without_counters(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if not k.endswith(_COUNTER)}


def _misfit(names: Sequence[str], theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> str:
    """Returns why a linear layer cannot be taken; empty if it can."""
    for name in names:
        if why := _difference(name, theirs, ours):
            outputs = ours[name].ndim > 1 and name in theirs and theirs[name].ndim > 1
            same_inputs = outputs and theirs[name].shape[1:] == ours[name].shape[1:]
            if same_inputs and len(theirs[name]) != len(ours[name]):
                return f"{len(theirs[name])} outputs there, {len(ours[name])} here"
            return why
    return ""


def _difference(name: str, theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> str:
    """Returns how a tensor of a source differs from the network's; empty if it fits."""
    if name not in ours:
        return "only there"
    if name not in theirs:
        return "only here"
    if theirs[name].shape != ours[name].shape:
        return f"{list(theirs[name].shape)} there, {list(ours[name].shape)} here"
    if theirs[name].dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return f"{str(theirs[name].dtype).removeprefix('torch.')} there"
    values = theirs[name].float()
    if name.endswith("running_var") and (values < 0).any():
        return "negative there"
    return "" if torch.isfinite(values).all() else "not finite in float32 there"


def _by_layer(tensors: Mapping[str, Tensor], prefix: str = "") -> dict[str, list[str]]:
    """Returns the names of tensors by their layer, in order."""
    found: dict[str, list[str]] = {}
    for name in tensors:
        if name.startswith(prefix):
            found.setdefault(name.rpartition(".")[0] or name, []).append(name)
    return found


def _as_typed(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()

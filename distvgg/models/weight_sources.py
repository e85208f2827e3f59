"""The three sources of `model.weights`: another run, a safetensors file, torchvision's VGG by name.

Owns where trained weights are read from, and what is known of their training.
"""

import os
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from distvgg.errors import UserError, nearest, one_line
from distvgg.models.pretrained import check_has_weights, read_weights
from distvgg.reachability import behind_proxy, connects
from distvgg.recipe import load
from distvgg.runs.layout import CONFIG_FILE, WEIGHTS_FILE, run_of
from distvgg.runs.preprocessing import of_metadata, read_preprocessing

PREFIX = "torchvision:"
_ENUM = re.compile(r"VGG\d+(_BN)?_Weights\.\w+")


@dataclass(frozen=True)
class Source:
    """Trained weights, with what is known of their training.

    Attributes:
        name: `model.weights` as given.
        tensors: by torchvision's keys.
        model: fields of the section `model`; empty if unknown.
        class_names: names by output index; empty if unknown.
        moments: mean and standard deviation of each channel that its input was normalised by.
    """

    name: str
    tensors: Mapping[str, Tensor]
    model: Mapping[str, Any]
    class_names: Sequence[str] = ()
    moments: tuple[Sequence[float], Sequence[float]] | None = None


def read_source(name: str) -> Source:
    """Reads the weights that `model.weights` names. Downloads torchvision's, unless cached.

    Raises:
        UserError: there are no such weights, or they cannot be read or downloaded.
    """
    check_source(name)
    if _is_torchvision(name):
        return _of_torchvision(name)
    path = Path(name)
    file = path / WEIGHTS_FILE if path.is_dir() else path
    tensors, metadata = read_weights(file)
    run_dir = run_of(path) if path.is_dir() else path.parent
    found = of_metadata(metadata, file)
    if found is None and path.is_dir():
        found = read_preprocessing(run_dir)
    if found is None:
        return Source(name, tensors, {})
    model = found.model
    if model is None and path.is_dir() and (run_dir / CONFIG_FILE).exists():
        model = load(str(run_dir / CONFIG_FILE)).model.model_dump()  # of an earlier version
    return Source(name, tensors, model or {}, found.class_names, (found.mean, found.std))


def check_source(name: str) -> None:
    """Checks that the weights that `model.weights` names exist; reads and downloads nothing.

    Raises:
        UserError: they do not.
    """
    if _is_torchvision(name):
        _torchvision_weights(name)
        return
    path = Path(name)
    if os.path.isdir(path):
        check_has_weights(path)
    elif not os.path.exists(path):
        near = f", did you mean {PREFIX}{name}?" if re.fullmatch(r"vgg\d+(_bn)?", name) else ""
        raise UserError(
            f"model.weights {name} does not exist{near}: give the folder of a finished run, one of"
            f" its checkpoints/step_*, a safetensors file, or {PREFIX}vgg16_bn"
        )
    elif path.suffix != ".safetensors":
        raise UserError(
            f"model.weights {name} is no safetensors file: write its tensors to one with"
            " safetensors.torch.save_file"
        )


def is_cached(name: str) -> bool:
    """Returns True if reading the weights needs no network."""
    if not _is_torchvision(name):
        return True
    return _cached_file(_torchvision_weights(name).url).exists()


def _is_torchvision(name: str) -> bool:
    return name.startswith(PREFIX) or _ENUM.fullmatch(name) is not None


def _torchvision_weights(name: str) -> Any:
    """Returns the member of torchvision's enum that a name means.

    Args:
        name: `torchvision:vgg16_bn`, or a member such as VGG16_BN_Weights.IMAGENET1K_V1, with or
            without the prefix.

    Raises:
        UserError: torchvision has no such weights.
    """
    from torchvision.models import (  # type: ignore[import-untyped]
        get_model_weights,
        vgg,
    )

    bare = name.removeprefix(PREFIX)
    builders = [n for n in vgg.__all__ if n.startswith("vgg")]
    enums = {
        f"{e.__name__}.{m}": w
        for e in map(get_model_weights, builders)
        for m, w in e.__members__.items()
    }
    if bare.lower() in builders:
        return get_model_weights(bare.lower()).DEFAULT
    if bare not in enums:
        near = nearest(bare, [*builders, *enums], PREFIX)
        raise UserError(
            f"model.weights: torchvision has no VGG weights {bare!r}{near}: give"
            f" {PREFIX} and one of {', '.join(builders)}"
        )
    return enums[bare]


def _of_torchvision(name: str) -> Source:
    weights = _torchvision_weights(name)
    file, url = _cached_file(weights.url), urlsplit(weights.url)
    assert url.hostname is not None
    if not file.exists() and not behind_proxy(url) and not connects(url.hostname, 443):
        raise UserError(
            f"model.weights {name} is not in torch's cache and {url.hostname} cannot be reached:"
            f" put {weights.url} into {file.parent}, or set TORCH_HOME to the cache that has it"
        )
    try:
        with redirect_stdout(sys.stderr):  # "Downloading ..."
            tensors = weights.get_state_dict(
                progress=False, check_hash=True, map_location="cpu", weights_only=True
            )
    # A damaged file; a failed or damaged download; a cache that cannot be written.
    except (OSError, RuntimeError, UnpicklingError, EOFError, ValueError) as error:
        why = one_line(error)
        raise UserError(
            f"model.weights {name} cannot be read ({why}): delete {file} to download it again, or"
            f" put {weights.url} there"
        ) from error
    builder = type(weights).__name__.removesuffix("_Weights")
    depth = re.search(r"\d+", builder)
    assert depth is not None
    transforms = weights.transforms()
    return Source(
        name,
        tensors,
        {
            "name": "vgg",
            "depth": int(depth[0]),
            "batch_norm": builder.endswith("_BN"),
            "width": 1.0,
        },
        moments=(transforms.mean, transforms.std),
    )


def _cached_file(url: str) -> Path:
    """Returns where torch's hub keeps a file."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(urlsplit(url).path).name

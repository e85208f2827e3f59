"""Data needed to use a run's weights: normalisation constants, sizes, class names, the network.

Stored as `preprocessing.json` in the run folder, and as metadata of each `model.safetensors`.
Imports no torch.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from distvgg.config import Config
from distvgg.errors import UserError
from distvgg.runs.files import atomic_write, read_json
from distvgg.runs.layout import PREPROCESSING_FILE

if TYPE_CHECKING:
    from distvgg.data.dataset import Dataset


METADATA_KEY = "preprocessing"


@dataclass(frozen=True)
class Preprocessing:
    """Constants that turn an image into network input, and an output's index into a class name.

    An RGB image, resized and cropped to `stored_size`, becomes `(pixel / 255 - mean) / std`. The
    result is then resized to `image_size` squared (bilinear, antialiased) if `stored_size` differs.

    Attributes:
        mean, std: per channel (red, green, blue), in 0..1.
        stored_size: height and width in pixels to which the dataset's images were cropped or
            resized before training.
        image_size: side of the network's input in pixels.
        crop_ratio: side of the centre crop as a share of the resized image's shorter side.
        class_names: names by output index; empty if they are unknown.
        superclass_of: [classes], index into `superclass_names`; None if there are no superclasses.
        model: the section `model` of the config without `weights`, which the shapes of the weights
            do not determine.
            None in files of earlier versions.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    stored_size: tuple[int, int]
    image_size: int
    class_names: list[str] = field(default_factory=list)
    superclass_names: list[str] = field(default_factory=list)
    superclass_of: list[int] | None = None
    model: dict[str, Any] | None = None
    crop_ratio: float = 1.0

    @staticmethod
    def of(dataset: "Dataset", config: Config) -> "Preprocessing":
        """Collects the constants of a dataset and a network."""
        height, width = dataset.train.images.shape[1:3]
        superclasses = dataset.superclass_of
        # Fields that earlier versions do not know; they can load the weights without. The source
        # of initial weights is no part of a network.
        set_here = config.model.model_dump(exclude_defaults=True).keys()
        unknown = {"weights"} | {"name", "layers"} - set_here
        return Preprocessing(
            mean=dataset.mean,
            std=dataset.std,
            stored_size=(height, width),
            image_size=config.model.image_size,
            class_names=dataset.class_names,
            superclass_names=dataset.superclass_names,
            superclass_of=None if superclasses is None else superclasses.tolist(),
            model=config.model.model_dump(exclude=unknown),
            crop_ratio=config.eval.crop_ratio,
        )

    def metadata(self) -> dict[str, str]:
        """Returns the same data for the header of a safetensors file, as one entry.

        safetensors writes several entries in an order that changes from process to process. The
        bytes of the file would change with that order.
        """
        return {METADATA_KEY: json.dumps(asdict(self))}


def save_preprocessing(preprocessing: Preprocessing, run_dir: Path) -> None:
    """Writes `preprocessing.json` atomically.

    Raises:
        OSError: the file cannot be written.
    """
    content = json.dumps(asdict(preprocessing), indent=2).encode() + b"\n"
    atomic_write(run_dir / PREPROCESSING_FILE, content)


def read_preprocessing(run_dir: Path) -> Preprocessing | None:
    """Reads `preprocessing.json`; returns None for a run of version 0.1, which lacks the file.

    Raises:
        UserError: the file is corrupt.
    """
    remedy = "that in the header of the weights is used"
    return read_json(run_dir / PREPROCESSING_FILE, Preprocessing, remedy)


def of_metadata(metadata: Mapping[str, str], file: Path) -> Preprocessing | None:
    """Returns the preprocessing in the header of a safetensors file, or None if there is none.

    Raises:
        UserError: the entry is corrupt, or of another version.
    """
    if METADATA_KEY not in metadata:
        return None
    try:
        return TypeAdapter(Preprocessing).validate_json(metadata[METADATA_KEY])
    except ValueError as error:
        raise UserError(
            f"the header of {file} is damaged, or of another version: put {PREPROCESSING_FILE} of"
            " its run into the same folder"
        ) from error

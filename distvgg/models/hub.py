"""The classifier that `huggingface_hub` loads, from a folder or from the hub.

A module of its own, so that `distvgg.load` imports no `huggingface_hub`.
"""

from dataclasses import asdict
from typing import Any, Self

import torch
from huggingface_hub import PyTorchModelHubMixin
from pydantic import TypeAdapter

from distvgg.config import ModelConfig
from distvgg.models.classifier import Classifier
from distvgg.models.export import described
from distvgg.runs.preprocessing import Preprocessing


class HubClassifier(
    Classifier, PyTorchModelHubMixin, library_name="distvgg", pipeline_tag="image-classification"
):
    """A `Classifier` with `from_pretrained`, for folders of `distvgg export --to hub`.

    `HubClassifier.from_pretrained(folder_or_repo)` takes the arguments of `huggingface_hub`'s
    mixin. The network is on the CPU and in evaluation mode, and the caller's random state does not
    change. The arguments of the constructor are the content of `config.json`.
    """

    def __init__(self, preprocessing: dict[str, Any], num_classes: int, flip: bool = False) -> None:
        """Builds the network with new weights.

        Args:
            preprocessing: fields of `distvgg.runs.preprocessing.Preprocessing`, `model` included.
            num_classes: number of outputs.
            flip: as in `Classifier`.

        Raises:
            ValueError: a field is missing or out of range.
        """
        constants = TypeAdapter(Preprocessing).validate_python(preprocessing)
        model = ModelConfig.model_validate(constants.model)
        super().__init__(model, constants, num_classes, flip=flip)

    @classmethod
    def _from_pretrained(cls, **options: Any) -> Self:
        # The mixin's own default fills what the file lacks with random weights.
        with torch.random.fork_rng(devices=[]):
            found: Self = super()._from_pretrained(**{"strict": True} | options)
        return found


def hub_config(model: Classifier) -> dict[str, Any]:
    """Returns the content of `config.json`, from which `HubClassifier` builds the network."""
    return {
        "preprocessing": asdict(described(model)),
        "num_classes": len(model.class_names),
        "flip": model.flip,
    }

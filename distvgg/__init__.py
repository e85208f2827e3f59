"""Training of VGG image classifiers whose result does not depend on the number of GPUs.

The names below are imported when they are first used, so that `import distvgg` loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distvgg.commands.evaluate import evaluate
    from distvgg.errors import RunError, UserError
    from distvgg.models.classifier import load
    from distvgg.models.hub import HubClassifier
    from distvgg.models.pretrained import load_model
    from distvgg.recipe import load as load_config
    from distvgg.runs.metrics_file import read_metrics
    from distvgg.training.trainer import train

__version__ = "0.2.0"
__all__ = [
    "HubClassifier",
    "RunError",
    "UserError",
    "__version__",
    "evaluate",
    "load",
    "load_config",
    "load_model",
    "read_metrics",
    "train",
]

_PUBLIC = {
    "HubClassifier": ("distvgg.models.hub", "HubClassifier"),
    "RunError": ("distvgg.errors", "RunError"),
    "UserError": ("distvgg.errors", "UserError"),
    "evaluate": ("distvgg.commands.evaluate", "evaluate"),
    "load": ("distvgg.models.classifier", "load"),
    "load_config": ("distvgg.recipe", "load"),
    "load_model": ("distvgg.models.pretrained", "load_model"),
    "read_metrics": ("distvgg.runs.metrics_file", "read_metrics"),
    "train": ("distvgg.training.trainer", "train"),
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'distvgg' has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    return getattr(import_module(module), attribute)


def __dir__() -> "list[str]":
    return __all__

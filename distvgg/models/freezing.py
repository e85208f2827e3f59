"""Parameters that are not trained: which ones, and what of a network then stays as it is.

Invariant: a frozen parameter has no gradient, and no optimizer state. A BatchNorm layer whose
parameters are all frozen keeps its running statistics, and normalises by them.
"""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn

from distvgg.errors import UserError, nearest
from distvgg.models.vgg import VGG, FrozenBatchNorm
from distvgg.wording import counted


def freeze(vgg: VGG, patterns: Sequence[str]) -> None:
    """Freezes the parameters of a network that match a pattern.

    Args:
        vgg: the network, before anything holds its parameters.
        patterns: names of layers or parameters, such as features, features.0 or features.0.bias,
            with * and ? as wildcards.

    Raises:
        UserError: a pattern matches no parameter, or nothing would be trained.
    """
    if not patterns:
        return
    names = [name for name, _ in vgg.named_parameters()]
    frozen = {name for pattern in patterns for name in _matches(pattern, names)}
    if len(frozen) == len(names):
        raise UserError(
            f"optim.frozen {','.join(patterns)} matches all parameters, so that nothing would be"
            f" trained: leave out the last layer, {names[-1].rpartition('.')[0]}"
        )
    for name, parameter in vgg.named_parameters():
        parameter.requires_grad_(name not in frozen)
    for i, layer in enumerate(vgg.features):
        is_frozen = not any(p.requires_grad for p in layer.parameters())
        if isinstance(layer, nn.BatchNorm2d) and is_frozen:
            vgg.features[i] = _frozen(layer)


def learned_parameters(model: nn.Module) -> list[Tensor]:
    """Returns the parameters of a model that are trained, in order."""
    return [p for p in model.parameters() if p.requires_grad]


def describe_frozen(vgg: VGG, patterns: Iterable[str]) -> str:
    """Returns what `freeze` left out of the training, as text for the user."""
    sizes = [(p.numel(), p.requires_grad) for p in vgg.parameters()]
    still = sum(size for size, learned in sizes if not learned)
    text = f"{', '.join(patterns)}: {still:,} of {sum(size for size, _ in sizes):,} parameters"
    layers = sum(isinstance(m, FrozenBatchNorm) for m in vgg.modules())
    return text + (
        f", and the statistics of {counted(layers, 'BatchNorm layer')}" if layers else ""
    )


def _matches(pattern: str, names: Sequence[str]) -> list[str]:
    """Returns the parameters that a pattern names, by their own name or that of a module.

    Raises:
        UserError: there are none.
    """
    found = [n for n in names if fnmatchcase(n, pattern) or fnmatchcase(n, f"{pattern}.*")]
    if not found:
        layers = dict.fromkeys(name.rpartition(".")[0] for name in names)
        known = [*dict.fromkeys(layer.partition(".")[0] for layer in layers), *layers, *names]
        near = nearest(pattern, known)
        raise UserError(
            f"optim.frozen: no parameter matches {pattern!r}{near}: give layers of distvgg summary"
            " that have parameters, such as features or features.0"
        )
    return found


def _frozen(layer: nn.BatchNorm2d) -> FrozenBatchNorm:
    frozen = FrozenBatchNorm(layer.num_features, layer.eps)
    frozen.load_state_dict(layer.state_dict(), assign=True)
    return frozen.requires_grad_(False).eval()

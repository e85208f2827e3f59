"""`distvgg summary`: the layers of a recipe's network, without data and without training."""

from distvgg.commands.text_tables import Side, plain_table
from distvgg.config import Config, DataConfig
from distvgg.data import synthetic
from distvgg.data.cache import cache_entry, is_complete, open_entry
from distvgg.data.cifar import CLASSES
from distvgg.errors import UserError
from distvgg.models.flops import training_flops
from distvgg.models.freezing import describe_frozen
from distvgg.models.summary import Layer, layers_of, network_name
from distvgg.models.transfer import preview
from distvgg.models.vgg import VGG
from distvgg.runs.initial_weights import InitialWeights


def summary(config: Config) -> str:
    """Returns a table of layers, output shapes, parameters and operations, with totals.

    Raises:
        UserError: the number of classes is not known yet, or `model.weights` or `optim.frozen` does
            not fit the network.
    """
    classes, side = count_classes(config), config.model.image_size
    layers = layers_of(config.model, classes)
    names = _class_names(config.data) if config.model.weights is not None else []
    vgg, initial = preview(config, classes, names)
    starts = initial is not None or bool(config.optim.frozen)
    columns: tuple[Side, ...] = ("left", "left", "right", "right", "right")
    rows = [["layer", "kind", "output", "parameters", "forward MFLOP", *["start"] * starts]]
    for layer in layers:
        shape = " x ".join(map(str, layer.shape))
        cells = [f"{layer.parameters:,}" if layer.parameters else "", _mega(layer.flops)]
        cells += [_start(layer, vgg, initial)] * starts
        rows.append([layer.name, layer.kind, shape, *cells])
    parameters = sum(layer.parameters for layer in layers)
    forward = sum(layer.flops for layer in layers)
    training = training_flops(config.model, classes, config.optim.frozen)
    name = network_name(config.model)
    frozen, ratio = config.optim.frozen, config.optim.trunk_lr_ratio
    return "\n".join(
        [
            plain_table(rows, (*columns, "left") if starts else columns),
            "",
            f"{name} for images of {side}x{side} pixels and {classes} classes",
            f"parameters  {parameters:,}, {4 * parameters / 2**20:,.1f} MiB in float32",
            f"forward     {forward:,} FLOP an image",
            f"training    {training:,} FLOP an image, forward and backward",
            *([f"weights     {initial.text()}"] if initial else []),
            *([f"frozen      {describe_frozen(vgg, frozen)}"] if frozen else []),
            *([f"trunk       features.* learn at {ratio:g} of the rate"] if ratio != 1 else []),
        ]
    )


def count_classes(config: Config) -> int:
    """Returns the number of classes of a config's data.

    Raises:
        UserError: the data is custom, and not decoded.
    """
    data = config.data
    if data.name != "custom":
        return CLASSES.get(data.name, synthetic.CLASSES)
    if is_complete(entry := cache_entry(data)):
        return open_entry(entry).num_classes
    raise UserError(
        f"the number of classes of {data.path} is known once it is decoded: distvgg doctor with the"
        " same options and --prepare does so"
    )


def _class_names(data: DataConfig) -> list[str]:
    """Returns the names of the classes where the data is decoded, which no network is asked for."""
    entry = cache_entry(data)
    return open_entry(entry).class_names if is_complete(entry) else []


def _start(layer: Layer, vgg: VGG, initial: InitialWeights | None) -> str:
    """Returns how a layer with parameters starts: loaded or new, and whether it is trained."""
    learned = [p.requires_grad for p in vgg.get_submodule(layer.name).parameters()]
    if not learned:
        return ""
    known = initial.loaded if initial else []
    text = "loaded" if {layer.name, layer.name.partition(".")[0]} & set(known) else "new"
    return text if all(learned) else f"{text}, {'partly ' if any(learned) else ''}frozen"


def _mega(flops: int) -> str:
    return f"{flops / 1e6:,.2f}" if flops else ""

"""`distvgg summary`: the layers of a recipe's network, without data and without training."""

from distvgg.commands.text_tables import plain_table
from distvgg.config import Config
from distvgg.data import synthetic
from distvgg.data.cache import cache_entry, is_complete, open_entry
from distvgg.data.cifar import CLASSES
from distvgg.errors import UserError
from distvgg.models.flops import training_flops
from distvgg.models.summary import layers_of, network_name


def summary(config: Config) -> str:
    """Returns a table of layers, output shapes, parameters and operations, with totals.

    Raises:
        UserError: the number of classes is not known yet.
    """
    classes, side = count_classes(config), config.model.image_size
    layers = layers_of(config.model, classes)
    rows = [["layer", "kind", "output", "parameters", "forward MFLOP"]]
    for layer in layers:
        shape = " x ".join(map(str, layer.shape))
        cells = [f"{layer.parameters:,}" if layer.parameters else "", _mega(layer.flops)]
        rows.append([layer.name, layer.kind, shape, *cells])
    parameters = sum(layer.parameters for layer in layers)
    forward = sum(layer.flops for layer in layers)
    training = training_flops(config.model, classes)
    name = network_name(config.model)
    return "\n".join(
        [
            plain_table(rows, ("left", "left", "right", "right", "right")),
            "",
            f"{name} for images of {side}x{side} pixels and {classes} classes",
            f"parameters  {parameters:,}, {4 * parameters / 2**20:,.1f} MiB in float32",
            f"forward     {forward:,} FLOP an image",
            f"training    {training:,} FLOP an image, forward and backward",
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


def _mega(flops: int) -> str:
    return f"{flops / 1e6:,.2f}" if flops else ""

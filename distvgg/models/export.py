"""A trained network in forms that other programs load: ONNX, and the code of plain torchvision.

Owns what is portable of the preprocessing: cast, normalisation, and the resize to `image_size`.
Invariant: an ONNX model leaves this module checked, with the logits of PyTorch up to `TOLERANCE`.

ONNX is written by the exporter of `torch.export` (`dynamo=True`). torch has it at every version
that distvgg admits. The exporter by TorchScript, which torch deprecates, refuses two layers of
networks here: the antialiased resize, and the average pooling of small grids.
"""

import json
import warnings
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from io import StringIO
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from distvgg.data.transforms import normalise, resize
from distvgg.errors import RunError, UserError
from distvgg.models.classifier import Classifier
from distvgg.models.vgg import VGG
from distvgg.runs.preprocessing import Preprocessing
from distvgg.runs.provenance import versions

if TYPE_CHECKING:
    from onnx import ModelProto

OPSET = 18  # the first with an antialiased resize, and the one that torch 2.8 writes
INPUT, OUTPUT = "images", "logits"
TOLERANCE = 1e-4
"""Largest difference between ONNX and PyTorch, as a share of the largest logit or of 1."""
_MAX_BYTES = 2**31 - 2**20  # protobuf's limit of a file, less what is no weight
_BATCHES = 1, 5


class FromPixels(nn.Module):
    """A classifier on pixels: [n, 3, *stored_size] uint8 -> logits [n, classes] float32."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        mean, std = (
            torch.tensor(x, dtype=torch.float32).view(3, 1, 1)
            for x in (model.preprocessing.mean, model.preprocessing.std)
        )
        self.model, self.image_size = model, model.preprocessing.image_size
        self.scale = nn.Buffer(1 / (255 * std))
        self.shift = nn.Buffer(-mean / std)

    def forward(self, images: Tensor) -> Tensor:
        normalised = images.float() * self.scale + self.shift
        logits: Tensor = self.model(resize(normalised, self.image_size))
        return logits


def described(model: Classifier) -> Preprocessing:
    """Returns the preprocessing of a classifier, with its network and its class names."""
    network = model.preprocessing.model or model.config.model_dump(mode="json", exclude={"weights"})
    return replace(model.preprocessing, model=network, class_names=model.class_names)


def to_onnx(model: Classifier) -> tuple["ModelProto", float]:
    """Converts a classifier to an ONNX model that takes pixels.

    The input `images` is [n, 3, *stored_size] uint8, the output `logits` [n, classes] float32, and
    n is any number. The metadata has `preprocessing` and `class_names` as JSON.

    Args:
        model: a classifier on the CPU, in evaluation mode.

    Returns:
        The model, and the largest absolute difference of its logits from PyTorch's.

    Raises:
        UserError: the weights exceed the size of an ONNX file, or torch needs another onnxscript.
        RunError: onnxruntime's logits are not those of PyTorch.
    """
    import onnx

    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if size > _MAX_BYTES:
        raise UserError(
            f"the weights have {size:,} bytes (expected at most {_MAX_BYTES:,} in one ONNX file):"
            " use --to safetensors"
        )
    example = torch.zeros(2, 3, *model.preprocessing.stored_size, dtype=torch.uint8)
    try:
        program = _program(FromPixels(model).eval(), example)
    except ImportError as error:  # of a part of onnxscript that torch expects
        raise UserError(
            f"torch {torch.__version__} needs another version of onnxscript ({error}):"
            " pip install --upgrade onnxscript"
        ) from error
    assert program is not None
    proto: ModelProto = program.model_proto
    _describe(proto, model)
    onnx.checker.check_model(proto, full_check=True)
    return proto, difference(proto, model)


def _program(network: FromPixels, example: Tensor) -> torch.onnx.ONNXProgram | None:
    """Runs torch's exporter, without its warnings about itself and what onnxscript 0.6 prints."""
    with torch.no_grad(), warnings.catch_warnings(action="ignore"), redirect_stdout(StringIO()):
        return torch.onnx.export(
            network,
            (example,),
            input_names=[INPUT],
            output_names=[OUTPUT],
            opset_version=OPSET,
            dynamic_shapes=({0: torch.export.Dim("n")},),
            dynamo=True,
            verbose=False,
        )


def difference(proto: "ModelProto", model: Classifier) -> float:
    """Returns the largest absolute difference between the logits of onnxruntime and of PyTorch.

    Batches of one and of five images of noise are compared.

    Raises:
        RunError: the difference is beyond the tolerance.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    preprocessing = model.preprocessing
    mean, std = (
        torch.tensor(x, dtype=torch.float32) for x in (preprocessing.mean, preprocessing.std)
    )
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for n in _BATCHES:
        pixels = torch.randint(
            256, (n, *preprocessing.stored_size, 3), dtype=torch.uint8, generator=generator
        )
        with torch.no_grad():
            expected = model(resize(normalise(pixels, mean, std), preprocessing.image_size))
        (found,) = session.run([OUTPUT], {INPUT: pixels.permute(0, 3, 1, 2).contiguous().numpy()})
        apart = (torch.from_numpy(found) - expected).abs().max().item()
        if not apart <= TOLERANCE * max(1.0, expected.abs().max().item()):
            raise RunError(
                f"the ONNX model's logits differ from PyTorch's by up to {apart:.1e} (expected at"
                f" most {TOLERANCE:.0e} of the largest): nothing was written; try other versions of"
                " onnx, onnxscript and onnxruntime"
            )
        worst = max(worst, apart)
    return worst


def _describe(proto: "ModelProto", model: Classifier) -> None:
    """Adds metadata, and removes the exporter's notes, which have paths of this machine."""
    for node in proto.graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    for field in ("value_info", "input", "output", "initializer"):
        for value in getattr(proto.graph, field):
            value.ClearField("metadata_props")
    proto.graph.ClearField("metadata_props")
    proto.ClearField("metadata_props")
    proto.producer_name, proto.producer_version = "distvgg", versions()["distvgg"]
    height, width = model.preprocessing.stored_size
    entries = {
        "preprocessing": json.dumps(asdict(described(model))),
        "class_names": json.dumps(model.class_names),
        "input": f"{INPUT}: RGB pixels [n, 3, {height}, {width}] uint8; normalised in the model",
        "output": f"{OUTPUT}: [n, {len(model.class_names)}] float32, before softmax",
    }
    for key, value in entries.items():
        proto.metadata_props.add(key=key, value=value)


def torchvision_code(model: VGG, image_size: int) -> str | None:
    """Returns the shortest code of plain torchvision that builds a network, without its weights.

    The code assigns `model`. None: torchvision's VGG does not have these layers, whatever is
    replaced.

    Args:
        model: the network.
        image_size: side of its input, in pixels. The last max-pool leaves a single pixel as it is.
    """
    table = _table(model.features, image_size)
    if table is None:
        return None
    entries, batch_norm, replaced = table
    classes = _linear(model, 6).out_features
    name = _NAMES.get(tuple(entries))
    if name:
        suffix = "_bn" if batch_norm else ""
        imports = [f"from torchvision.models import {name}{suffix}"]
        lines = [f"model = {name}{suffix}(num_classes={classes})"]
    else:
        imports = ["from torchvision.models.vgg import VGG, make_layers"]
        lines = [
            f"layers = {json.dumps(entries)}",
            f"model = VGG(make_layers(layers, batch_norm={batch_norm}), num_classes={classes})",
        ]
    lines += [f"model.features[{at}] = {layer}" for at, layer in replaced.items()]
    side = model.avgpool.output_size
    if side not in (7, (7, 7)):
        lines.append(f"model.avgpool = nn.AdaptiveAvgPool2d({side})")
    theirs = {0: (512 * 7 * 7, 4096), 3: (4096, 4096), 6: (4096, classes)}
    for at, shape in theirs.items():
        linear = _linear(model, at)
        ours = linear.in_features, linear.out_features
        if ours != shape:
            lines.append(f"model.classifier[{at}] = nn.Linear({ours[0]}, {ours[1]})")
    if any("nn." in line for line in lines):
        imports.insert(0, "from torch import nn")
    return "\n".join([*imports, "", *lines])


# Networks that torchvision has under a name, as its `make_layers` takes them.
_NAMES = {
    (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"): "vgg11",
    (64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"): "vgg13",
    (64, 64, "M", 128, 128, "M", *[256] * 3, "M", *[512] * 3, "M", *[512] * 3, "M"): "vgg16",
    (64, 64, "M", 128, 128, "M", *[256] * 4, "M", *[512] * 4, "M", *[512] * 4, "M"): "vgg19",
}


def _table(
    features: nn.Sequential, side: int
) -> tuple[list[int | str], bool, dict[int, str]] | None:
    """Reads the argument of torchvision's `make_layers` off a network.

    Args:
        features: the layers before the pooling.
        side: of the input, in pixels.

    Returns:
        The table, whether BatchNorm follows each convolution, and the code of layers that
        `make_layers` does not make, by index. None: the layers do not follow its pattern.
    """
    entries: list[int | str] = []
    replaced: dict[int, str] = {}
    batch_norm = any(isinstance(layer, nn.BatchNorm2d) for layer in features)
    after_conv: list[type[nn.Module]] = [nn.BatchNorm2d, nn.ReLU] if batch_norm else [nn.ReLU]
    layers = list(features)
    at = 0
    while at < len(layers):
        layer = layers[at]
        if isinstance(layer, nn.Conv2d):
            following = layers[at + 1 : at + 1 + len(after_conv)]
            if not _are(following, after_conv):
                return None
            if (layer.kernel_size, layer.padding, layer.stride) != ((3, 3), (1, 1), (1, 1)):
                replaced[at] = (
                    f"nn.Conv2d({layer.in_channels}, {layer.out_channels}, {layer.kernel_size},"
                    f" stride={layer.stride}, padding={layer.padding})"
                )
            entries.append(layer.out_channels)
            at += len(after_conv)
        elif isinstance(layer, nn.Identity):
            entries.append("M")
            replaced[at] = "nn.Identity()"
        elif isinstance(layer, nn.MaxPool2d):
            if layer.kernel_size != 2:
                return None
            entries.append("M")
            if side < 2:
                replaced[at] = "nn.Identity()"
            side //= 2
        else:
            return None
        at += 1
    return entries, batch_norm, replaced


def _are(layers: list[nn.Module], kinds: list[type[nn.Module]]) -> bool:
    return len(layers) == len(kinds) and all(map(isinstance, layers, kinds))


def _linear(model: VGG, at: int) -> nn.Linear:
    layer = model.classifier[at]
    assert isinstance(layer, nn.Linear)
    return layer

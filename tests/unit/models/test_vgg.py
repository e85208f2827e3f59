"""VGG against torchvision's: the same keys, shapes, weights both ways, and outputs."""

from typing import Any

import pytest
import torch
import torchvision

from distvgg.config import ModelConfig
from distvgg.models.flops import training_flops
from distvgg.models.summary import layers_of, network_name
from distvgg.models.vgg import VGG, build_vgg, layers_of_table

PAPER = {"head_width": 4096, "pool_size": 7, "image_size": 64}


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("depth", [11, 13, 16, 19])
def test_keys_and_shapes_are_torchvisions(depth: int, batch_norm: bool) -> None:
    with torch.device("meta"):
        ours = VGG(ModelConfig(depth=depth, batch_norm=batch_norm, **PAPER), 1000)
        theirs = getattr(torchvision.models, f"vgg{depth}{'_bn' if batch_norm else ''}")()

    def shapes(model: torch.nn.Module) -> list[tuple[str, torch.Size]]:
        return [(k, v.shape) for k, v in model.state_dict().items()]

    assert shapes(ours) == shapes(theirs)


@pytest.mark.parametrize("batch_norm", [True, False])
def test_outputs_equal_torchvisions_with_its_weights(batch_norm: bool) -> None:
    """75 pixels: the pools meet odd sides."""
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, "vgg11_bn" if batch_norm else "vgg11")(num_classes=10)
    ours = VGG(ModelConfig(depth=11, batch_norm=batch_norm, **PAPER), 10)
    ours.load_state_dict(theirs.state_dict())
    for size in (32, 64, 75):
        images = torch.randn(2, 3, size, size)
        with torch.inference_mode():
            torch.testing.assert_close(ours.eval()(images), theirs.eval()(images))
    theirs.load_state_dict(ours.state_dict())


def test_a_dropped_pool_leaves_the_other_layers_and_their_keys_alone() -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.vgg16_bn(num_classes=10)
    ours = VGG(ModelConfig(max_pools=(1, 2, 3, 5), **PAPER), 10).eval()
    ours.load_state_dict(theirs.state_dict())
    pools = [m for m in theirs.features if isinstance(m, torch.nn.MaxPool2d)]
    pools[3].kernel_size = pools[3].stride = 1
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert ours.features(images).shape == (2, 512, 2, 2)
        torch.testing.assert_close(ours(images), theirs.eval()(images))


# Table 1 of the paper, with millions of parameters by its table 2, and torchvision's exact numbers.
COLUMNS = {
    "A": ("64,M,128,M,256,256,M,512,512,M,512,512,M", 133, 132_863_336),
    "B": ("64,64,M,128,128,M,256,256,M,512,512,M,512,512,M", 133, 133_047_848),
    "C": (
        "64,64,M,128,128,M,256,256,1x1-256,M,512,512,1x1-512,M,512,512,1x1-512,M",
        134,
        138_357_544 - 8 * (256**2 + 2 * 512**2),  # D, with one tap in place of nine
    ),
    "D": ("64,64,M,128,128,M,256,256,256,M,512,512,512,M,512,512,512,M", 138, 138_357_544),
    "E": (
        "64,64,M,128,128,M,256,256,256,256,M,512,512,512,512,M,512,512,512,512,M",
        144,
        143_667_240,
    ),
}
SHORTHANDS = {11: "A", 13: "B", 16: "D", 19: "E"}


@pytest.mark.parametrize("column", COLUMNS)
def test_parameters_are_those_of_the_papers_table_2(column: str) -> None:
    layers, millions, exact = COLUMNS[column]
    config = ModelConfig(layers=layers, batch_norm=False, **PAPER | {"image_size": 224})
    found = sum(layer.parameters for layer in layers_of(config, 1000))
    assert found == exact
    assert round(found / 1e6) == millions
    named = {"A": "VGG-11", "B": "VGG-13", "C": "VGG-16", "D": "VGG-16", "E": "VGG-19"}
    assert network_name(config) == named[column]


@pytest.mark.parametrize(
    ("depth", "size"), [(11, 16), (11, 32), (11, 48), (13, 32), (16, 32), (19, 32)]
)
def test_a_table_gives_the_bits_of_its_shorthand(depth: int, size: int) -> None:
    """At 16 pixels the last max-pool is given one pixel; at 32 and 48, `Conv3x3` computes."""
    shape = {"width": 0.05, "image_size": size, "dropout": 0.0}
    short = build_vgg(ModelConfig(depth=depth, **shape), 10, seed=3)
    full = build_vgg(ModelConfig(layers=COLUMNS[SHORTHANDS[depth]][0], **shape), 10, seed=3)
    assert list(short.state_dict()) == list(full.state_dict())
    images = torch.randn(4, 3, size, size)
    losses = [model(images).square().sum() for model in (short, full)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    for one, other in zip(short.parameters(), full.parameters(), strict=True):
        assert one.detach().numpy().tobytes() == other.detach().numpy().tobytes()
        assert torch.equal(one.grad, other.grad)
    for one, other in zip(short.buffers(), full.buffers(), strict=True):
        assert torch.equal(one, other)


def test_a_table_without_a_max_pool_gives_the_bits_of_its_shorthand() -> None:
    """Its keys are consecutive, while the shorthand keeps those of torchvision."""
    dropped = ModelConfig(depth=11, max_pools=(2, 3, 4, 5), width=0.05, dropout=0)
    table = [entry for entry in layers_of_table(dropped) if entry is not None]
    given = ModelConfig(layers=table, width=0.05, dropout=0)
    short, full = (build_vgg(config, 10, seed=3) for config in (dropped, given))
    assert [len(m.features) for m in (short, full)] == [29, 28]
    images = torch.randn(4, 3, 32, 32)
    losses = [model(images).square().sum() for model in (short, full)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    for one, other in zip(short.parameters(), full.parameters(), strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one.grad, other.grad)


def test_a_table_in_torchvisions_notation_has_its_keys() -> None:
    cfg = torchvision.models.vgg.cfgs["B"]
    with torch.device("meta"):
        ours = VGG(ModelConfig(layers=cfg, **PAPER), 1000).state_dict()
        theirs = torchvision.models.vgg13_bn().state_dict()
    assert [(k, v.shape) for k, v in ours.items()] == [(k, v.shape) for k, v in theirs.items()]


def test_layers_of_1x1_mix_channels_and_keep_the_grid() -> None:
    config = ModelConfig(layers=(8, "M", "1x1-16", 4), init="dirac", batch_norm=False)
    model = build_vgg(config, 10, seed=0)
    layer = model.features[3]
    assert isinstance(layer, torch.nn.Conv2d)
    assert (layer.weight.shape, layer.padding) == ((16, 8, 1, 1), (0, 0))
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(layer(x)[:, :8], x)
    assert model.features(torch.zeros(2, 3, 32, 32)).shape == (2, 4, 16, 16)


def test_alexnet_is_torchvisions() -> None:
    config = ModelConfig(name="alexnet", **PAPER | {"pool_size": 6}, batch_norm=False)
    ours, theirs = VGG(config, 10).eval(), torchvision.models.alexnet(num_classes=10).eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images))
    assert sum(layer.parameters for layer in layers_of(config, 1000)) == 61_100_840


def test_lenet_5_has_the_shapes_of_its_paper() -> None:
    """Figure 2 of LeCun et al. (1998); parameters of C1, C5 and F6, with three input channels."""
    config = ModelConfig(name="lenet5", batch_norm=False)
    layers = {layer.name: layer for layer in layers_of(config, 10)}
    grids = [layers[f"features.{n}"].shape for n in (0, 2, 3, 5)]
    assert grids == [(6, 28, 28), (6, 14, 14), (16, 10, 10), (16, 5, 5)]
    weights = [layers[name].parameters for name in ("features.0", "classifier.0", "classifier.2")]
    assert weights == [156 + 300, 48_120, 10_164]
    model = build_vgg(config, 10, seed=0)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("size", [16, 17, 24, 31, 32, 48, 224])
def test_any_resolution_from_16_pixels_up(size: int) -> None:
    model = build_vgg(ModelConfig(depth=11, width=0.05, image_size=size), 10, seed=0).eval()
    with torch.inference_mode():
        logits = model(torch.randn(2, 3, size, size))
    assert logits.shape == (2, 10)
    assert torch.isfinite(logits).all()


def test_the_small_head_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        model = VGG(ModelConfig(depth=16), 100)
    # 4,224 channels have a bias before BatchNorm, which is none here.
    assert sum(p.numel() for p in model.parameters()) == 15_299_748 - 4_224


@pytest.mark.parametrize(("width", "channels"), [(0.25, 16), (0.5, 32), (2, 128), (0.001, 1)])
def test_width_scales_convolutions_and_head(width: float, channels: int) -> None:
    with torch.device("meta"):
        model = VGG(ModelConfig(depth=11, width=width), 100)
    assert model.features[0].out_channels == channels
    assert model.classifier[0].out_features == max(1, round(512 * width))


@pytest.mark.parametrize("batch_norm", [True, False])
def test_the_signal_keeps_its_variance_through_19_layers(batch_norm: bool) -> None:
    config = ModelConfig(depth=19, batch_norm=batch_norm)
    model = build_vgg(config, 100, seed=0)
    with torch.inference_mode():
        features = model.features(torch.randn(16, 3, 32, 32))
    assert 0.05 < features.std() < 20


def test_dirac_starts_pass_channels_on() -> None:
    model = build_vgg(ModelConfig(depth=11, width=0.1, init="dirac"), 10, seed=0)
    he = build_vgg(ModelConfig(depth=11, width=0.1), 10, seed=0)
    for module, reference in zip(model.features, he.features, strict=True):
        if isinstance(module, torch.nn.Conv2d):
            x = torch.randn(2, module.in_channels, 5, 5)
            n = min(module.in_channels, module.out_channels)
            torch.testing.assert_close(module(x)[:, :n], x[:, :n])
            assert torch.equal(module.weight[n:], reference.weight[n:])
    wide = build_vgg(ModelConfig(depth=11, head_width=512, init="dirac"), 10, seed=0)
    assert torch.equal(wide.classifier[0].weight, torch.eye(512))
    assert torch.equal(wide.classifier[3].weight, torch.eye(512))


def test_initial_weights_are_a_function_of_the_seed_alone() -> None:
    config = ModelConfig(depth=11, width=0.1)
    before = torch.get_rng_state()
    first = build_vgg(config, 10, seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    again, other = build_vgg(config, 10, seed=1), build_vgg(config, 10, seed=2)
    for name, value in again.state_dict().items():
        assert torch.equal(value, first[name])
    assert not torch.equal(other.features[0].weight, first["features.0.weight"])


@pytest.mark.parametrize(("depth", "giga"), [(11, 7.609), (16, 15.47), (19, 19.632)])
def test_flops_are_three_forwards_less_the_gradient_of_the_images(depth: int, giga: float) -> None:
    """torchvision publishes the multiply-adds of its forwards (`weights.meta["_ops"]`)."""
    assert torchvision.models.get_model_weights(f"vgg{depth}").DEFAULT.meta["_ops"] == giga
    model = ModelConfig(depth=depth, **PAPER | {"image_size": 224})
    first = 64 * 3 * 3 * 3 * 224**2
    forward = (training_flops(model, 1000) / 2 + first) / 3
    assert forward == pytest.approx(1e9 * giga, rel=1e-4)


def test_flops_follow_the_pools() -> None:
    def flops(**config: Any) -> int:
        return training_flops(ModelConfig(**config), 100)

    assert flops(max_pools=()) > 8 * flops()
    assert flops(image_size=64) == pytest.approx(4 * flops(), rel=1e-2)

"""Weights of a file and of torchvision's cache, and what is said where there are none."""

from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor

from distvgg.config import ModelConfig
from distvgg.errors import UserError
from distvgg.models.transfer import choose
from distvgg.models.vgg import build_vgg
from distvgg.models.weight_sources import is_cached, read_source
from distvgg.recipe import load

TINY = ModelConfig(depth=11, width=0.05)


def state(config: ModelConfig = TINY, classes: int = 10, seed: int = 0) -> dict[str, Tensor]:
    return build_vgg(config, classes, seed).state_dict()


def test_files_that_are_no_weights_are_one_line_each(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "model.pth")
    (tmp_path / "broken.safetensors").write_bytes(b"not this")
    for name, said in (
        (tmp_path / "nowhere", "does not exist: give the folder of a finished run"),
        (tmp_path / "model.pth", "is no safetensors file: .*save_file"),
        (tmp_path / "broken.safetensors", "cannot be loaded"),
        (tmp_path, "has no model.safetensors"),
        ("vgg16_bn", "did you mean torchvision:vgg16_bn?"),
        ("torchvision:vgg12", "no VGG weights 'vgg12', did you mean torchvision:vgg1"),
        ("torchvision:resnet18", "no VGG weights 'resnet18'.*vgg11_bn"),
        ("VGG16_BN_Weights.IMAGENET1K_V9", "did you mean .*VGG16_BN_Weights.IMAGENET1K_V1"),
    ):
        with pytest.raises(UserError, match=said.replace("?", r"\?")) as error:
            read_source(str(name))
        assert "\n" not in str(error.value)


def random(like: Tensor, *, real: bool) -> Tensor:
    """Random values, or one for all, of which a file has just the one: the head has 0.5 GB."""
    if not like.is_floating_point():
        return torch.zeros_like(like, device="cpu")
    return torch.rand(like.shape) if real else torch.zeros(1).expand(like.shape)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torch's cache in a folder of its own, and no way to the network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def test_torchvisions_weights_are_read_from_its_cache(hub: Path) -> None:
    with torch.device("meta"):
        model = torchvision.models.vgg11_bn()
    theirs = {k: random(v, real=k.startswith("features")) for k, v in model.state_dict().items()}
    torch.save(theirs, hub / "vgg11_bn-6002323d.pth")
    config = load("fast", {"model.depth": "11"}).model
    network = state(config, 100)
    for name in (
        "torchvision:vgg11_bn",
        "VGG11_BN_Weights.IMAGENET1K_V1",
        "torchvision:VGG11_BN_Weights.DEFAULT",
    ):
        assert is_cached(name)
        source = read_source(name)
        assert source.model == {
            "name": "vgg",
            "depth": 11,
            "batch_norm": True,
            "width": 1.0,
        }
        assert source.moments == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        record, tensors = choose(source, network, config, [])
        assert record.loaded == ["features"]
        assert record.new == {
            "classifier.0": "[4096, 25088] there, [512, 512] here",
            "classifier.3": "[4096, 4096] there, [512, 512] here",
            "classifier.6": "[1000, 4096] there, [100, 512] here",
        }
        assert len(tensors) == 8 * 6  # weight and bias of both layers, and two statistics
        assert all(torch.equal(t, theirs[k]) for k, t in tensors.items())
    with pytest.raises(UserError, match=r"set --model.depth 11, or"):
        choose(read_source("torchvision:vgg11_bn"), state(TINY), ModelConfig(), [])
    alexnet = ModelConfig(name="alexnet", image_size=64)
    with pytest.raises(UserError, match=r"set --model.name vgg --model.depth 11"):
        choose(read_source("torchvision:vgg11_bn"), state(alexnet), alexnet, [])


def test_a_damaged_cache_is_one_line_that_names_the_file(hub: Path) -> None:
    (hub / "vgg13-19584684.pth").write_bytes(b"<html>not found</html>")
    with pytest.raises(UserError, match=r"cannot be read \(.*delete .*vgg13-19584684\.pth"):
        read_source("torchvision:vgg13")


def test_offline_and_not_cached_is_one_line(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_cached("torchvision:vgg16_bn")
    monkeypatch.setattr("socket.getaddrinfo", _no_network)
    with pytest.raises(UserError) as error:
        read_source("torchvision:vgg16_bn")
    assert f"put https://download.pytorch.org/models/vgg16_bn-6c64b313.pth into {hub}" in str(
        error.value
    )
    assert "\n" not in str(error.value)


def _no_network(*_: object, **__: object) -> None:
    raise OSError("Temporary failure in name resolution")


def test_a_file_of_its_own_needs_no_metadata(tmp_path: Path) -> None:
    save_file(state(seed=1), tmp_path / "weights.safetensors")
    source = read_source(str(tmp_path / "weights.safetensors"))
    assert source.moments is None
    assert not source.class_names
    assert choose(source, state(), TINY, [])[0].loaded[-1] == "classifier.6"

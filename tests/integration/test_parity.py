"""distvgg beside torch and torchvision alone: the same network, and the same training.

All in float64, where two orders of the same sums differ by about 1e-16 an addition: what is left
between two programs is then a difference in what they compute. In float32 the rounding carries some
activations across ReLU's kink, and gradients of single weights part in the first digits.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision import transforms
from torchvision.models.vgg import cfgs, make_layers

from distvgg.config import Config, ModelConfig
from distvgg.data.cache import load_dataset
from distvgg.data.dataset import Dataset, train_val_indices
from distvgg.data.plan import epoch_permutation
from distvgg.models.vgg import VGG, build_vgg
from distvgg.recipe import load
from distvgg.rng import derive_seed
from processes import FLOAT64, rows, run

COLUMNS = {16: "D", 19: "E"}  # of the paper's table 1, by which torchvision names them
PAPER = {"head_width": 4096, "pool_size": 7}
CLASSES = 10
# Ten steps leave 4e-15 in the loss and 3e-14 in the weights. Nesterov's momentum, or no decay of
# biases, shows at 1e-2 by then.
TOLERANCE = 1e-12


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def torchvisions(config: ModelConfig, num_classes: int) -> nn.Module:
    """torchvision's VGG with its layers as wide as the config has them, and no values yet."""

    def scaled(channels: int) -> int:
        return max(1, round(channels * config.width))

    layers = [v if isinstance(v, str) else scaled(v) for v in cfgs[COLUMNS[config.depth]]]
    inputs, hidden = scaled(512) * config.pool_size**2, scaled(config.head_width)
    with torch.device("meta"):
        vgg = torchvision.models.VGG(make_layers(layers, config.batch_norm), init_weights=False)
        vgg.avgpool = nn.AdaptiveAvgPool2d(config.pool_size)
        for at, shape in ((0, (inputs, hidden)), (3, (hidden, hidden)), (6, (hidden, num_classes))):
            vgg.classifier[at] = nn.Linear(*shape)
    for layer in vgg.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = config.dropout
    return vgg.to_empty(device="cpu")


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({"depth": 16, "batch_norm": True, **PAPER}, marks=pytest.mark.variant),
        pytest.param({"depth": 19, "batch_norm": False, **PAPER}, marks=pytest.mark.variant),
        {"depth": 16, "batch_norm": True, "width": 0.1},
        {"depth": 19, "batch_norm": False, "width": 0.1},
        {"depth": 16, "batch_norm": True, "width": 0.05, **PAPER, "image_size": 227},
    ],
    ids=["vgg16_bn", "vgg19", "vgg16_bn small", "vgg19 small", "vgg16_bn 227"],
)
def test_outputs_and_gradients_equal_torchvisions(shape: dict[str, int]) -> None:
    config = ModelConfig(dropout=0, **shape)
    torch.manual_seed(0)
    theirs = torchvisions(config, CLASSES)
    for layer in theirs.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            layer.reset_parameters()
        if isinstance(layer, nn.Conv2d):  # whose own start leaves nothing after 19 layers
            nn.init.kaiming_normal_(layer.weight)
    with torch.device("meta"):
        ours = VGG(config, CLASSES)
    ours.to_empty(device="cpu").load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, config.image_size, config.image_size)
    labels = torch.tensor([3, 7])
    for model in (ours, theirs):
        nn.functional.cross_entropy(model.train()(images), labels).backward()
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    found = {name: p.grad for name, p in ours.named_parameters()}
    # Ours has no biases before BatchNorm, whose gradients cancel.
    cancelled = {name: torch.zeros_like(g) for name, g in expected.items() if name not in found}
    assert all(name.startswith("features.") and name.endswith(".bias") for name in cancelled)
    assert len(cancelled) == (13 if config.batch_norm else 0)
    assert_near(found | cancelled, expected)
    with torch.inference_mode():  # with the BatchNorm statistics of the forward above
        logits = [{"logits": model.eval()(images)} for model in (ours, theirs)]
    assert_near(*logits)


def assert_near(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """To the tolerance of the largest number: one that sums cancel to, such as the gradient of a
    bias before BatchNorm, has no digits of its own. Integers, which count batches, exactly."""
    assert ours.keys() == theirs.keys()
    counters = {name: value for name, value in theirs.items() if not value.is_floating_point()}
    assert all(torch.equal(ours[name], value) for name, value in counters.items())
    floats = {name: value for name, value in theirs.items() if name not in counters}
    largest = max(float(value.abs().max()) for value in floats.values())
    assert largest > 1e-3
    for name, value in floats.items():
        # A single pass: torch.testing makes several copies of a gigabyte.
        error = float(torch.dist(ours[name], value, p=torch.inf))
        assert error <= TOLERANCE * largest, name


@pytest.mark.parametrize("dropout", [pytest.param(0, marks=pytest.mark.variant), 0.5])
def test_the_tutorials_recipe_is_a_plain_torch_loop_step_by_step(
    tmp_path: Path, dropout: float
) -> None:
    folder = tmp_path / "run"
    words = ("train", "tutorial", "--run-dir", str(folder), "--train.epochs", "1")
    smaller = {
        **{"data.name": "synthetic", "data.train_size": 160, "data.val_size": 103},
        **{"model.width": 0.05, "model.image_size": 64, "model.dropout": dropout},
        **{"track.every_steps": 1, "track.wandb": False, "eval.test": False},
    }
    options = [word for k, v in smaller.items() for word in (f"--{k}", str(v).lower())]
    done = run([*words, *options], program=FLOAT64)
    assert done.returncode == 0, done.stderr

    config = load("tutorial", smaller)
    dataset = load_dataset(config.data)
    vgg = torchvisions(config.model, dataset.num_classes)
    start = build_vgg(config.model, dataset.num_classes, derive_seed(config.seed, "weights"))
    vgg.load_state_dict(start.state_dict())
    expected = plain_epoch(vgg, dataset, config)
    ours = [row["train/loss"] for row in rows(folder) if "train/loss" in row]
    assert len(ours) == 10
    assert ours == pytest.approx(expected, rel=TOLERANCE)
    # The steps do something: what the tolerance is compared with.
    assert max(expected) - min(expected) > 1e-3
    weights = load_file(folder / "model.safetensors")
    assert_near(weights, vgg.state_dict())
    before = start.state_dict()
    assert not any(torch.equal(weights[k], v) for k, v in before.items() if k.endswith("weight"))


def plain_epoch(vgg: nn.Module, dataset: Dataset, config: Config) -> list[float]:
    """The loss of each step of an epoch, by a loop as tutorials have it. Of distvgg are only the
    order of the samples and the seed of each step's dropout."""
    prepare = transforms.Compose(
        [
            transforms.ToTensor(),
            transforms.Resize((config.model.image_size,) * 2),
            transforms.Normalize(dataset.mean, dataset.std),
        ]
    )
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(vgg.parameters(), lr=0.005, momentum=0.9, weight_decay=0.005)
    train, _ = train_val_indices(dataset.train.labels, config.data)
    order = epoch_permutation(config.seed, 0, len(train)).tolist()
    losses = []
    vgg.train()
    for step in range(len(order) // 16):
        chosen = train[order[step * 16 : (step + 1) * 16]]
        images = torch.stack([prepare(dataset.train.images[i]) for i in chosen])
        labels = torch.from_numpy(dataset.train.labels[chosen])
        torch.manual_seed(derive_seed(config.seed, "dropout", step, 0))
        loss = criterion(vgg(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses

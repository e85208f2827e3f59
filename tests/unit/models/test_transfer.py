"""What a network takes from other weights, and what it refuses."""

import pytest
import torch
from torch import Tensor

from distvgg.config import ModelConfig
from distvgg.errors import UserError
from distvgg.models.transfer import choose
from distvgg.models.vgg import build_vgg
from distvgg.models.weight_sources import Source
from distvgg.runs.initial_weights import InitialWeights

TINY = ModelConfig(depth=11, width=0.05)


def state(config: ModelConfig = TINY, classes: int = 10, seed: int = 0) -> dict[str, Tensor]:
    return build_vgg(config, classes, seed).state_dict()


def chosen(
    there: dict[str, Tensor], classes: int = 10, names: list[str] | None = None, **known: object
) -> tuple[InitialWeights, dict[str, Tensor]]:
    source = Source("there", there, known.pop("model", {}), **known)
    return choose(source, state(classes=classes), TINY, names or [])


def test_all_is_taken_where_all_fits() -> None:
    there = state(seed=1)
    record, tensors = chosen(there)
    assert record.loaded == ["features", "classifier.0", "classifier.3", "classifier.6"]
    assert not record.new
    assert not record.unused
    assert tensors.keys() == {k for k in there if not k.endswith("num_batches_tracked")}
    assert all(torch.equal(tensors[k], there[k]) for k in tensors)


def test_the_last_layer_is_new_where_the_classes_differ() -> None:
    record, tensors = chosen(state(classes=7, seed=1))
    assert record.new == {"classifier.6": "7 outputs there, 10 here"}
    assert not any(name.startswith("classifier.6") for name in tensors)
    # As many classes, but others.
    names = [str(i) for i in range(10)]
    record, _ = chosen(state(seed=1), names=names, class_names=names[::-1])
    assert record.new == {"classifier.6": "other classes there"}
    record, _ = chosen(state(seed=1), names=names, class_names=names)
    assert not record.new


def test_linear_layers_are_taken_where_their_shape_fits() -> None:
    there = state(seed=1)
    there["classifier.0.weight"] = torch.ones(3, 9)
    there["classifier.9.weight"] = torch.ones(2, 2)
    record, tensors = chosen(there)
    assert record.loaded == ["features", "classifier.3", "classifier.6"]
    assert record.new == {"classifier.0": "[3, 9] there, [26, 26] here"}
    assert not any(name.startswith("classifier.0") for name in tensors)
    assert record.unused == ["classifier.9"]
    said = "features, classifier.3, classifier.6 from there; new: classifier.0 ([3, 9] there, "
    assert record.text().startswith(said)
    assert record.text().endswith("; not used: classifier.9")


def test_the_hash_is_of_what_was_taken() -> None:
    first, _ = chosen(state(seed=1))
    assert chosen(state(seed=1) | {"classifier.9.weight": torch.ones(1)})[0].sha256 == first.sha256
    assert chosen(state(seed=2))[0].sha256 != first.sha256
    half = {k: v.half() for k, v in state(seed=1).items()}
    record, tensors = chosen(half)
    assert record.sha256 != first.sha256
    assert {t.dtype for t in tensors.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("model", "advice"),
    [
        (ModelConfig(depth=13, width=0.05), "set --model.depth 13, or"),
        (ModelConfig(depth=11, width=0.1), "set --model.width 0.1, or"),
        (ModelConfig(depth=11, width=0.05, batch_norm=False), "set --model.batch_norm false, or"),
    ],
)
def test_a_trunk_that_does_not_fit_is_refused_with_keys_and_options(
    model: ModelConfig, advice: str
) -> None:
    with pytest.raises(UserError) as error:
        chosen(state(model), model=model.model_dump() | {"dropout": 0.1})
    assert advice in str(error.value)
    assert "features." in str(error.value)
    assert "more): " in str(error.value)
    assert "\n" not in str(error.value)


def test_other_tensors_are_refused() -> None:
    with pytest.raises(UserError, match=r"has no layer features\.\*, so that it is no VGG"):
        chosen({"layer1.0.conv1.weight": torch.ones(1)})
    with pytest.raises(UserError, match=r"features\.0\.bias: not finite in float32 there"):
        chosen(state() | {"features.0.bias": torch.full((3,), torch.nan)})
    with pytest.raises(UserError, match=r"features\.0\.bias: int8 there"):
        chosen(state() | {"features.0.bias": torch.zeros(3, dtype=torch.int8)})
    with pytest.raises(UserError, match=r"features\.0\.bias: float8_e4m3fn there"):
        chosen(state() | {"features.0.bias": torch.zeros(3, dtype=torch.float8_e4m3fn)})
    with pytest.raises(UserError, match=r"features\.0\.bias: not finite in float32 there"):
        chosen(state() | {"features.0.bias": torch.full((3,), 1e300, dtype=torch.float64)})
    with pytest.raises(UserError, match=r"features\.1\.running_var: negative there"):
        chosen(state() | {"features.1.running_var": torch.full((3,), -1.0)})

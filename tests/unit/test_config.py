"""Recipes, overrides, run folders: round trips, and one line for each mistake."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from distvgg.config import Config
from distvgg.errors import UserError
from distvgg.recipe import load, recipe_names
from processes import ROOT


def message(recipe: str, **overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load(recipe, {k.replace("__", "."): v for k, v in overrides.items()})
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "none", "[ ]"])
def test_an_empty_list_may_be_written_in_any_way(text: str) -> None:
    assert load("fast", {"model.max_pools": text}).model.max_pools == ()


def test_overrides_win_over_the_recipe_and_text_becomes_typed() -> None:
    config = load(
        "quickstart",
        {
            "train.epochs": "0.5",
            "model.depth": "19",
            "model.max_pools": "5,1, 2,5",
            "model.batch_norm": "false",
            "optim.lr": "1e-3",
            "optim.clip_norm": "none",
            "train.precision": "no",
            "track.name": "2024",
        },
    )
    assert config.train.epochs == 0.5
    assert config.model.depth == 19
    assert config.model.max_pools == (1, 2, 5)
    assert config.model.batch_norm is False
    assert config.optim.lr == 0.001
    assert config.optim.clip_norm is None
    assert config.train.precision == "no"
    assert config.track.name == "2024"
    assert config.data.name == "synthetic"


def test_a_config_survives_its_own_yaml(tmp_path: Path) -> None:
    config = load(
        "quickstart",
        {"train.precision": "no", "data.train_size": "100", "model.max_pools": "[1, 3]"},
    )
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    assert load(str(path)) == config


@pytest.mark.parametrize(
    "given",
    [{"max_pools": ()}, {"max_pools": (1, 2, 5)}, {"layers": "64,M,1x1-8"}, {"layers": [64]}],
    ids=str,
)
def test_a_config_survives_its_own_flat_form(given: dict[str, Any]) -> None:
    """Which trackers get: plain values only."""
    config = load("quickstart", {f"model.{name}": value for name, value in given.items()})
    flat = config.flat()
    assert {type(v) for v in flat.values()} <= {int, float, str, bool, type(None)}
    assert load("quickstart", flat) == config


def test_a_table_of_layers_is_read_from_text_and_yaml(tmp_path: Path) -> None:
    table = (64, "M", 128, "1x1-256", "M")
    config = load("fast", {"model.layers": "64, M,128,1x1-256,M"})
    assert config.model.layers == table
    path = tmp_path / "config.yaml"
    path.write_text("model: {layers: [64, M, 128, 1x1-256, M]}")
    assert load(str(path)).model.layers == table
    path.write_text(config.to_yaml())
    assert load(str(path)) == config
    assert load(str(path), {"model.layers": "none"}).model.layers is None


def test_a_table_on_the_command_line_replaces_the_shorthands_of_the_recipe(tmp_path: Path) -> None:
    assert load("quickstart").model.depth == 11
    model = load("quickstart", {"model.layers": "64,M"}).model
    assert (model.depth, model.max_pools) == (16, (1, 2, 3, 4, 5))
    both = {"model.layers": "64,M", "model.depth": "11", "model.max_pools": "1,2"}
    with pytest.raises(UserError) as error:
        load("quickstart", both)
    assert str(error.value) == (
        "model.layers gives all layers, and model.depth is 11 and model.max_pools is 1,2: drop"
        " model.depth and model.max_pools, or set --model.layers none"
    )
    path = tmp_path / "mine.yaml"
    path.write_text("model: {layers: [64, M], depth: 13}")
    assert "drop model.depth, or" in message(str(path))
    assert "drop model.max_pools, or" in message(
        str(path), model__max_pools="1,2", model__depth="16"
    )


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (
            "64,m",
            "'m' (expected channels of a 3x3 convolution, 1x1-CHANNELS, or M for a max-pool);"
            " write M",
        ),
        ("64,maxpool", "write M"),
        ("conv1-256", "write 1x1-256"),
        ("256@1x1", "write 1x1-256"),
        ("conv3-64", "write 64"),
        ("64.0", "write 64"),
        ("-64", "write 64"),
        ("64,0", "drop it, or give at least one channel"),
        ("64,1x1-0", "drop it, or give at least one channel"),
        ("64,,M", "drop a comma"),
        ("64;M", "separate the entries by commas"),
        ("64 M", "separate the entries by commas"),
        ("1e2", "write one of these"),
        ("5x5-64", "write one of these"),
        ("64.5", "write one of these"),
        ("64,1x1-99999999999", "1x1-99999999999 (expected at most 16384 channels); give fewer"),
        ("64,true", "write one of these"),
        ("M,M", "no convolution (expected at least one); begin with its channels"),
        ("", "no convolution"),
        (
            "64,M,M,M,M,M,M",
            "6 max-pools at model.image_size 32 (expected at most 5); drop 1 M, or set"
            " --model.image_size 64",
        ),
    ],
)
def test_a_mistake_in_a_table_of_layers_is_named_with_the_remedy(
    layers: str, expected: str
) -> None:
    assert expected in message("debug", model__layers=layers)


def test_a_table_may_have_as_many_max_pools_as_halve_the_image() -> None:
    for size, most in ((16, 5), (32, 5), (63, 5), (64, 6), (1024, 10)):
        given = {"model.image_size": str(size)}
        assert load("debug", given | {"model.layers": "8" + ",M" * most})
        with pytest.raises(UserError, match=f"expected at most {most}"):
            load("debug", given | {"model.layers": "8" + ",M" * (most + 1)})
    assert "layers must be a valid tuple" in message("debug", model__layers=64)  # type: ignore[arg-type]


def test_options_that_a_network_lacks_are_refused_or_dropped_with_the_recipes(
    tmp_path: Path,
) -> None:
    model = load("fast", {"model.name": "lenet5"}).model
    assert (model.max_pools, model.dropout) == ((1, 2, 3, 4, 5), 0.5)
    assert message("debug", model__name="lenet5", model__dropout="0.1", model__layers="8,M") == (
        "model.name lenet5 has no such option: model.layers is 8,M and model.dropout is 0.1; drop"
        " model.layers and model.dropout, or set --model.name vgg"
    )
    path = tmp_path / "mine.yaml"
    path.write_text("model: {name: alexnet, depth: 11, image_size: 64}")
    assert "drop model.depth, or" in message(str(path))
    path.write_text("model: {name: alexnet, image_size: 64, dropout: 0.2, head_width: 64}")
    config = load(str(path))
    path.write_text(config.to_yaml())
    assert load(str(path)) == config


def test_alexnet_says_the_least_image_size() -> None:
    assert load("debug", {"model.name": "alexnet", "model.image_size": "63"})
    for size in ("32", "62"):
        given = {"model__name": "alexnet", "model__image_size": size}
        assert message("debug", **given) == (
            f"model.name alexnet: model.image_size {size} (expected at least 63, so that a pixel"
            " reaches its head); set --model.image_size 64"
        )


def test_a_network_without_a_table_is_described_as_before() -> None:
    """So that run folders keep their names."""
    for name in recipe_names():
        model = load(name).model.model_dump(exclude_defaults=True)
        assert not {"layers", "name"} & model.keys()


@pytest.mark.parametrize("name", recipe_names())
def test_packaged_recipes_load_and_say_what_to_expect(name: str) -> None:
    assert load(name)
    header = (ROOT / "distvgg" / "recipes" / f"{name}.yaml").read_text().split("\n\n")[0]
    assert header.startswith("#")
    assert f"train {name}" in header
    assert "minute" in header or "hour" in header


def test_what_was_added_to_the_config_means_what_was_done_before(tmp_path: Path) -> None:
    """A config.yaml of an earlier version is still the config of its run."""
    path = tmp_path / "config.yaml"
    path.write_text("eval: {every_epochs: 2, batch_size: 100}")
    config = load(str(path))
    assert (config.eval.tta, config.eval.test) == ("no", True)
    path.write_text("eval: {tta: no}")
    assert load(str(path)).eval.tta == "no"


def test_the_tutorials_recipe_is_the_tutorial() -> None:
    """Field by field, so that a new default of ours cannot creep in."""
    flat = load("tutorial").flat()
    expected = {
        **{"data.name": "cifar100", "data.val_size": 5000, "data.train_size": None},
        **{"data.resize": None, "model.depth": 16, "model.batch_norm": True, "model.width": 1},
        **{"model.head_width": 4096, "model.pool_size": 7, "model.dropout": 0.5},
        **{"model.image_size": 227, "train.epochs": 20, "train.global_batch_size": 16},
        **{"train.micro_batch_size": 16, "train.precision": "no", "train.label_smoothing": 0},
        **{"optim.name": "sgd", "optim.lr": 0.005, "optim.momentum": 0.9, "optim.nesterov": False},
        **{"optim.weight_decay": 0.005, "optim.decay_norm_and_bias": True},
        **{"optim.clip_norm": None, "optim.schedule": "constant", "optim.warmup_epochs": 0},
        **{"optim.ema_decay": 0, "model.init": "he"},
        **{"augment.crop_padding": 0, "augment.flip": "no", "augment.trivial": False},
        **{"augment.cutout": 0, "augment.mixup_alpha": 0, "augment.cutmix_alpha": 0},
        **{"eval.tta": "no"},
    }
    assert {name: flat[name] for name in expected} == expected


def test_vgg19_is_fast_with_another_depth() -> None:
    assert load("vgg19") == load("fast", {"model.depth": 19})


def test_an_unquoted_no_in_yaml_is_a_precision(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("train: {precision: no}")
    assert load(str(path)).train.precision == "no"


@pytest.mark.parametrize(
    ("written", "read"),
    [("true", "random"), ("false", "no"), ("no", "no"), ("alternating", "alternating")],
)
def test_a_flip_may_still_be_a_switch(tmp_path: Path, written: str, read: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"augment: {{flip: {written}}}")
    config = load(str(path))
    assert config.augment.flip == read
    assert load("fast", {"augment.flip": written}).augment.flip == read
    path.write_text(config.to_yaml())
    assert load(str(path)) == config


def test_mixing_a_single_image_is_refused() -> None:
    alone = {"train.micro_batch_size": "1", "model.batch_norm": "false"}
    with pytest.raises(UserError, match=r"mixup and cutmix need train\.micro_batch_size >= 2"):
        load("quickstart", alone | {"augment.mixup_alpha": "1"})


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Config().train.epochs = 3.0  # type: ignore[misc]


def test_unknown_keys_are_answered_with_the_nearest_name() -> None:
    assert "unknown key train.epoch, did you mean train.epochs?" in message(
        "fast", train__epoch="1"
    )
    assert "did you mean optim.lr or optim.muon_lr" in message("fast", train__lr="1")
    assert "did you mean train.global_batch_size?" in message("fast", data__global_batch_size="1")
    assert "did you mean model?" in message("fast", modle__depth="16")
    assert "the sections are seed, data, model" in message("fast", qqqq="1")


def test_values_out_of_range_are_named_with_the_range() -> None:
    assert "train.epochs must be greater than 0 (got '-1')" in message("fast", train__epochs="-1")
    assert "model.depth must be 11, 13, 16 or 19" in message("fast", model__depth="12")
    assert "model.max_pools.1 must be 1, 2, 3, 4 or 5" in message("fast", model__max_pools="1,6")
    assert "'auto', 'no', 'fp16' or 'bf16'" in message("fast", train__precision="fp8")
    assert "optim.lr must be a valid number" in message("fast", optim__lr="fast")
    assert "finite" in message("fast", optim__lr="nan")
    assert "model.dropout must be less than 1" in message("fast", model__dropout="1")
    assert "track.project must match pattern" in message("fast", track__project="team/project")
    assert "train must be a valid dictionary" in message("fast", train="5")


def test_batches_that_do_not_divide_name_what_would() -> None:
    text = message("fast", train__global_batch_size="250", train__micro_batch_size="64")
    assert "250 is not a multiple of train.micro_batch_size 64" in text
    assert "make it 192 or 256, or make the micro-batch 50" in text
    text = message("fast", train__global_batch_size="10", train__micro_batch_size="64")
    assert "make it 64, or make the micro-batch 10" in text


def test_batchnorm_over_a_single_image_is_refused() -> None:
    assert "needs train.micro_batch_size >= 2" in message("fast", train__micro_batch_size="1")
    assert load("quickstart", {"train.micro_batch_size": "1", "model.batch_norm": "false"})


def test_muon_without_batchnorm_is_refused() -> None:
    assert "use sgd or adamw" in message("fast", model__batch_norm="false")
    assert load("fast", {"model.batch_norm": "false", "optim.name": "sgd"})


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("train: [1, 2", "is not valid YAML"),
        ("- a\n- b", "must be a mapping"),
        ("train: {epochs: 1, epocs: 2}", "did you mean train.epochs?"),
        (b"\xff\xfe\x00", "is not valid YAML"),
        ("train: 3", "train must be"),
    ],
)
def test_broken_recipes_are_one_line(tmp_path: Path, content: str | bytes, reason: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert reason in message(str(path))
    assert reason in message(str(path), train__epochs="1")


def test_missing_recipes_name_those_there_are() -> None:
    assert "did you mean quickstart?" in message("quikstart")
    assert "cannot read recipe nowhere.yaml" in message("nowhere.yaml")


def test_a_file_in_the_working_directory_does_not_shadow_a_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("debug").write_text("seed: 7\n")
    assert load("debug").seed == 0
    assert load("./debug").seed == 7


@pytest.mark.parametrize(
    ("field", "off", "on"),
    [("gradient_compression", "no", "bf16"), ("start_size", "none", "16")],
)
def test_a_field_of_version_0_1_is_accepted_where_it_was_off(field: str, off: str, on: str) -> None:
    assert load("quickstart", {f"train.{field}": off}) == load("quickstart")
    with pytest.raises(UserError, match=rf"train\.{field} is gone: .*; drop it"):
        load("quickstart", {f"train.{field}": on})
    assert load("quickstart", {"train.full_size_at": "0.7"}) == load("quickstart")

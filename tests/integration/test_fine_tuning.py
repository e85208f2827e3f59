"""Runs that start from the weights of another run: what they take, what stays, what they say."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
from accelerate.state import AcceleratorState
from torch import Tensor

from configs import tiny
from distvgg.errors import UserError
from distvgg.recipe import load
from distvgg.runs.result import read_result
from distvgg.training import setup, trainer
from made_data import noise, write_folders
from processes import CPU, Started, assert_same_run, run

NAMES = ["ant", "bee", "cow", "doe", "elk"]
FROZEN = ("features.0", "features.1", "features.15", "features.16", "classifier.0")
# All that could move what is frozen: momenta of both kinds, decay, an average of the weights.
ARGS = ("--data.name", "custom", "--data.val_size", "30", "--data.train_size", "90")
ARGS += ("--optim.name", "muon", "--optim.ema_decay", "0.9", "--optim.weight_decay", "0.01")
ARGS += ("--optim.frozen", ",".join(FROZEN), "--optim.trunk_lr_ratio", "0.1")
ARGS += ("--train.epochs", "25", "--checkpoint.every_steps", "4", "--eval.every_epochs", "15")


@pytest.fixture(autouse=True)
def _no_accelerator_left_over() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module", autouse=True)
def _on_a_cpu() -> Iterator[None]:
    """As processes of their own are, so that runs are equal."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CPU.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with 100 classes, which has statistics of its own and a checkpoint."""
    folder = tmp_path_factory.mktemp("source") / "run"
    trainer.train(tiny(checkpoint__every_steps=5, optim__lr=0.01), folder)
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The option of a set with five classes."""
    folder = tmp_path_factory.mktemp("data")
    images = {"train": noise(120, seed=1), "test": noise(10, seed=2)}
    return "--data.path", write_folders(folder, NAMES, images)


def weights(folder: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def is_frozen(name: str) -> bool:
    return name.startswith(tuple(f"{layer}." for layer in FROZEN))


def test_frozen_layers_keep_their_bytes_on_any_number_of_processes_and_over_a_kill(
    source: Path, data: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(source, there := tmp_path / "there")
    args = (*ARGS, *data, "--model.weights", str(there))
    killed = Started(tmp_path / "killed", *args, processes=2)
    killed.until_step(9)
    killed.kill()
    config = load(str(tmp_path / "killed" / "config.yaml"))
    trainer.train(config, tmp_path / "whole")
    said = capsys.readouterr().out
    assert "new: classifier.6 (100 outputs there, 5 here); sha256 " in said
    assert "statistics of 2 BatchNorm layers" in said
    assert "(features: x 0.1)" in said
    there.rename(tmp_path / "away")  # a run with a checkpoint does not need them
    trainer.train(config, tmp_path / "killed")
    said = capsys.readouterr().out
    assert "resumed after step" in said
    assert "new: classifier.6 (100 outputs there, 5 here); sha256 " in said
    assert_same_run(tmp_path / "whole", tmp_path / "killed")

    before, after = weights(source), weights(tmp_path / "killed")
    for name, tensor in after.items():
        # Convolutions have no bias to train, but its key.
        without = name.endswith(".bias") and after[f"{name[:-5]}.weight"].ndim == 4
        if not name.endswith("num_batches_tracked") and not without:
            same = tensor.shape == before[name].shape and bool((tensor == before[name]).all())
            assert same == is_frozen(name), name

    result, whole = (read_result(tmp_path / name) for name in ("killed", "whole"))
    assert result is not None
    assert whole is not None
    assert result.initial_weights is not None
    assert result.initial_weights == whole.initial_weights
    assert result.initial_weights.source == str(there)
    assert result.initial_weights.loaded == ["features", "classifier.0", "classifier.3"]
    assert result.frozen == tuple(sorted(FROZEN))
    assert result.trunk_lr_ratio == 0.1
    (*_, newest) = sorted((tmp_path / "killed" / "checkpoints").iterdir())
    kept = safetensors.torch.load_file(newest / "state.safetensors")
    momenta = {n.partition(".")[2] for n in kept if n.startswith("momentum_buffer.")}
    assert momenta
    assert not any(map(is_frozen, momenta))


def test_all_sources_of_one_training_give_the_same_tensors(source: Path, tmp_path: Path) -> None:
    file = tmp_path / "copy.safetensors"
    shutil.copy(source / "model.safetensors", file)
    (*_, checkpoint) = sorted((source / "checkpoints").iterdir())
    hashes = set()
    for i, name in enumerate((source, file, checkpoint)):
        built = setup.build(tiny(model__weights=str(name)), tmp_path / str(i))
        assert built.initial_weights is not None
        assert not built.initial_weights.new
        hashes.add(built.initial_weights.sha256)
        there = weights(source)
        for key, value in built.vgg.state_dict().items():
            assert key.endswith("num_batches_tracked") or (value == there[key]).all()
        built.accelerator.end_training()
    assert len(hashes) == 1


def test_layers_that_start_anew_are_those_of_the_seed(source: Path, tmp_path: Path) -> None:
    changes = {"model__head_width": 100, "seed": 3, "optim__frozen": "features,classifier.0"}
    plain = setup.build(tiny(**changes), tmp_path / "plain").vgg.state_dict()
    loaded = setup.build(tiny(model__weights=str(source), **changes), tmp_path / "loaded")
    assert loaded.initial_weights is not None
    assert list(loaded.initial_weights.new) == ["classifier.0", "classifier.3", "classifier.6"]
    said = "optim.frozen: initial weights of the seed stay in classifier.0 (not in model.weights)"
    assert said in loaded.notes
    for key, value in loaded.vgg.state_dict().items():
        if key.startswith("classifier."):
            assert (value == plain[key]).all(), key


def test_other_weights_before_the_first_checkpoint_are_refused(
    source: Path, tmp_path: Path
) -> None:
    shutil.copy(source / "model.safetensors", file := tmp_path / "start.safetensors")
    config, folder = tiny(model__weights=str(file)), tmp_path / "run"
    for _ in range(2):  # killed before its first checkpoint, it starts again
        built = setup.build(config, folder)
        built.lock.release()
    changed = weights(source)
    changed["features.0.bias"][0] += 1
    safetensors.torch.save_file(changed, file)
    with pytest.raises(UserError, match=r"holds other weights than when run folder .* was made"):
        setup.build(config, folder)


def test_a_mistake_makes_no_run_folder(source: Path, tmp_path: Path) -> None:
    for changes, said in (
        ({"optim__frozen": "feature"}, "did you mean features?"),
        ({"model__weights": str(tmp_path / "none")}, "does not exist"),
        (
            {"model__weights": str(source), "model__width": 0.1},
            "set --model.width 0.05, or leave model.weights out",
        ),
    ):
        with pytest.raises(UserError, match=said.replace("?", r"\?")):
            setup.build(tiny(**changes), tmp_path / "run")
        assert not (tmp_path / "run").exists()


@pytest.mark.variant
def test_a_mistake_is_one_line_on_several_processes(source: Path, tmp_path: Path) -> None:
    words = ["train", "quickstart", "--run-dir", str(tmp_path / "run"), "--model.weights"]
    done = run([*words, str(source), "--track.wandb", "false"], processes=2)
    assert done.returncode != 0
    (error,) = [s for s in done.stderr.splitlines() if s.startswith("distvgg: error")]
    assert "set --model.width 0.05, or leave model.weights out" in error


def test_summary_and_doctor_say_what_is_taken_and_frozen(source: Path, tmp_path: Path) -> None:
    from distvgg.commands.doctor import initial_weights
    from distvgg.commands.summary import summary

    config = tiny(model__weights=str(source), optim__frozen="features.0", data__name="cifar10")
    lines = [" ".join(line.split()) for line in summary(config).splitlines()]
    assert "features.0 Conv2d 3 x 32 x 32 81 0.17 loaded, frozen" in lines
    assert "features.1 BatchNorm2d 3 x 32 x 32 6 loaded" in lines
    assert "classifier.6 Linear 10 270 0.00 new" in lines
    taken = f"features, classifier.0, classifier.3 from {source}; new: classifier.6 (100 outputs"
    assert f"weights {taken} there, 10 here)" in lines
    assert any(line.startswith("frozen features.0: 81 of ") for line in lines)
    verdict, text = initial_weights(config, tmp_path, tmp_path, prepare=False)
    assert verdict == "ok"
    assert "frozen: features.0: 81 of" in text
    (tmp_path / "checkpoints" / "step_00000001").mkdir(parents=True)
    config = config.replace(model__weights="gone")
    assert "not read again" in initial_weights(config, tmp_path, tmp_path, prepare=False)[1]


def test_a_replay_starts_from_the_same_weights(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from distvgg.commands.replay import replay

    config = tiny(model__weights=str(source), optim__frozen="features", train__epochs=0.3)
    trainer.train(config, tmp_path / "run")
    AcceleratorState._reset_state(reset_partial_state=True)
    said = replay(tmp_path / "run", 2, 1, tmp_path / "out", pause=False)
    assert "equal to the logged row to the last bit: step 1, 2" in said
    assert "DIFFERENT" not in said
    numbers = json.loads((tmp_path / "out" / "micro_batch_1.json").read_text())
    assert {name.partition(".")[0] for name in numbers["gradients"]} == {"classifier"}

"""`distvgg export`: other programs load the network and compute what `distvgg.load` computes."""

import io
import json
import os
import re
import shlex
import shutil
from contextlib import redirect_stderr, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file

import distvgg
import hub_server
from distvgg import cli
from distvgg.commands.model_card import torchvision_program, transforms_program
from distvgg.config import ModelConfig
from distvgg.errors import RunError
from distvgg.models.classifier import Classifier
from distvgg.models.export import difference, torchvision_code
from distvgg.models.vgg import VGG
from made_data import noise, png
from pages import blocks
from processes import ROOT, run, train

PAGE = (ROOT / "docs" / "export.md").read_text()
CODE = "```python\n(.*?)```"

needs_onnx = pytest.mark.skipif(
    not all(map(find_spec, ("onnx", "onnxruntime", "onnxscript"))),
    reason="needs the extra export: pip install onnx onnxruntime onnxscript",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on synthetic images, whose input is larger than they are."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    train(folder, "--model.image_size", "40")
    return folder


def with_run(finished: Path, folder: Path) -> Path:
    """A folder as the page has it: the run in runs/small, and an image."""
    shutil.copytree(finished, folder / "runs" / "small")
    (folder / "cat.png").write_bytes(png(noise(1, 0)[0]))
    return folder


@pytest.fixture
def here(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, as the page has it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return with_run(finished, tmp_path)


def export(*words: str) -> tuple[int, str, str]:
    """Runs the command in this process: exit code, output, errors."""
    output, errors = io.StringIO(), io.StringIO()
    with mock.patch.dict(os.environ), redirect_stdout(output), redirect_stderr(errors):
        code = cli.main(["export", *words])
    return code, output.getvalue(), errors.getvalue()


@pytest.fixture(scope="module")
def exported(
    finished: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, str]]:
    """The page's folder after the page's commands, and what each printed, by form."""
    folder, printed = with_run(finished, tmp_path_factory.mktemp("page")), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for _, command in blocks(PAGE, "shell"):
            words = shlex.split(command.removeprefix("python -m distvgg export "))
            form = words[words.index("--to") + 1]
            if form == "onnx" and not find_spec("onnxruntime"):
                continue
            code, printed[form], errors = export(*words)
            assert (code, errors) == (0, "")
    return folder, printed


@pytest.fixture
def printed(
    exported: tuple[Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> dict[str, str]:
    """What the page's commands printed, by form; the current folder is the page's."""
    folder, by_form = exported
    monkeypatch.chdir(folder)
    return by_form


def execute(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(code, "docs", "exec"), names)
    return names


def program_of(part: str) -> list[str]:
    """The programs of a part of the page."""
    (text,) = [t for t in re.split(r"^## ", PAGE, flags=re.MULTILINE) if t.startswith(part)]
    return [program for _, program in blocks(text, "python")]


def test_the_page_loads_the_weights_in_torchvision(
    printed: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    program, preprocessing = program_of("safetensors")
    assert printed["safetensors"].startswith(program)
    model = distvgg.load("runs/small")
    x = model.preprocess("cat.png")[None]
    names = execute(program)
    torch.testing.assert_close(names["model"](x), model(x))
    exec(compile(preprocessing, "docs", "exec"), names)
    torch.testing.assert_close(names["x"], x, rtol=1e-4, atol=1e-4)
    best, _ = model.classify("cat.png", top=1)[0]
    assert capsys.readouterr().out == f"{best}\n"
    assert distvgg.load("small.safetensors").classify("cat.png") == model.classify("cat.png")


def test_the_page_loads_the_folder_for_the_hub(
    printed: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "hub" in printed
    (program,) = program_of("The hub")
    execute(program)
    expected = distvgg.load("runs/small").classify("cat.png")
    assert capsys.readouterr().out.endswith(f"{expected}\n")


@needs_onnx
def test_onnx_computes_what_the_classifier_computes(
    printed: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert re.fullmatch(
        r"small\.onnx: 0\.\d MB, ONNX opset 18, input images \[n, 3, 32, 32\] uint8 RGB,"
        r" output logits \[n, 100\] float32, largest difference from PyTorch \d\.\de-0\d\n",
        printed["onnx"],
    )
    model = distvgg.load("runs/small")
    (program,) = program_of("ONNX")
    session = execute(program)["session"]
    assert capsys.readouterr().out == f"{model.classify('cat.png')[0][0]}\n"
    for n in (1, 5):
        images = noise(n, n)
        (found,) = session.run(None, {"images": images.transpose(0, 3, 1, 2)})
        x = torch.stack([model.preprocess(image) for image in images])
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), model(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(Exception, match="tensor\\(uint8\\)"):
        session.run(None, {"images": np.zeros((1, 3, 32, 32), np.float32)})
    described = session.get_modelmeta().custom_metadata_map
    assert json.loads(described["class_names"]) == model.class_names
    assert json.loads(described["preprocessing"])["mean"] == list(model.preprocessing.mean)
    assert str(ROOT).encode() not in Path("small.onnx").read_bytes()


def small(finished: Path, **fields: Any) -> Classifier:
    """A classifier with new weights and other layers, on the data of the run."""
    trained = distvgg.load(finished)
    config = ModelConfig.model_validate(trained.config.model_dump() | fields)
    constants = trained.preprocessing.__class__(
        **trained.preprocessing.__dict__ | {"image_size": config.image_size, "model": None}
    )
    model = Classifier(config, constants, 100).eval()
    for layer in model.modules():  # so that a wrong order of layers shows
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(layer.running_var, 0.5, 2)
    return model


@needs_onnx
def test_another_network_is_refused(exported: tuple[Path, dict[str, str]]) -> None:
    """The resize is in the model; logits that differ from PyTorch's are an error."""
    import onnx

    folder, _ = exported
    model, proto = distvgg.load(folder / "runs/small"), onnx.load(folder / "small.onnx")
    assert difference(proto, model) < 1e-5
    assert "Resize" in {node.op_type for node in proto.graph.node}
    with torch.no_grad():
        model.classifier[-1].bias[0] += 0.01
    with pytest.raises(RunError, match=r"differ from PyTorch's by up to 1\.0e-02"):
        difference(proto, model)


@pytest.mark.parametrize(
    "fields",
    [
        {"max_pools": (2, 4, 5), "image_size": 40},
        {"image_size": 16, "depth": 13, "batch_norm": False, "pool_size": 7},
    ],
)
def test_plain_torchvision_computes_the_same(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    from safetensors.torch import save_file

    monkeypatch.chdir(tmp_path)
    model = small(finished, **fields)
    save_file(model.state_dict(), "w.safetensors")
    image = Image.fromarray(noise(1, 3)[0])
    preprocess = execute(transforms_program(model))["preprocess"]
    x = preprocess(image)[None]
    torch.testing.assert_close(x[0], model.preprocess(image), rtol=1e-4, atol=1e-4)
    program = torchvision_program(model, "w.safetensors")
    assert program is not None
    loaded = execute(program)["model"]
    assert isinstance(loaded, torchvision.models.VGG)
    torch.testing.assert_close(loaded(x), model(x))


@pytest.mark.parametrize(("depth", "norm"), [(11, True), (13, False), (16, True), (19, True)])
def test_a_network_of_torchvision_is_its_own_name(depth: int, norm: bool) -> None:
    name = f"vgg{depth}" + ("_bn" if norm else "")
    config = ModelConfig(depth=depth, batch_norm=norm, head_width=4096, pool_size=7)
    with torch.device("meta"):
        model = VGG(config, 7)
        code = torchvision_code(model, 224)
        assert code == f"from torchvision.models import {name}\n\nmodel = {name}(num_classes=7)"
        theirs = execute(code)["model"].state_dict()
    assert {k: v.shape for k, v in theirs.items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }
    model.features[1] = torch.nn.Tanh()
    assert torchvision_code(model, 224) is None


def test_the_folder_for_the_hub_has_the_numbers_of_the_result(
    exported: tuple[Path, dict[str, str]],
) -> None:
    from huggingface_hub import ModelCard

    here, printed = exported
    folder = here / "small-hub"
    assert printed["hub"].startswith("small-hub: config.json, model.safetensors (0.")
    names = ["README.md", "config.json", "model.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert not [path for path in here.iterdir() if path.name.startswith(".")]
    card = ModelCard.load(folder / "README.md")
    result = json.loads((here / "runs/small/result.json").read_text())
    measured = {
        (r.dataset_split, r.metric_name): r.metric_value for r in card.data.eval_results or ()
    }
    for split, row in (("validation", result["val"]), ("test", result["test"])):
        assert measured[split, "top-1"] == row["top1"]
        assert (
            f"| {split} | {row['count']:,} | {row['loss']:.3f} | {row['top1']:.2%} |" in card.text
        )
    for said in (result["hardware"], result["data_fingerprint"], "seed 0", result["commit"] or ""):
        assert said in card.text
    assert card.data.metrics == ["accuracy"]
    assert card.data.license is None
    assert str(here) not in card.text
    # distvgg.load takes the same folder; the code of the card is that of the page.
    image = noise(1, 0)[0]
    expected = distvgg.load(here / "runs/small").classify(image)
    assert distvgg.load(folder).classify(image) == expected
    _, in_torchvision, _ = re.findall(CODE, card.text, re.DOTALL)
    assert in_torchvision.replace("model.safetensors", "small.safetensors") in PAGE


def test_a_second_export_keeps_the_card_and_replaces_the_weights(here: Path) -> None:
    export("runs/small", "--to", "hub", "--out", "mine")
    (here / "mine/README.md").write_text("license: mit")
    (here / "mine/model.safetensors").write_text("old")
    (checkpoint,) = (here / "runs/small/checkpoints").iterdir()
    code, _, errors = export(str(checkpoint), "--to", "hub", "--out", "mine")
    assert code == 0
    assert errors.startswith("distvgg: note: mine/README.md is kept")
    assert (here / "mine/README.md").read_text() == "license: mit"
    assert load_file(here / "mine/model.safetensors")
    export(str(checkpoint), "--to", "hub")
    card = (here / f"small-{checkpoint.name}-hub/README.md").read_text()
    assert "Not measured" in card
    assert "model-index" not in card
    assert "accuracy" not in card


def test_missing_weights_are_not_filled_with_random_ones(here: Path) -> None:
    from safetensors.torch import save_file

    export("runs/small", "--to", "hub", "--out", "mine")
    weights = load_file("mine/model.safetensors")
    del weights["classifier.6.bias"]
    save_file(weights, "mine/model.safetensors")
    with pytest.raises(RuntimeError, match=r"classifier\.6\.bias"):
        distvgg.HubClassifier.from_pretrained("mine")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("/nowhere --to onnx", "run folder /nowhere does not exist"),
        ("runs/small --to onxx", "--to: invalid choice: 'onxx'"),
        ("runs/small", "missing --to"),
        ("runs/small --to onnx --push a/b", "--push uploads a folder of --to hub (got --to onnx)"),
        ("runs/small --to hub --push a/b/c", "--push a/b/c is no name of a repository"),
        ("runs/small --to safetensors --out /nowhere/x", "cannot write /nowhere/x (No such file"),
        ("runs/small --to hub --out cat.png", "cannot write cat.png (Not a directory): choose"),
        ("runs/small --to hub --out runs/small", "runs/small/model.safetensors belongs to a run"),
        ("runs/small --to hub --out runs/small/config.yaml", "config.yaml (Not a directory)"),
        (
            "runs/small --to safetensors --out runs/small/config.yaml",
            "config.yaml belongs to a run",
        ),
        (
            "runs/small --to safetensors --out runs/small/model.safetensors",
            "model.safetensors belongs to a run: choose another place with --out",
        ),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(here: Path, words: str, line: str) -> None:
    before = sorted(here.rglob("*"))
    code, output, errors = export(*words.split())
    assert (code, output, errors.count("\n")) == (2, "", 1)
    assert errors.startswith("distvgg: error: ")
    assert line in errors
    assert sorted(here.rglob("*")) == before


def test_the_folder_is_uploaded(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the real client; each obstacle is one line, and the folder stays."""
    from huggingface_hub import constants

    push = ("runs/small", "--to", "hub", "--push", "user/name")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(here / "no token"))
    code, output, errors = export(*push)
    assert (code, output) == (2, "")
    assert errors == (
        "distvgg: error: --push needs a token of the hub: run `hf auth login`, or set HF_TOKEN\n"
    )
    assert not (here / "small-hub").exists()

    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    code, output, errors = export(*push)
    assert (code, output, errors.count("\n")) == (2, "", 1)
    assert "small-hub is complete, and could not be uploaded to user/name (" in errors
    (here / "small-hub/notes.txt").write_text("mine")

    with hub_server.serving() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        code, output, errors = export(*push)
        assert code == 0, errors
        assert output.endswith(f"\nuploaded: {server.url}/user/name\n")
        names = ("README.md", "config.json", "model.safetensors")
        assert server.repos == {
            "user/name": {name: (here / "small-hub" / name).read_bytes() for name in names}
        }
        monkeypatch.setenv("HF_TOKEN", "hf_other")
        code, _, errors = export(*push)
    assert code == 2
    assert errors.splitlines()[-1].endswith(
        "(Invalid username or password.): use a token that may write there (`hf auth login`, or"
        " HF_TOKEN), and repeat the command, or hf upload user/name small-hub"
    )


def test_without_the_extra_one_line_says_what_to_install(here: Path) -> None:
    probe = (
        "import sys, importlib.util as u\n"
        "found = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name.startswith('onnx') else found(name, *a)\n"
        "import distvgg.cli\n"
        "sys.exit(distvgg.cli.main(['export', 'runs/small', '--to', 'onnx']))"
    )
    done = run((), program=("-c", probe), cwd=here)
    assert done.returncode == 2
    assert done.stderr == (
        "distvgg: error: export to ONNX needs onnx, onnxruntime, onnxscript, not installed:"
        " pip install onnx onnxruntime onnxscript\n"
    )

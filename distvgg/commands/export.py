"""`distvgg export`: a trained network as ONNX, as safetensors, or as a folder for the hub.

Reads only the run folder. Invariant: a file has its name only when it is complete and checked, and
the weights of a run are never overwritten.
"""

import json
import os
import shutil
import socket
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from distvgg.errors import UserError, one_line
from distvgg.recipe import load as load_config
from distvgg.runs.files import atomic_write, write_fsync
from distvgg.runs.layout import CONFIG_FILE, WEIGHTS_FILE, refuse_to_overwrite, run_of
from distvgg.runs.result import read_result

if TYPE_CHECKING:
    from distvgg.models.classifier import Classifier

Format = Literal["onnx", "safetensors", "hub"]
_SUFFIXES: dict[Format, str] = {
    "onnx": ".onnx",
    "safetensors": ".safetensors",
    "hub": "-hub",
}
CARD_FILE, HUB_CONFIG_FILE = "README.md", "config.json"


def export(run: Path, to: Format, out: Path | None = None, push: str | None = None) -> str:
    """Writes the network of a run in another form.

    Args:
        run: folder of a finished run, a checkpoint, or a folder with `model.safetensors`.
        to: the form.
        out: file to write, or folder for `hub`. None: named after the run, in the current folder.
        push: repository on the hub that the folder is uploaded to.

    Returns:
        What was written, for the user.

    Raises:
        UserError: the run cannot be used, a package is missing, the output cannot be written, or
            the hub refuses the upload.
        RunError: the ONNX model does not compute what PyTorch computes.
    """
    if push is not None:
        if to != "hub":
            raise UserError(f"--push uploads a folder of --to hub (got --to {to})")
        _check_can_push(push)
    if to == "onnx":
        _require_packages()
    from distvgg.models.classifier import load

    model = load(run)
    out = out or Path(_default_name(run) + _SUFFIXES[to])
    refuse_to_overwrite(out / WEIGHTS_FILE if to == "hub" else out)
    if to == "onnx":
        return _write_onnx(model, out)
    if to == "safetensors":
        return _write_safetensors(model, out)
    text = _write_hub(model, run, out, push)
    return text if push is None else f"{text}\nuploaded: {_push(out, push)}"


def _require_packages() -> None:
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]
    if missing:
        raise UserError(
            f"export to ONNX needs {', '.join(missing)}, not installed:"
            " pip install onnx onnxruntime onnxscript"
        )


def _default_name(run: Path) -> str:
    folder = run_of(run).resolve()
    return folder.name if run.resolve() == folder else f"{folder.name}-{run.resolve().name}"


def _write_onnx(model: "Classifier", out: Path) -> str:
    from distvgg.models.export import INPUT, OPSET, OUTPUT, to_onnx

    if model.flip:
        _note("the run averages mirror images (eval.tta flip); the ONNX model does not")
    proto, apart = to_onnx(model)
    size = _write(out, proto.SerializeToString())
    height, width = model.preprocessing.stored_size
    return (
        f"{out}: {size}, ONNX opset {OPSET}, input {INPUT} [n, 3, {height}, {width}] uint8 RGB,"
        f" output {OUTPUT} [n, {len(model.class_names)}] float32,"
        f" largest difference from PyTorch {apart:.1e}"
    )


def _write_safetensors(model: "Classifier", out: Path) -> str:
    from distvgg.commands.model_card import torchvision_program, transforms_program

    size = _write(out, _weights(model))
    program = torchvision_program(model, str(out))
    line = f"{out}: {size}, {len(model.class_names)} classes, keys of torchvision's VGG"
    if program is None:
        return f"{line}, whose layers differ: load it with distvgg.load"
    return f"{program}\n{transforms_program(model)}\n{line}"


def _weights(model: "Classifier") -> bytes:
    from safetensors.torch import save

    from distvgg.models.export import described

    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    return save(tensors, described(model).metadata())


def _write_hub(model: "Classifier", run: Path, out: Path, repo: str | None) -> str:
    from distvgg.commands.model_card import model_card
    from distvgg.models.hub import hub_config

    run_dir = run_of(run)
    has_config = (run_dir / CONFIG_FILE).exists()
    config = load_config(str(run_dir / CONFIG_FILE)) if has_config else None
    final = run.resolve() == run_dir.resolve()
    card = model_card(
        model, config, read_result(run_dir) if final else None, repo or out.resolve().name
    )
    contents = {
        WEIGHTS_FILE: _weights(model),
        HUB_CONFIG_FILE: json.dumps(hub_config(model), indent=2).encode() + b"\n",
        CARD_FILE: card.encode(),
    }
    if (out / CARD_FILE).exists():
        del contents[CARD_FILE]
        _note(f"{out / CARD_FILE} is kept, with what was added to it; delete it to have a new one")
    _write_folder(out, contents)
    size = _size((out / WEIGHTS_FILE).stat().st_size)
    text = f"{out}: {HUB_CONFIG_FILE}, {WEIGHTS_FILE} ({size}), {CARD_FILE}"
    return text if repo else f"{text}; add license: to {CARD_FILE}, then hf upload REPO_ID {out}"


def _write_folder(folder: Path, contents: dict[str, bytes]) -> None:
    """Writes files into a folder. A new folder appears complete; in another, each file does."""
    try:
        if folder.exists():
            for name, content in contents.items():
                atomic_write(folder / name, content, writer=_writer())
            return
        new = folder.with_name(f".{folder.name}.{_writer()}tmp")
        new.mkdir()
        try:
            for name, content in contents.items():
                write_fsync(new / name, content)
            new.rename(folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    except OSError as error:
        raise _cannot_write(folder, error) from error


def _write(path: Path, content: bytes) -> str:
    """Writes a file atomically and returns its size as text."""
    try:
        atomic_write(path, content, writer=_writer())
    except OSError as error:
        raise _cannot_write(path, error) from error
    return _size(len(content))


def _writer() -> str:
    return f"{socket.gethostname()}-{os.getpid()}."


def _cannot_write(path: Path, error: OSError) -> UserError:
    reason = error.strerror or str(error)
    return UserError(f"cannot write {path} ({reason}): choose another place with --out")


def _size(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _check_can_push(repo: str) -> None:
    """Checks a repository's name, and that there is a token, before anything is computed."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(
            f"--push {repo} is no name of a repository (expected USER/NAME): {one_line(error)}"
        ) from error
    if get_token() is None:
        raise UserError("--push needs a token of the hub: run `hf auth login`, or set HF_TOKEN")


def _push(folder: Path, repo: str) -> str:
    """Uploads the three files, and returns the address of the repository."""
    from huggingface_hub import HfApi, errors

    api = HfApi()
    try:
        address = api.create_repo(repo, exist_ok=True)
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=[CARD_FILE, HUB_CONFIG_FILE, WEIGHTS_FILE],
            commit_message="Upload the model of distvgg export",
        )
        return str(address)
    except errors.HfHubHTTPError as error:
        refused = error.response.status_code in (401, 403)
        remedy = "use a token that may write there (`hf auth login`, or HF_TOKEN), and "
        raise _not_uploaded(
            folder, repo, error.server_message or one_line(error), remedy if refused else ""
        ) from error
    # Without a network, the HTTP library of huggingface_hub 1 and later raises no OSError.
    except (OSError, errors.HTTPError) as error:  # type: ignore[attr-defined]
        raise _not_uploaded(folder, repo, one_line(error)) from error


def _not_uploaded(folder: Path, repo: str, reason: str, remedy: str = "") -> UserError:
    return UserError(
        f"{folder} is complete, and could not be uploaded to {repo} ({reason}):"
        f" {remedy}repeat the command, or hf upload {repo} {folder}"
    )


def _note(text: str) -> None:
    print(f"distvgg: note: {text}", file=sys.stderr, flush=True)

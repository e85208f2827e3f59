"""CheckpointManager: written aside in the background, verified, then renamed; read only if sound.

    checkpoints/step_00001234/model.safetensors   the network, as torchvision's keys have it
                              state.safetensors   the optimizer's tensors and running sums
                              manifest.json       progress; sizes and SHA-256, its own too

Invariant: a folder of that name appears whole and verified. Nothing in it is ever unpickled. It
holds nothing of any one rank, so that any number of processes can go on from it.
"""

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from distvgg.runs.files import fsync_dir, write_fsync
from distvgg.runs.layout import WEIGHTS_FILE, checkpoint_dirs

FORMAT = 1
STATE_FILE, MANIFEST_FILE = "state.safetensors", "manifest.json"
_FILES = (WEIGHTS_FILE, STATE_FILE)
Tensors = Mapping[str, Tensor]


class CorruptCheckpointError(Exception):
    """A checkpoint that is not what was written; the message says how."""


@dataclass(frozen=True)
class Checkpoint:
    """What was read and verified: two files' bytes, and the progress noted with them."""

    name: str
    model: bytes
    state: bytes
    progress: dict[str, Any]


class CheckpointManager:
    """The checkpoints of one run. For the main process.

    Args:
        folder: `checkpoints/` of the run.
        keep: how many of the newest to keep, beside the best.
        metadata: for the header of `model.safetensors`.

    Attributes:
        saved: the step of the newest that is known to be sound.
    """

    def __init__(self, folder: Path, keep: int, metadata: Mapping[str, str] | None = None) -> None:
        self._folder, self._keep = folder, keep
        self._metadata = {WEIGHTS_FILE: dict(metadata)} if metadata else {}
        self._host: dict[tuple[str, str], Tensor] = {}  # by file and key
        self._thread: threading.Thread | None = None
        self._failures: SimpleQueue[str] = SimpleQueue()
        self._best: int | None = None
        self.saved = 0
        for leftover in folder.glob(".step_*"):  # of a kill
            shutil.rmtree(leftover, ignore_errors=True)

    def newest(
        self, refuse: Callable[[Checkpoint], str | None], say: Callable[[str], None]
    ) -> Checkpoint | None:
        """The newest sound checkpoint, None if there is none; each damaged one gets a line.

        Args:
            refuse: the reason why a sound one does not fit the rest of the folder, or None.
        """
        for path in reversed(checkpoint_dirs(self._folder)):
            try:
                checkpoint = read(path)
                if (reason := refuse(checkpoint)) is None:
                    self.saved = int(path.name.removeprefix("step_"))
                    return checkpoint
            except CorruptCheckpointError as error:
                reason = str(error)
            say(f"checkpoint {path.name} refused: {reason}")
        return None

    def save(
        self,
        step: int,
        model: Tensors,
        state: Tensors,
        progress: dict[str, Any],
        *,
        best: int | None,
        flush: Callable[[], None],
    ) -> None:
        """Copies to host memory and returns; a thread writes. Waits for an earlier save first.

        Args:
            progress: JSON values.
            best: the step whose checkpoint is to be kept however old it gets.
            flush: brings to disk what `progress` counts on; called before the manifest is written.
        """
        self.wait()
        parts = {WEIGHTS_FILE: model, STATE_FILE: state}
        snapshot = {file: self._to_host(file, part) for file, part in parts.items()}
        copied = None
        if (device := next(iter(model.values())).device).type == "cuda":
            copied = torch.Event(device)
            copied.record()

        def work() -> None:
            why: str | None = "see the traceback"  # of what nobody foresaw
            try:
                if copied is not None:
                    copied.synchronize()
                flush()
                self._write(step, snapshot, progress)
                self.saved, why = step, None
            except (OSError, CorruptCheckpointError) as error:
                why = getattr(error, "strerror", None) or str(error)
            finally:
                if why:
                    line = f"checkpoint {_name(step)} failed: {why}; the one before it stands"
                    self._failures.put(line)
            try:
                self._prune(step, best)
            except OSError as error:
                self._failures.put(f"old checkpoints cannot be deleted: {error.strerror}")

        # Not a daemon: the interpreter waits for it at exit.
        self._thread = threading.Thread(target=work, name="checkpoint")
        self._thread.start()

    def failure(self) -> str | None:
        """The next thing that went wrong in the background and was not told yet, if any."""
        return None if self._failures.empty() else self._failures.get()

    def wait(self) -> None:
        """Returns when nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _to_host(self, file: str, tensors: Tensors) -> dict[str, Tensor]:
        """Copies into host buffers made once; pinned, so that a GPU does not wait."""
        for key, tensor in tensors.items():
            if (file, key) not in self._host:
                self._host[file, key] = torch.empty(
                    tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda
                )
            source = tensor.contiguous() if tensor.is_cuda else tensor
            self._host[file, key].copy_(source, non_blocking=True)
        return {key: self._host[file, key] for key in tensors}

    def _write(
        self, step: int, snapshot: Mapping[str, dict[str, Tensor]], progress: dict[str, Any]
    ) -> None:
        from safetensors.torch import save

        aside, final = self._folder / f".{_name(step)}.tmp", self._folder / _name(step)
        try:
            self._remove(aside)
            aside.mkdir(parents=True)
            files = {}
            for name, tensors in snapshot.items():
                content = save(tensors, self._metadata.get(name))
                write_fsync(aside / name, content)
                files[name] = {"size": len(content), "sha256": _sha256(content)}
            body = {"format": FORMAT, "step": step, "files": files, "progress": progress}
            write_fsync(aside / MANIFEST_FILE, _manifest(body))
            fsync_dir(aside)
            _evict_page_cache(aside)
            read(aside)
            self._remove(final)  # refused, or of a future that this run has not seen
            aside.rename(final)
            fsync_dir(self._folder)
        except (OSError, CorruptCheckpointError):
            shutil.rmtree(aside, ignore_errors=True)
            raise

    def _prune(self, step: int, best: int | None) -> None:
        """Deletes what is older than the newest `keep`, but for the best that there is.

        What lies ahead was refused, perhaps for a reason that goes away: it stays until the run
        gets there.
        """
        steps = [int(p.name.removeprefix("step_")) for p in checkpoint_dirs(self._folder)]
        if best in steps:
            self._best = best
        steps = [s for s in steps if s <= step]
        kept = {*steps[-self._keep :], self._best}
        for other in steps:
            if other not in kept:
                self._remove(self._folder / _name(other))

    def _remove(self, path: Path) -> None:
        """Deletes a folder under another name, so that a kill leaves no half of it to be read."""
        if path.exists():
            aside = path.with_name(f".{path.name.strip('.')}.old")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            shutil.rmtree(aside)


def read(path: Path) -> Checkpoint:
    """Reads and verifies one checkpoint's folder.

    Raises:
        CorruptCheckpointError: something in it is missing, cut short or altered.
    """
    manifest = _read_file(path / MANIFEST_FILE)
    try:
        body = json.loads(manifest)["body"]
        sound = _manifest(body) == manifest
        form, files, progress = body["format"], body["files"], dict(body["progress"])
        expected = {name: (files[name]["size"], files[name]["sha256"]) for name in _FILES}
    except (ValueError, KeyError, TypeError, RecursionError):
        sound = False
    if not sound:
        raise CorruptCheckpointError(f"{MANIFEST_FILE} is damaged")
    if form != FORMAT:
        raise CorruptCheckpointError(f"its format is {form}, this version reads {FORMAT}")
    contents = {}
    for name in _FILES:
        contents[name] = content = _read_file(path / name)
        size, digest = expected[name]
        if len(content) != size:
            raise CorruptCheckpointError(f"{name} has {len(content):,} of {size:,} bytes")
        if _sha256(content) != digest:
            raise CorruptCheckpointError(f"{name} is damaged: its SHA-256 is not the manifest's")
    return Checkpoint(path.name, contents[WEIGHTS_FILE], contents[STATE_FILE], progress)


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]
) -> dict[str, Tensor]:
    """An optimizer's tensors by parameter name: `momentum_buffer.features.0.weight`. Its
    hyperparameters are the config's, and not kept."""
    return {
        f"{key}.{names[parameter]}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], tensors: Tensors
) -> None:
    """Puts back what `optimizer_tensors` gave."""
    parameters = {name: parameter for parameter, name in names.items()}
    for full, value in tensors.items():
        key, _, name = full.partition(".")
        parameter = parameters[name]
        if value.shape == parameter.shape:
            # Strides as the parameter has them: fused kernels walk both alike.
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        optimizer.state[parameter][key] = value.to(parameter.device)


def _manifest(body: dict[str, Any]) -> bytes:
    """The one way to write a manifest, with its own SHA-256: any other byte is damage."""
    digest = _sha256(json.dumps(body, sort_keys=True).encode())
    return json.dumps({"body": body, "sha256": digest}, sort_keys=True, indent=1).encode() + b"\n"


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise CorruptCheckpointError(f"{path.name} is missing") from error
    except OSError as error:
        raise CorruptCheckpointError(f"{path.name} cannot be read: {error.strerror}") from error


def _evict_page_cache(folder: Path) -> None:
    """Lets the reading that verifies come from the disk, not from the kernel's copy (Linux)."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _name(step: int) -> str:
    return f"step_{step:08}"


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()

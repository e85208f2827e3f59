"""Checkpoints, which a thread writes to a temporary directory, verifies and then renames.

    checkpoints/step_00001234/model.safetensors   the network, with torchvision's keys
                              state.safetensors   optimizer tensors and running sums
                              manifest.json       progress; sizes and SHA-256, its own included

Invariant: a directory with such a name is complete and was verified before its rename. A checkpoint
is read only if it is valid, and nothing in a checkpoint is ever unpickled. A checkpoint holds
nothing specific to one rank, so that any number of processes can resume from it.
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
from distvgg.runs.layout import MANIFEST_FILE, STATE_FILE, WEIGHTS_FILE, checkpoint_dirs

FORMAT = 1
_FILES = (WEIGHTS_FILE, STATE_FILE)
Tensors = Mapping[str, Tensor]


class CorruptCheckpointError(Exception):
    """Error for a corrupt checkpoint; the message says what is wrong."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and verified.

    Attributes:
        name: of its directory.
        model, state: content of `model.safetensors` and `state.safetensors`.
        progress: JSON values saved with both files.
    """

    name: str
    model: bytes
    state: bytes
    progress: dict[str, Any]


class CheckpointManager:
    """The checkpoints of one run; only the main process has a manager.

    Args:
        folder: `checkpoints/` of the run.
        keep: number of newest checkpoints to keep, besides the best one.
        metadata: for the header of `model.safetensors`.

    Attributes:
        saved: step of the newest checkpoint that is known to be valid.
    """

    def __init__(self, folder: Path, keep: int, metadata: Mapping[str, str] | None = None) -> None:
        self._folder, self._keep = folder, keep
        self._metadata = {WEIGHTS_FILE: dict(metadata)} if metadata else {}
        self._host: dict[tuple[str, str], Tensor] = {}  # by file and key
        self._thread: threading.Thread | None = None
        self._failures: SimpleQueue[str] = SimpleQueue()
        self._best: int | None = None
        self.saved = 0
        for leftover in folder.glob(".step_*"):  # left by a kill
            shutil.rmtree(leftover, ignore_errors=True)

    def newest(
        self, refuse: Callable[[Checkpoint], str | None], say: Callable[[str], None]
    ) -> Checkpoint | None:
        """Returns the newest valid checkpoint that is not refused, or None.

        Args:
            refuse: returns why a valid checkpoint does not fit the rest of the run folder, or None.
            say: called with one line for each checkpoint that is corrupt or refused.
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
        """Copies tensors to host memory and returns; a thread writes the checkpoint.

        Waits first until an earlier save has ended.

        Args:
            step: names the checkpoint.
            model: tensors of `model.safetensors`.
            state: tensors of `state.safetensors`.
            progress: JSON values.
            best: step whose checkpoint is kept however old it gets.
            flush: writes to disk what `progress` relies on; called before the manifest is written.
        """
        self.wait()
        parts = {WEIGHTS_FILE: model, STATE_FILE: state}
        snapshot = {file: self._to_host(file, part) for file, part in parts.items()}
        copied = None
        if (device := next(iter(model.values())).device).type == "cuda":
            copied = torch.Event(device)
            copied.record()

        def work() -> None:
            why: str | None = "see the traceback"  # for an unforeseen exception
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
                    line = (
                        f"checkpoint {directory_name(step)} failed: {why}; the one before it stands"
                    )
                    self._failures.put(line)
            try:
                self._prune(step, best)
            except OSError as error:
                self._failures.put(f"old checkpoints cannot be deleted: {error.strerror}")

        # Not a daemon: the interpreter waits for this thread at exit.
        self._thread = threading.Thread(target=work, name="checkpoint")
        self._thread.start()

    def failure(self) -> str | None:
        """Returns the next background failure that was not returned before, or None."""
        return None if self._failures.empty() else self._failures.get()

    def wait(self) -> None:
        """Waits until no checkpoint is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _to_host(self, file: str, tensors: Tensors) -> dict[str, Tensor]:
        """Copies tensors into host buffers, which are allocated once.

        Buffers of CUDA tensors are pinned, so that the GPU does not wait.
        """
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

        final = self._folder / directory_name(step)
        tmp_dir = final.with_name(f".{final.name}.tmp")
        try:
            self._remove(tmp_dir)
            tmp_dir.mkdir(parents=True)
            files = {}
            for name, tensors in snapshot.items():
                content = save(tensors, self._metadata.get(name))
                write_fsync(tmp_dir / name, content)
                files[name] = {"size": len(content), "sha256": _sha256(content)}
            body = {"format": FORMAT, "step": step, "files": files, "progress": progress}
            write_fsync(tmp_dir / MANIFEST_FILE, _manifest(body))
            fsync_dir(tmp_dir)
            _evict_page_cache(tmp_dir)
            read(tmp_dir)
            self._remove(final)  # refused before, or left by a launch that was further
            tmp_dir.rename(final)
            fsync_dir(self._folder)
        except (OSError, CorruptCheckpointError):
            shutil.rmtree(tmp_dir, ignore_errors=True)
            raise

    def _prune(self, step: int, best: int | None) -> None:
        """Deletes checkpoints older than the newest `keep`, except the best one on disk.

        Checkpoints ahead of `step` were refused, perhaps for a temporary reason. They stay until
        the run reaches their step.
        """
        steps = [int(p.name.removeprefix("step_")) for p in checkpoint_dirs(self._folder)]
        if best in steps:
            self._best = best
        steps = [s for s in steps if s <= step]
        kept = {*steps[-self._keep :], self._best}
        for other in steps:
            if other not in kept:
                self._remove(self._folder / directory_name(other))

    def _remove(self, path: Path) -> None:
        """Renames a directory, then deletes it, so that a kill leaves no readable part of it."""
        if path.exists():
            old = path.with_name(f".{path.name.strip('.')}.old")
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
            shutil.rmtree(old)


def read(path: Path) -> Checkpoint:
    """Reads and verifies one checkpoint directory.

    Raises:
        CorruptCheckpointError: a file is missing, truncated or altered, or the format is another.
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


def directory_name(step: int) -> str:
    """Returns the name of a checkpoint's directory."""
    return f"step_{step:08}"


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]
) -> dict[str, Tensor]:
    """Returns an optimizer's tensors by parameter: `momentum_buffer.features.0.weight`.

    Hyperparameters come from the config and are not saved.
    """
    return {
        f"{key}.{names[parameter]}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], tensors: Tensors
) -> None:
    """Restores the tensors that `optimizer_tensors` returned."""
    parameters = {name: parameter for parameter, name in names.items()}
    for full, value in tensors.items():
        key, _, name = full.partition(".")
        parameter = parameters[name]
        if value.shape == parameter.shape:
            # Use the parameter's strides: fused kernels traverse both in the same order.
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        optimizer.state[parameter][key] = value.to(parameter.device)


def _manifest(body: dict[str, Any]) -> bytes:
    """Returns the only valid encoding of a manifest, which includes its own SHA-256.

    Any other bytes are corrupt.
    """
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
    """Evicts files from the page cache, so that verification reads from the disk (Linux)."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()

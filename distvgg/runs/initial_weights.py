"""Record of the weights that a run started from, in its folder.

Owns `initial_weights.json`. Invariant: the file is written before the first step and never changes,
so that a run that is killed before its first checkpoint starts again from the same weights, or not
at all. Imports no torch.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from distvgg.errors import UserError
from distvgg.runs.files import atomic_write, read_json
from distvgg.runs.layout import INITIAL_WEIGHTS_FILE


@dataclass(frozen=True)
class InitialWeights:
    """The source of a run's initial weights.

    Attributes:
        source: `model.weights` as given.
        loaded: what was loaded: `features`, and each linear layer by name.
        new: the linear layers that start anew, with the reason.
        unused: layers of the source that the network does not have.
        sha256: of the loaded tensors: names, shapes, dtypes and bytes, in the order of names.
    """

    source: str
    loaded: list[str]
    new: Mapping[str, str]
    unused: list[str]
    sha256: str

    def text(self) -> str:
        """Describes source and layers as text, without the hash."""
        text = f"{', '.join(self.loaded)} from {self.source}"
        if self.new:
            text += "; new: " + ", ".join(f"{name} ({why})" for name, why in self.new.items())
        return text + (f"; not used: {', '.join(self.unused)}" if self.unused else "")


def read_initial_weights(run_dir: Path) -> InitialWeights | None:
    """Reads `initial_weights.json`; returns None if the run has no such file.

    Raises:
        UserError: the file is corrupt.
    """
    remedy = "the result will not say what it started from"
    return read_json(run_dir / INITIAL_WEIGHTS_FILE, InitialWeights, remedy)


def keep_initial_weights(record: InitialWeights, run_dir: Path) -> None:
    """Writes `initial_weights.json` at the first start, and compares with it at a later one.

    Raises:
        UserError: the run began with other weights, or the file cannot be written.
    """
    earlier = read_initial_weights(run_dir)
    if earlier is not None and earlier.sha256 != record.sha256:
        raise UserError(
            f"model.weights {record.source} holds other weights than when run folder {run_dir} was"
            f" made (sha256 {record.sha256[:12]}, expected {earlier.sha256[:12]}): bring them back,"
            " or start again with another --run-dir"
        )
    if earlier is not None:
        return
    content = json.dumps(asdict(record), indent=2).encode() + b"\n"
    try:
        atomic_write(run_dir / INITIAL_WEIGHTS_FILE, content)
    except OSError as error:
        raise UserError(
            f"cannot write run folder {run_dir} ({error.strerror}): make room, or choose another"
            " with --run-dir"
        ) from error

"""The file that names the W&B run of a run folder, and the rows that a growing file has."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distvgg.errors import UserError
from distvgg.tracking import wandb_process, wandb_sync


@pytest.mark.parametrize(
    "content", [b"", b"\xff\0\x01", b'{"id": "abcd', b'["a"]', b'{"id": 5}', b'{"id": "../../ab"}']
)
def test_damaged_run_file_means_a_new_run(
    tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "wandb" / "run.json"
    path.parent.mkdir()
    path.write_bytes(content)
    file = wandb_sync._read_run_file(tmp_path)
    line = f"W&B: a new run with every row, because {path} is damaged\n"
    assert capsys.readouterr().out == line
    assert not file.online
    wandb_sync._write_run_file(tmp_path, file)
    assert wandb_sync._read_run_file(tmp_path) == file
    assert capsys.readouterr().out == ""


def test_new_run_takes_the_id_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "sweep-7")
    assert wandb_sync._read_run_file(tmp_path).id == "sweep-7"


def test_rows_are_sent_once_they_are_whole(tmp_path: Path) -> None:
    """A row that is half written when the file is read, and rows that the server has."""
    path, sent = tmp_path / "metrics.jsonl", []
    run: Any = SimpleNamespace(starting_step=1, log=lambda row: sent.append(row["step"]))
    pieces = iter(['{"step": 1}\n{"step": 2}\n{"ste', 'p": 3}\n', ""])

    def ended(within: float) -> bool:
        piece = next(pieces)
        with path.open("a") as file:
            file.write(piece)
        return not piece

    assert wandb_sync._send(run, path, ended) == 2
    assert sent == [2, 3]


def test_line_that_is_no_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n\0\0\0\n')
    run: Any = SimpleNamespace(starting_step=0, log=lambda row: None)
    with pytest.raises(UserError, match="line 2: not JSON"):
        wandb_sync._send(run, path, lambda _: True)


def test_refused_process_is_a_line_and_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(wandb_process.subprocess, "Popen", refuse)
    assert wandb_process.start_wandb(tmp_path, said.append) is None
    assert said == [
        f"W&B: failed (Resource temporarily unavailable). To upload: distvgg sync {tmp_path}"
    ]

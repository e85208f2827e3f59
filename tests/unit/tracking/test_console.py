"""Where the rows of a run end up besides metrics.jsonl and W&B: TensorBoard, a terminal, a log."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from processes import at_a_terminal, rows, tiny, train


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What a terminal shows of a run."""
    return at_a_terminal(tiny(tmp_path_factory.mktemp("terminal") / "run"))


def test_a_terminal_has_a_progress_bar(shown: str) -> None:
    *_, last = (line for line in shown.split("\r") if "10/10 [" in line)
    assert re.search(r"100%\|█+\| 10/10 \[\d\d:\d\d<\d\d:\d\d", last), last
    assert re.search(r"loss \d\.\d{3}, top1 \d+\.\d\d%, [\d,]+ images/s", last), last
    # Lines stand above the bar, each on its own.
    assert re.search(r"\rstep 10/10  epoch 1\.07  val loss [^\r]+\r\n", shown)


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run with TensorBoard, its output a log file."""
    folder = tmp_path_factory.mktemp("log") / "run"
    return folder, train(folder, "--track.tensorboard", "true")


def test_tensorboard_has_every_row(logged: tuple[Path, str]) -> None:
    folder, _ = logged
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard" / "distvgg"))
    events.Reload()
    found = {
        (event.step, name): event.value
        for name in events.Tags()["scalars"]
        for event in events.Scalars(name)
    }
    written = {(row["step"], name): value for row in rows(folder) for name, value in row.items()}
    assert found == pytest.approx(written, rel=1e-6)  # event files hold float32


def test_a_log_file_gets_plain_lines(logged: tuple[Path, str]) -> None:
    _, output = logged
    assert "\r" not in output
    steps = [line for line in output.splitlines() if line.startswith("step")]
    first, val, test = steps  # within 30 s there is one line of training
    assert re.fullmatch(r"step  1/10  epoch 0\.11  loss \d\.\d{3}, top1 \d+\.\d\d%", first)
    assert re.match(r"step 10/10  epoch 1\.07  val loss \d\.\d{3}, val top1 \d+\.\d\d%", val)
    assert re.match(r"step 10/10  epoch 1\.07  test loss", test)


def test_a_log_file_says_at_most_every_30_seconds_how_much_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:

    from distvgg.tracking import console as module

    now = 1000.0
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))
    console = module.Console(200)
    for step in range(101, 171):  # a resumed run
        now += 1
        console.advance()
        console.log({"step": step, "epoch": step / 10, "train/loss": 1.5}, step)
    first, second, third = capsys.readouterr().out.splitlines()
    assert first == "step 101/200  epoch 10.10  loss 1.500"  # one step says nothing about speed
    assert second == "step 131/200  epoch 13.10  loss 1.500, 1:09 left"
    assert third == "step 161/200  epoch 16.10  loss 1.500, 0:39 left"

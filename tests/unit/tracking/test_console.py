"""Where the rows of a run end up besides metrics.jsonl and W&B: TensorBoard, a terminal, a log."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from distvgg.metrics import without_clock
from processes import at_a_terminal, rows, tiny, train


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What a terminal shows of a run."""
    return at_a_terminal(tiny(tmp_path_factory.mktemp("terminal") / "run"))


def test_a_terminal_has_a_progress_bar(shown: str) -> None:
    *_, last = (line for line in shown.split("\r") if "10/10 [" in line)
    assert re.search(r"100%\|█+\| 10/10 \[\d\d:\d\d, 00:00 left, ", last), last
    assert re.search(r"loss \d\.\d{3}, top1 \d+\.\d\d%, [\d,]+ images/s", last), last
    # Lines stand above the bar, each on its own.
    assert re.search(r"\rstep 10/10  epoch 1\.07  val loss [^\r]+  <- new best\r\n", shown)


def test_a_terminal_says_first_what_will_run_and_last_where_the_results_are(shown: str) -> None:
    lines = shown.replace("\r\n", "\n").splitlines()
    table = dict(line.split(maxsplit=1) for line in lines[:6])
    assert list(table) == ["data", "network", "training", "optimizer", "compute", "curves"]
    assert len({re.match(r"\w+ +", line).end() for line in lines[:6]}) == 1  # aligned
    assert table["data"] == "synthetic: 600 train, 103 val, 2,000 test images, 100 classes"
    assert re.fullmatch(
        r"VGG-11-BN at 32x32, 28,142 parameters, 0\.00263 GFLOP .+", table["network"]
    )
    assert table["training"].startswith("10 steps of 64 = 1 process x 4 x 16; 1.07 epochs, ")
    assert table["optimizer"].startswith("sgd, lr 0.1, cosine after ")
    assert table["compute"].startswith("float32 on cpu, 1 thread each; ")
    assert table["curves"].endswith("/run/metrics.jsonl")
    assert lines[-2].endswith("/run/model.safetensors")
    assert lines[-1] == f"  curves: {table['curves']}"


def test_a_validation_says_whether_it_is_the_best_so_far_also_after_a_resume(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from distvgg.tracking.console import Best, Console

    console = Console(400, done=100, best=Best(90, 0.5))
    for step, top1 in ((200, 0.5), (300, 0.625), (400, 0.6)):
        console.log({"step": step, "epoch": step / 100, "val/loss": 1.0, "val/top1": top1}, step)
    console.log({"step": 400, "epoch": 4.0, "test/loss": 1.0, "test/top1": 0.7}, 400)
    assert [line.split("%", 1)[1] for line in capsys.readouterr().out.splitlines()] == [
        "  (best top1 50.00% at step 90)",  # the earliest of several
        "  <- new best",
        "  (best top1 62.50% at step 300)",
        "",
    ]


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
    sent = map(without_clock, rows(folder))
    written = {(row["step"], name): value for row in sent for name, value in row.items()}
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

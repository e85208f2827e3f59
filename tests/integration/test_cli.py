"""What a user sees: help, one line for each mistake, exit codes, nothing left behind."""

import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.version import Version

import distvgg
from distvgg.commands.arguments import default_run_dir
from distvgg.recipe import load
from processes import ROOT, TINY, rows, run, tiny, train


def mistake(*args: str, processes: int = 1, env: dict[str, str] | None = None) -> str:
    """Runs what must be refused; returns the one line."""
    done = run(args, processes=processes, env=env)
    lines = [line for line in done.stderr.splitlines() if line.startswith("distvgg: error")]
    assert len(lines) == 1, done.stderr
    if processes == 1:
        assert done.returncode == 2
        assert done.stderr.strip() == lines[0]
    else:
        # The launcher turns any exit code into 1 and adds a traceback of its own, not ours.
        assert done.returncode == 1
        assert f'File "{ROOT}/distvgg/' not in done.stderr
    return lines[0]


def test_help_answers_within_a_second_and_imports_nothing_heavy() -> None:
    probe = (
        "import sys, time; t = time.process_time()\n"
        "import distvgg.cli\n"
        "try: distvgg.cli.main(['train', 'quickstart', '--help'])\n"
        "except SystemExit: pass\n"
        "print(time.process_time() - t, *sorted({'torch', 'accelerate', 'datasets', 'wandb'}"
        " & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=True, cwd=ROOT
    )
    *_, last = done.stdout.splitlines()
    seconds, *heavy = last.split()
    assert not heavy
    assert float(seconds) < 1
    assert "--train.global_batch_size INT" in done.stdout
    # The recipe's own values are the defaults shown.
    assert re.search(r"--model\.depth \{11,13,16,19\}[^-]*\(default: 11\)", done.stdout)


@pytest.mark.parametrize(
    "optimizer", ["sgd", pytest.param("adamw", marks=pytest.mark.variant), "muon"]
)
def test_a_training_imports_nothing_that_only_compilation_and_sharding_need(
    tmp_path: Path, optimizer: str
) -> None:
    """They would take 1.4 s at each start (torch 2.14, accelerate 1.15)."""
    unused = {"torch._dynamo", "torch._inductor", "torch.distributed.tensor", "sympy"}
    words = [*tiny(tmp_path / "run"), "--optim.name", optimizer]
    probe = (
        "import sys, distvgg.cli\n"
        f"code = distvgg.cli.main({words})\n"
        f"print(code, sorted({unused} & set(sys.modules)))"
    )
    done = run((), program=("-c", probe))
    assert done.stdout.splitlines()[-1:] == ["0 []"], done.stderr


def test_the_version_is_that_of_the_package() -> None:
    assert run(["--version"]).stdout == f"distvgg {distvgg.__version__}\n"


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"]])
def test_usage(args: list[str]) -> None:
    done = run(args)
    assert done.returncode == (0 if args else 2)
    assert "distvgg train RECIPE --help" in done.stdout
    assert "quickstart" in done.stdout


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["trian"], "no command 'trian': give one of train, evaluate, replay, predict, export"),
        (["train"], "give one recipe, not none: one of best, debug, fast, imagenet"),
        (["train", "fast", "more"], "give one recipe, not fast more"),
        (["train", "quikstart"], "did you mean quickstart?"),
        (["train", "fast", "--train.epochs"], "--train.epochs needs a value"),
        (["train", "fast", "--train.epoch", "3"], "did you mean train.epochs?"),
        (["train", "fast", "--optim.lr=-1"], "optim.lr must be greater than 0"),
        (["train", "fast", "--train.global-batch-size", "100"], "not a multiple"),
        (["train", "fast", "--data.path", "/nowhere"], "/nowhere is not a folder"),
        (["train", "quickstart", "--train.precision", "fp16"], "fp16 needs a CUDA GPU"),
        (["train", "quickstart", "--data.val_size", "10000"], "data.val_size 10000 leaves nothing"),
        (["doctor", "fast", "--train.epoch", "3"], "did you mean train.epochs?"),
        (["train", "fast", "--rundir", "x"], "no option --rundir, did you mean --run-dir?"),
        (["train", "fast", "--seed"], "--seed needs a value: --seed VALUE"),
        (["doctor", "--prepare"], "give one recipe, not none"),
        (["bench", "quikstart"], "did you mean quickstart?"),
        (["bench", "--gpus", "8"], "no option --gpus, did you mean --gpu?: give one of json, gpu"),
        (["bench", "--gpu", "v100"], "--gpu must be 'h100' or 'a100'"),
        (["bench", "--images_per_sec", "0"], "--images_per_sec must be greater than"),
        (["bench", "--images_per_sec", "1e30"], "--images_per_sec must be less than"),
        (["bench", "--images_per_sec", "1000", "--fixed_ms", "600"], "fixed_ms 600 must be less"),
        (["evaluate"], "missing RUN_DIR"),
        (["evaluate", "/nowhere"], "is not the folder of a finished run"),
        (["evaluate", "x", "--split", "all"], "--split: invalid choice: 'all'"),
        (["predict", "x"], "missing IMAGE"),
        (["predict", "x", "y", "--tops", "3"], "no option --tops, did you mean --top?"),
        (["predict", "x", "y", "--top", "many"], "--top: invalid int value: 'many'"),
        (["predict", "/nowhere", f"{ROOT}/docs"], "run folder /nowhere does not exist"),
        (["compare"], "missing RUN_DIR"),
        (["compare", "x", "--sort", "test"], "no option --sort: give one of out"),
        (["compare", "x", "--out"], "--out needs a value"),
        (["compare", "/nowhere"], "run folder /nowhere does not exist"),
        (["compare", "x", "--out="], "is no name of a file"),
        (["launch", "--", "nosuch"], "no recipe 'nosuch'"),
        (["launch", "--processes", "-1", "--", "debug"], "--processes must be greater than or"),
        (["launch", "--port", "99999", "--", "debug"], "--port must be less than or equal"),
        (["sweep", "debug", "--sweep", "seed=0,1", "--task", "-1"], "expected --task >= 0"),
        (["sweep", "debug", "--sweep", "train.epochs.x=1"], "unknown key train.epochs.x"),
        (["train", "fast", "--optim.lr", "-1e-3"], "optim.lr must be greater than 0"),
        (["bench", "fast", "--gpu", "none", "--jitter", "2"], "--jitter must be less than"),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else " ".join(value[:3]),
)
def test_mistakes_are_one_line_and_exit_code_2(
    args: list[str], expected: str, tmp_path: Path
) -> None:
    if args[0] == "train":
        args = [*args, "--run-dir", str(tmp_path / "run")]
    assert expected in mistake(*args)


@pytest.mark.parametrize("name", ["file", "x" * 300])
def test_a_run_folder_that_cannot_be_is_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    line = mistake("train", "debug", "--run-dir", str(tmp_path / name))
    assert re.search(r"cannot (write run folder|read) \S+", line)


def test_the_help_of_a_recipe_is_found_wherever_its_name_stands() -> None:
    for words in (["fast", "--help"], ["--help", "fast"], ["--seed", "1", "fast", "-h"]):
        assert "(default: muon)" in run(["train", *words]).stdout
    done = run(["launch", "--", "fsat.yaml", "--help"])
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_options_of_version_0_1_are_accepted_where_they_were_off() -> None:
    old = ["--train.gradient_compression", "no", "--train.start_size", "none"]
    assert run(["config", "debug", *old]).stdout == run(["config", "debug"]).stdout


def test_a_reader_that_has_read_enough_is_no_error() -> None:
    words = f"{sys.executable} -m distvgg config fast | true"
    done = subprocess.run(["bash", "-c", words], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""


def test_mistakes_under_the_launcher_are_told_once_and_leave_no_process(tmp_path: Path) -> None:
    args = ("train", "quickstart", "--run-dir", str(tmp_path / "run"), *TINY)
    line = mistake(*args, "--train.micro_batch_size", "64", processes=2)
    assert "2 processes do not divide the 1 micro-batches" in line
    deadline = time.monotonic() + 5
    while left := [p for p in processes_naming(str(tmp_path)) if time.monotonic() < deadline]:
        time.sleep(0.1)
    assert not left


def test_data_that_cannot_be_read_are_told_once_and_stop_no_later_launch(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "set" / "train" / name).mkdir(parents=True)
        (tmp_path / "set" / "train" / name / "x.jpg").write_text("no image")
    data = ("--data.name", "custom", "--data.path", str(tmp_path / "set"))
    args = ("train", "quickstart", "--run-dir", str(tmp_path / "run"), *TINY, *data)
    line = mistake(*args, processes=2)
    assert "2 of 2 images: image 0" in line
    assert not (tmp_path / "run" / "STOP").exists()


def processes_naming(text: str) -> list[str]:
    """The process ids whose command line contains a text."""
    return [
        path.parent.name
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if text.encode() in read_bytes(path)
    ]


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # the process has ended
        return b""


@pytest.mark.skipif(
    Version(version("accelerate")) < Version("1.15"),
    reason="accelerate 1.7 forms a group of these processes",
)
def test_several_processes_that_are_each_alone_are_refused(tmp_path: Path) -> None:
    """What torchrun starts on a machine without GPU."""
    args = ("train", "quickstart", "--run-dir", str(tmp_path / "run"))
    env = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    env |= {"ACCELERATE_USE_CPU": "false"}
    line = mistake(*args, env=env)
    assert "WORLD_SIZE is 2 but no process group was formed" in line
    assert "ACCELERATE_USE_CPU=true" in line


def test_a_finished_run_is_shown_not_repeated_and_another_config_refused(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "run"  # a name that is also that of a part of a run
    args = ("--train.epochs", "0.2", "--track.report", "true")
    first = train(folder, *args)
    before = (folder / "metrics.jsonl").stat().st_mtime_ns
    # The folder's own config is a recipe.
    done = run(["train", str(folder / "config.yaml"), "--run-dir", str(folder)])
    assert done.returncode == 0, done.stderr
    again = done.stdout
    assert first.strip().endswith(again.strip())
    assert f"  weights: {folder}/model.safetensors" in again
    assert f"\n  report: {folder}/report.html\n" in again
    assert (folder / "metrics.jsonl").stat().st_mtime_ns == before
    line = mistake("train", "quickstart", "--run-dir", str(folder), "--seed", "7")
    assert "seed is 0 there, 7 here" in line
    # Evaluation gives the numbers of the run again.
    done = run(["evaluate", str(folder)])
    test = rows(folder)[-1]
    assert (
        f"test loss {test['test/loss']:.3f}, test top1 {100 * test['test/top1']:.2f}%"
        in done.stdout
    )
    (folder / "model.safetensors").write_bytes(b"not weights")
    assert "cannot be loaded" in mistake("evaluate", str(folder))
    (folder / "result.json").write_text("{")
    assert "result.json is damaged: delete it" in mistake(
        "train", str(folder / "config.yaml"), "--run-dir", str(folder)
    )
    # So does its checkpoint on validation, and is verified first.
    (checkpoint,) = (folder / "checkpoints").iterdir()
    val = ("evaluate", str(checkpoint), "--split", "val")
    assert f"val top1 {100 * rows(folder)[-2]['val/top1']:.2f}%" in run(val).stdout
    (checkpoint / "state.safetensors").write_bytes(b"")
    assert "cannot be loaded: state.safetensors has 0 of" in mistake(*val)


def test_the_default_run_folder_is_named_by_recipe_and_values(tmp_path: Path) -> None:
    words = [*TINY, "--train.epochs", "0.1"]
    assert run(["train", "quickstart", *words], cwd=tmp_path).returncode == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"quickstart-[0-9a-f]{8}", folder.name)
    values = dict(zip((w.removeprefix("--") for w in words[::2]), words[1::2], strict=True))
    same, other = load("quickstart", values), load("quickstart", values | {"seed": "1"})
    assert default_run_dir("quickstart", same).name == folder.name
    assert default_run_dir("quickstart", other).name != folder.name


def test_a_run_folder_named_by_version_0_1_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`quickstart-102fc94c` is what 0.1 made of the recipe: a hash of all fields that it had."""
    monkeypatch.chdir(tmp_path)
    config = load("quickstart")
    new = default_run_dir("quickstart", config)
    assert new.name != "quickstart-102fc94c"
    Path("runs/quickstart-102fc94c").mkdir(parents=True)
    assert default_run_dir("quickstart", config) == Path("runs/quickstart-102fc94c")
    new.mkdir()
    assert default_run_dir("quickstart", config) == new


@pytest.mark.parametrize(
    "command",
    [
        *("train", "predict", "replay", "report", "config", "summary", "doctor"),
        *("sweep", "bench", "launch", "sync"),
    ],
)
def test_every_command_explains_its_options(command: str) -> None:
    done = run([command, "--help"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: distvgg {command}")


def test_a_switch_takes_no_value_or_one_and_names_may_have_hyphens() -> None:
    words = ["--track.wandb=false", "--train.global-batch-size", "512", "--train.compile"]
    done = run(["config", "--seed", "3", *words, "debug"])
    assert done.returncode == 0, done.stderr
    config = yaml.safe_load(done.stdout)
    assert (config["train"]["compile"], config["track"]["wandb"]) == (True, False)
    assert (config["train"]["global_batch_size"], config["seed"]) == (512, 3)


@pytest.mark.parametrize(
    "words",
    [
        ["debug", "--train.compile"],
        ["--train.compile", "debug"],
        ["--train.compile", "--seed", "3", "debug"],
        ["debug", "--train.compile", "--track.wandb", "false"],
        ["debug", "--train.compile", "True"],
        ["--train.compile", "--augment.trivial", "debug"],
    ],
    ids=" ".join,
)
def test_a_switch_without_a_value_is_true_wherever_it_stands(words: list[str]) -> None:
    done = run(["config", *words])
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["train"]["compile"] is True

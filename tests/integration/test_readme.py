"""The README's commands, run as they are written, in a copy of the tree."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from processes import ROOT, run

SETUP, TESTS = re.search(r"```bash\n(\S+)\n(\S+)\n```", (ROOT / "README.md").read_text()).groups()


def clone(folder: Path) -> Path:
    """Copies the files that git would clone, changes that are not committed included."""
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for name in names:
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone, whose scripts find the environment that runs this test active."""
    return clone(tmp_path_factory.mktemp("clone") / "distvgg")


def shell(
    command: str,
    checkout: Path,
    timeout: float = 240,
    python: Path | None = Path(sys.executable),
) -> subprocess.CompletedProcess[str]:
    """Runs a command in a checkout; `python` is that of the active environment, if any."""
    clean = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("WANDB_", "ACCELERATE_", "DISTVGG_VENV"))
    }
    home = checkout.parent / "home"
    path = os.pathsep.join(filter(None, [python and str(python.parent), os.environ["PATH"]]))
    return subprocess.run(
        ["bash", "-c", command],
        cwd=checkout,
        env=clean | {"HOME": str(home), "PATH": path},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=timeout,
    )


def pattern(line: str) -> str:
    """A line of a terminal without its numbers and hashes."""
    return re.sub(r"\b[0-9a-f]{8}\b|[\d.,]+", "N", line)


@pytest.mark.parametrize(
    "epochs", [pytest.param("", marks=pytest.mark.long), " --train.epochs 0.5"]
)
def test_the_first_command_trains_over_two_processes_and_says_where_the_curves_are(
    checkout: Path, epochs: str
) -> None:
    shutil.rmtree(checkout / "runs", ignore_errors=True)
    command = SETUP + epochs
    done = shell(command, checkout)
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stdout
    assert re.search(r"W&B: offline.*distvgg sync", done.stdout)
    (run_dir,) = (checkout / "runs").iterdir()
    assert f"curves: runs/{run_dir.name}/metrics.jsonl" in done.stdout
    accuracy = re.search(r"  val   loss .*, top1 ([\d.]+)%", done.stdout)
    assert accuracy is not None
    if not epochs:  # learnable: far above the 1% of chance, and the 60% that the set was made for
        assert float(accuracy[1]) > 60

    printed = {pattern(line) for line in done.stdout.splitlines()}
    sample = re.search(r"it prints\n\n```\n([\s\S]+?)```", (ROOT / "README.md").read_text())
    assert sample
    lines = [line for line in sample[1].splitlines() if line != "..."]
    assert len(lines) > 4
    assert [line for line in lines if pattern(line) not in printed] == []

    again = shell(command, checkout, timeout=60)
    assert again.returncode == 0
    assert again.stdout.strip() == done.stdout[done.stdout.index("done: ") :].strip()


def test_the_second_command_runs_the_tests(checkout: Path) -> None:
    done = shell(f"{TESTS} -q tests/unit/test_requirements.py", checkout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ passed", done.stdout)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_on_a_fresh_machine_the_first_command_makes_its_own_environment(tmp_path: Path) -> None:
    fresh = clone(tmp_path / "distvgg")
    done = shell(f"{SETUP} --train.epochs 0.5", fresh, timeout=1800, python=None)
    assert done.returncode == 0, done.stderr
    assert "Making a virtual environment" in done.stdout
    assert "done: " in done.stdout
    again = shell(f"{SETUP} --train.epochs 0.5", fresh, timeout=60, python=None)
    assert "Installing" not in again.stdout


@pytest.mark.parametrize(
    "flags", [pytest.param("", marks=pytest.mark.variant), "--profile --train.overfit_batches 2"]
)
def test_debugging_trains_on_one_process_without_trackers(checkout: Path, flags: str) -> None:
    done = shell(
        f"./launch/single_gpu.sh quickstart --train.epochs 0.1 --run-dir runs/debug{len(flags)} "
        + flags,
        checkout,
    )
    assert done.returncode == 0, done.stderr
    assert "1 process" in done.stdout
    assert not (checkout / "runs" / f"debug{len(flags)}" / "wandb").exists()
    assert ("5 of train.profile_steps" in done.stdout) is ("--profile" in flags)
    assert ("on 2 fixed batches" in done.stdout) is ("overfit" in flags)


@pytest.mark.parametrize("script", ["multi_gpu.sh", "single_gpu.sh"])
def test_a_mistake_is_one_line_before_the_launcher_starts(checkout: Path, script: str) -> None:
    done = shell(f"./launch/{script} quickstart --train.epoch 1", checkout)
    assert done.returncode == 2
    which, line = done.stderr.splitlines()
    assert which == f"distvgg: {sys.executable}, as it is"
    assert "did you mean train.epochs?" in line


def test_every_config_field_and_recipe_in_the_readme_exists() -> None:
    from distvgg.config import Config
    from distvgg.recipe import recipe_names

    text = (ROOT / "README.md").read_text()
    for field in re.findall(r"--((?:data|model|train|optim|track)\.\w+)", text):
        assert field in Config().flat()
    for recipe in re.findall(r"(?:multi_gpu\.sh|single_gpu\.sh|distvgg train) (\w+)", text):
        assert recipe in [*recipe_names(), "RECIPE"]


def test_sample_of_bench_is_what_it_prints() -> None:
    text = (ROOT / "docs" / "performance.md").read_text()
    sample = re.search(r"```\n\$ distvgg (bench .+)\n([\s\S]+?)```", text)
    assert sample
    done = run(sample[1].split(), timeout=120)
    printed = done.stdout.splitlines()
    missing = [line for line in sample[2].splitlines() if line != "..." and line not in printed]
    assert missing == [], done.stdout + done.stderr

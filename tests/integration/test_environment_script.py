"""launch/environment.sh: which interpreter the scripts use, and what they say if they cannot."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from processes import ROOT

# Prints the interpreter that a script would use, without running anything with it.
SCRIPT = 'source launch/environment.sh; use_environment; echo "uses $PYTHON"'


def chosen(
    *path: Path | str, extra: str = "", **env: str | Path
) -> subprocess.CompletedProcess[str]:
    """Runs the script with folders first on PATH, and without any package index."""
    chosen_by_user = ("PIP_", "DISTVGG_VENV")
    clean = {
        k: v for k, v in os.environ.items() if k != "PYTHON" and not k.startswith(chosen_by_user)
    }
    paths = os.pathsep.join([*map(str, path), "/usr/bin", "/bin"])
    settings = {"PATH": paths, "PIP_NO_INDEX": "1", "PYTHONNOUSERSITE": ""}
    return subprocess.run(
        ["bash", "-c", SCRIPT.replace("use_environment", f"use_environment {extra}")],
        cwd=ROOT,
        env=clean | settings | {k: str(v) for k, v in env.items()},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder with a `python` of the interpreter under this environment, which has no packages."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "python").symlink_to(Path(sys.base_prefix) / "bin" / "python3")
    return folder


def site_package(tmp_path: Path, name: str, version: str) -> Path:
    """A user base that has a package by its metadata, as a site's module has torch."""
    minor = f"python{sys.version_info.major}.{sys.version_info.minor}"
    folder = tmp_path / "site" / "lib" / minor / "site-packages"
    metadata = folder / f"{name}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return tmp_path / "site"


def test_active_environment_is_used_as_it_is() -> None:
    active = Path(sys.executable).parent
    done = chosen(active, extra="dev")
    assert (done.returncode, done.stdout) == (0, f"uses {active}/python\n"), done.stderr
    expected = "" if active.parent == ROOT / ".venv" else f"distvgg: {active}/python, as it is\n"
    assert done.stderr == expected


def test_torch_of_the_site_is_kept(tmp_path: Path, base: Path) -> None:
    site, venv = site_package(tmp_path, "torch", "99.1"), tmp_path / "venv"
    done = chosen(base, DISTVGG_VENV=venv, PYTHONUSERBASE=site)
    said = f"Making a virtual environment in {venv} on top of {base}/python, whose torch it uses"
    assert said in done.stdout, done.stdout + done.stderr
    assert (venv / "constraints.txt").read_text() == "torch==99.1\n"
    (line,) = done.stderr.splitlines()
    assert line.startswith("distvgg: error: pip reaches no package index with what is missing (ERR")
    assert (done.returncode, "torch==" in line) == (2, False)


@pytest.mark.variant
def test_old_torch_of_the_site_is_not_used(tmp_path: Path, base: Path) -> None:
    site, venv = site_package(tmp_path, "torch", "1.13.1"), tmp_path / "venv"
    done = chosen(base, DISTVGG_VENV=venv, PYTHONUSERBASE=site)
    assert f"Making a virtual environment in {venv}\n" in done.stdout
    assert (venv / "constraints.txt").read_text() == ""
    assert done.returncode == 2


@pytest.mark.variant
def test_active_environment_without_packages_is_no_base(tmp_path: Path, base: Path) -> None:
    subprocess.run([base / "python", "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    done = chosen(tmp_path / "bare" / "bin", base, DISTVGG_VENV=tmp_path / "venv")
    assert f"Making a virtual environment in {tmp_path / 'venv'}\n" in done.stdout, done.stderr


def test_no_room_is_one_line(tmp_path: Path, base: Path) -> None:
    venv = tmp_path / "venv"
    pip = venv / "bin" / "python"
    pip.parent.mkdir(parents=True)
    pip.write_text("#!/bin/sh\necho 'ERROR: [Errno 28] No space left on device' >&2; exit 1\n")
    pip.chmod(0o755)
    done = chosen(base, DISTVGG_VENV=venv)
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"distvgg: error: no room for the environment in {venv} (")
    assert line.endswith("set DISTVGG_VENV to a folder with more room")


def test_no_python_is_one_line(tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "cat", "cksum", "dirname", "flock", "mkdir"):
        (tools / name).symlink_to(str(shutil.which(name)))
    done = chosen(PATH=tools, DISTVGG_VENV=tmp_path / "venv")
    (line,) = done.stderr.splitlines()
    assert line.startswith("distvgg: error: no Python 3.11 or newer with venv: install one")
    assert done.returncode == 2

"""Versions that are missing or too old, a line each."""

import sys
from importlib import metadata
from pathlib import Path

import pytest

from distvgg import requirements


def with_versions(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if versions.get(name) == "none":
            raise metadata.PackageNotFoundError(name)
        return versions.get(name) or real(name)

    monkeypatch.setattr(metadata, "version", version)


def lowest(name: str) -> str:
    return dict(requirements._requirements(""))[name]


def test_this_environment_meets_all_requirements() -> None:
    assert requirements.unmet("tensorboard") == []


def test_old_and_missing_packages_are_named_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_versions(monkeypatch, torch="1.13.1+cu117", accelerate="none")
    torch, accelerate = lowest("torch"), lowest("accelerate")
    assert requirements.unmet() == [
        f"torch 1.13.1+cu117 is too old (expected {torch} or newer): pip install 'torch>={torch}'",
        f"accelerate is not installed: pip install 'accelerate>={accelerate}'",
    ]
    assert len(requirements.unmet(only=["torch"])) == 1


@pytest.mark.parametrize("suffix", ["", ".0", "+cu130", "a0+ecf3bae.nv25.02", ".post1"])
def test_builds_of_the_lowest_version_are_new_enough(
    monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    with_versions(monkeypatch, torch=lowest("torch") + suffix)
    assert requirements.unmet() == []


def test_old_python_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 8, 18))
    (line,) = requirements.unmet()
    assert line == f"Python 3.8 is too old (expected 3.11 or newer): {sys.executable}"


def test_installed_package_has_the_requirements_of_the_checkout(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = requirements._requirements("tensorboard")
    monkeypatch.setattr(requirements, "__file__", str(tmp_path / "distvgg" / "requirements.py"))
    assert requirements._requirements("tensorboard") == expected


def test_python_bound_is_that_of_setup_cfg() -> None:
    text = (Path(requirements.__file__).parent.parent / "setup.cfg").read_text()
    assert "python_requires = >={}.{}\n".format(*requirements.PYTHON) in text

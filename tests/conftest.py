"""Fixtures that several test files share. Nothing here is imported by the package."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# How long an example takes says how busy the machine is.
# A run of CI tries the same examples again; others look for new ones.
settings.register_profile("distvgg", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("distvgg")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Makes what a test draws from the global generator the same in each run."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data cache of this session's own, decoded once, that all tests and processes share."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["DISTVGG_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def cifar100() -> str:
    """The folder of the real CIFAR-100 as Parquet; skips where there is none."""
    path = os.environ.get("DISTVGG_CIFAR100")
    if not path:
        pytest.skip("set DISTVGG_CIFAR100 to a folder with CIFAR-100 as Parquet to run this")
    return path


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Makes these tests' processes those of a user whom W&B does not know, and who cannot reach it
    but where a test says so."""
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ:
            if name.startswith(("WANDB_", "XDG_")) or name == "NETRC":
                patch.delenv(name)
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        patch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")
        yield

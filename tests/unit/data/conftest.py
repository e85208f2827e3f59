"""A cold cache, a small set, and the real one."""

from pathlib import Path

import pytest

from distvgg.config import DataConfig
from distvgg.data.cache import load_dataset
from distvgg.data.dataset import Dataset
from made_data import made_rows, write_parquet


@pytest.fixture
def cold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("DISTVGG_CACHE", str(folder))
    return folder


@pytest.fixture
def parquet(tmp_path: Path) -> str:
    """A small set without fault: ten classes, 20 train and 10 test images."""
    return write_parquet(tmp_path / "set", made_rows(20, 1), made_rows(10, 2))


@pytest.fixture(scope="module")
def real(cache: Path, cifar100: str) -> Dataset:
    return load_dataset(DataConfig(path=cifar100))

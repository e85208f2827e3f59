"""A start over many files reads directories alone, and still notices what was added or removed."""

import os
from pathlib import Path

import pytest

from distvgg.data import cache, stamps
from distvgg.data.cache import cache_entry
from made_data import custom

OLD = 10**18  # ns: in 2001


def settle(root: Path) -> None:
    for folder, _, _ in os.walk(root):
        os.utime(folder, ns=(OLD, OLD))


def test_a_stamp_stands_for_a_walk_until_a_directory_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTVGG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "MIN_FILES", 6)
    monkeypatch.setattr(stamps, "SAMPLE", 2)
    root = tmp_path / "set"
    for i in range(6):
        path = root / "train" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"1")
    data = custom(str(root))
    first = cache_entry(data)
    assert not list(tmp_path.glob("cache/stamps/*"))  # directories of this moment may change unseen
    settle(root)
    assert cache_entry(data) == first
    (stamp,) = tmp_path.glob("cache/stamps/*.json")

    with monkeypatch.context() as patch:
        patch.setattr(os, "walk", None)  # any walk fails
        assert cache_entry(data) == first
    assert cache_entry(data.model_copy(update={"resize": 32})) != first

    (root / "train" / "a" / "new.png").write_bytes(b"1")
    grown = cache_entry(data)
    assert grown != first
    (root / "train" / "a" / "new.png").unlink()
    assert cache_entry(data) == first

    settle(root)
    cache_entry(data)
    (root / "train" / "a" / "2.png").write_bytes(b"12")  # in place: no directory changes
    assert cache_entry(data) == first
    (root / "train" / "a").touch()
    edited = cache_entry(data)
    assert edited != first

    settle(root)
    cache_entry(data)
    for file in root.glob("train/*/*"):  # all in place: the sample shows it
        file.write_bytes(b"123")
    assert cache_entry(data) not in (first, edited)

    settle(root)
    stamp.write_text("damaged")
    assert cache_entry(data) != first


def test_a_few_files_are_walked_so_that_an_edit_in_place_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTVGG_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "set" / "train" / "a" / "0.png"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"1")
    settle(tmp_path / "set")
    first = cache_entry(custom(str(tmp_path / "set")))
    file.write_bytes(b"12")
    assert cache_entry(custom(str(tmp_path / "set"))) != first

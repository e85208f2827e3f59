"""Two sets of disjoint classes, from a made CIFAR-100."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from benchmarks.split_classes import split
from made_data import made_rows, write_parquet


def test_no_image_is_in_two_files_and_classes_have_their_images(tmp_path: Path) -> None:
    train = [i % 100 for i in range(12_500)]  # 125 images of each class, one small image
    (image,) = made_rows(1)["img"]
    rows: dict[str, Any] = {"img": [{**image, "path": str(i)} for i in range(len(train))]}
    test = {"img": rows["img"][:300], "fine_label": train[:300]}
    write_parquet(tmp_path / "set", rows | {"fine_label": train}, test)
    split(tmp_path / "set", tmp_path, images=20)

    found = {
        str(path.relative_to(tmp_path)): pq.read_table(path).to_pylist()
        for path in tmp_path.glob("*/*.parquet")
        if path.parent.name != "set"
    }
    assert {name: len(rows) for name, rows in found.items()} == {
        "first/train.parquet": 6250,
        "first/test.parquet": 150,
        "second/train.parquet": 1000,
        "second/val.parquet": 5000,
        "second/test.parquet": 150,
    }
    for name, chosen in found.items():
        offset = 50 * name.startswith("second")
        assert {row["label"] for row in chosen} == set(range(50))
        assert all(int(row["img"]["path"]) % 100 == row["label"] + offset for row in chosen)
    drawn = [
        row["img"]["path"]
        for name, chosen in found.items()
        for row in chosen
        if not name.endswith("test.parquet")
    ]
    assert len(set(drawn)) == len(drawn)

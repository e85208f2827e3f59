"""The confusion matrix: pairs, classes and superclasses of a matrix counted by hand; its file."""

import subprocess
import sys
from pathlib import Path

import pytest

from distvgg.errors import UserError
from distvgg.runs.confusion import (
    Confusion,
    by_superclass,
    class_accuracy,
    describe_pairs,
    read_confusion,
    save_confusion,
    worst_pairs,
)
from processes import ROOT

NAMES = ["cat", "dog", "oak", "elm", "yew"]
COUNTS = [
    [5, 3, 0, 0, 2],
    [1, 9, 0, 0, 0],
    [0, 0, 6, 3, 1],
    [0, 1, 2, 7, 0],
    [0, 0, 0, 0, 0],
]
CONFUSION = Confusion("test", NAMES, COUNTS, ["animals", "trees"], [0, 0, 1, 1, 1])


def test_the_worst_pairs_come_first_and_equals_in_the_order_of_classes() -> None:
    expected = [
        *(("cat", "dog", 3), ("oak", "elm", 3), ("cat", "yew", 2), ("elm", "oak", 2)),
        *(("dog", "cat", 1), ("oak", "yew", 1), ("elm", "dog", 1)),
    ]
    assert worst_pairs(CONFUSION, 100) == expected
    assert worst_pairs(CONFUSION, 3) == expected[:3]


def test_classes_from_the_worst_on_without_those_that_have_no_image() -> None:
    assert list(class_accuracy(CONFUSION).items()) == [
        *(("cat", 0.5), ("oak", 0.6), ("elm", 0.7), ("dog", 0.9)),
    ]


def test_superclasses_hold_the_same_images() -> None:
    coarse = by_superclass(CONFUSION)
    assert coarse is not None
    assert coarse.counts == [[18, 2], [1, 19]]
    assert worst_pairs(coarse) == [("animals", "trees", 2), ("trees", "animals", 1)]
    assert by_superclass(coarse) is None


def test_pairs_are_told_in_two_columns() -> None:
    assert describe_pairs(CONFUSION, "class", 5).splitlines() == [
        "class taken for another, and how many images:",
        "  cat as dog     3  elm as oak     2",
        "  oak as elm     3  dog as cat     1",
        "  cat as yew     2",
    ]
    right = Confusion("val", ["a", "b"], [[1, 0], [0, 2]], [], None)
    assert describe_pairs(right, "class") == "no class was taken for another"


def test_its_file_holds_it_whole_or_is_refused(tmp_path: Path) -> None:
    assert read_confusion(tmp_path) is None
    save_confusion(CONFUSION, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["confusion.json"]
    assert read_confusion(tmp_path) == CONFUSION
    for text in ("{", '{"split": "test", "class_names": ["a"], "counts": []}', "[]"):
        (tmp_path / "confusion.json").write_text(text)
        with pytest.raises(UserError, match=r"confusion\.json is damaged: delete it"):
            read_confusion(tmp_path)


def test_reading_one_imports_no_torch() -> None:
    probe = "import sys, distvgg.runs.confusion; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "False"

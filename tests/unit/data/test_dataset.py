"""The split of a dataset into training and validation images."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distvgg.config import DataConfig
from distvgg.data.dataset import Dataset, train_val_indices
from distvgg.errors import UserError


def test_the_real_split_holds_out_50_of_each_class(real: Dataset) -> None:
    train, val = train_val_indices(real.train.labels, DataConfig())
    assert np.bincount(real.train.labels[train]).tolist() == [450] * 100
    assert np.bincount(real.train.labels[val]).tolist() == [50] * 100
    subset, _ = train_val_indices(real.train.labels, DataConfig(train_size=1000))
    assert np.bincount(real.train.labels[subset]).tolist() == [10] * 100


@st.composite
def labels_and_sizes(draw: st.DrawFn) -> tuple[np.ndarray, int, int]:
    labels = np.array(draw(st.lists(st.integers(0, 6) | st.just(0), min_size=3, max_size=200)))
    val_size = draw(st.integers(1, len(labels) - 1))
    return labels, val_size, draw(st.integers(1, len(labels) - val_size))


@given(labels_and_sizes(), st.integers(0, 99))
def test_a_split_is_stratified_disjoint_exhaustive_and_seeded(
    drawn: tuple[np.ndarray, int, int], seed: int
) -> None:
    labels, val_size, train_size = drawn
    config = DataConfig(val_size=val_size, split_seed=seed)
    train, val = train_val_indices(labels, config)
    assert len(val) == val_size
    assert sorted([*train, *val]) == list(range(len(labels)))
    again, _ = train_val_indices(labels, config)
    assert np.array_equal(train, again)

    subset, same_val = train_val_indices(
        labels, DataConfig(val_size=val_size, split_seed=seed, train_size=train_size)
    )
    assert len(subset) == train_size
    assert set(subset) <= set(train)
    assert np.array_equal(val, same_val)
    for part, whole in ((val, np.arange(len(labels))), (subset, train)):
        for label in np.unique(labels):
            fair = len(part) * np.mean(labels[whole] == label)
            assert abs(np.sum(labels[part] == label) - fair) < 1


def test_another_split_seed_is_another_split() -> None:
    labels = np.arange(1000) % 10
    splits = [train_val_indices(labels, DataConfig(val_size=100, split_seed=s))[1] for s in (0, 1)]
    assert len(np.intersect1d(*splits)) < 30


def test_sizes_beyond_the_data_are_refused() -> None:
    labels = np.arange(100) % 10
    with pytest.raises(UserError, match=r"data\.val_size 100 leaves nothing.* 100 images"):
        train_val_indices(labels, DataConfig(val_size=100))
    with pytest.raises(UserError, match=r"data\.train_size 91 is more than the 90 .*val_size 10"):
        train_val_indices(labels, DataConfig(val_size=10, train_size=91))

"""The synthetic set."""

from pathlib import Path

import numpy as np

from distvgg.config import DataConfig
from distvgg.data import cifar, synthetic
from distvgg.data.cache import load_dataset
from made_data import CIFAR100_NAMES


def test_the_synthetic_set_is_balanced_reproducible_and_no_cifar(
    cache: Path, tmp_path: Path
) -> None:
    dataset = load_dataset(DataConfig(name="synthetic"))
    assert dataset.test is not None
    assert dataset.superclass_of is not None
    assert (dataset.num_classes, len(dataset.superclass_names)) == (100, 20)
    assert np.bincount(dataset.superclass_of).tolist() == [5] * 20
    for split, n in ((dataset.train, 100), (dataset.test, 20)):
        assert split.images.shape[1:] == (32, 32, 3)
        assert np.bincount(split.labels).tolist() == [n] * 100
        assert split.superclasses is not None
        assert np.array_equal(split.superclasses, dataset.superclass_of[split.labels])
    names = {*dataset.class_names, *dataset.superclass_names}
    assert len(names) == 120
    assert not names & {*CIFAR100_NAMES, *cifar.CIFAR100_SUPERCLASSES}

    (entry,) = (p for p in cache.glob("synthetic-*") if p.is_dir())
    synthetic.write(tmp_path)
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (entry / file.name).read_bytes(), file.name

"""`import distvgg`: what it offers, and what it does not load."""

import subprocess
import sys

import pytest

import distvgg


def test_the_public_names_are_imported_when_they_are_used() -> None:
    probe = (
        "import sys, distvgg; distvgg.load_config('debug'); print('torch' in sys.modules);"
        " print(all(hasattr(distvgg, name) for name in distvgg.__all__))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'fit'"):
        _ = distvgg.fit

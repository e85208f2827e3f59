"""Versions of Python and of packages, compared with those that distvgg needs.

    python -m distvgg.requirements [--extra NAME] [--only PACKAGE ...]

Prints a line for each package that is missing or too old. The exit code is 1 if there is any.

This module uses the standard library alone. With `__init__` and `__main__`, it keeps to the syntax
of Python 3.6, so that an interpreter that is too old gets a line instead of a syntax error.
"""

import argparse
import configparser
import re
import sys
from pathlib import Path
from typing import Sequence

PYTHON = (3, 11)
# `.dev0` admits the builds of a vendor, such as 2.8.0a0+34c6371d24.nv25.08.
_REQUIREMENT = re.compile(r"([A-Za-z0-9_.-]+?)(?:>=([0-9.]+?)(?:\.dev0)?)?")


def unmet(extra: str = "", only: Sequence[str] = ()) -> "list[str]":
    """Lists what is missing or too old, a line each.

    Args:
        extra: name of an extra, whose requirements are checked as well.
        only: the packages to check; by default all.
    """
    if sys.version_info < PYTHON:
        version = ".".join(map(str, sys.version_info[:2]))
        wanted = ".".join(map(str, PYTHON))
        return [f"Python {version} is too old (expected {wanted} or newer): {sys.executable}"]
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as version_of

    lines = []
    for name, lowest in _requirements(extra):
        if only and name not in only:
            continue
        remedy = f"pip install '{name}>={lowest}'" if lowest else f"pip install {name}"
        try:
            found = version_of(name)
            if not found:  # half removed
                raise PackageNotFoundError(name)
        except PackageNotFoundError:
            lines.append(f"{name} is not installed: {remedy}")
            continue
        if _release(found) < _release(lowest):
            lines.append(f"{name} {found} is too old (expected {lowest} or newer): {remedy}")
    return lines


def _requirements(extra: str) -> "list[tuple[str, str]]":
    """Returns (package, lowest version) from setup.cfg of a checkout, else from the metadata."""
    from importlib.metadata import requires

    setup = configparser.ConfigParser()
    setup.read(Path(__file__).resolve().parent.parent / "setup.cfg")
    if setup.get("metadata", "name", fallback="") == "distvgg":
        texts = setup.get("options", "install_requires").split("\n")
        if extra:
            texts += setup.get("options.extras_require", extra).split("\n")
    else:
        texts = []
        for line in requires("distvgg") or ():
            text, _, marker = line.partition(";")
            if not marker or (extra and re.search(f"[\"']{extra}[\"']", marker)):
                texts.append(text)
    texts = ["".join(text.split()) for text in texts]
    found = [_REQUIREMENT.fullmatch(text) for text in texts if text]
    assert all(found), texts
    return [(match[1], match[2] or "") for match in found if match]


def _release(version: str) -> "list[int]":
    """Returns the numbers that a version begins with, less zeros at the end: 2.8.0a0 -> 2, 8."""
    found = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(number) for number in found.group().split(".")] if found else []
    while numbers and not numbers[-1]:
        numbers.pop()
    return numbers


def main() -> int:
    """Checks this interpreter."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--extra", default="")
    parser.add_argument("--only", nargs="+", default=())
    options = parser.parse_args()
    lines = unmet(options.extra, options.only)
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())

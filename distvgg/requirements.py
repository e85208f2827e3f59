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
_REQUIREMENT = re.compile(r"([A-Za-z0-9_.-]+?)(?:>=([0-9.]+))?")


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
    found = [_REQUIREMENT.fullmatch("".join(text.split())) for text in texts]
    return [(match[1], match[2] or "") for match in found if match]


def _release(version: str) -> "list[int]":
    """Returns the numbers that a version begins with: 2.7.0a0+git -> 2, 7, 0."""
    found = re.match(r"\d+(\.\d+)*", version)
    return [int(number) for number in found.group().split(".")] if found else []


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

"""Exceptions that the command line reports as one line, and suggestions in their messages."""

import difflib
from collections.abc import Sequence


class UserError(ValueError):
    """An error caused by user input.

    The message is one line that says what to change. The command line prints the message and exits
    with code 2. Any other exception except RunError is a bug and keeps its traceback.
    """


class RunError(RuntimeError):
    """An unrecoverable failure of a run, with a cause outside the program.

    Examples are non-finite numbers, the death of a process, and a full disk at the end. The message
    is one line, and the exit code is 1.
    """


class PeerLostError(RunError):
    """A peer failure: another process of this run died."""


def nearest(name: str, names: Sequence[str], prefix: str = "") -> str:
    """Returns `, did you mean X?`; empty if no name is near.

    Names whose last part contains the last part of `name` come first: optim.lr for train.lr.
    """
    leaf = name.rsplit(".", 1)[-1]
    leaves = {n.rsplit(".", 1)[-1]: n for n in names}
    found = difflib.get_close_matches(name, names, n=1, cutoff=0.85)
    if not found:
        found = [n for n in names if f"_{leaf}_" in f"_{n.rsplit('.', 1)[-1]}_"]
        found.sort(key=lambda n: not n.endswith(f".{leaf}"))
    found = found or difflib.get_close_matches(name, names, n=1, cutoff=0.7)
    found = found or [leaves[near] for near in difflib.get_close_matches(leaf, leaves, n=1)]
    return f", did you mean {' or '.join(prefix + n for n in found[:3])}?" if found else ""


def root_cause(error: BaseException) -> BaseException:
    """Returns the error at the beginning of a chain of causes."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def one_line(error: BaseException) -> str:
    """Returns the first 200 characters of an error's message on one line, or its type."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message without its full stop, or its type."""
    return next(iter(str(error).splitlines()), "").rstrip(".") or type(error).__name__


def reason(error: BaseException) -> str:
    """Returns the message of an error's root cause, as `one_line` does."""
    return one_line(root_cause(error))

"""Exceptions that the command line reports as one line."""


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

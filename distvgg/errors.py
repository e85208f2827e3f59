"""The errors that a user sees as one line."""


class UserError(ValueError):
    """A mistake that the user can mend. Its message is one line that says what to change; the
    command line prints that line and exits with code 2. Any other exception but RunError is a
    bug and keeps its traceback."""


class RunError(RuntimeError):
    """A run that cannot go on, for a reason that lies outside the program: numbers that ran away, a
    process that died, a full disk at the end. One line as well, exit code 1."""


class PeerLostError(RunError):
    """Another process of this run is gone."""

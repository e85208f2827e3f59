import atexit
import os
import sys
from typing import NoReturn

from distvgg import preemption

if sys.argv[1:2] == ["train"]:
    preemption.install()  # before the slow imports: a signal that comes now must not kill

from distvgg import environment
from distvgg.cli import main


def leave(code: int) -> NoReturn:
    """Ends one of several processes as `sys.exit` does, exit handlers included, but does not take
    the interpreter and its libraries down. There, on busy cores once in some fifty times, a thread
    of C++ that nobody joined aborts a process that has saved everything (gloo, torch 2.14)."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    if environment.world_size() > 1:
        leave(main())
    sys.exit(main())

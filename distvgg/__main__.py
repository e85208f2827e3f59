import atexit
import gc
import os
import sys
from typing import NoReturn

# The imports below and those of a command make some 600,000 objects that stay. Looking for garbage
# among them, at Python's threshold of 700, would take a tenth of a start.
gc.set_threshold(100_000)

from distvgg import requirements

# What the imports below need; `distvgg doctor` checks the rest.
missing = requirements.unmet(only=("torch", "accelerate", "pydantic", "PyYAML"))
if missing:
    sys.stderr.write(f"distvgg: error: {'; '.join(missing)}\n")
    sys.exit(2)

from distvgg import preemption

if sys.argv[1:2] == ["train"]:
    preemption.install()  # before the slow imports, during which a signal must not kill the process

from distvgg import environment
from distvgg.cli import main


def leave(code: int) -> NoReturn:
    """Ends one of several processes after its exit handlers, without tearing down the interpreter.

    During the teardown of the interpreter and its libraries, an unjoined C++ thread can abort a
    process that has saved everything (pytorch/pytorch issue 190489). On busy cores this happened
    about once in fifty exits (gloo, torch 2.14).
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    code = main()
    if environment.world_size() > 1:
        leave(code)
    gc.freeze()  # a last collection over all that was imported would take 0.2 s
    sys.exit(code)

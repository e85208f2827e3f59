"""Starts commands of distvgg, and launchers, in processes that have imported torch already.

That import takes most of the time of a short command, and all but the waiting of a launcher. The
processes that a launcher starts are Python's own.

Each command is a process of its own, forked from one that has imported torch and nothing of
distvgg, with the arguments, environment and streams that it would have otherwise. What torch and
Python read from the environment when they start must be equal; for other values, and wherever the
start itself is tested, Python is started in the usual way.
"""

import atexit
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

# Variables that Python, torch and the libraries below it read when they start.
_AT_START = re.compile(
    r"(ATEN|CUDA|GLIBC|KMP|LANG|LC|LD|MALLOC|MKL|OMP|OPENBLAS|PYTHON|TMP|TORCH|TZ)"
)


class Process:
    """A command under way, with what tests use of `subprocess.Popen`.

    Attributes:
        pid: of the command.
        returncode: once its end was seen.
    """

    def __init__(self, answers: socket.socket) -> None:
        self._answers = answers
        self.pid = int(answers.recv(99))
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._answers.settimeout(timeout)
            try:
                self.returncode = int(self._answers.recv(99))
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0) from None
            self._answers.close()
        return self.returncode

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(
    module: str,
    args: Sequence[str],
    env: Mapping[str, str],
    cwd: Path | None,
    streams: tuple[int, int, int],
    *,
    new_session: bool = False,
) -> Process | None:
    """Starts `python -m MODULE ARGS`.

    Args:
        streams: file descriptors of stdin, stdout and stderr.

    Returns:
        None if the environment differs where Python or torch would see it.
    """
    server, started_with = _server()
    if _at_start(env) != started_with:
        return None
    request = {"module": module, "args": list(args), "env": dict(env), "session": new_session}
    request["cwd"] = os.fspath(cwd or Path.cwd())
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        socket.send_fds(server, [json.dumps(request).encode()], [theirs.fileno(), *streams])
    return Process(ours)


def run(
    module: str,
    args: Sequence[str],
    env: Mapping[str, str],
    cwd: Path | None,
    timeout: float,
) -> subprocess.CompletedProcess[str] | None:
    """Runs `python -m MODULE ARGS` to its end, as `subprocess.run`; None as `start`."""
    with (
        open(os.devnull) as stdin,
        tempfile.TemporaryFile("w+") as stdout,
        tempfile.TemporaryFile("w+") as stderr,
    ):
        files = (stdin.fileno(), stdout.fileno(), stderr.fileno())
        process = start(module, args, env, cwd, files)
        if process is None:
            return None
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
            process.wait()
        stdout.seek(0)
        stderr.seek(0)
        return subprocess.CompletedProcess([*args], code, stdout.read(), stderr.read())


@lru_cache(maxsize=1)
def _server() -> tuple[socket.socket, dict[str, str]]:
    """Starts the process that imports torch; returns its socket and what it read at its start."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process = subprocess.Popen(
        [sys.executable, __file__, str(theirs.fileno())],
        env=env,
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
    )
    theirs.close()
    atexit.register(process.wait)
    atexit.register(ours.close)  # runs first, and ends the process
    return ours, _at_start(env)


def _at_start(env: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in env.items() if _AT_START.match(name)}


def serve(requests: socket.socket) -> None:
    """Forks for each request a process that waits for the command and answers."""
    import torch  # noqa: F401

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest, which closes the socket
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait
    while True:
        message, descriptors, *_ = socket.recv_fds(requests, 2**20, 4)
        if not message:
            return
        if os.fork() == 0:
            requests.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            answers = socket.socket(fileno=descriptors[0])
            if (pid := os.fork()) == 0:
                answers.close()
                signal.signal(signal.SIGINT, signal.default_int_handler)
                become(json.loads(message), descriptors[1:])
                return
            for stream in descriptors[1:]:
                os.close(stream)
            answers.send(str(pid).encode())
            _, status = os.waitpid(pid, 0)
            with suppress(BrokenPipeError):  # nobody asks any more
                answers.send(str(os.waitstatus_to_exitcode(status)).encode())
            os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)


def become(request: dict[str, Any], streams: Sequence[int]) -> None:
    """Runs a module in this process, as `python -m` does."""
    if request["session"]:
        os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.path[0] = request["cwd"]
    sys.argv[1:] = request["args"]
    runpy.run_module(request["module"], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))

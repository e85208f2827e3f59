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
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

# Variables that Python, torch and the libraries below it read when they start.
_AT_START = re.compile(
    r"(ATEN|CUDA|GLIBC|KMP|LANG|LC|LD|MALLOC|MKL|OMP|OPENBLAS|PYTHON|TMP|TORCH|TZ)"
)
_one_at_a_time = Lock()


class _Server:
    """A process that has imported torch, with the variables of one environment."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            env=env,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        atexit.register(self.close)

    def close(self) -> None:
        self._ours.close()
        self._process.kill()
        self._process.wait()

    def run(
        self,
        module: str,
        args: Sequence[str],
        env: Mapping[str, str],
        cwd: Path | None,
        timeout: float,
    ) -> subprocess.CompletedProcess[str]:
        request = {"module": module, "args": list(args), "env": dict(env)}
        request["cwd"] = os.fspath(cwd or Path.cwd())
        with (
            open(os.devnull) as stdin,
            tempfile.TemporaryFile("w+") as stdout,
            tempfile.TemporaryFile("w+") as stderr,
        ):
            streams = [stream.fileno() for stream in (stdin, stdout, stderr)]
            self._ours.settimeout(None)
            socket.send_fds(self._ours, [json.dumps(request).encode()], streams)
            pid = int(self._ours.recv(99))
            try:
                self._ours.settimeout(timeout)
                code = int(self._ours.recv(99))
            except TimeoutError:
                os.kill(pid, signal.SIGKILL)
                self._ours.settimeout(None)
                self._ours.recv(99)
                raise subprocess.TimeoutExpired([*args], timeout) from None
            stdout.seek(0)
            stderr.seek(0)
            return subprocess.CompletedProcess([*args], code, stdout.read(), stderr.read())


def run(
    module: str,
    args: Sequence[str],
    env: Mapping[str, str],
    cwd: Path | None,
    timeout: float,
) -> subprocess.CompletedProcess[str] | None:
    """Runs `python -m MODULE ARGS` to its end.

    Returns:
        As `subprocess.run`; None if the environment differs where Python or torch would see it, or
        if another thread runs a command.
    """
    if not _one_at_a_time.acquire(blocking=False):
        return None
    try:
        server, started_with = _started()
        if _at_start(env) != started_with:
            return None
        try:
            return server.run(module, args, env, cwd, timeout)
        except BaseException:  # an answer may be under way, which the next command would read
            _started.cache_clear()
            server.close()
            raise
    finally:
        _one_at_a_time.release()


@lru_cache(maxsize=1)
def _started() -> tuple[_Server, dict[str, str]]:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return _Server(env), _at_start(env)


def _at_start(env: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in env.items() if _AT_START.match(name)}


def serve(connection: socket.socket) -> None:
    """Forks a process for each request, and answers with its number and its exit code."""
    import torch  # noqa: F401

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest, which closes the socket
    while True:
        message, streams, *_ = socket.recv_fds(connection, 2**20, 3)
        if not message:
            return
        pid = os.fork()
        if pid == 0:
            connection.close()
            signal.signal(signal.SIGINT, signal.default_int_handler)
            become(json.loads(message), streams)
            return
        for stream in streams:
            os.close(stream)
        connection.send(str(pid).encode())
        _, status = os.waitpid(pid, 0)
        connection.send(str(os.waitstatus_to_exitcode(status)).encode())


def become(request: dict[str, Any], streams: Sequence[int]) -> None:
    """Runs a module in this process, as `python -m` does."""
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

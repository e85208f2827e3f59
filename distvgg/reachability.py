"""Whether somebody is there, asked with a limit that holds whatever hangs.

Invariant: no question here takes longer than it says. Name resolution heeds no timeout, so each is
asked in a thread that is left behind when its time is up; as a daemon it holds up no exit.
"""

import socket
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Thread
from urllib.parse import SplitResult
from urllib.request import getproxies, proxy_bypass

CONNECT_SECONDS = 3.0


def within(seconds: float, question: Callable[[], bool]) -> bool:
    """What a question finds, False where it does not come back in time."""
    answers: SimpleQueue[bool] = SimpleQueue()
    Thread(target=lambda: answers.put(question()), daemon=True).start()
    try:
        return answers.get(timeout=seconds)
    except Empty:
        return False


def connects(host: str, port: int) -> bool:
    """Whether a TCP connection comes about within CONNECT_SECONDS, name resolution included.

    All addresses at once: many a network has IPv6 addresses to which no packet finds its way.
    """
    connected: SimpleQueue[bool] = SimpleQueue()

    def try_all() -> bool:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):  # no such name; not a name
            return False
        for family, *_, address in found:
            Thread(target=try_one, args=(family, address), daemon=True).start()
        return any(connected.get() for _ in found)

    def try_one(family: int, address: tuple[str, int]) -> None:
        taken = False
        with suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as end:
            end.settimeout(CONNECT_SECONDS)
            end.connect(address)
            taken = True
        connected.put(taken)

    return within(CONNECT_SECONDS, try_all)


def behind_proxy(url: SplitResult) -> bool:
    """Whether the environment names a proxy for a URL, whose own address then tells nothing."""
    proxies = getproxies()
    proxied = url.scheme in proxies or "all" in proxies
    return proxied and not proxy_bypass(url.netloc.rpartition("@")[2])

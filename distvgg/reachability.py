"""Reachability checks with a hard time limit, name resolution included.

Invariant: no check takes longer than its limit. Name resolution ignores timeouts, so each check
runs in a thread that is abandoned after the limit. The thread is a daemon, so it does not delay
exit.
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
    """Returns the result of `question`, or False if it takes longer than `seconds`."""
    answers: SimpleQueue[bool] = SimpleQueue()
    Thread(target=lambda: answers.put(question()), daemon=True).start()
    try:
        return answers.get(timeout=seconds)
    except Empty:
        return False


def connects(host: str, port: int) -> bool:
    """Returns True if a TCP connection succeeds within CONNECT_SECONDS, name resolution included.

    All addresses are tried at once, because many networks have IPv6 addresses that no packet
    reaches.
    """
    connected: SimpleQueue[bool] = SimpleQueue()

    def try_all() -> bool:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):  # unknown name; invalid name
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
    """Returns True if the environment names a proxy for a URL.

    Reachability of the URL's own address is then irrelevant.
    """
    proxies = getproxies()
    proxied = url.scheme in proxies or "all" in proxies
    return proxied and not proxy_bypass(url.netloc.rpartition("@")[2])

"""The limit of the questions whether somebody is there, against what truly hangs."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from urllib.parse import urlsplit

import pytest

from distvgg import reachability


@pytest.fixture
def mute_port() -> Iterator[int]:
    """A port whose packets get no answer, as behind a firewall: that of a listening socket whose
    queue is full (Linux)."""
    with ExitStack() as open_sockets:
        listener = open_sockets.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            end = open_sockets.enter_context(socket.socket())
            end.setblocking(False)
            end.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


def seconds_until_no(host: str, port: int) -> float:
    started = time.monotonic()
    assert not reachability.connects(host, port)
    return time.monotonic() - started


def test_a_listening_socket_is_reached_and_a_closed_port_or_no_name_refused_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        # `localhost` has an IPv6 address as well, where nobody listens.
        assert reachability.connects("localhost", server.getsockname()[1])
    assert seconds_until_no("127.0.0.1", 1) < 2  # silence is waited for 3
    assert seconds_until_no("a" * 64 + ".invalid", 443) < 2


def test_silence_is_waited_for_only_so_long(mute_port: int) -> None:
    assert 2.9 < seconds_until_no("127.0.0.1", mute_port) < 6


def test_one_silent_address_of_several_hides_no_other(
    mute_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host of two addresses, of which the first is mute: an IPv6 route to nowhere."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        addresses = [("127.0.0.1", mute_port), server.getsockname()]
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", a) for a in addresses]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        started = time.monotonic()
        assert reachability.connects("two.invalid", 443)
        assert time.monotonic() - started < 2


def test_a_name_server_that_hangs_is_waited_for_only_so_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    over = threading.Event()

    def hang(*_: object, **__: object) -> None:
        over.wait()
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    assert 2.9 < seconds_until_no("slow.invalid", 443) < 6
    over.set()  # the thread that was left behind ends with its test


@pytest.mark.parametrize(
    ("url", "behind"),
    [
        ("https://api.wandb.ai", True),
        ("http://api.wandb.ai", False),
        ("https://wandb.here:8443", False),
    ],
)
def test_a_proxy_counts_for_its_scheme_and_not_for_hosts_that_bypass_it(
    url: str, behind: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("https_proxy", "http://proxy.invalid:3128")
    monkeypatch.setenv("no_proxy", ".here")
    assert reachability.behind_proxy(urlsplit(url)) is behind

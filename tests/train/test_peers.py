"""Connections that tell when a process has ended."""

import socket
import threading
import time

import pytest

from gradret import distributed as peers
from gradret.distributed import Peers


class Port:
    """Stands for the broadcast between threads that play processes."""

    def __init__(self):
        self.value, self.known = None, threading.Event()

    def share(self, met: tuple[int, bytes] | None) -> tuple[int, bytes] | None:
        if met is not None:
            self.value = met
            self.known.set()
        assert self.known.wait(10)
        return self.value


def connect(size: int) -> list[Peers]:
    port, found = Port(), [None] * size

    def play(rank: int) -> None:
        found[rank] = Peers(rank, size, port.share)

    threads = [threading.Thread(target=play, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    return found


def test_the_first_sees_every_end_and_the_others_see_the_firsts(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    first, second, third = connect(3)
    assert not any(one.is_one_gone() for one in (first, second, third))
    third.close()
    assert first.is_one_gone()
    assert not second.is_one_gone()
    first.close()
    assert second.is_one_gone()
    second.close()
    assert not second.is_one_gone()  # nobody is looked at any more


def test_a_first_process_that_is_reached_by_ipv6(monkeypatch, capsys):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("has no IPv6")
    monkeypatch.setenv("MASTER_ADDR", "::1")
    began = time.monotonic()
    first, second = connect(2)
    assert time.monotonic() - began < 5
    second.close()
    assert first.is_one_gone()
    first.close()
    assert capsys.readouterr().err == ""


def test_strangers_are_no_processes(monkeypatch):
    """One says nothing, one the wrong thing, one goes at once: as port scanners do."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(peers, "GREET_S", 0.2)
    strangers, share, first_here = [], Port.share, threading.Lock()

    def share_after_strangers(self, met):
        met = share(self, met)
        if first_here.acquire(blocking=False):
            strangers.extend(socket.create_connection(("127.0.0.1", met[0]), 5) for _ in range(3))
            strangers[1].sendall(b"GET / HTTP/1.1\r\n\r\n")
            strangers[2].close()
        return met

    monkeypatch.setattr(Port, "share", share_after_strangers)
    first, second = connect(2)
    for stranger in strangers:
        stranger.close()
    assert not first.is_one_gone() and not second.is_one_gone()
    second.close()
    assert first.is_one_gone()
    first.close()


def test_who_can_not_be_watched_is_told(monkeypatch, capsys):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(peers, "CONNECT_S", 0.2)
    Peers(0, 3, lambda met: met).close()
    assert capsys.readouterr().err == (
        "2 of the 3 processes can not be watched: that one has ended is noticed when it is next waited for\n"
    )


def test_without_an_address_nobody_is_looked_at(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    alone = Peers(0, 2, lambda met: met)
    assert not alone.is_one_gone()
    alone.close()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    refused = Peers(1, 2, lambda met: (9, b""))  # where nobody listens
    assert not refused.is_one_gone()

"""Connections that tell when a process has ended."""

import threading

from gradret.peers import Peers


class Port:
    """Stands for the broadcast between threads that play processes."""

    def __init__(self):
        self.value, self.known = None, threading.Event()

    def share(self, port: int | None) -> int | None:
        if port is not None:
            self.value = port
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
    assert not any(peers.is_one_gone() for peers in (first, second, third))
    third.close()
    assert first.is_one_gone()
    assert not second.is_one_gone()
    first.close()
    assert second.is_one_gone()
    second.close()
    assert not second.is_one_gone()  # nobody is looked at any more


def test_without_an_address_nobody_is_looked_at(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    alone = Peers(0, 2, lambda port: port)
    assert not alone.is_one_gone()
    alone.close()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    refused = Peers(1, 2, lambda port: 9)  # where nobody listens
    assert not refused.is_one_gone()

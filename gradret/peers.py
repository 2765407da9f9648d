"""Connections between processes that carry nothing: one that closes tells that its process has ended.

Exchanges tell it, too, but between two of them minutes may pass.
"""

import os
import secrets
import socket
import time
from collections.abc import Callable

from gradret.console import say

CONNECT_S = 30.0
GREET_S = 2.0  # a stranger who says nothing is listened to so long
TOKEN_BYTES = 16


class Peers:
    """The first process's connections to all others, or another one's to the first.

    Where they can not be made, the first one says so, and an exchange is what notices.

    Args:
        rank, size: of this process, and how many there are.
        share: gives every process what the first one passes; all call it once.
    """

    def __init__(self, rank: int, size: int, share: Callable[[tuple[int, bytes] | None], tuple[int, bytes] | None]):
        self._connections: list[socket.socket] = []
        host = os.environ.get("MASTER_ADDR")  # where the first process is
        server = _listen(host) if rank == 0 and host else None
        # Whoever scans ports connects, too: the token tells the others from strangers.
        met = share((server.getsockname()[1], secrets.token_bytes(TOKEN_BYTES)) if server is not None else None)
        if server is not None:
            with server:
                self._connections = _greet(server, size - 1, met[1])
        elif rank and host and met is not None:
            self._connections = _call(host, *met)
        for connection in self._connections:
            connection.setblocking(False)
        if rank == 0 and len(self._connections) < size - 1:
            say(
                f"{size - 1 - len(self._connections)} of the {size} processes can not be watched: "
                "that one has ended is noticed when it is next waited for"
            )

    def is_one_gone(self) -> bool:
        """Whether a connected process has ended. Costs a system call a connection."""
        for connection in self._connections:
            try:
                if not connection.recv(1, socket.MSG_PEEK):
                    return True
            except BlockingIOError:
                continue
            except OSError:
                return True
        return False

    def close(self) -> None:
        """Let go of the connections: the others then see this process as ended."""
        for connection in self._connections:
            connection.close()
        self._connections.clear()


def _listen(host: str) -> socket.socket | None:
    """A server on a free port that is reached at `host`, by IPv4 or IPv6; None where there can be none."""
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=socket.SOMAXCONN)
        family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server(("", 0), family=family, backlog=socket.SOMAXCONN)
    except OSError:
        return None


def _greet(server: socket.socket, count: int, token: bytes) -> list[socket.socket]:
    """The connections of `count` processes, or of those that came in time; each is told that it is watched."""
    found: list[socket.socket] = []
    deadline = time.monotonic() + CONNECT_S
    while len(found) < count and (left := deadline - time.monotonic()) > 0:
        server.settimeout(left)
        try:
            connection = server.accept()[0]
        except OSError:
            break
        try:
            connection.settimeout(min(GREET_S, left))
            if not secrets.compare_digest(_receive(connection, TOKEN_BYTES), token):
                raise OSError("a stranger")
            connection.sendall(b"+")
            found.append(connection)
        except OSError:
            connection.close()
    return found


def _call(host: str, port: int, token: bytes) -> list[socket.socket]:
    """The connection to the first process; [] where it does not answer."""
    try:
        connection = socket.create_connection((host, port), CONNECT_S)
    except OSError:
        return []
    try:
        connection.sendall(token)
        if _receive(connection, 1) == b"+":
            return [connection]
    except OSError:
        pass
    connection.close()
    return []


def _receive(connection: socket.socket, size: int) -> bytes:
    """So many bytes; fewer where the other side closes before."""
    found = b""
    while len(found) < size and (part := connection.recv(size - len(found))):
        found += part
    return found

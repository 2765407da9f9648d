"""Connections between processes that carry nothing: one that closes tells that its process has ended.

Exchanges tell it, too, but between two of them minutes may pass.
"""

import os
import socket
from collections.abc import Callable

CONNECT_S = 30.0


class Peers:
    """The first process's connections to all others, or another one's to the first.

    Where they can not be made, an exchange is what notices.

    Args:
        rank, size: of this process, and how many there are.
        share_port: gives every process the first one's port; all call it once.
    """

    def __init__(self, rank: int, size: int, share_port: Callable[[int | None], int | None]):
        self._connections: list[socket.socket] = []
        host = os.environ.get("MASTER_ADDR")  # where the first process is
        server = port = None
        if rank == 0 and host:
            try:
                server = socket.create_server(("", 0), backlog=size)
                port = server.getsockname()[1]
            except OSError:
                pass
        port = share_port(port)
        if port is None or not host:
            return
        try:
            if rank:
                self._connections.append(socket.create_connection((host, port), CONNECT_S))
            else:
                server.settimeout(CONNECT_S)
                self._connections += [server.accept()[0] for _ in range(size - 1)]
        except OSError:
            pass
        finally:
            if server is not None:
                server.close()
        for connection in self._connections:
            connection.setblocking(False)

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

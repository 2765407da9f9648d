"""Several processes that share one piece of work, as torchrun starts them; alone, every exchange is with oneself."""

import os
import re
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradret.console import GradretError, ProcessLost, ToldElsewhere, count_processes, say

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


# Others wait so long while the first one writes or searches. A process that died is noticed at once: its sockets close.
TIMEOUT = timedelta(hours=6)
# One that died before it was connected has no socket: those who wait for it see nothing.
JOIN_TIMEOUT = timedelta(minutes=5)
POLL_S = 0.0005  # between two looks at an exchange on a GPU


class Processes:
    """The processes of a job. All of them must make the same exchanges in the same order.

    Small things and Python objects go by gloo on the CPU, tensors by nccl on CUDA and by gloo elsewhere.

    Attributes:
        rank: this process, from 0.
        size: how many there are.
    Raises: every exchange raises ProcessLost when another process has ended.
    """

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank, self.size = rank, size
        self._peers: Peers | None = None

    def watch(self) -> None:
        """Connect to the others, so that check() can look. An exchange: every process calls it, once."""
        if self.size > 1:
            self._peers = Peers(self.rank, self.size, self.broadcast)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    @property
    def local_size(self) -> int:
        """How many of them share this machine."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if self.size > 1 else 1

    @property
    def launcher(self) -> str:
        """How a command of gradret is started by as many processes."""
        nodes = f" --nnodes {self.size // self.local_size}" if self.size > self.local_size else ""
        return f"torchrun{nodes} --nproc-per-node {self.local_size} -m gradret" if self.size > 1 else "gradret"

    def check(self) -> None:
        """Look, without an exchange, whether the others are there: the first process at all, the others at the first.

        Before watch() it sees nothing.
        Raises: ProcessLost.
        """
        if self._peers is not None and self._peers.is_one_gone():
            raise self._lost("another process has ended")

    def close(self) -> None:
        """This process has no more to share."""
        if self._peers is not None:
            self._peers.close()

    def gather_objects(self, value) -> list:
        """Everyone's value, in order of rank; it must be picklable."""
        if self.size == 1:
            return [value]
        found: list = [None] * self.size
        with self._exchange():
            dist.all_gather_object(found, value)
        return found

    def collect_objects(self, value) -> list:
        """Everyone's value, in order of rank, in the first process; [] in the others."""
        if self.size == 1:
            return [value]
        found: list = [None] * self.size if self.is_first else []
        with self._exchange():
            dist.gather_object(value, found or None, dst=0)
        return found

    def broadcast(self, value: Any) -> Any:
        """The first process's value; the others' is ignored."""
        if self.size == 1:
            return value
        box = [value if self.is_first else None]
        with self._exchange():
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by the sum of everyone's, the same bits in every process."""
        if self.size == 1:
            return
        with self._exchange():
            self._wait([dist.all_reduce(tensor, async_op=True) for tensor in tensors], tensors)

    def add_number(self, value: float) -> float:
        """The sum of everyone's number."""
        total = torch.tensor(value, dtype=torch.float64)
        self.add([total])
        return total.item()

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace each parameter's gradient by the sum of everyone's; one that nobody has stays None."""
        if self.size == 1:
            return
        has_gradient = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32)
        self.add([has_gradient])
        wanted = [p for p, count in zip(parameters, has_gradient.tolist(), strict=True) if count]
        for parameter in wanted:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.add([p.grad for p in wanted])

    def share_tensors(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite each tensor with the first process's."""
        if self.size == 1:
            return
        with self._exchange():
            self._wait([dist.broadcast(tensor, src=0, async_op=True) for tensor in tensors], tensors)

    def _wait(self, works: Sequence, tensors: Sequence[Tensor]) -> None:
        for work, tensor in zip(works, tensors, strict=True):
            # nccl's wait() does not notice that a process has died, and what then reads the tensor blocks for hours.
            while tensor.is_cuda and not work.is_completed():
                self.check()
                time.sleep(POLL_S)
            work.wait()

    def split(self, count: int) -> range:
        """This process's share of `count` things: contiguous, of the same size as the others' or one more."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    @contextmanager
    def agree(self) -> Iterator[None]:
        """Every process runs the block; where one fails with a GradretError, all end, and one of them tells it.

        The block must make no exchange. A ProcessLost that check() raises in it ends this process at once.
        """
        failure = None
        try:
            yield
        except ProcessLost:  # the one that is gone would not answer
            raise
        except GradretError as error:
            failure = error
            if self.size == 1:
                raise
        told = self.gather_objects(None if failure is None else str(failure))
        first = next((rank for rank, message in enumerate(told) if message is not None), None)
        if first is None:
            return
        if first == self.rank:
            raise failure if self.is_first else GradretError(f"process {self.rank} of {self.size}: {failure}")
        raise ToldElsewhere(told[first])

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # gloo and nccl raise nothing narrower
            reason = re.sub(r"^\[\S*\] ", "", str(error).splitlines()[0]).split(". ")[0]
            slow = "timed out" in reason.lower()
            what = "the others did not answer in time" if slow else "another process has ended"
            raise self._lost(f"{what} ({reason[:120]})") from error

    def _lost(self, what: str) -> ProcessLost:
        return ProcessLost(f"process {self.rank} of {self.size}: {what}; look for its own message, if it left one")


ALONE = Processes()


def end_process(code: int) -> NoReturn:
    """End at once: while Python shuts down, gloo's threads abort now and then, though all work is done (torch 2.13)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def join_processes(device: str | None) -> Iterator[tuple[Processes, str | None]]:
    """The processes started by torchrun, and this one's device: cuda becomes the GPU of this local rank.

    Joins a group that the caller has made already, too. Started alone, nothing is done.
    """
    made_here = not (dist.is_available() and dist.is_initialized())
    if made_here and count_processes() == 1:
        yield ALONE, device
        return
    if device is None or device == "cuda":
        local = int(os.environ.get("LOCAL_RANK", 0))
        device = f"cuda:{local}" if torch.cuda.is_available() else (device or "cpu")
    elif made_here and ":" in device and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
        raise GradretError(f"--device {device} is one GPU, which several processes can not share; give --device cuda")
    on_cuda = device.startswith("cuda")
    if on_cuda and not torch.cuda.is_available():
        raise GradretError(f"--device {device}: no CUDA device is there, or PyTorch was built without CUDA")
    if made_here:
        if on_cuda and torch.device(device).index < torch.cuda.device_count():
            torch.cuda.set_device(device)
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo", timeout=JOIN_TIMEOUT)
        except (RuntimeError, ValueError) as error:
            raise GradretError(f"the processes could not find each other ({str(error).splitlines()[0]})") from error
        dist.distributed_c10d._set_pg_timeout(TIMEOUT)
    processes = Processes(dist.get_rank(), dist.get_world_size())
    processes.watch()
    yield processes, device
    processes.close()
    if made_here:  # not after an error: with a process gone it may wait for ever
        dist.destroy_process_group()

"""Several processes that share one piece of work, as torchrun starts them; alone, every exchange is with oneself.

Nobody here watches the others. When a process dies, an exchange fails in those that wait for it (gloo), or torchrun's
agent sends them SIGTERM, and SIGKILL half a minute later. train/loop says what they then save and tell.
"""

import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradret.console import GradretError, ProcessLost, ToldElsewhere, count_processes

JOIN_TIMEOUT = timedelta(minutes=5)  # for all processes to come
TIMEOUT = timedelta(hours=6)  # for an exchange: the others wait while the first one writes or searches
POLL_S = 0.0005  # between two looks at an exchange on a GPU
BUCKET_ELEMENTS = 1 << 23  # of gradients summed at once: 32 MiB in float32 beside the gradients themselves


class Processes:
    """The processes that share a piece of work. All of them must make the same exchanges in the same order.

    Small things and Python objects go by gloo on the CPU, tensors by nccl on CUDA and by gloo elsewhere.

    Args:
        rank: this process, from 0.
        size: how many there are.
        group: torch.distributed's; None for its default one.
    Raises: every exchange raises ProcessLost when another process has ended.
    """

    def __init__(self, rank: int = 0, size: int = 1, group: "dist.ProcessGroup | None" = None):
        self.rank, self.size, self._group = rank, size, group

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

    def split(self, count: int) -> range:
        """This process's share of `count` things: contiguous, of the same size as the others' or one more."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def gather_objects(self, value: Any) -> list[Any]:
        """Everyone's value, in order of rank; it must be picklable."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with self._exchange():
            dist.all_gather_object(found, value, group=self._group)
        return found

    def collect_objects(self, value: Any) -> list[Any]:
        """Everyone's value, in order of rank, in the first process; [] in the others."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size if self.is_first else []
        with self._exchange():
            dist.gather_object(value, found or None, dst=0, group=self._group)
        return found

    def broadcast(self, value: Any) -> Any:
        """The first process's value; the others' is ignored."""
        if self.size == 1:
            return value
        box = [value if self.is_first else None]
        with self._exchange():
            dist.broadcast_object_list(box, src=0, group=self._group, device=torch.device("cpu"))
        return box[0]

    def sum_tensors(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by the sum of everyone's, the same bits in every process."""
        self._exchange_tensors(dist.all_reduce, tensors)

    def sum_number(self, value: float) -> float:
        """The sum of everyone's number."""
        total = torch.tensor(value, dtype=torch.float64)
        self.sum_tensors([total])
        return total.item()

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace each parameter's gradient by the sum of everyone's; one that nobody has stays None.

        A process without texts of its own in a step has no gradients at all: it counts as zeros. So that nobody takes
        those of an unused parameter for real ones (AdamW would decay it), each bucket also sums who has which.
        """
        if self.size == 1:
            return
        for bucket in _fill_buckets(parameters):
            has_gradient = torch.tensor([float(p.grad is not None) for p in bucket]).to(bucket[0])
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
            flat = torch.cat([gradient.flatten() for gradient in (*gradients, has_gradient)])
            self.sum_tensors([flat])
            *sums, counts = flat.split([*(p.numel() for p in bucket), len(bucket)])
            for parameter, gradient, total, count in zip(bucket, gradients, sums, counts.tolist(), strict=True):
                if count:
                    parameter.grad = gradient.copy_(total.view_as(gradient))

    def share_tensors(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite each tensor with the first process's."""
        self._exchange_tensors(partial(dist.broadcast, src=0), tensors)

    @contextmanager
    def agree(self) -> Iterator[None]:
        """Every process runs the block; where one fails with a GradretError, all end, and one of them tells it.

        The block must make no exchange.
        """
        failure = None
        try:
            yield
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

    def _exchange_tensors(self, start: Callable[..., Any], tensors: Sequence[Tensor]) -> None:
        """Start an exchange of each tensor, and wait until all are done.

        On a GPU wait() only queues: what reads the tensor next blocks outside Python, where no signal is heard. So this
        polls first, and a process whose peer has died still hears torchrun's SIGTERM, saves and says how to go on.
        Where nobody sends one, nccl's watchdog ends the process after TIMEOUT, or as soon as it sees the broken
        connection. That is an abort without a line of ours: what is left then is the last checkpoint.
        """
        if self.size == 1:
            return
        with self._exchange():
            started = [start(tensor, group=self._group, async_op=True) for tensor in tensors]
            for exchange, tensor in zip(started, tensors, strict=True):
                while tensor.is_cuda and not exchange.is_completed():
                    time.sleep(POLL_S)
                exchange.wait()

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # gloo and nccl raise nothing narrower
            reason = re.sub(r"^\[\S*\] ", "", str(error).splitlines()[0]).split(". ")[0]
            slow = "timed out" in reason.lower()
            what = "the others did not answer in time" if slow else "another process has ended"
            raise ProcessLost(
                f"process {self.rank} of {self.size}: {what} ({reason[:120]}); look for its own message, if it left one"
            ) from error


def _fill_buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """The parameters in their order, in groups of one type and of at most BUCKET_ELEMENTS, or a larger one alone."""
    bucket: list[nn.Parameter] = []
    elements = 0
    for parameter in parameters:
        if bucket and (parameter.dtype != bucket[0].dtype or elements + parameter.numel() > BUCKET_ELEMENTS):
            yield bucket
            bucket, elements = [], 0
        bucket.append(parameter)
        elements += parameter.numel()
    if bucket:
        yield bucket


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
        raise GradretError(f"--device {device} is one GPU, which several processes cannot share; give --device cuda")
    on_cuda = device.startswith("cuda")
    if on_cuda and not torch.cuda.is_available():
        raise GradretError(f"--device {device}: no CUDA device is there, or PyTorch was built without CUDA")
    group = None
    if made_here:
        if on_cuda and torch.device(device).index < torch.cuda.device_count():
            torch.cuda.set_device(device)
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo", timeout=JOIN_TIMEOUT)
            # A group keeps the timeout that it was made with, and to join is not to wait for: exchanges have their own.
            group = dist.new_group(timeout=TIMEOUT)
        except (RuntimeError, ValueError) as error:
            raise GradretError(f"the processes could not find each other ({str(error).splitlines()[0]})") from error
    yield Processes(dist.get_rank(), dist.get_world_size(), group), device
    if made_here:  # not after an error: with a process gone it may wait for ever
        dist.destroy_process_group()

"""How many passages fit into memory at once with their activations: measured on a few, carried on in proportion."""

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from gradret.console import GradretError
from gradret.encoder.model import Encoder, autocast

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


def is_peak_known() -> bool:
    """Whether a process's peak since it was started can be read."""
    return STATUS.exists()


def can_restart_peak() -> bool:
    """Whether the peak can be made to start again."""
    return os.access(CLEAR_REFS, os.W_OK)


def restart_peak() -> None:
    """The peak starts again from what is resident now."""
    CLEAR_REFS.write_text("5")


def peak_bytes() -> int:
    """The most that was resident. Not ru_maxrss: that starts at what the process which started this one held."""
    return read_field(STATUS, "VmHWM")


def resident_bytes() -> int:
    """What is resident now."""
    return read_field(STATUS, "VmRSS")


def read_field(path: str | os.PathLike, name: str, unit: int = 1024) -> int:
    """A number of bytes from a file of lines `name: number kB` or `name number`."""
    for line in Path(path).read_text().splitlines():
        words = line.replace(":", " ").split()
        if words and words[0] == name:
            return int(words[1]) * unit
    raise ValueError(f"{path}: has no {name}")


def fresh_environment(**variables: str) -> dict[str, str]:
    """The environment for a process that must find this very package."""
    package = str(Path(__file__).parents[2])
    paths = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": paths, **variables}


PROBES = (1, 3)  # passages, few enough to fit where anything does; their difference is what each one needs
SHARE = 0.8  # of the free memory: allocators waste some, and others use the machine, too
MIB = 1 << 20
CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class Capacity:
    """Bytes that are free for a chunk, and bytes that a passage of the longest length needs in it."""

    free: int
    per_passage: int

    @property
    def chunk(self) -> int:
        """Passages that fit at once; 0 if not one does."""
        return max(0, int(SHARE * self.free) // self.per_passage)


def measure_capacity(
    encoder: Encoder, length: int, precision: str, optimizer_bytes: int, local: int = 1
) -> Capacity | None:
    """Run some passages forward and backward and look at the peak of memory; None where the system does not show it.

    Args:
        encoder: on the device that is looked at; its gradients are dropped.
        length: tokens of the longest passage.
        precision: "float32" or "bfloat16" (autocast).
        optimizer_bytes: that will be taken later on.
        local: processes that share the memory of this machine.
    """
    on_cuda = encoder.device.type == "cuda"
    if not on_cuda and not (encoder.device.type == "cpu" and can_restart_peak()):
        return None
    measure = _measure_cuda_peak if on_cuda else _measure_cpu_peak

    def run(passages: int) -> None:
        tokens = [np.full(length, encoder.tokenizer.pad_token_id, np.int32)] * passages
        with autocast(encoder.device, precision):
            embedded = encoder.search_vectors(encoder.embed_tokens(tokens))
        embedded.sum().backward()

    was_training = encoder.training
    encoder.train()
    try:
        run(1)  # gradients and what libraries set up exist from now on
        few, many = (measure(lambda n=n: run(n)) for n in PROBES)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise GradretError(
            f"out of memory with {PROBES[1]} passages of {length} tokens; lower --document-max-length, or try "
            "--gradient-checkpointing or --lora"
        ) from error
    free = _free_cuda(encoder.device) if on_cuda else _free_cpu() // local
    encoder.zero_grad(set_to_none=True)
    encoder.train(was_training)
    per_passage = max(1, (many - few) // (PROBES[1] - PROBES[0]))
    return Capacity(max(0, free - optimizer_bytes), per_passage)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether that is what PyTorch says; of CUDA there is a narrower error, of the CPU there is not."""
    return any(words in str(error) for words in ("out of memory", "allocate memory", "bad_alloc"))


def check_chunk(capacity: Capacity | None, passages: int, chunk: int | None) -> None:
    """Refuse before the work what would run out of memory in it.

    Args:
        capacity: None where it is not known.
        passages: of the longest length, that take as much memory as the texts of a batch.
        chunk: of gradient caching; None keeps the activations of the whole batch.
    Raises: GradretError with a chunk to try.
    """
    if capacity is None:
        return
    wanted = passages if chunk is None else min(chunk, passages)
    need, free = wanted * capacity.per_passage / MIB, capacity.free / MIB
    if need <= free:
        return
    what = f"--chunk {chunk}" if chunk else "a batch without --chunk"
    if not capacity.chunk:
        raise GradretError(
            f"{what} needs about {need:.0f} MiB of memory, {free:.0f} MiB are free, and not one passage fits; "
            "lower --document-max-length, or try --gradient-checkpointing"
        )
    raise GradretError(
        f"{what} needs about {need:.0f} MiB of memory, {free:.0f} MiB are free; try --chunk {capacity.chunk}"
    )


def _measure_cuda_peak(run: Callable[[], None]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def _measure_cpu_peak(run: Callable[[], None]) -> int:
    with suppress(OSError, AttributeError):  # glibc: what is freed but kept would hide what is taken
        ctypes.CDLL(None).malloc_trim(0)
    restart_peak()
    run()
    return peak_bytes()


def _free_cuda(device: torch.device) -> int:
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _free_cpu() -> int:
    """Bytes this process may still take: of the machine, of its control groups and of its own limit."""
    import resource  # not on Windows, where this function is never called

    free = [read_field("/proc/meminfo", "MemAvailable"), *_free_in_cgroups()]
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        free.append(limit - read_field(STATUS, "VmSize"))
    return min(free)


def _free_in_cgroups() -> Iterator[int]:
    """Bytes that each memory limit over this process leaves: a limit of a group holds for the groups inside it."""
    with suppress(OSError):
        for line in OWN_CGROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":  # version 2
                top, names = CGROUPS, ("memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers.split(","):
                top = CGROUPS / "memory"
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            else:
                continue
            # Inside a container the path may be the host's, of which only the container's own end is to be seen: `top`.
            for group in (path := Path(path.lstrip("/")), *path.parents):
                with suppress(OSError, ValueError):  # no limit says "max"; the outermost group has no such file
                    limit, used = (int((top / group / name).read_text()) for name in names[:2])
                    cache = read_field(top / group / "memory.stat", names[2], unit=1)  # given back when asked for
                    yield limit - used + cache

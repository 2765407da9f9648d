"""How a large encoder trains in little memory: what fits, low-rank adapters, and activations computed again."""

import ctypes
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from gradret.console import GradretError, needing
from gradret.data.lists import hash64
from gradret.encoder.model import Encoder, autocast
from gradret.settings import FitSettings

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


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
        length: tokens of the longest passage.
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
    """Refuse before the work what would run out of memory in it; nothing where the capacity is not known.

    Args:
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
    advice = f"; try --chunk {capacity.chunk}"
    if not capacity.chunk:
        advice = ", and not one passage fits; lower --document-max-length, or try --gradient-checkpointing"
    raise GradretError(f"{what} needs about {need:.0f} MiB of memory, {free:.0f} MiB are free{advice}")


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
            path = Path(line.split(":", 2)[2].lstrip("/"))  # in a container the host's, of which the end alone is seen
            for group in (CGROUPS / folder for folder in (path, *path.parents)):
                with suppress(OSError, ValueError):  # no limit says "max"; the outermost group has no such file
                    limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
                    yield limit - used + read_field(group / "memory.stat", "inactive_file", unit=1)  # given back


def adapt(encoder: Encoder, settings: FitSettings) -> None:
    """Make the encoder train as settings.lora* and settings.gradient_checkpointing say, in place.

    With lora, y = W x becomes y = W x + (lora_alpha / lora) B A x in the chosen linear layers: W and all other weights
    are frozen, A (lora, inputs) and B (outputs, lora) are trained in float32 whatever W's type is. B starts at zero, so
    the encoder starts unchanged; A depends on settings.seed alone. torch's global random state is left as it was.

    Raises: GradretError when peft is not installed, a name in lora_targets has no linear layer, or the model cannot
        compute its activations again.
    Source: Hu et al. (2021), LoRA, arXiv 2106.09685.
    """
    transformer = encoder.transformer
    if settings.lora:
        encoder.transformer = _add_adapters(transformer, settings)
    if settings.gradient_checkpointing:
        _recompute_activations(transformer, settings.model)


def merge_adapters(encoder: Encoder) -> None:
    """Put the adapters, if there are any, into the weights, in place; no trace of peft is left.

    W + (lora_alpha / lora) B A is computed in float32 and rounded to the type of W once. In bfloat16 that drops what is
    smaller than half of W's last digit, 1 part in 512: cast the encoder to float32 before, where this matters.
    """
    merge = getattr(encoder.transformer, "merge_and_unload", None)
    if merge is not None:
        # peft adds its float32 B A to the weight in place, where PyTorch computes in the wider of the two types.
        encoder.transformer = merge().requires_grad_(True)


def _add_adapters(transformer: nn.Module, settings: FitSettings) -> nn.Module:
    with needing("--lora", "peft", "lora"):
        from peft import LoraConfig, get_peft_model
    paths = _find_targets(transformer, settings.lora_targets, settings.model)
    config = LoraConfig(
        r=settings.lora,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules="|".join(map(re.escape, paths)),  # a pattern has to match as a whole, names in a list do not
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")  # of Conv1D, which it then sets
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")  # peft reads it by its older name
        try:
            adapted = get_peft_model(transformer, config)
        except ValueError as error:  # kinds of layers that peft knows not to work
            raise GradretError(f"{settings.model}: cannot get adapters: {error}") from error
    # Drawn here once more: peft draws from the global generator, and rounds to the frozen weights' type.
    generator = torch.Generator().manual_seed(hash64("adapters", str(settings.seed)) >> 1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_A." in name:
                drawn = torch.empty(parameter.shape)
                parameter.copy_(nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator))
    return adapted


def _find_targets(transformer: nn.Module, names: tuple[str, ...], model: str) -> list[str]:
    """Paths of the linear layers that get adapters. Raises: GradretError when a name has none."""
    from transformers.pytorch_utils import Conv1D  # GPT-2 writes its linear layers so

    # A pooler is no part of an embedding here: it would have no gradient.
    linear = [p for p, m in transformer.named_modules() if isinstance(m, nn.Linear | Conv1D) and "pooler" not in p]
    for name in names:
        if not any(_ends_in(path, name) for path in linear):
            last = sorted({path.rsplit(".", 1)[-1] for path in linear})
            raise GradretError(f"lora_targets {name}: matches no linear layer of {model}; it has: {', '.join(last)}")
    if not linear:
        raise GradretError(f"{model}: has no linear layers for adapters; train without --lora")
    return [path for path in linear if not names or any(_ends_in(path, name) for name in names)]


def _ends_in(path: str, name: str) -> bool:
    return f".{path}".endswith(f".{name}")


def _recompute_activations(transformer: nn.Module, model: str) -> None:
    # The newer name first: under the older one transformers warns, which in time is to go.
    enable = getattr(transformer, "activation_checkpointing_enable", None)
    enable = enable or getattr(transformer, "gradient_checkpointing_enable", None)
    if not getattr(transformer, "supports_gradient_checkpointing", False) or enable is None:
        raise GradretError(
            f"{model}: {type(transformer).__name__} cannot compute its activations again; "
            "train without --gradient-checkpointing, with a smaller --chunk"
        )
    enable({"use_reentrant": False})

"""The compiled kernels, where they were built, and which path serves a call."""

import warnings
from functools import cache
from typing import Any

import torch  # before the module, so that both use the same OpenMP threads

INTERFACE = 5

compiled: Any = None  # the module, where it was built and loads
missing: str | None = None  # why it is not there

try:
    import gradret._kernels as compiled
except ModuleNotFoundError:
    missing = "gradret was built without them"
except ImportError as error:  # built, but a library that it needs is not there
    missing = str(error)
    warnings.warn(f"gradret's compiled kernels do not load, losses run in PyTorch: {error}", stacklevel=2)
else:
    if getattr(compiled, "INTERFACE", 0) != INTERFACE:  # a checkout that moved on after it was installed
        compiled = None
        missing = "they were built from other sources; install gradret again"


def backend(device: torch.device | str) -> str:
    """What serves tensors on a device: "cuda" or "cpu", a compiled kernel, or "torch", the same in plain PyTorch."""
    kind = torch.device(device).type
    if compiled is None:
        return "torch"
    if kind == "cuda":
        return "cuda" if _was_built_for(torch.device(device).index) else "torch"
    return "cpu" if kind == "cpu" else "torch"


@cache
def _was_built_for(index: int | None) -> bool:
    """Whether the module holds code for this CUDA device: for an older one of its generation, or to be translated."""
    built = [divmod(int(a), 10) for a in compiled.CUDA_ARCHITECTURES.split(";") if a]
    if not built or not torch.cuda.is_available():
        return False
    major, minor = torch.cuda.get_device_capability(index)
    return (major, minor) >= max(built) or any(a == major and b <= minor for a, b in built)


def describe_backend(device: torch.device | str) -> str:
    """One line for people: the path and what it was built for, or why it is not a compiled one."""
    path, kind = backend(device), torch.device(device).type
    if path == "cuda":
        return f"cuda (compiled for sm_{compiled.CUDA_ARCHITECTURES.replace(';', ', sm_')})"
    if path == "cpu":
        return f"cpu (compiled, {compiled.instruction_set()})"
    if compiled is None:
        return f"torch (no compiled kernels: {missing})"
    return f"torch (no compiled kernels for {kind})"


def current_stream(device: torch.device) -> int:
    """The address of the stream that PyTorch would launch on."""
    return torch.cuda.current_stream(device).cuda_stream


def address(tensor: torch.Tensor | None) -> int:
    """Of the first element, for a kernel; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()

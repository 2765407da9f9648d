"""Python processes that start in a moment, because they are forked from one that has loaded PyTorch and transformers.

To import these anew takes five seconds of a core per process. In all else they are processes of their own: with
signals, exit codes, an environment, a folder, and files for what they print.
"""

import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

# One thread per process: several that share a core wait for each other. No GPU: several cannot share one.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
PRELOADED = ["gradret.train.loop", "transformers.models.bert.modeling_bert"]

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(PRELOADED)


def run_python(command: list[str], environment: dict[str, str], folder: Path, printed: list[Path]) -> None:
    """What the forked process does: `python COMMAND...`, with its standard output and error in two files."""
    for number, path in enumerate(printed, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.environ.update(environment)
    os.chdir(folder)
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")


class ForkedPython:
    """`subprocess.Popen([sys.executable, *command])` with pipes for both outputs, as far as tests use it.

    Args:
        command: a script, or "-m" and a module, with its arguments.
        environment: added to that of the tests and to ENVIRONMENT.
    """

    def __init__(self, command: list[str], environment: dict[str, str] | None = None, folder: Path | None = None):
        self._folder = tempfile.TemporaryDirectory(prefix="forked-")
        self._printed = [Path(self._folder.name, name) for name in ("stdout", "stderr")]
        arguments = (list(map(str, command)), environment or {}, folder or Path.cwd(), self._printed)
        with mock.patch.dict(os.environ, ENVIRONMENT):  # for the process that all are forked from
            self._process = CONTEXT.Process(target=run_python, args=arguments, daemon=True)
            self._process.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def terminate(self) -> None:
        self._process.terminate()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self._process.join(timeout)
        if self.returncode is None:
            self._process.kill()
            raise subprocess.TimeoutExpired("a forked process", timeout)
        return tuple(path.read_text() for path in self._printed)


def start_group(size: int, command: list[str], folders: tuple[Path, ...] = ()) -> list[ForkedPython]:
    """Processes as a cluster's launcher starts them, each in its folder if any are given: nobody watches over them."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    places = folders or [None] * size
    return [ForkedPython(command, shared | {"RANK": str(rank)}, folder) for rank, folder in enumerate(places)]


def run_group(size: int, command: list[str]) -> subprocess.CompletedProcess:
    """The highest exit code of all processes and what they printed, one after the other."""
    processes = start_group(size, command)
    printed = [process.communicate(timeout=180) for process in processes]
    code = max(process.returncode for process in processes)
    return subprocess.CompletedProcess(command, code, *("".join(texts) for texts in zip(*printed, strict=True)))


def run_forked(command: list[str]) -> subprocess.CompletedProcess:
    process = ForkedPython(command)
    stdout, stderr = process.communicate(timeout=180)
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)

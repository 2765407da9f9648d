"""Small files: JSON read, written, replaced in one piece; whether a path can be written."""

import json
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout

from gradret.console import GradretError, say

PART = ".part"  # ends the name of a file that is not whole yet


def versions() -> dict:
    """JSON-serialisable; `commit` is None where gradret does not run from a git checkout."""
    import torch  # here, because the command line reads files before it needs torch
    import transformers

    return {
        "gradret": metadata.version("gradret"),
        "commit": _find_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _find_processor(),
        "threads": torch.get_num_threads(),
    }


def _find_commit() -> str | None:
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        describe = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git here, or a checkout that it does not trust
        return None


def _find_processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Turns what the system refuses in here into one line that names the path. Raises: GradretError."""
    try:
        yield
    except OSError as error:
        raise GradretError(f"{path}: cannot be written ({error.strerror})") from error


def read_json(path: Path) -> dict:
    """A JSON file's content; {} when it is not there. Raises: GradretError when it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise GradretError(f"{path}: not valid JSON ({error})") from None
    except OSError as error:
        raise GradretError(f"{path}: cannot be read ({error.strerror})") from None


def read_object(path: Path) -> dict:
    """A JSON file's object; {} when the file is not there. Raises: GradretError when it holds something else."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise GradretError(f"{path}: expected a JSON object, got {json.dumps(content)[:50]}; put it back from a copy")
    return content


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write in. At the end of the block it takes the path's place, and is on the disk; after an error not."""
    part = path.with_name(f"{path.name}{PART}")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with suppress(OSError):
            shutil.copymode(path, part)  # of the file that is replaced, if there is one
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def write_whole(path: str | os.PathLike, lines: Iterable[str]) -> None:
    """Write a text file in UTF-8, which is left as it is until all its lines are there.

    Raises: GradretError when it cannot be written; whatever the lines raise.
    """
    target = Path(os.path.realpath(path))  # a link stays one
    with writing(path):
        if os.access(target.parent, os.W_OK) and (target.is_file() or not target.exists()):
            with replacing(target) as file:
                file.writelines(line.encode() for line in lines)
            return
        with tempfile.TemporaryFile() as whole:  # for a pipe, or a file whose folder takes no other
            whole.writelines(line.encode() for line in lines)
            whole.seek(0)
            with open(target, "wb") as file:
                shutil.copyfileobj(whole, file)


def write_json(path: Path, content: object) -> None:
    """Write JSON, indented; the file is the old one or the new one, never half of it."""
    with replacing(path) as file:
        file.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


@contextmanager
def hold_lock(path: Path, what: str) -> Iterator[None]:
    """While no other process holds the lock in this file. Where files cannot be written or locked, nobody is kept out.

    Not to be nested. `what` says what the other process does, where this one waits for it.
    """
    lock = FileLock(path)
    with ExitStack() as held:
        with suppress(OSError, NotImplementedError):
            try:
                held.enter_context(lock.acquire(blocking=False))
            except Timeout:
                say(f"waiting for another process that {what} ({path})")
                held.enter_context(lock.acquire())
        yield


def sync_file(path: Path) -> None:
    """Wait until a file, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(path: str | os.PathLike) -> None:
    """Refuse before the work what could not be written after it. Raises: GradretError.

    The file is not made: others that start in the same folder could take it for theirs.
    """
    with writing(path):
        try:
            os.close(os.open(path, os.O_WRONLY))
        except FileNotFoundError:
            with tempfile.TemporaryFile(dir=Path(path).parent):
                pass


def open_folder(out: str | os.PathLike, *names: str) -> None:
    """Make the folder, and refuse before the work what could not be written after it. Raises: GradretError."""
    with writing(out):
        os.makedirs(out, exist_ok=True)
    for name in names:
        check_writable(Path(out, name))

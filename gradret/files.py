"""Small files: JSON read, written, replaced in one piece; whether a path can be written."""

import json
import os
import shutil
from pathlib import Path

from gradret.errors import GradretError


def read_json(path: Path) -> dict:
    """A JSON file's content; {} when it is not there. Raises: GradretError when it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise GradretError(f"{path}: not valid JSON ({error})") from None


def write_json(path: Path, content: object) -> None:
    """Write JSON, indented."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def replace_json(path: Path, content: object) -> None:
    """Write JSON so that the file is the old one or the new one, never half of it."""
    part = path.with_suffix(".part")
    write_json(part, content)
    os.replace(part, path)


def link_file(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, or a copy where the file system has no hard links, in one piece."""
    part = target.with_suffix(".part")
    part.unlink(missing_ok=True)
    try:
        os.link(source, part)
    except OSError:
        shutil.copyfile(source, part)
    os.replace(part, target)


def sync_file(path: Path) -> None:
    """Wait until a file, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(path: str | os.PathLike) -> None:
    """Refuse before the work what could not be written after it. Raises: GradretError."""
    try:
        new = not os.path.exists(path)
        with open(path, "ab"):
            pass
        if new:
            os.unlink(path)
    except OSError as error:
        raise GradretError(f"{path}: can not be written ({error.strerror})") from None


def open_folder(out: str, *names: str) -> None:
    """Make the folder, and refuse before the work what could not be written after it. Raises: GradretError."""
    try:
        os.makedirs(out, exist_ok=True)
    except OSError as error:
        raise GradretError(f"{out}: can not be written ({error.strerror})") from error
    for name in names:
        check_writable(Path(out, name))


def drop_after(path: Path, step: int) -> None:
    """Rewrite a file of JSON lines without those of later steps and without a torn last line."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except json.JSONDecodeError:
            break
    part = path.with_suffix(".part")
    part.write_text("".join(kept), encoding="utf-8")
    os.replace(part, path)

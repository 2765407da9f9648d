"""The rows of a grid: a file that gets one line a finished run, from one process or several at once."""

import json
import math
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from gradret.bench.grid import DEFAULTS, ENCODER_FIELDS, OWN_FIELDS, as_json, hash_record
from gradret.console import GradretError, say
from gradret.data.lists import decode_json
from gradret.files import sync_file
from gradret.settings import spell_loss

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


NUMBER_OR_NONE = (int, float, type(None))
ROW_KEYS = {  # what the tables are made of, and its types
    "run": dict,
    "collections": dict,
    "versions": dict,
    "device": str,
    "fit_seconds": NUMBER_OR_NONE,
    "steps": NUMBER_OR_NONE,
    "lists": NUMBER_OR_NONE,
}


class GridRows:
    """rows.jsonl: a line holds the record of a run (Run.record) and what came of it, and stays as it was written.

    A line also keeps the defaults of FitSettings as they then were, so that it stands for the same run when a default
    has changed since. What a kill can leave, a last line cut short, is dropped.

    Args:
        path: need not exist.
    Raises: GradretError when the file can not be read or written, or a line is no row.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def read(self, *, all_versions: bool = False, tell: bool = True) -> dict[str, list[dict]]:
        """Key of a run -> its rows, the latest first, without those of another version of gradret.

        Args:
            all_versions: with those of others.
            tell: say what is left out.
        """
        found: dict[str, list[dict]] = {}
        others: Counter = Counter()
        for _, row in self._read_lines():
            version = row["versions"].get("gradret")
            if all_versions or version == metadata.version("gradret"):
                found.setdefault(find_key(row), []).insert(0, row)
            else:
                others[version] += 1
        for version, count in others.items() if tell else ():
            rows = "1 row is" if count == 1 else f"{count} rows are"
            say(f"{self.path}: {rows} of gradret {version} and not used; this is {metadata.version('gradret')}")
        return found

    def append(self, row: dict) -> None:
        """Write a row at the end and wait until it is on the disk; a line cut short before it is removed."""
        line = json.dumps(row, ensure_ascii=False) + "\n"
        with self.locked() as descriptor, self._explained():
            data = self.path.read_bytes()
            whole = _measure_whole(data)
            os.ftruncate(descriptor, whole)
            # A last line may be whole but for its newline.
            rest = (b"" if data[:whole].endswith(b"\n") or not whole else b"\n") + line.encode()
            try:
                while rest:  # where the disk is full, writing on says why
                    rest = rest[os.write(descriptor, rest) :]
                os.fsync(descriptor)
            except BaseException:
                os.ftruncate(descriptor, whole)
                raise

    def drop(self, keys: Collection[str]) -> int:
        """Remove the rows of these runs; how many there were."""
        if not self.path.exists():
            return 0
        with self.locked(), self._explained():
            lines = list(self._read_lines())
            kept = [line for line, row in lines if find_key(row) not in keys]
            if len(kept) < len(lines):
                part = self.path.with_suffix(".part")
                part.write_bytes(b"".join(kept))
                sync_file(part)
                os.replace(part, self.path)
        return len(lines) - len(kept)

    def _read_lines(self) -> Iterator[tuple[bytes, dict]]:
        """Every whole line with its newline, and what it holds."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise GradretError(f"{self.path}: can not be read ({error.strerror})") from None
        lines = data[: _measure_whole(data)].split(b"\n")
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"{self.path}:{number}"
                try:
                    row = decode_json(line, where)
                except GradretError as error:
                    raise GradretError(f"{error}; remove the line, and its run is done again") from None
                if not _is_row(row):
                    raise GradretError(
                        f"{where}: is no row of gradret bench quality; remove the line, or name another --out"
                    )
                yield line + b"\n", row

    @contextmanager
    def locked(self):
        """The file, open to append, while no other process writes to it or has it locked."""
        with self._explained():
            while True:
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
                try:
                    if fcntl is not None:
                        fcntl.flock(descriptor, fcntl.LOCK_EX)
                except OSError:  # a network file system without locks
                    break
                # While this one waited, another may have put a new file in its place.
                if os.path.exists(self.path) and os.path.samestat(os.fstat(descriptor), os.stat(self.path)):
                    break
                os.close(descriptor)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    @contextmanager
    def _explained(self):
        try:
            yield
        except OSError as error:
            raise GradretError(
                f"{self.path}: can not be written ({error.strerror}); the rows before are kept: make room and run the "
                "same command again"
            ) from error


def list_defaults() -> dict:
    """The defaults that a trained run's record leaves out, as JSON."""
    kept = (name for name in DEFAULTS if name not in (*ENCODER_FIELDS, *OWN_FIELDS))
    return {name: as_json(DEFAULTS[name]) for name in kept}


def find_key(row: Mapping) -> str:
    """The key that a row's run has now; a default that has changed since the row was written counts as set."""
    now = list_defaults()
    known = row.get("defaults", {})  # none of what is not trained
    settings = _spell_mixture({**known, **row["run"].get("settings", {})})
    changed = {k: v for k, v in settings.items() if k not in now or v != now[k]}
    return hash_record({**row["run"], "settings": changed})


def _spell_mixture(settings: dict) -> dict:
    """Settings whose loss is spelled out; in earlier rows `wasserstein` had shares of kl and of the contrast."""
    shares = {name: settings.pop(f"{name}_share", 0.0) for name in ("kl", "contrast")}
    if settings.get("loss") == "wasserstein":
        weights = {"wasserstein": round(1 - sum(shares.values()), 6), **shares}
        settings["loss"] = spell_loss("+".join(f"{name}:{weight}" for name, weight in weights.items() if weight))
    return settings


def _is_row(row: object) -> bool:
    """Whether it has everything that the tables are made of, numbers where numbers belong."""
    if not (isinstance(row, dict) and row.keys() >= ROW_KEYS.keys()):
        return False
    if not all(isinstance(row[key], kinds) for key, kinds in ROW_KEYS.items()):
        return False
    if not all(isinstance(part, dict) for part in (row.get("defaults", {}), row["run"].get("settings", {}))):
        return False
    for collection in row["collections"].values():
        if not isinstance(collection, dict):
            return False
        measures, per_query = collection.get("measures"), collection.get("per_query")
        if not (isinstance(measures, dict) and isinstance(per_query, dict)):
            return False
        if not all(_are_numbers(values) for values in (measures, *per_query.values())):
            return False
    return "ranker" in row["run"]


def _are_numbers(values: object) -> bool:
    return isinstance(values, dict) and all(
        isinstance(value, int | float) and math.isfinite(value) for value in values.values()
    )


def _measure_whole(data: bytes) -> int:
    """Bytes up to the end of the last whole line, which may lack its newline."""
    end = data.rfind(b"\n") + 1
    try:
        json.loads(data[end:])
    except ValueError:
        return end
    return len(data)

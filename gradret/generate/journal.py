"""The output of a generation: a file of ranking lists that only grows, its rejects, and the record of its settings."""

import json
import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path

from gradret.console import PATIENCE_S, GradretError, say, show_bar
from gradret.data.lists import RankingList, decode_json, format_list, parse_list, query_key
from gradret.files import open_folder, read_json, replace_json
from gradret.generate.queries import Query

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class Journal:
    """A generation's files, open to append to: killed at any moment, they lose nothing and double nothing.

    Every list and every reject is one line, written at once. What a kill can leave, a last line without its newline,
    is mended when the files are next opened.

    Args:
        out: the lists, JSONL.
        rejects: the queries given up, JSONL; None for OUT's name with .rejects.jsonl for .jsonl.
        record: the settings, JSON-serialisable, kept in a file of OUT's name with .gen.json for .jsonl; or a function
            that gives them, called once it is clear that the files can be written.
        mix: append to lists that were written with other settings, too.
        retry_rejects: take no query for given up that was before.
    Attributes:
        done: query_key of every query that has its list.
        rejected: query_key of every query given up that has none; those not tried to the end are not among them.
    Raises: GradretError when a file can not be written, is in use, is broken, or when the settings differ.
    """

    def __init__(
        self,
        out: Path,
        rejects: Path | None,
        record: dict | Callable[[], dict],
        *,
        mix: bool = False,
        retry_rejects: bool = False,
    ):
        self.out = Path(out)
        stem = self.out.name.removesuffix(".jsonl")
        self.record_path = self.out.with_name(f"{stem}.gen.json")
        self.rejects = self.out.with_name(f"{stem}.rejects.jsonl") if rejects is None else Path(rejects)
        if str(out) == "-":
            raise GradretError("--out -: lists are appended to a file that later runs read; name a file")
        if len({os.path.abspath(path) for path in (self.out, self.record_path, self.rejects)}) < 3:
            raise GradretError(f"{self.rejects}: is taken by the lists or their record; name another file for rejects")
        self._fds: list[int] = []
        try:
            self._out, self._rejects = self._open(self.out), self._open(self.rejects)
            self._keep_record(json.loads(json.dumps(record() if callable(record) else record)), mix)
            self._seen: dict[str, tuple[int, int]] = {}  # query id -> query_key, line
            self._scan(self._out, self.out, self._note_list)
            self.done = {key for key, _ in self._seen.values()}
            self.rejected: set[int] = set()
            self._scan(self._rejects, self.rejects, self._note_reject)
            self.rejected = set() if retry_rejects else self.rejected - self.done
        except BaseException:
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        """Let go of the files."""
        while self._fds:
            os.close(self._fds.pop())

    def add(self, ranking_list: RankingList) -> None:
        """Append a list. Raises: GradretError when it can not be written; what was there before is intact."""
        key = query_key(ranking_list.query_id, ranking_list.query)
        if ranking_list.query_id in self._seen:
            raise ValueError(f"query id '{ranking_list.query_id}' has its list already")
        _append(self._out, self.out, (format_list(ranking_list) + "\n").encode())
        self._seen[ranking_list.query_id] = key, 0
        self.done.add(key)

    def reject(self, query: Query, reason: str, detail: str, replies: list[str], final: bool = True) -> None:
        """Note a query given up, and what the model replied.

        Args:
            final: whether it was tried to the end; if not (the server went away), a later run tries it again.
        Raises: GradretError as add.
        """
        entry = {"query_id": query.query_id, "query": query.text, "reason": reason, "detail": detail}
        line = json.dumps({**entry, "replies": replies, "final": final}, ensure_ascii=False) + "\n"
        _append(self._rejects, self.rejects, line.encode("utf-8", "replace"))  # raw replies may hold half a surrogate
        if final:
            self.rejected.add(query.key)

    def check_queries(self, queries: Iterable[Query]) -> None:
        """Refuse queries whose id stands for other words in the lists already written. Raises: GradretError."""
        for query in queries:
            key, _ = self._seen.get(query.query_id, (query.key, 0))
            if key != query.key:
                raise GradretError(
                    f"{self.out}: query '{query.query_id}' has other words there than in the queries given; "
                    "choose another --out"
                )

    def _open(self, path: Path) -> int:
        open_folder(str(path.parent))
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise GradretError(f"{path}: can not be written ({error.strerror})") from None
        self._fds.append(fd)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise GradretError(f"{path}: is not a regular file; lists are appended to one that later runs read")
        try:
            if fcntl is not None:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise GradretError(
                f"{path}: another process is writing to it; wait for it, stop it, or name another file"
            ) from None
        except OSError:  # a network file system without locks
            pass
        return fd

    def _keep_record(self, record: dict, mix: bool) -> None:
        """Compare the settings with those of the lists there are; before the first list, write them down."""
        stored = read_json(self.record_path)
        if stored and not (isinstance(stored, dict) and isinstance(stored.get("settings"), dict)):
            raise GradretError(f"{self.record_path}: is not the record of a generation; choose another --out")
        lists, rejects = os.fstat(self._out).st_size, os.fstat(self._rejects).st_size
        if not lists and not (stored and rejects):
            content = {"settings": record}
        else:
            # None stands for lists without a record
            used = [stored["settings"], *stored.get("also", [])] if stored else [None]
            if any(settings is not None and not _list_differences(settings, record) for settings in used):
                return
            if not mix:
                advice = "choose another --out, or pass --mix-settings to append all the same"
                raise GradretError(f"{self.out}: {_describe_difference(used[0], record, self.record_path)}; {advice}")
            first, *also = [*used, record] if stored else [record, None]
            content = {"settings": first, "also": also}
        if content != stored:
            try:
                replace_json(self.record_path, content)
            except OSError as error:
                raise GradretError(f"{self.record_path}: can not be written ({error.strerror})") from None

    def _scan(self, fd: int, path: Path, note) -> None:
        """Give each line's object to `note`; mend a last line that was cut off."""
        size, offset = os.fstat(fd).st_size, 0
        with (
            open(path, "rb") as file,
            show_bar(total=size, unit="B", unit_scale=True, desc=f"reading {path.name}", delay=PATIENCE_S) as bar,
        ):
            for number, line in enumerate(file, 1):
                where = f"{path}:{number}"
                if not line.endswith(b"\n") and not _is_whole(line):
                    os.ftruncate(fd, offset)
                    say(f"{where}: was cut off when a run was stopped; removed, its query is asked again")
                    return
                if line.strip():
                    note(decode_json(line, where), where, number)
                if not line.endswith(b"\n"):
                    _append(fd, path, b"\n")
                    say(f"{where}: was written whole but for its newline when a run was stopped; added")
                offset += len(line)
                if number % 1000 == 0:
                    bar.update(offset - bar.n)

    def _note_list(self, record: object, where: str, number: int) -> None:
        ranking_list = parse_list(record, where)
        key = query_key(ranking_list.query_id, ranking_list.query)
        if ranking_list.query_id in self._seen:
            raise GradretError(
                f"{where}: query id '{ranking_list.query_id}' was already used in line "
                f"{self._seen[ranking_list.query_id][1]}; remove one of the two"
            )
        self._seen[ranking_list.query_id] = key, number

    def _note_reject(self, record: object, where: str, number: int) -> None:
        fields = [record.get(key) for key in ("query_id", "query", "final")] if isinstance(record, dict) else [None]
        if [type(field) for field in fields] != [str, str, bool]:
            raise GradretError(
                f"{where}: expected a rejected query with query_id, query and final; remove the line, "
                "or name another file for rejects"
            )
        if fields[2]:
            self.rejected.add(query_key(fields[0], fields[1]))


def _append(fd: int, path: Path, data: bytes) -> None:
    """Write at the end, all or nothing."""
    before = os.fstat(fd).st_size
    try:
        written = os.write(fd, data)
        while written < len(data):  # the disk is full; writing on says why, or goes on if room was made
            written += os.write(fd, data[written:])
    except BaseException as error:
        os.ftruncate(fd, before)
        if not isinstance(error, OSError):
            raise
        raise GradretError(
            f"{path}: can not be written ({error.strerror}); all lines before are kept: "
            "make room and run the same command again"
        ) from error


def _is_whole(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _describe_difference(stored: dict | None, record: dict, record_path: Path) -> str:
    if stored is None:
        return f"holds lists, but {record_path.name}, the record of how they were written, is not there"
    name = _list_differences(stored, record)[0]
    shown = [_show(settings.get(name)) for settings in (stored, record)]
    return f"was written with {name}={shown[0]} where {shown[1]} is asked for"


def _list_differences(stored: dict, record: dict) -> list[str]:
    return [name for name in {**record, **stored} if stored.get(name) != record.get(name)]


def _show(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."

"""The output of a generation: a file of ranking lists that only grows, its rejects, and the record of its settings."""

import json
import os
import stat
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path

from filelock import lock_descriptor

from gradret.console import BAR_DELAY_S, GradretError, say, show_bar
from gradret.data.lists import RankingList, decode_json, format_list, parse_list, query_key
from gradret.files import open_folder, read_object, write_json, writing
from gradret.generate.queries import Query

RECENT = 256


class Journal:
    """A generation's files, open to append to: killed at any moment, they lose nothing and double nothing.

    Every list and every reject is one line, written at once. What a kill can leave, a last line without its newline,
    is mended by the next `resume`. Opening takes the files, so that no other process writes to them.

    Args:
        out: the lists, JSONL.
        rejects: the queries given up, JSONL; None for OUT's name with .rejects.jsonl for .jsonl.
    Attributes:
        done: query_key of every query that has its list.
        rejected: query_key of every query given up that has none; those not tried to the end are not among them.
        recent: the lists written last, at most RECENT.
    Raises: GradretError when a file cannot be written, or is in use.
    """

    def __init__(self, out: Path, rejects: Path | None = None):
        self.out = Path(out)
        stem = self.out.name.removesuffix(".jsonl")
        self.record_path = self.out.with_name(f"{stem}.gen.json")
        self.rejects = self.out.with_name(f"{stem}.rejects.jsonl") if rejects is None else Path(rejects)
        if str(out) == "-":
            raise GradretError("--out -: lists are appended to a file that later runs read; name a file")
        if len({os.path.abspath(path) for path in (self.out, self.record_path, self.rejects)}) < 3:
            raise GradretError(f"{self.rejects}: is taken by the lists or their record; name another file for rejects")
        self.done: set[int] = set()
        self.rejected: set[int] = set()
        self.recent: deque[RankingList] = deque(maxlen=RECENT)
        self._seen: dict[str, tuple[int, int]] = {}  # query id -> query_key, line
        self._fds: dict[Path, int] = {}
        try:
            for path in (self.out, self.rejects):
                self._open(path)
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
            os.close(self._fds.popitem()[1])

    def resume(self, record: dict, *, mix: bool = False, retry_rejects: bool = False) -> None:
        """Read what earlier runs wrote. Before the first list, write the settings down.

        Args:
            record: the settings, JSON-serialisable, kept in a file of OUT's name with .gen.json for .jsonl.
            mix: append to lists that were written with other settings, too.
            retry_rejects: take no query for given up that was before.
        Raises: GradretError when the settings differ, before anything is touched; when a line is broken.
        """
        self._keep_record(json.loads(json.dumps(record)), mix)
        self._scan(self.out, self._note_list)
        self.done = {key for key, _ in self._seen.values()}
        self._scan(self.rejects, self._note_reject)
        self.rejected = set() if retry_rejects else self.rejected - self.done

    def add(self, ranking_list: RankingList) -> None:
        """Append a list. Raises: GradretError when it cannot be written; what was there before is intact."""
        key = query_key(ranking_list.query_id, ranking_list.query)
        if ranking_list.query_id in self._seen:
            raise ValueError(f"query id '{ranking_list.query_id}' has its list already")
        self._append(self.out, (format_list(ranking_list) + "\n").encode())
        self._seen[ranking_list.query_id] = key, 0
        self.done.add(key)
        self.recent.append(ranking_list)

    def reject(self, query: Query, reason: str, detail: str, replies: list[str], final: bool = True) -> None:
        """Note a query given up, and what the model replied.

        Args:
            final: whether it was tried to the end; if not (the server went away), a later run tries it again.
        Raises: GradretError as add.
        """
        entry = {"query_id": query.query_id, "query": query.text, "reason": reason, "detail": detail}
        line = json.dumps({**entry, "replies": replies, "final": final}, ensure_ascii=False) + "\n"
        self._append(self.rejects, line.encode("utf-8", "replace"))  # raw replies may hold half a surrogate pair
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

    def _open(self, path: Path) -> None:
        open_folder(str(path.parent))
        with writing(path):
            fd = self._fds[path] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise GradretError(f"{path}: is not a regular file; lists are appended to one that later runs read")
        try:
            # The lists themselves are locked: a lock file beside them would stay behind, and a kill frees this one.
            held = lock_descriptor(fd, blocking=False)
        except OSError:  # a network file system without locks
            return
        if not held:
            raise GradretError(f"{path}: another process is writing to it; wait for it, stop it, or name another file")

    def _keep_record(self, record: dict, mix: bool) -> None:
        """Compare the settings with those of the lists there are; before the first list, write them down."""
        stored = read_object(self.record_path)
        used = stored.get("settings") if stored else []
        if not isinstance(used, list):
            raise GradretError(f"{self.record_path}: is not the record of a generation; choose another --out")
        written = {path: os.fstat(fd).st_size > 0 for path, fd in self._fds.items()}
        if not written[self.out] and not (used and written[self.rejects]):
            used = []  # nothing yet depends on what an earlier run wrote down
        else:
            used = used or [None]  # stands for the settings of lists without a record
            if any(settings is not None and not _differing(settings, record) for settings in used):
                return
            if not mix:
                advice = "choose another --out, or pass --mix-settings to append all the same"
                raise GradretError(f"{self.out}: {self._describe_difference(used[0], record)}; {advice}")
        content = {"settings": [*used, record]}
        if content != stored:
            with writing(self.record_path):
                write_json(self.record_path, content)

    def _describe_difference(self, stored: dict | None, record: dict) -> str:
        if stored is None:
            return f"holds lists, but {self.record_path.name}, the record of how they were written, is not there"
        name = _differing(stored, record)[0]
        texts = [json.dumps(settings.get(name), ensure_ascii=False) for settings in (stored, record)]
        shown = [text if len(text) <= 60 else text[:57] + "..." for text in texts]
        return f"was written with {name}={shown[0]} where {shown[1]} is asked for"

    def _scan(self, path: Path, note: Callable[[object, str, int], None]) -> None:
        """Give each line's object, its place and its number to `note`; mend a last line that was cut off."""
        fd, offset = self._fds[path], 0
        size = os.fstat(fd).st_size
        with (
            open(path, "rb") as file,
            show_bar(total=size, unit="B", unit_scale=True, desc=f"reading {path.name}", delay=BAR_DELAY_S) as bar,
        ):
            for number, line in enumerate(file, 1):
                where = f"{path}:{number}"
                # Only the last line can lack its newline. What is broken elsewhere somebody has edited: `note` tells.
                if not line.endswith(b"\n") and not _is_whole(line):
                    os.ftruncate(fd, offset)
                    say(f"{where}: was cut off when a run was stopped; removed, its query is asked again")
                    return
                if line.strip():
                    note(decode_json(line, where), where, number)
                if not line.endswith(b"\n"):
                    self._append(path, b"\n")
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
        self.recent.append(ranking_list)

    def _note_reject(self, record: object, where: str, number: int) -> None:
        fields = [record.get(key) for key in ("query_id", "query", "final")] if isinstance(record, dict) else [None]
        if [type(field) for field in fields] != [str, str, bool]:
            raise GradretError(
                f"{where}: expected a rejected query with query_id, query and final; remove the line, "
                "or name another file for rejects"
            )
        if fields[2]:
            self.rejected.add(query_key(fields[0], fields[1]))

    def _append(self, path: Path, data: bytes) -> None:
        """Write at the end, all or nothing."""
        fd = self._fds[path]
        before = os.fstat(fd).st_size
        # One write, without a buffer of Python's: a kill leaves at most the last line torn, and never a line in memory.
        try:
            written = os.write(fd, data)
            while written < len(data):  # the disk is full; writing on says why, or goes on if room was made
                written += os.write(fd, data[written:])
        except BaseException as error:
            os.ftruncate(fd, before)
            if not isinstance(error, OSError):
                raise
            raise GradretError(
                f"{path}: cannot be written ({error.strerror}); all lines before are kept: "
                "make room and run the same command again"
            ) from error


def _is_whole(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _differing(stored: dict, record: dict) -> list[str]:
    """Names of the settings that differ; null is as good as absent."""
    return [name for name in {**record, **stored} if stored.get(name) != record.get(name)]

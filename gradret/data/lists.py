"""Ranking lists: one query with its graded passages, as JSONL in and out; how any text file is read, and its words."""

import codecs
import hashlib
import json
import os
import re
import unicodedata
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeGuard

import numpy as np

from gradret.console import BAR_DELAY_S, GradretError, show_bar
from gradret.files import write_whole

GRADE_LIMIT = 1000  # 2^grade still fits a float64
PASSAGE_KEYS = ("grade", "text", "title", "doc_id")
LIST_KEYS = ("query_id", "query", "passages", "meta")
TEVATRON_KEYS = {"positive_passages": 1, "negative_passages": 0}  # -> grade
JUDGED = "judged"  # a passage's key for the real-valued grade that `gen --judge` gives it
QUOTED = 60  # characters of a value that a message shows
SURROGATE, HALVES = re.compile(r"\\u[dD][89a-fA-F]"), re.compile(r"[\ud800-\udfff]")  # in JSON, in a text
HALF_A_PAIR = "holds half of a surrogate pair (\\ud800 to \\udfff); cut the text elsewhere"
SPACE, PIECE = re.compile(r"\s"), 1 << 16  # characters
# Of JSON in bytes: up to where it can be cut, before a character that no escape holds.
PART = re.compile(rb'.*(?=[^\\"/0-9a-fA-Fnrtu\x80-\xbf])', re.DOTALL)
BLANKS = b" \\ntr"  # escaped ones, too
PART_BYTES = 1 << 18
# In no text that was read as it was written, with what it comes from.
FOREIGN = {"\0": "a NUL character, as UTF-16 has", "\r": "a carriage return within a line, as old Macs end them"}


@dataclass(slots=True)
class Passage:
    """A passage and its grade for one query; `extra` holds the keys gradret does not know."""

    grade: float
    text: str
    title: str | None = None
    doc_id: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def content(self) -> str:
        """What an encoder reads: title and text, as BEIR joins them."""
        return f"{self.title} {self.text}".strip() if self.title else self.text


@dataclass(slots=True)
class RankingList:
    """One query with its graded passages; `where` names the place it was read from in messages."""

    query_id: str
    query: str
    passages: list[Passage]
    meta: dict[str, Any] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    where: str = field(default="", compare=False)

    @property
    def place(self) -> str:
        """Opens messages about the whole list."""
        return f"{self.where}: list '{self.query_id}'"


def parse_list(record: object, where: str) -> RankingList:
    """A checked RankingList from one decoded JSON object, one of Tevatron's too: its positive passages have grade 1.

    Raises: GradretError, which `where`, "FILE:LINE", opens, when a key is missing or of the wrong type, a list has no
    passages, or a grade is not a finite number.
    """
    if not isinstance(record, dict):
        raise GradretError(f"{where}: expected a JSON object, got {quote(record)}")
    query_id = parse_id(record.get("query_id"), f"{where}: query_id")
    query = record.get("query")
    if not isinstance(query, str) or not query.strip():
        raise GradretError(f"{where}: query {quote(query)} of list '{query_id}' is not a non-empty string")
    if "passages" not in record and all(isinstance(record.get(key), list) for key in TEVATRON_KEYS):
        record = _read_tevatron(record, where)
    passages = record.get("passages")
    if not isinstance(passages, list) or not passages:
        raise GradretError(f"{where}: list '{query_id}' has no passages; give it at least one or remove the line")
    return RankingList(
        query_id,
        query,
        [_parse_passage(p, f"{where}: passage {i}") for i, p in enumerate(passages, 1)],
        record.get("meta"),
        {key: value for key, value in record.items() if key not in LIST_KEYS},
        where,
    )


def _read_tevatron(record: dict[str, Any], where: str) -> dict[str, Any]:
    """The same with the passages as gradret has them."""
    passages = []
    for key, grade in TEVATRON_KEYS.items():
        for passage in record[key]:
            if not isinstance(passage, dict):
                raise GradretError(f"{where}: {key} holds {quote(passage)}; expected JSON objects with docid and text")
            others = {k: v for k, v in passage.items() if k not in ("docid", "title")}
            titled = {"title": passage["title"]} if passage.get("title") else {}
            passages.append({"grade": grade, "doc_id": passage.get("docid")} | titled | others)
    return {k: v for k, v in record.items() if k not in TEVATRON_KEYS} | {"passages": passages}


def _parse_passage(record: object, where: str) -> Passage:
    if not isinstance(record, dict):
        raise GradretError(f"{where}: expected a JSON object with grade and text, got {quote(record)}")
    grade = record.get("grade")
    if not is_grade(grade):
        raise GradretError(
            f"{where}: grade {quote(grade)} is not a finite number below 1000; write one such as 0, 1, 2 or 3"
        )
    text = record.get("text")
    if not isinstance(text, str):
        raise GradretError(f"{where}: text {quote(text)} is not a string")
    title, doc_id = record.get("title"), record.get("doc_id")
    for key, value in (("title", title), ("doc_id", doc_id)):
        if value is not None and not isinstance(value, str):
            raise GradretError(f"{where}: {key} {quote(value)} is not a string")
    if doc_id:
        parse_id(doc_id, f"{where}: doc_id")
    extra = {key: value for key, value in record.items() if key not in PASSAGE_KEYS}
    return Passage(grade, text, title, doc_id, extra)


def is_grade(value: object) -> TypeGuard[float]:
    """Whether it is a finite number below GRADE_LIMIT."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < GRADE_LIMIT


def parse_id(value: object, place: str) -> str:
    """The id that a value of JSON is, a whole number as its digits. Raises: GradretError, which `place` opens."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value:
        raise GradretError(f"{place} {quote(value)} is not a non-empty string")
    if "\0" in value:  # arrays of bytes lose it at the end of an id
        raise GradretError(f"{place} {json.dumps(value)} holds a NUL character; rename it")
    return value


def quote(value: object) -> str:
    """A value of JSON as messages show it, a text in quotation marks; what is long is cut off."""
    shown = value if isinstance(value, str) else json.dumps(value)
    if len(shown) > QUOTED:
        shown = shown[: QUOTED - 3] + "..."
    return f"'{shown}'" if isinstance(value, str) else shown


def format_list(ranking_list: RankingList) -> str:
    """The list as one JSON line without the newline; optional keys that are None are left out."""
    record = {
        "query_id": ranking_list.query_id,
        "query": ranking_list.query,
        "passages": [
            {
                "grade": p.grade,
                "text": p.text,
                **{k: v for k, v in (("title", p.title), ("doc_id", p.doc_id)) if v is not None},
                **p.extra,
            }
            for p in ranking_list.passages
        ],
        **({"meta": ranking_list.meta} if ranking_list.meta is not None else {}),
        **ranking_list.extra,
    }
    return json.dumps(record, ensure_ascii=False, default=_make_plain)


def _make_plain(value: object) -> Any:
    """A NumPy number, or an array, as JSON has it. Raises: TypeError."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{value!r:.100} cannot be written as JSON")


# Every text of a user comes through the following: lists, corpora, queries, qrels, ids, scales, examples.


class Line(NamedTuple):
    """A line of a text file: FILE:LINE for messages, its number from 1 on, the byte it begins at, and its text."""

    where: str
    number: int
    offset: int
    text: str


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """The file opened for reading bytes. Raises: GradretError when it cannot be; TypeError for no path."""
    if not isinstance(path, str | os.PathLike):  # a number would be an open file's
        raise TypeError(f"path must be a file's name, got {path!r:.100}")
    try:
        return open(path, "rb")
    except FileNotFoundError:
        raise GradretError(f"{path}: no such file") from None
    except OSError as error:
        raise GradretError(f"{path}: cannot be read ({error.strerror})") from None


def decode_text(content: bytes, where: str, *, first: bool = True) -> str:
    """The text of a file or a line in UTF-8, without the line's end.

    Args:
        first: whether it opens the file, which a byte order mark may do.
    Raises: GradretError when it is not UTF-8, or holds what makes it doubtful where lines and ids begin and end.
    """
    content = content.removeprefix(codecs.BOM_UTF8) if first else content
    try:
        text = content.decode("utf-8").replace("\r\n", "\n").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise GradretError(
            f"{where}: not UTF-8 text ({error.reason} at byte {error.start}); save the file as UTF-8"
        ) from None
    for character, what in FOREIGN.items():
        if character in text:
            raise GradretError(f"{where}: holds {what}; save the file as UTF-8")
    if text.startswith("\ufeff"):
        raise GradretError(f"{where}: begins with a byte order mark that does not open the file; remove it")
    return text


def shorten_lines(file: BinaryIO, characters: int) -> Iterator[bytes]:
    """Lines of JSON; of a string, the middle between so many characters at both ends may be left out.

    White space around a string does not count. What is left out is never in memory as a whole.
    """
    least = 12 * characters  # bytes: two escapes can be one character
    line, middle, rest, inside, begun = bytearray(), [], bytearray(), False, 0
    while piece := file.readline(PART_BYTES):
        ends = piece.endswith(b"\n")
        if ends and not line and not rest:
            yield piece
            continue
        found = PART.match(piece)
        if not ends and not found:
            rest += piece
            continue
        cut = found.end() if found and not ends else len(piece)
        part, rest = bytes(rest + piece[:cut]), bytearray(piece[cut:])
        marks = part.replace(rb"\\", b"").replace(rb"\"", b"").count(b'"')  # that begin or end a string
        if inside and not marks and begun >= least:
            middle.append((part, len(part.rstrip(BLANKS))))
            while sum(length for _, length in middle[1:]) >= least:
                del middle[0]
        else:
            line += b"".join(part for part, _ in middle) + part
            middle.clear()
            begun = 0 if marks or not inside else begun + len(part if begun else part.lstrip(BLANKS))
        inside = inside != bool(marks % 2)
        if ends:
            yield bytes(line)
            line, inside, begun = bytearray(), False, 0
    if line or rest:
        yield bytes(line + b"".join(part for part, _ in middle) + rest)


TEXT_CHARACTERS = 1 << 17  # at each end of a text that is to be encoded: many times what any encoder reads


def number_lines(lines: Iterable[bytes], place: str, tell: Callable[[], int] | None = None) -> Iterator[Line]:
    """Lines of bytes, as an open file gives them, decoded; those that hold only white space are left out.

    Args:
        place: where they come from, for messages.
        tell: says where the next line begins; None where lines are as long as in the file.
    Raises: GradretError as decode_text.
    """
    offset = 0
    for number, line in enumerate(lines, 1):
        where = f"{place}:{number}"
        text = decode_text(line, where, first=number == 1)
        if text.strip():
            yield Line(where, number, offset, text)
        offset = tell() if tell else offset + len(line)


def read_lines(path: str | os.PathLike[str], *, desc: str = "", characters: int | None = None) -> Iterator[Line]:
    """The lines of a text file, see number_lines.

    Args:
        desc: of a progress bar that shows up where reading takes long; "" for none.
        characters: see shorten_lines; None for lines as they are.
    Raises: GradretError when the file cannot be read or is not UTF-8.
    """
    with open_file(path) as file:
        bar_options: dict[str, Any] = {"total": os.fstat(file.fileno()).st_size, "unit": "B", "unit_scale": True}
        with show_bar(shown=bool(desc), desc=desc, delay=BAR_DELAY_S, **bar_options) as bar:
            try:
                shortened = None if characters is None else shorten_lines(file, characters)
                for line in number_lines(shortened or file, str(path), file.tell if shortened else None):
                    yield line
                    bar.update(line.offset - bar.n)
            except OSError as error:
                raise GradretError(f"{path}: cannot be read ({error.strerror})") from error


def read_line(file: BinaryIO, offset: int, characters: int | None = None) -> bytes:
    """The line that begins at an offset; characters: see read_lines."""
    file.seek(offset)
    return file.readline() if characters is None else next(shorten_lines(file, characters))


def decode_json(line: str | bytes, where: str) -> Any:
    """One decoded JSON line. Raises: GradretError when it is not UTF-8 or not JSON."""
    text = line if isinstance(line, str) else decode_text(line, where)
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise GradretError(f"{where}: not valid JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise GradretError(f"{where}: not readable as JSON ({error})") from None
    if SURROGATE.search(text):
        try:
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise GradretError(f"{where}: {HALF_A_PAIR}") from None
    return record


def write_lists(path: str | os.PathLike[str], lists: Iterable[RankingList]) -> None:
    """Write ranking lists as JSONL, UTF-8; the file is left as it is until they are all there.

    Raises: GradretError when a list is none that read_lists reads, or the file cannot be written; TypeError when
        `lists` holds something else.
    """
    if isinstance(lists, RankingList):
        raise TypeError("lists must be several, such as [ranking_list], got a single one")
    write_whole(path, (_format_checked(r, f"{path}: list {n}") for n, r in enumerate(lists, 1)))


def _format_checked(ranking_list: RankingList, where: str) -> str:
    """The list's line. Raises: GradretError, as parse_list; TypeError when it is no list of passages."""
    if not isinstance(ranking_list, RankingList):
        raise TypeError(f"lists must hold RankingList, got {ranking_list!r:.100}")
    if not all(isinstance(passage, Passage) for passage in ranking_list.passages):
        raise TypeError(f"{where}: passages must be Passage, got {ranking_list.passages!r:.100}")
    text = format_list(ranking_list)
    parse_list(decode_json(text, where), where)
    if not text.isascii() and HALVES.search(text):
        raise GradretError(f"{where}: {HALF_A_PAIR}")
    return text + "\n"


def read_lists(path: str | os.PathLike[str]) -> Iterator[RankingList]:
    """Every ranking list of a JSONL file in order, one at a time. Raises: GradretError as parse_list."""
    for line in read_lines(path):
        yield parse_list(decode_json(line.text, line.where), line.where)


def grades_agree(intended: Sequence[float], judged: Sequence[float]) -> bool:
    """Whether, of every two passages of a list with different intended grades, the higher is judged higher, too."""
    lowest_above = float("inf")
    for grade in sorted(set(intended), reverse=True):
        level = [j for i, j in zip(intended, judged, strict=True) if i == grade]
        if max(level) >= lowest_above:
            return False
        lowest_above = min(level)
    return True


def hash64(*parts: str) -> int:
    """A 64-bit key of some strings, the same on every machine."""
    return int.from_bytes(hashlib.blake2b("\0".join(parts).encode(), digest_size=8).digest(), "little")


def join_words(text: str) -> str:
    """The text with a single space for each run of space, and none at its ends.

    Piece by piece: a list of the words of a whole text takes more than ten times its memory.
    """
    pieces, start = [], 0
    while start < len(text):
        gap = SPACE.search(text, start + PIECE)
        end = gap.start() if gap else len(text)
        pieces.append(" ".join(text[start:end].split()))
        start = end
    return " ".join(filter(None, pieces))


def query_key(query_id: str, query: str) -> int:
    """What makes two queries one: the same id and the same words. Ids of two collections may collide."""
    return hash64(query_id, join_words(unicodedata.normalize("NFC", query)))


def query_words(text: str) -> str:
    """A query, or what else is looked for twice, without case, runs of space and Unicode's ways to write a letter."""
    return join_words(unicodedata.normalize("NFC", text.lower()))


class DocumentNames:
    """The ids of the distinct passages of lists; of their texts only hashes are kept.

    A passage without a doc_id is named QUERY_ID/POSITION; the same words twice are one document.
    """

    def __init__(self) -> None:
        self._id_of: dict[int, str] = {}
        self._content_of: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._content_of)

    def name(self, ranking_list: RankingList) -> tuple[dict[str, Passage], list[str]]:
        """The list's passages by document id, each with its first grade, and which ids are new.

        Raises: GradretError when an id stands for two texts.
        """
        judged: dict[str, Passage] = {}
        new = []
        for position, passage in enumerate(ranking_list.passages, 1):
            content = hash64(passage.content)
            doc_id = self._id_of.setdefault(content, passage.doc_id or f"{ranking_list.query_id}/{position}")
            if doc_id not in self._content_of:
                new.append(doc_id)
            if self._content_of.setdefault(doc_id, content) != content:
                raise GradretError(
                    f"{ranking_list.place}: doc_id '{doc_id}' stands for two different texts; rename one"
                )
            judged.setdefault(doc_id, passage)
        return judged, new


class ListFile(Sequence[RankingList]):
    """Ranking lists of a JSONL file by position; only an index of 32 bytes per list stays in memory.

    One pass over the file decodes every line, so that a torn line or a query id used twice shows at once;
    the passages are checked as each list is read.

    Args:
        characters: see read_lines.
    Attributes:
        ids, keys: (lists,) uint64, hash64 of the query id, and query_key.
        fingerprint: hex digest of the lines.
    Raises: GradretError.
    """

    def __init__(self, path: str | os.PathLike[str], characters: int | None = None):
        self.path, self._characters = Path(path), characters
        self._file = open_file(path)
        if not self._file.seekable():
            raise GradretError(f"{path}: is a pipe; lists are read by position: save them in a file first")
        offsets, numbers, ids, keys = array("q"), array("q"), array("Q"), array("Q")
        digest = hashlib.blake2b(digest_size=16)
        for line in read_lines(path, desc=f"indexing {self.path.name}", characters=characters):
            digest.update(f"{line.text}\n".encode())
            record = decode_json(line.text, line.where)
            query_id, query = (record.get(key) if isinstance(record, dict) else None for key in ("query_id", "query"))
            offsets.append(line.offset)
            numbers.append(line.number)
            ids.append(hash64(str(query_id)))
            keys.append(query_key(str(query_id), str(query)))
        if not ids:
            raise GradretError(f"{path}: no ranking lists; expected one JSON object per line")
        self._offsets, self._numbers = np.array(offsets), np.array(numbers)
        self.ids, self.keys = np.array(ids, np.uint64), np.array(keys, np.uint64)
        self.fingerprint = digest.hexdigest()
        self._refuse_duplicate_ids()

    def _refuse_duplicate_ids(self) -> None:
        order = np.argsort(self.ids, kind="stable")
        same = np.flatnonzero(self.ids[order][1:] == self.ids[order][:-1])
        for first, second in sorted((int(order[i + 1]), int(order[i])) for i in same):
            later, earlier = self[first], self[second]
            if later.query_id == earlier.query_id:  # not merely the same hash
                raise GradretError(
                    f"{later.where}: query id '{later.query_id}' was already used in line {self._numbers[second]}; "
                    "give every list an id of its own, or pass the files as two sources to merge them"
                )

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> RankingList:  # type: ignore[override]  # no slices
        where = f"{self.path}:{self._numbers[index]}"
        line = read_line(self._file, int(self._offsets[index]), self._characters)
        return parse_list(decode_json(line, where), where)


# The words of a text, and shingles: runs of words, by which texts that repeat each other are found.

# Thai, Lao, Burmese, Khmer, kana and Han write no spaces: there each character counts as a word.
UNSPACED = (
    "\u0e00-\u0e3e\u0e40-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
UNSPACED_RUN = re.compile(f"[{UNSPACED}]+")
# Vowel signs of Indic scripts, Hebrew and Arabic points, accents: part of a word, though not for \w.
MARKS = "\u0300-\u036f\u0591-\u05c7\u064b-\u065f\u0670\u0900-\u0963\u0966-\u0dff"
WORD = re.compile(f"[{UNSPACED}]|(?:[^\\W_{UNSPACED}]|[{MARKS}])+")

# Thresholds against 513 real lists (2,052 passages written by a large model), of which they reject none.
SHINGLE = 3  # words
MIN_SHINGLES = 8  # of the shorter text; below, chance decides
# Share of the shorter text's shingles that the other has, too. Two passages of a real list share at most .06; a copy
# in which every fifth word is another shares .5 of them in the median.
NEAR_DUPLICATE = 0.3


def split_words(text: str) -> list[str]:
    """The words of a text, without case and punctuation; in scripts without spaces, its characters."""
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def weigh_words(words: Sequence[str]) -> float:
    """How many words they are worth: a character of a script without spaces is half a word."""
    return sum(0.5 if UNSPACED_RUN.match(word) else 1 for word in words)


def make_shingles(words: Sequence[str], size: int = SHINGLE) -> set[tuple[str, ...]]:
    """Every run of so many words; none where there are fewer."""
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}

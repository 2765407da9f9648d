"""Queries to write passages for: from files, standard input, BEIR directories and ir_datasets."""

import csv
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from gradret.console import GradretError
from gradret.data.collections import load_dataset, parse_query, read_qrels, read_text, reading, tell_absent, unpacking
from gradret.data.lists import Line, decode_json, number_lines, query_key, read_lines
from gradret.data.sources import Source, find_path, parse_source, query_selector

STANDARD_INPUT = "-"
FORMS = {".jsonl": "json", ".json": "json", ".tsv": "tsv", ".csv": "csv", ".txt": "plain"}
# What the columns of a table are called where its first row says it, see _plain_name.
ID_NAMES = ("queryid", "qid", "id", "topicid")
TEXT_NAMES = ("text", "query", "question", "querytext")


@dataclass(frozen=True, slots=True)
class Query:
    """A query to write passages for. Its text may be empty: that is for the caller to reject."""

    query_id: str
    text: str

    @property
    def key(self) -> int:
        """What makes two queries one, see lists.query_key."""
        return query_key(self.query_id, self.text)


def read_queries(name: str) -> list[Query]:
    """The queries a name stands for, in their order.

    Args:
        name: an ir_datasets id; a file of JSON lines (.jsonl: BEIR's _id and text, or query_id and query as in
            ranking lists), of ID<TAB>TEXT (.tsv) or a spreadsheet's (.csv), where the first row may name the columns,
            or of queries alone (.txt: the id is the line's number); `sample`; a BEIR directory, DIR for all its queries
            or DIR:SPLIT for those judged there; `-` for standard input. Without such a suffix the first line decides;
            there a spreadsheet's must name the columns.
            `?queries=even|odd|FILE` after it selects some.

    Raises: GradretError with FILE:LINE when a line has another form or an id is used twice; when there are no queries.
    """
    source = parse_source(name)
    if source != Source(source.name, queries=source.queries):
        raise GradretError(f"{name}: queries take no option but queries=even|odd|FILE; leave the others out")
    place, numbered = _open(source.name)
    queries, lines = [], {}
    for number, query in numbered:
        earlier = lines.setdefault(query.query_id, number)
        if earlier != number:
            raise GradretError(
                f"{place}:{number}: query id '{query.query_id}' was already used in line {earlier}; "
                "give every query an id of its own"
            )
        queries.append(query)
    if not queries:
        raise GradretError(f"{place}: no queries; expected one per line")
    if source.queries is not None:
        select = query_selector(source.queries)
        queries = [query for query in queries if select(query.query_id)]
        if not queries:
            raise GradretError(f"{place}: queries={source.queries} selects none of its queries")
    return queries


def _open(name: str) -> tuple[str, Iterator[tuple[int, Query]]]:
    """The name of the place in messages, and each query with the number of its line."""
    if name == STANDARD_INPUT:
        return "standard input", _parse_lines(number_lines(sys.stdin.buffer, "standard input"), None)
    path = find_path(name)
    if path is None:
        return name, _read_ir_datasets(name)
    if path.is_dir():
        numbered = _read_file(path / "queries.jsonl")
        directory, colon, split = name.rpartition(":")
        if colon and path == Path(directory):
            judged, found = read_qrels(path, split).keys(), list(numbered)
            tell_absent(name, judged, judged - {query.query_id for _, query in found}, "queries")
            numbered = iter([(number, query) for number, query in found if query.query_id in judged])
        return str(path / "queries.jsonl"), numbered
    return str(path), _read_file(path)


def _read_file(path: Path) -> Iterator[tuple[int, Query]]:
    return _parse_lines(read_lines(path), FORMS.get(path.suffix.lower()))


def _parse_lines(lines: Iterable[Line], form: str | None) -> Iterator[tuple[int, Query]]:
    lines = iter(lines)
    first = next(lines, None)
    if first is None:
        return
    lines = chain([first], lines)
    form = form or _guess_form(first.text)
    if form == "json":
        yield from (
            (line.number, Query(*parse_query(decode_json(line.text, line.where), line.where))) for line in lines
        )
    elif form == "plain":
        yield from ((line.number, Query(str(line.number), line.text.strip())) for line in lines)
    else:
        yield from _parse_table(_split_tabs(lines) if form == "tsv" else _split_csv(first, lines))


def _guess_form(first: str) -> str:
    """Of FORMS the one that a first line shows. Queries may hold commas, but none is a table's header."""
    if first.lstrip().startswith("{"):
        return "json"
    if "\t" in first:
        return "tsv"
    names = {_plain_name(name.strip('" ')) for name in re.split("[,;]", first)}
    is_header = not names.isdisjoint(ID_NAMES) and not names.isdisjoint(TEXT_NAMES)
    return "csv" if is_header or first.startswith("sep=") else "plain"


Row = tuple[Line, list[str]]  # of a table, with the line it begins in


def _split_tabs(lines: Iterable[Line]) -> Iterator[Row]:
    """Rows of tab-separated fields, in quotation marks where csv.writer or a spreadsheet has put them.

    Files without quoting have them, too: where a line is not quoted in csv's way throughout, they belong to the text.
    """
    for line in lines:
        try:
            fields = next(csv.reader([line.text], delimiter="\t", strict=True))
        except csv.Error:
            fields = line.text.split("\t")
        yield line, fields


def _split_csv(first: Line, lines: Iterator[Line]) -> Iterator[Row]:
    """Rows of fields, which may hold line breaks in quotation marks, separated as the first line shows: , or ; or tab.

    A first line `sep=;`, as Excel takes it, is no row. Raises: GradretError for quotation marks out of place.
    """
    separator = re.search("[,;\t]", re.sub('"[^"]*"', "", first.text))
    if first.text.startswith("sep="):
        next(lines)
    begun: list[Line] = []  # lines of the row that is being read

    def feed() -> Iterator[str]:
        for line in lines:
            begun.append(line)
            yield line.text + "\n"

    rows = csv.reader(feed(), delimiter=separator.group() if separator else ",", strict=True)
    try:
        for fields in rows:
            if any(map(str.strip, fields)):  # spreadsheets write rows of nothing but separators
                yield begun[0], fields
            begun.clear()
    except csv.Error as error:
        raise GradretError(f"{begun[0].where}: not readable as CSV ({error}); mend its quotation marks") from None


def _parse_table(rows: Iterator[Row]) -> Iterator[tuple[int, Query]]:
    """A query for each row of an id and a text, or of the columns that a first row of names calls so."""
    first = next(rows, None)
    if first is None:
        return
    header = _read_header(*first)
    id_column, text_column, width = header or (0, 1, 2)
    for line, fields in rows if header else chain([first], rows):
        if len(fields) != width or not fields[id_column].strip():
            expected = f"an id and {width} columns, as in the header" if header else "ID<TAB>TEXT or, in CSV, ID,TEXT"
            raise GradretError(f"{line.where}: expected {expected}, got {len(fields)} columns: '{line.text[:60]}'")
        yield line.number, Query(fields[id_column], fields[text_column].strip())


def _plain_name(column: str) -> str:
    """A column's name as far as it counts: Query ID, query-id and query_id are one."""
    return re.sub("[ _-]", "", column.strip().lower())


def _read_header(line: Line, fields: Sequence[str]) -> tuple[int, int, int] | None:
    """The columns of ids and texts and the number of columns, where a table's first row names them."""
    names = [_plain_name(field) for field in fields]
    ids, texts = ([i for i, name in enumerate(names) if name in known] for known in (ID_NAMES, TEXT_NAMES))
    if not ids and not texts:
        return None
    if len(ids) != 1 or len(texts) != 1:
        raise GradretError(
            f"{line.where}: '{line.text[:60]}' looks like a header; name one column query_id and one text"
        )
    return ids[0], texts[0], len(names)


def _read_ir_datasets(dataset_id: str) -> Iterator[tuple[int, Query]]:
    dataset = load_dataset(dataset_id)
    if not dataset.has_queries():
        raise GradretError(f"{dataset_id}: this ir_datasets id has no queries; name one that has")
    with reading(dataset), unpacking():
        queries = list(dataset.queries_iter())
    for number, query in enumerate(queries, 1):
        yield number, Query(query.query_id, read_text(dataset, query))


def parse_shard(text: str) -> tuple[int, int]:
    """(i, n) from `I/N`, 1 <= I <= N. Raises: GradretError."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise GradretError(f"shard '{text}': expected I/N with 1 <= I <= N, such as 1/4")
    return int(index), int(count)


def take_shard(queries: Sequence[Query], shard: tuple[int, int]) -> list[Query]:
    """The i-th of n shares of the queries: every n-th, from the i-th on; together the shares are all of them."""
    index, count = shard
    return list(queries[index - 1 :: count])

"""Queries to write passages for: from files, standard input, BEIR directories and ir_datasets."""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gradret.console import GradretError
from gradret.data.collections import load_dataset, read_qrels, reading, unpacking
from gradret.data.lists import Line, decode_json, number_lines, query_key, read_lines
from gradret.data.sources import find_path, parse_source, query_selector

STANDARD_INPUT = "-"
FORMS = {".jsonl": "json", ".json": "json", ".tsv": "tsv", ".txt": "plain"}


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
            ranking lists), of ID<TAB>TEXT (.tsv) or of queries alone (.txt: the id is the line's number); `sample`;
            a BEIR directory, DIR for all its queries or DIR:SPLIT for those judged there; `-` for standard input.
            Without such a suffix the first line decides. `?queries=even|odd|FILE` after it selects some.

    Raises: GradretError with FILE:LINE when a line has another form or an id is used twice; when there are no queries.
    """
    source = parse_source(name)
    if (source.grades, source.sample, source.drop_self, source.labels) != (None, None, None, "intended"):
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
        if path != Path(name):
            judged = read_qrels(path, name.rpartition(":")[2])
            numbered = ((number, query) for number, query in numbered if query.query_id in judged)
        return str(path / "queries.jsonl"), numbered
    return str(path), _read_file(path)


def _read_file(path: Path) -> Iterator[tuple[int, Query]]:
    return _parse_lines(read_lines(path), FORMS.get(path.suffix))


def _parse_lines(lines: Iterable[Line], form: str | None) -> Iterator[tuple[int, Query]]:
    for line in lines:
        form = form or ("json" if line.text.lstrip().startswith("{") else "tsv" if "\t" in line.text else "plain")
        if form == "json":
            yield line.number, _parse_record(decode_json(line.text, line.where), line.where)
        elif form == "tsv":
            yield line.number, _parse_columns(line.text, line.where)
        else:
            yield line.number, Query(str(line.number), line.text.strip())


def _parse_record(record: object, where: str) -> Query:
    keys = ("_id", "text") if isinstance(record, dict) and "_id" in record else ("query_id", "query")
    query_id, text = (record.get(key) for key in keys) if isinstance(record, dict) else (None, None)
    if isinstance(query_id, int) and not isinstance(query_id, bool):
        query_id = str(query_id)
    if not isinstance(query_id, str) or not query_id or not isinstance(text, str):
        raise GradretError(
            f"{where}: expected a JSON object with the strings _id and text, or query_id and query, "
            f"got {json.dumps(record, ensure_ascii=False)[:60]}"
        )
    return Query(query_id, text)


def _parse_columns(line: str, where: str) -> Query:
    columns = line.split("\t")
    if len(columns) != 2 or not columns[0].strip():
        raise GradretError(f"{where}: expected ID<TAB>TEXT, got {len(columns)} columns: '{line[:60]}'")
    return Query(columns[0].strip(), columns[1].strip())


def _read_ir_datasets(dataset_id: str) -> Iterator[tuple[int, Query]]:
    dataset = load_dataset(dataset_id)
    if not dataset.has_queries():
        raise GradretError(f"{dataset_id}: this ir_datasets id has no queries; name one that has")
    with reading(dataset), unpacking():
        queries = list(dataset.queries_iter())
    for number, query in enumerate(queries, 1):
        yield number, Query(query.query_id, query.default_text())


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

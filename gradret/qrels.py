"""Judgments beside a corpus: BEIR's qrels/SPLIT.tsv, TREC's qrels/SPLIT.txt, or Trove's qrels.jsonl."""

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from gradret.errors import GradretError
from gradret.lists import decode_json, open_file

BEIR_HEADER = ["query-id", "corpus-id", "score"]
TREC_SUFFIXES = (".txt", ".qrels", ".trec")
TROVE_FILE = "qrels.jsonl"

Qrels = dict[str, dict[str, float]]


def read_qrels(directory: Path, split: str) -> Qrels:
    """Query id -> {doc id -> grade}, of the first of these files that is there.

    `qrels/SPLIT.tsv`, with the header query-id, corpus-id, score and whole numbers (BEIR); `qrels/SPLIT.txt`, .qrels or
    .trec, lines of `QUERY 0 DOCUMENT GRADE` (trec_eval); `qrels.jsonl`, a line a query with qid, docid and score, the
    latter two lists of one length (Trove), which is the same for every split.

    Raises: GradretError when there is none, or a line is not of its format.
    """
    beir = directory / "qrels" / f"{split}.tsv"
    if beir.exists():
        return _collect(_read_beir(beir))
    for suffix in TREC_SUFFIXES:
        trec = beir.with_suffix(suffix)
        if trec.exists():
            return _collect(_read_trec(trec))
    trove = directory / TROVE_FILE
    if trove.exists():
        return _collect(_read_trove(trove))
    there = sorted({p.stem for suffix in (".tsv", *TREC_SUFFIXES) for p in beir.parent.glob(f"*{suffix}")})
    raise GradretError(f"{beir}: no such file; splits with qrels here: {', '.join(there) or 'none'}")


def _collect(lines: Iterator[tuple[str, str, float]]) -> Qrels:
    qrels: Qrels = {}
    for query_id, doc_id, grade in lines:
        qrels.setdefault(query_id, {})[doc_id] = grade
    return qrels


def _read_beir(path: Path) -> Iterator[tuple[str, str, float]]:
    with open_file(path) as file:
        header = file.readline().decode("utf-8", "replace").rstrip("\r\n")
        if header.split("\t") != BEIR_HEADER:
            raise GradretError(
                f"{path}:1: expected the header 'query-id<TAB>corpus-id<TAB>score', got '{header[:60]}'; "
                "add it as the first line"
            )
        expected = "'query-id<TAB>corpus-id<TAB>score' with a whole number as score"
        yield from _read_lines(file, path, 2, lambda line: line.split("\t"), expected)


def _read_trec(path: Path) -> Iterator[tuple[str, str, float]]:
    def split(line: str) -> list[str]:
        query_id, _, *others = line.split()
        return [query_id, *others]

    with open_file(path) as file:
        yield from _read_lines(file, path, 1, split, "'QUERY 0 DOCUMENT GRADE' with a whole number as grade")


def _read_lines(
    lines: Iterable[bytes], path: Path, first: int, split: Callable[[str], list[str]], expected: str
) -> Iterator[tuple[str, str, float]]:
    """Judgments of lines that `split` cuts into query, document and grade; the first line has the number `first`."""
    for number, line in enumerate(lines, first):
        text = line.decode("utf-8", "replace").rstrip("\r\n")
        if not text:
            continue
        try:
            query_id, doc_id, grade = split(text)
            yield query_id, doc_id, int(grade)
        except ValueError:
            raise GradretError(f"{path}:{number}: expected {expected}") from None


def _read_trove(path: Path) -> Iterator[tuple[str, str, float]]:
    with open_file(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            record = decode_json(line, f"{path}:{number}")
            try:
                query_id, doc_ids, scores = (record[key] for key in ("qid", "docid", "score"))
                if not isinstance(query_id, str) or not all(isinstance(doc_id, str) for doc_id in doc_ids):
                    raise TypeError
                for doc_id, score in zip(doc_ids, scores, strict=True):
                    if not math.isfinite(score):
                        raise ValueError
                    yield query_id, doc_id, score
            except (KeyError, TypeError, ValueError):
                raise GradretError(
                    f"{path}:{number}: expected a JSON object with a string qid and two lists of one length, docid of "
                    "strings and score of numbers"
                ) from None

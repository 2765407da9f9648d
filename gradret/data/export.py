"""Ranking lists in the formats of BEIR, Tevatron, Trove and TREC, and any source as ranking lists."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TextIO

from gradret.console import BAR_DELAY_S, GradretError, show_bar
from gradret.data.collections import BEIR_HEADER
from gradret.data.lists import DocumentNames, Passage, RankingList, format_list
from gradret.data.sources import Source, open_lists, parse_source
from gradret.files import writing

FORMS = ("beir", "tevatron", "trove", "trec", "lists")
ONE_FILE = ("tevatron", "lists")
HEADERS = {"qrels/train.tsv": "\t".join(BEIR_HEADER) + "\n"}
UNFIT = {  # BEIR's reader takes a quotation mark at the start for CSV quoting
    "beir": (re.compile(r'[\t\r\n]|^"'), "BEIR's", "tabs, line breaks and a quotation mark at its start"),
    "trec": (re.compile(r"\s|^$"), "TREC's", "white space"),
}


def export_lists(source: str, form: str, out: Path, *, positive_from: float | None = None) -> dict:
    """Write ranking lists in a neighbour's format, or what a neighbour has as ranking lists.

    A passage without a doc_id is named QUERY_ID/POSITION; the same words twice are one document, which a query
    judges once, by the first grade.

    Args:
        source: the lists as `fit --data` names them, without options but query_file.
        form: "beir", a directory of corpus.jsonl, queries.jsonl and qrels/train.tsv with whole numbers; "trec", the
            same with trec_eval's qrels/train.txt; "trove", the same corpus.jsonl and queries.jsonl, and qrels.jsonl
            with real numbers, as MaterializedQRelConfig reads them (ir-trove 0.0.2); "tevatron", one JSONL file with
            the texts under positive_passages and negative_passages (Tevatron 1; Tevatron 2 reads it beside its newer
            format with ids and a corpus); "lists", ranking lists.
        out: the directory or file to make; an empty directory may be there.
        positive_from: for tevatron: positive are the passages of this grade or above; None for those of the highest
            grade of their list.

    Returns: counts: queries, documents, judgements.
    Raises: GradretError when the lists cannot be read, a doc_id has two texts, the format cannot say a grade or an
        id, or `out` is taken or cannot be written; no half of it stays then.
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {FORMS}, got {form!r}")
    if positive_from is not None and form != "tevatron":
        raise GradretError(f"{form} keeps every grade; only tevatron's passages are positive from some grade on")
    out = Path(out)
    parsed = parse_source(source)
    if parsed != Source(parsed.name, query_file=parsed.query_file):
        raise GradretError(f"{source}: lists are written as they are; leave out the options after '?' but query_file")
    lists = open_lists(parsed)
    with writing(out):
        if out.exists() and (form in ONE_FILE or not out.is_dir() or any(out.iterdir())):
            raise GradretError(f"{out}: is already there, and nothing is overwritten; name another place")
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))  # beside it, to be moved in one piece
        try:
            counts = _write(lists, form, work / "out", positive_from)
            os.replace(work / "out", out)
        finally:
            shutil.rmtree(work)
    return counts


def _write(lists: Sequence[RankingList], form: str, out: Path, positive_from: float | None) -> dict:
    documents, judgements = DocumentNames(), 0
    files: dict[str, TextIO] = {}
    with ExitStack() as closing:
        for ranking_list in show_bar(lists, desc="exporting", unit="list", delay=BAR_DELAY_S):
            judged, new = documents.name(ranking_list)
            judgements += len(ranking_list.passages if form == "lists" else judged)
            for name, line in _format(form, ranking_list, judged, new, positive_from):
                if name not in files:
                    path = out / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    files[name] = closing.enter_context(open(path, "w", encoding="utf-8", newline="\n"))
                    files[name].write(HEADERS.get(name, ""))
                files[name].write(line + "\n")
    return {"queries": len(lists), "documents": len(documents), "judgements": judgements}


def _format(
    form: str, ranking_list: RankingList, judged: dict[str, Passage], new: list[str], positive_from: float | None
) -> Iterator[tuple[str, str]]:
    """What a list adds to the files: names, "" where there is but one, and lines; `new` are its new document ids."""
    query_id = ranking_list.query_id
    if form == "lists":
        yield "", format_list(ranking_list)
    elif form == "tevatron":
        yield "", _format_tevatron(ranking_list, judged, positive_from)
    else:
        for doc_id in new:
            yield "corpus.jsonl", _to_json(_describe(doc_id, judged[doc_id], "_id"))
        yield "queries.jsonl", _to_json({"_id": query_id, "text": ranking_list.query})
        if form == "trove":  # all real: readers of JSON lines guess one type for the column
            scores = [float(p.grade) for p in judged.values()]
            yield "qrels.jsonl", _to_json({"qid": query_id, "docid": list(judged), "score": scores})
        for doc_id, passage in judged.items() if form in UNFIT else ():
            _refuse_unfit(form, ranking_list, doc_id, passage.grade)
            if form == "beir":
                yield "qrels/train.tsv", f"{query_id}\t{doc_id}\t{int(passage.grade)}"
            else:
                yield "qrels/train.txt", f"{query_id} 0 {doc_id} {int(passage.grade)}"


def _format_tevatron(ranking_list: RankingList, judged: dict[str, Passage], positive_from: float | None) -> str:
    lowest = max(p.grade for p in judged.values()) if positive_from is None else positive_from
    groups: dict[str, list] = {"positive": [], "negative": []}
    for doc_id, passage in judged.items():
        groups["positive" if passage.grade >= lowest else "negative"].append(_describe(doc_id, passage, "docid"))
    for name, group in groups.items():
        # Tevatron draws from both, and breaks off in the middle of an epoch where there is nothing to draw from.
        if not group:
            raise GradretError(
                f"{ranking_list.place} has no {name} passage when grades from {lowest:g} on are positive, "
                "but Tevatron needs one; choose another lowest positive grade, or remove the list"
            )
    record = {"query_id": ranking_list.query_id, "query": ranking_list.query}
    return _to_json(record | {f"{name}_passages": group for name, group in groups.items()})


def _refuse_unfit(form: str, ranking_list: RankingList, doc_id: str, grade: float) -> None:
    unfit, whose, what = UNFIT[form]
    if grade != int(grade):
        raise GradretError(
            f"{ranking_list.place} has the grade {grade:g}, but {whose} are whole numbers; "
            "round the grades in the lists, or export to trove, which takes real ones"
        )
    for identifier in (ranking_list.query_id, doc_id):
        if unfit.search(identifier):
            raise GradretError(
                f"{ranking_list.where}: the id {json.dumps(identifier)} does not fit into a line of {whose} qrels; "
                f"rename it, without {what}"
            )


def _describe(doc_id: str, passage: Passage, key: str) -> dict:
    return {key: doc_id, "title": passage.title or "", "text": passage.text}


def _to_json(record: dict) -> str:
    return json.dumps(record, ensure_ascii=False)

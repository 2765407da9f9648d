"""Ranking lists shown for reading: what was measured of them and some that were drawn, for a terminal and as a page."""

import html
import math
import random
import re
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from string import Template
from typing import Any

import numpy as np

from gradret.bench import format_table
from gradret.console import count_of
from gradret.data.lists import RankingList
from gradret.evaluation.order import Order, PairOrder, read_judged

SHOWN_REPEATS = 10
WIDTH = 100  # characters of a line of text on the terminal
# What moves a terminal's cursor, ends its line or turns its direction of writing.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]+")


def draw_lists(count: int, draw: int, seed: int) -> list[int]:
    """The positions of some of the lists, ascending."""
    return sorted(random.Random(seed).sample(range(count), min(draw, count)))


def describe_lists(
    name: str, encoder: str, similarity: str, order: Order, drawn: Sequence[tuple[RankingList, np.ndarray]]
) -> dict[str, Any]:
    """What was found, JSON-serialisable.

    Args:
        name: of the lists; encoder, similarity: its name, and whether it compares by "cosine" or "dot".
        drawn: lists to be read, and the similarities of their passages.
    """
    return {
        "lists": order.lists,
        "passages": order.passages,
        "complete": order.complete,
        "source": name,
        "encoder": encoder,
        "similarity": similarity,
        "warning": order.encoder.warn(),
        "order": {"encoder": describe_pairs(order.encoder), "judge": describe_pairs(order.judge)},
        "grades": {
            f"{grade:g}": {key: _round(value) for key, value in asdict(summary).items()}
            for grade, summary in order.grades.items()
        },
        "repeating": order.repeating,
        "repeats": [
            {"one": repeat.one, "other": repeat.other, "share": round(repeat.share, 4)}
            for repeat in order.repeats[:SHOWN_REPEATS]
        ],
        "drawn": [_describe_list(ranking_list, scores) for ranking_list, scores in drawn],
    }


def describe_pairs(order: PairOrder) -> dict[str, Any] | None:
    if order.share is None:
        return None
    kinds = {
        f"{high:g}>{low:g}": {"pairs": pairs, "in_order": ordered, "share": round(ordered / pairs, 4)}
        for (high, low), (ordered, pairs) in order.kinds.items()
    }
    return {"pairs": order.pairs, "share": round(order.share, 4), "kinds": kinds}


def _describe_list(ranking_list: RankingList, scores: np.ndarray) -> dict[str, Any]:
    rows = zip(ranking_list.passages, scores.tolist(), strict=True)
    passages = [
        {"grade": p.grade, "similarity": _round(score), "judged": _round(read_judged(p)), "text": p.content}
        for p, score in sorted(rows, key=lambda row: -row[0].grade)
    ]
    return {"query_id": ranking_list.query_id, "query": ranking_list.query, "passages": passages}


def _round(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else round(value, 4)


def format_lists(document: dict[str, Any]) -> str:
    """The document of describe_lists, for a terminal."""
    parts = [_tell_size(document), *(format_table(*table) for table in _make_tables(document)), _tell_repeats(document)]
    for drawn in document["drawn"]:
        lines = [f"[{_clean(drawn['query_id'])}] {_clean(drawn['query'])}"]
        for passage in drawn["passages"]:
            text = f"{_tell_passage(passage)}: {_clean(passage['text'])}"
            lines.append(textwrap.fill(text, WIDTH, initial_indent="  ", subsequent_indent="    "))
        parts.append("\n".join(lines))
    return "\n\n".join(parts + [document["warning"]] * bool(document["warning"]))


def _tell_size(document: dict[str, Any]) -> str:
    size = f"{count_of(document['lists'], 'list')}, {count_of(document['passages'], 'passage')}"
    return (
        f"{document['source']}: {size}; {document['complete']} with all grades ({', '.join(document['grades'])})\n"
        f"encoder: {document['encoder']}, {document['similarity']} of query and passage"
    )


def _make_tables(document: dict[str, Any]) -> list[tuple[list[str], list[list[str]]]]:
    """Header and rows: the pairs in order by kind, where there are pairs, and what the grades have."""
    pairs = {f"by the {name}": found for name, found in document["order"].items() if found}
    tables = []
    if pairs:
        first = next(iter(pairs.values()))
        rows = [["all", str(first["pairs"]), *(_tell(found["share"], 3) for found in pairs.values())]]
        for kind, counts in first["kinds"].items():
            shares = (found["kinds"].get(kind, {}).get("share") for found in pairs.values())
            rows.append([kind, str(counts["pairs"]), *(_tell(share, 3) for share in shares)])
        tables.append((["pairs in order", "pairs", *pairs], rows))
    grades, counts = document["grades"], ("lists", "passages", "characters", "words")
    means = [m for m in ("similarity", "judged") if any(found[m] is not None for found in grades.values())]
    rows = [
        [grade, *(f"{found[count]:.0f}" for count in counts), *(_tell(found[mean]) for mean in means)]
        for grade, found in grades.items()
    ]
    tables.append((["grade", *counts, *means], rows))
    return tables


def _tell(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _tell_repeats(document: dict[str, Any]) -> str:
    if not document["repeating"]:
        return "no passage repeats one of another list"
    lines = [f"{document['repeating']} passages repeat one of another list:"]
    for repeat in document["repeats"]:
        (one, grade), (other, other_grade) = repeat["one"], repeat["other"]
        lines.append(
            f"  {_clean(one)} (grade {grade:g}), {_clean(other)} (grade {other_grade:g}): {repeat['share']:.0%}"
        )
    return "\n".join(lines)


def _tell_passage(passage: dict[str, Any]) -> str:
    judged = "" if passage["judged"] is None else f", judged {passage['judged']:.2f}"
    return f"{passage['grade']:g} ({_tell(passage['similarity'])}{judged})"


def _clean(text: str) -> str:
    return " ".join(UNPRINTABLE.sub(" ", text).split())


PAGE = Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 46em; margin: auto; padding: 1em }
h1 { font-size: 1.3em } h2 { font-size: 1.05em; margin: 2em 0 0 } h1, h2, p, li { overflow-wrap: anywhere }
table { border-collapse: collapse; margin: 1em 0; display: block; overflow-x: auto }
th, td { padding: .2em .6em; text-align: right; border-bottom: 1px solid #ddd } th:first-child { text-align: left }
.warning { padding: .5em 1em; border-left: .3em solid #b30; background: #fee } .note { color: #666; margin: 1em 0 0 }
.text { margin: 0 }
</style>
<h1>$title</h1>
$body
""")


def format_page(document: dict[str, Any]) -> str:
    """The document of describe_lists as one HTML page that needs nothing else."""
    parts = [f"<p>{_escape(line)}</p>" for line in _tell_size(document).splitlines()]
    if document["warning"]:
        parts.append(f'<p class="warning">{_escape(document["warning"])}</p>')
    for header, rows in _make_tables(document):
        parts.append(f"<table>{_tag_row(header, 'th')}{''.join(_tag_row(row, 'td') for row in rows)}</table>")
    first, *repeats = _tell_repeats(document).splitlines()
    parts.append(f"<p>{_escape(first)}</p>")
    if repeats:
        parts.append(f"<ul>{''.join(f'<li>{_escape(line)}</li>' for line in repeats)}</ul>")
    for drawn in document["drawn"]:
        parts.append(f'<h2 dir="auto">{_escape(drawn["query"])}</h2>\n<p class="note">{_escape(drawn["query_id"])}</p>')
        for passage in drawn["passages"]:
            parts.append(f'<p class="note">{_escape(_tell_passage(passage))}</p>')
            parts.append(f'<p class="text" dir="auto">{_escape(passage["text"])}</p>')
    return PAGE.substitute(title=_escape(document["source"]), body="\n".join(parts))


def _tag_row(cells: Sequence[str], tag: str) -> str:
    first, *others = (_escape(cell) for cell in cells)
    return f"<tr><th>{first}</th>{''.join(f'<{tag}>{cell}</{tag}>' for cell in others)}</tr>\n"


def _escape(text: str) -> str:
    return html.escape(_clean(text))

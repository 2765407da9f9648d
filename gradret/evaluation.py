"""Retrieval quality: measures by ir_measures, and paired tests between systems."""

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gradret.collection import Collection
from gradret.encoder import Encoder
from gradret.errors import GradretError
from gradret.retrieve import embed_corpus, search
from gradret.settings import DEFAULT_MEASURES

DEFAULT_DEPTH = 1000


@dataclass
class Evaluation:
    """One encoder on one collection.

    Attributes:
        measures: measure -> mean over the queries.
        per_query: measure -> {query id -> value}.
        run: query id -> [(doc id, score)], best first.
    """

    measures: dict[str, float]
    per_query: dict[str, dict[str, float]]
    run: dict[str, list[tuple[str, float]]]


def split_measures(text: str) -> list[str]:
    """Measure names from `nDCG@10,P(rel=2,judged_only=True)@5`: split at the commas outside parentheses."""
    return [name.strip() for name in re.split(r",(?![^(]*\))", text)]


def parse_measures(names: Sequence[str]) -> list:
    """ir_measures' measure objects. Raises: GradretError when a name is not one of ir_measures'."""
    import ir_measures

    measures = []
    for name in names:
        try:
            measures.append(ir_measures.parse_measure(name))
        except (NameError, ValueError, SyntaxError) as error:
            raise GradretError(
                f"measure '{name}' is not known ({error}); use ir_measures' names, such as nDCG@10, R@100, RR@10, AP"
            ) from None
    return measures


def evaluate(
    encoder: Encoder,
    collection: Collection,
    *,
    measures: Sequence[str] = DEFAULT_MEASURES,
    depth: int = DEFAULT_DEPTH,
    cache: Path | None = None,
    batch_size: int = 32,
    precision: str = "float32",
    progress: bool = True,
) -> Evaluation:
    """Embed, search exactly and measure.

    Args:
        encoder: see encoder.load.
        collection: see sources.open_collection.
        measures: any ir_measures names. A grade that is not whole is rounded for them.
        depth: documents ranked for each query.
        cache: folder that keeps the corpus embeddings; None throws them away.
    Raises: GradretError.
    """
    parse_measures(measures)
    with tempfile.TemporaryDirectory(prefix="gradret-") as temporary:
        corpus = embed_corpus(
            encoder,
            collection,
            cache or Path(temporary),
            batch_size=batch_size,
            precision=precision,
            progress=progress,
        )
        run = search(encoder, collection, corpus, depth=depth, batch_size=batch_size, precision=precision)
    return measure_run(run, collection, measures)


def measure_run(run: dict, collection: Collection, measures: Sequence[str] = DEFAULT_MEASURES) -> Evaluation:
    """Measure a ranking against the collection's qrels, over the collection's queries."""
    import ir_measures

    parsed = dict(zip(parse_measures(measures), measures, strict=True))
    qrels = {q: {d: round(grade) for d, grade in collection.qrels[q].items()} for q in collection.queries}
    scores = {query_id: dict(ranking) for query_id, ranking in run.items()}
    per_query: dict[str, dict[str, float]] = {name: {} for name in measures}
    for metric in ir_measures.iter_calc(list(parsed), qrels, scores):
        per_query[parsed[metric.measure]][metric.query_id] = metric.value
    # A query for which nothing was found counts as 0, not as absent.
    per_query = {name: {q: values.get(q, 0.0) for q in collection.queries} for name, values in per_query.items()}
    return Evaluation({name: float(np.mean(list(v.values()))) for name, v in per_query.items()}, per_query, run)


def paired_t_test(ours: dict[str, float], theirs: dict[str, float]) -> float:
    """Two-sided p-value of the paired t-test over queries; 1 where no query differs, nan below two queries.

    Raises: ValueError when the queries differ; GradretError when SciPy is not installed.
    """
    try:
        from scipy.stats import ttest_rel
    except ImportError:
        raise GradretError("significance tests need SciPy; install it: pip install 'gradret[bench]'") from None
    if ours.keys() != theirs.keys():
        raise ValueError("both systems must be measured on the same queries")
    difference = np.array([ours[q] - theirs[q] for q in ours])
    if len(difference) < 2:
        return float("nan")
    if not difference.any():
        return 1.0
    return float(ttest_rel(list(ours.values()), [theirs[q] for q in ours]).pvalue)

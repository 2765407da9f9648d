"""Retrieval quality of an encoder, or of anything that embeds texts: measures by ir_measures."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any

from gradret.console import BAR_DELAY_S, GradretError, say, show_bar
from gradret.data.collections import Collection
from gradret.data.sources import open_collection, parse_source
from gradret.distributed import ALONE, Processes
from gradret.encoder.model import Encoder, check_embedding_options
from gradret.evaluation.search import EmbeddingFunction, OutsideEmbedder, as_embedder, embed_corpus, search
from gradret.settings import DEFAULT_MEASURES

DEFAULT_DEPTH = 1000


@dataclass
class Evaluation:
    """One encoder on one collection.

    Attributes:
        measures: measure, by its canonical name -> mean over the queries (a sum for those that count).
        per_query: measure -> {query id -> value}.
        run: query id -> [(doc id, score)], best first; of several processes only the first has it.
    """

    measures: dict[str, float]
    per_query: dict[str, dict[str, float]]
    run: dict[str, list[tuple[str, float]]]


def split_measures(text: str) -> list[str]:
    """Measure names from `nDCG@10,P(rel=2,judged_only=True)@5`: split at the commas outside brackets."""
    return [name.strip() for name in re.split(r",(?![^(]*\))", text)]


def parse_measures(names: Sequence[str], depth: int | None = None) -> dict[str, Any]:
    """ir_measures' measure objects by their canonical names, each once.

    Raises: GradretError when a name is unknown, ir_measures cannot compute it, or it looks below `depth`.
    """
    import ir_measures

    measures = {}
    for name in names:
        try:
            measure = ir_measures.parse_measure(name)
            measure.validate_params()
            if not ir_measures.DefaultPipeline.supports(measure):
                raise ValueError("nothing that is installed computes it")
        except (NameError, ValueError, SyntaxError, KeyError, TypeError, AssertionError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise GradretError(
                f"measure '{name}' is not known ({reason}); use ir_measures' names, such as nDCG@10, R@100, RR@10, AP"
            ) from None
        cutoff = measure.params.get("cutoff")
        if depth is not None and cutoff is not None and cutoff > depth:
            raise GradretError(
                f"measure '{name}' looks at {cutoff} documents, but only {depth} are ranked; raise --depth"
            )
        measures[str(measure)] = measure
    return measures


def evaluate(
    model: Encoder | EmbeddingFunction | str | Path,
    collection: Collection | str | Path,
    *,
    measures: Sequence[str] | str = DEFAULT_MEASURES,
    depth: int = DEFAULT_DEPTH,
    cache: str | Path | None = None,
    batch_size: int = 32,
    precision: str = "float32",
    progress: bool = True,
    processes: Processes = ALONE,
) -> Evaluation:
    """Embed, search exactly and measure; several processes share the embedding of the documents.

    Args:
        model: an Encoder or the name of one; a sentence-transformers model, whose encode_query, encode_document and
            similarity are used; or a function of a list of n texts and their kind, "query" or "document", to (n, D)
            embeddings, an array or a tensor, whose dot product is the similarity.
        collection: its name, as the command line takes it, such as beir/scifact/test; or see sources.open_collection.
        measures: any ir_measures names, as a sequence or separated by commas; a grade that is not whole is rounded for
            them, halves upwards.
        depth: documents ranked for each query.
        cache: folder that keeps the corpus embeddings; None throws them away. For an Encoder only: what other
            embeddings depend on is not known.
        batch_size: texts at once, for a function all that are encoded together (at most 1,024).
        precision: "float32" or, for an Encoder, "bfloat16".
        processes: all of them must call.
    Raises: GradretError; ValueError for values out of range, for a cache or a precision with what is no Encoder;
        TypeError for a collection that is none, and see as_embedder.
    """
    measures = split_measures(measures) if isinstance(measures, str) else list(measures)
    if not measures or not isinstance(depth, Integral) or depth < 1:
        given = f"{measures}, {depth!r}, {batch_size!r}"
        raise ValueError(f"expected measures, depth and batch_size from 1 on; got {given}")
    check_embedding_options(batch_size, precision)
    parse_measures(measures, depth)
    if isinstance(collection, str | Path):
        collection = open_collection(parse_source(str(collection)))
    if not isinstance(collection, Collection):
        raise TypeError(f"collection must be the name of one, or a Collection; got {collection!r:.100}")
    encoder = as_embedder(model, next(iter(collection.queries.values())))
    if isinstance(encoder, OutsideEmbedder) and (cache is not None or precision != "float32"):
        raise ValueError("cache and precision are for an Encoder; leave them out for a model that is not gradret's")
    options: dict[str, Any] = {"batch_size": batch_size, "precision": precision}
    folder = None if cache is None else Path(cache)
    corpus = embed_corpus(encoder, collection, folder, progress=progress, processes=processes, **options)
    result = None
    with processes.agree():
        if corpus is not None:
            collection.check_documents(doc_id.decode() for doc_id in corpus.doc_ids)
            run = search(encoder, collection, corpus, depth=depth, progress=progress, **options)
            result = measure_run(run, collection, measures, progress=progress)
    shared = processes.broadcast(replace(result, run={}) if result is not None else None)
    return result or shared


def measure_run(
    run: dict[str, list[tuple[str, float]]],
    collection: Collection,
    measures: Sequence[str] = DEFAULT_MEASURES,
    *,
    progress: bool = True,
) -> Evaluation:
    """Measure a ranking against the collection's qrels, over the collection's queries.

    The ranking counts as it stands: ir_measures' providers, which break ties in different ways, are given ranks
    for scores, and plain numbers for ids, which some of them cannot read otherwise. A query for which nothing was
    found counts as 0.
    """
    import ir_measures

    parsed = parse_measures(measures)
    grades = [g for q in collection.queries for g in collection.qrels[q].values()]
    if any(g != int(g) for g in grades):
        say(f"{collection.name}: grades that are not whole are rounded for the measures, halves upwards")
    numbers: dict[str, str] = {}
    qrels, scores = {}, {}
    bar: dict[str, Any] = {"shown": progress, "unit": "query", "delay": BAR_DELAY_S}
    for number, query_id in enumerate(show_bar(collection.queries, desc="reading the ranking", **bar), 1):
        judged = collection.qrels[query_id].items()
        qrels[str(number)] = {_number(numbers, doc_id): math.floor(grade + 0.5) for doc_id, grade in judged}
        ranking = run.get(query_id, ())
        scores[str(number)] = {_number(numbers, d): float(len(ranking) - i) for i, (d, _) in enumerate(ranking)}
    found = {measure: dict.fromkeys(qrels, 0.0) for measure in parsed.values()}
    values = ir_measures.iter_calc(list(found), qrels, scores)
    for metric in show_bar(values, total=len(found) * len(qrels), desc="measuring", **bar | {"unit": "value"}):
        found[metric.measure][metric.query_id] = metric.value
    means, per_query = {}, {}
    for name, measure in parsed.items():
        total = measure.aggregator()
        for value in found[measure].values():
            total.add(value)
        means[name] = float(total.result())
        per_query[name] = dict(zip(collection.queries, found[measure].values(), strict=True))
    return Evaluation(means, per_query, run)


def _number(numbers: dict[str, str], doc_id: str) -> str:
    return numbers.setdefault(doc_id, str(len(numbers) + 1))

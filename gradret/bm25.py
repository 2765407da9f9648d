"""BM25 as bm25s computes it: for hard negatives, and as a row of the quality benchmark."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from gradret.collection import Collection
from gradret.console import PATIENCE_S, show_bar
from gradret.errors import GradretError
from gradret.imports import without

# A function of B queries and a depth: for each the positions of its best documents and, descending, their scores.
ScoredRanker = Callable[[list[str], int], Sequence[tuple[np.ndarray, np.ndarray]]]


def import_bm25s(what: str):
    """The package bm25s. Raises: GradretError when it is not installed, saying what needs it."""
    try:
        with without("jax"):
            import bm25s
    except ModuleNotFoundError as error:
        if error.name != "bm25s":
            raise
        raise GradretError(f"{what} needs the package bm25s: pip install 'gradret[bm25]'") from None
    return bm25s


def index_bm25(collection: Collection, what: str = "BM25", check: Callable[[], None] = lambda: None) -> ScoredRanker:
    """A ranker by BM25 as bm25s computes it by default: Lucene's variant, words of two letters on, without English
    stop words. Its index stands in memory, 8 bytes for each distinct word of each document.

    Documents that share no word with the query are not ranked; of equal scores the earlier document comes first.

    Args:
        collection: its documents are ranked.
        what: needs it, for the message where bm25s is not installed.
        check: called for each document and each query; what it raises ends the work.
    """
    bm25s = import_bm25s(what)
    tokenizer = bm25s.tokenization.Tokenizer()

    def read_contents() -> Iterator[str]:
        documents, total = collection.documents(), collection.document_count
        for document in show_bar(documents, total=total, desc="indexing for BM25", unit="doc", delay=PATIENCE_S):
            check()
            yield document.content

    tokens = [np.array(t, np.int32) for t in tokenizer.streaming_tokenize(read_contents(), allow_empty=False)]
    vocabulary = tokenizer.get_vocab_dict()
    index = bm25s.BM25(backend="numpy")
    if vocabulary:
        index.index((tokens, vocabulary), create_empty_token=False, show_progress=False)

    def rank(queries: list[str], depth: int) -> list[tuple[np.ndarray, np.ndarray]]:
        rankings = []
        tokenized = tokenizer.streaming_tokenize(queries, update_vocab=False, allow_empty=False)
        for words in show_bar(tokenized, total=len(queries), desc="ranking by BM25", unit="query", delay=PATIENCE_S):
            check()
            scores = index.get_scores_from_ids(words) if words else np.zeros(0, np.float32)
            found = np.flatnonzero(scores)
            if len(found) > depth:  # those that are as good as the last of the best, too: the earlier ones win
                found = found[scores[found] >= np.partition(scores[found], -depth)[-depth]]
            best = found[np.argsort(-scores[found], kind="stable")][:depth]
            rankings.append((best, scores[best]))
        return rankings

    return rank


def search_bm25(collection: Collection, *, depth: int) -> dict[str, list[tuple[str, float]]]:
    """Rank the documents for every query: query id -> [(doc id, score)], best first, at most `depth`.

    Ties, and documents with the query's id, are treated as retrieve.search does.
    """
    rank = index_bm25(collection)
    doc_ids = [document.doc_id for document in collection.documents()]
    rankings = rank(list(collection.queries.values()), depth + collection.drop_self)
    run = {}
    for query_id, (positions, scores) in zip(collection.queries, rankings, strict=True):
        pairs = list(zip((doc_ids[p] for p in positions), scores.tolist(), strict=True))
        if collection.drop_self:
            pairs = [(doc_id, score) for doc_id, score in pairs if doc_id != query_id]
        pairs.sort(key=lambda pair: pair[0], reverse=True)
        pairs.sort(key=lambda pair: -pair[1])
        run[query_id] = pairs[:depth]
    return run

"""Exact search: documents embedded, queries ranked against them, and rankings as TREC runs."""

import hashlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from gradret.console import BAR_DELAY_S, GradretError, show_bar
from gradret.data.collections import Collection
from gradret.data.lists import PIECE, quote
from gradret.distributed import ALONE, Processes
from gradret.encoder.load import load_encoder
from gradret.encoder.model import Encoder, Kind
from gradret.files import hold_lock, write_json, write_whole

EmbeddingFunction = Callable[[list[str], Kind], Any]  # texts and "query" or "document" to (n, D), an array or a tensor


class OutsideEmbedder:
    """A function of texts in place of an Encoder; what it depends on is not known, so none of it is cached.

    Args:
        embed: n texts, their kind and how many at once to (n, D) embeddings.
        probe: a query, to learn the dimension from.
        normalize: whether the cosine of two embeddings is their similarity; else their dot product.
        device: where queries are scored.
    """

    def __init__(
        self,
        embed: Callable[[list[str], Kind, int], Any],
        probe: str,
        *,
        normalize: bool,
        device: str | torch.device = "cpu",
    ):
        self._embed, self._normalize, self.device = embed, normalize, torch.device(device)
        self.dimension = 0
        self.dimension = self.encode([probe], "query").shape[1]
        self.longest_text = None

    def encode(
        self, texts: Sequence[str], kind: Kind = "document", *, batch_size: int = 32, precision: str = "float32"
    ) -> np.ndarray:
        """(n, D) float32. Raises: ValueError when what the function gave is something else."""
        if not texts:
            return np.zeros((0, self.dimension), np.float32)
        found = self._embed(list(texts), kind, batch_size)
        if isinstance(found, Tensor) and found.layout == torch.strided:
            found = found.detach().cpu()
            found = (found.float() if found.is_floating_point() else found).numpy()
        try:
            given = np.asarray(found)
            result = given.astype(np.float32, casting="same_kind" if given.dtype.kind == "c" else "unsafe")
        except (TypeError, ValueError, RuntimeError):
            what = f"a {type(found).__name__}"
            raise ValueError(f"embeddings must be a dense array of real numbers, (n, D), got {what}") from None
        if result.ndim != 2 or len(result) != len(texts) or not result.shape[1]:
            raise ValueError(f"embeddings of {len(texts)} texts must be ({len(texts)}, D), got {result.shape}")
        if self.dimension and result.shape[1] != self.dimension:
            raise ValueError(f"the embeddings of {kind} texts have {result.shape[1]} dimensions, not {self.dimension}")
        return result

    def search_vectors(self, embeddings: Tensor) -> Tensor:
        return nnf.normalize(embeddings, dim=-1) if self._normalize else embeddings

    def fingerprint(self, *, queries: bool = True) -> str:
        raise ValueError("what the embeddings depend on is not known: they cannot be cached")


Embedder = Encoder | OutsideEmbedder  # what can embed a corpus and its queries


def as_embedder(model: Encoder | str | Path | EmbeddingFunction, probe: str) -> Embedder:
    """An Embedder of what the user has, see evaluate.

    Args:
        probe: a query, to learn the dimension from.
    Raises: TypeError for anything else, ValueError for a similarity without a dot product, GradretError as
        load_encoder.
    """
    if isinstance(model, Encoder):
        return model
    if isinstance(model, str | Path):
        return load_encoder(str(model))
    library = sys.modules.get("sentence_transformers")  # without it there is no model of it
    if library is not None and isinstance(model, library.SentenceTransformer):
        similarity = str(model.similarity_fn_name)
        if similarity not in ("cosine", "dot"):
            raise ValueError(f"the model's similarity is '{similarity}'; only cosine and dot can be searched here")

        def embed(texts: list[str], kind: Kind, batch_size: int) -> np.ndarray:
            encode = model.encode_query if kind == "query" else model.encode_document
            return np.asarray(encode(texts, batch_size=batch_size, show_progress_bar=False, convert_to_numpy=True))

        return OutsideEmbedder(embed, probe, normalize=similarity == "cosine", device=model.device)
    if callable(model) and not isinstance(model, nn.Module | type):
        return OutsideEmbedder(lambda texts, kind, _: model(texts, kind), probe, normalize=False)
    raise TypeError(
        f"expected an Encoder, its name, a SentenceTransformer or a function of texts and their kind, "
        f"got {model!r:.100}"
    )


ENCODE_BLOCK = 2048  # documents encoded, written and recorded at once: what an interruption may cost
SEARCH_BLOCK = 16384  # documents scored at once
ENCODE_PART = 256  # documents sorted by length together, and steps of the progress bar
QUERY_BLOCK = 1024  # queries scored at once: with SEARCH_BLOCK, 64 MiB of scores


def default_cache() -> Path:
    """Where corpus embeddings are kept: $GRADRET_CACHE, else gradret/ in the user's cache folder."""
    base = os.environ.get("GRADRET_CACHE")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gradret"


def embed_texts(
    encoder: Embedder,
    texts: Sequence[str],
    kind: Kind = "document",
    *,
    ids: Sequence[str] | None = None,
    batch_size: int = 32,
    precision: str = "float32",
) -> np.ndarray:
    """(n, D) float32 vectors, whose dot products are scores.

    Args:
        ids: of the texts, for messages; None: a text is named by its own words.
    Raises: GradretError when a vector is not finite, for what is not gradret's own encoder ValueError.
    """
    embeddings = encoder.encode(texts, kind, batch_size=batch_size, precision=precision)
    vectors = encoder.search_vectors(torch.from_numpy(embeddings)).numpy()
    broken = np.flatnonzero(~np.isfinite(vectors).all(1))
    if len(broken):
        named = quote((ids or texts)[broken[0]])
        line = f"the embedding of {kind} {named} is not finite; expected numbers: look at the model's weights"
        raise ValueError(line) if isinstance(encoder, OutsideEmbedder) else GradretError(line)
    return vectors


@dataclass
class CorpusEmbeddings:
    """A collection's documents: vectors (documents, D) float32, memory-mapped, and doc_ids (documents,) bytes."""

    vectors: np.ndarray
    doc_ids: np.ndarray


def embed_corpus(
    encoder: Embedder,
    collection: Collection,
    cache: Path | None,
    *,
    batch_size: int = 32,
    precision: str = "float32",
    progress: bool = True,
    processes: Processes = ALONE,
) -> CorpusEmbeddings | None:
    """Embed every document, block by block, into a file. All processes share the work and call, the first one writes.

    Args:
        cache: folder of the first process that keeps the vectors, see find_store, so that they are computed once. An
            interrupted run goes on at the block it was in; one that starts beside another waits for it. None: a
            temporary file, which goes away with the result, and nothing is digested.
    Returns: the embeddings; None in all processes but the first.
    Raises: GradretError when the disk is full or the collection has no documents.
    """
    store = None
    doc_ids: list[np.ndarray] = []  # by blocks, of the first process
    with ExitStack() as held:
        with processes.agree():
            if processes.is_first and cache is not None:
                store, doc_ids = find_store(encoder, collection, cache, precision, progress=progress)
                if store.done < sum(map(len, doc_ids)):
                    held.enter_context(store.locked())
            elif processes.is_first:
                store = CorpusStore(encoder.dimension)
        # With a cache all documents are known by now; without one they are counted as they are embedded.
        done, known = processes.broadcast((store.done, sum(map(len, doc_ids))) if store is not None else None)
        documents = collection.documents(done, encoder.longest_text) if not known or done < known else iter(())
        options: dict[str, Any] = {"total": known or collection.document_count, "initial": done, "unit": "doc"}
        with show_bar(shown=progress and processes.is_first, desc="embedding documents", **options) as bar:
            while True:
                vectors = [np.zeros((0, encoder.dimension), np.float32)]
                with processes.agree():
                    block = list(islice(documents, ENCODE_BLOCK * processes.size))
                    own = processes.split(len(block))
                    for start in range(own.start, own.stop, ENCODE_PART):
                        part = block[start : min(start + ENCODE_PART, own.stop)]
                        texts, ids = [d.content for d in part], [d.doc_id for d in part]
                        found = embed_texts(encoder, texts, ids=ids, batch_size=batch_size, precision=precision)
                        vectors.append(found)
                        bar.update(len(texts))
                if not block:
                    break
                parts = processes.collect_objects(np.concatenate(vectors))
                with processes.agree():
                    if store is not None:
                        store.append(parts)
                        if not known:
                            doc_ids.append(np.array([d.doc_id.encode() for d in block]))
                bar.update(done + len(block) - bar.n)
                done += len(block)
        with processes.agree():
            if not done:
                raise GradretError(f"{collection.name}: no documents")
            return CorpusEmbeddings(store.open(), np.concatenate(doc_ids)) if store is not None else None


def find_store(
    encoder: Embedder,
    collection: Collection,
    cache: Path,
    precision: str,
    *,
    progress: bool = True,
) -> tuple["CorpusStore", list[np.ndarray]]:
    """The vectors under `cache` that belong to an encoder and a collection, and the documents' ids in blocks.

    The folder's name is a key of the encoder, the documents and the precision: a changed weight or word never meets an
    old vector.
    """
    digest, doc_ids = hashlib.blake2b(digest_size=16), []
    options: dict[str, Any] = {"total": collection.document_count, "unit": "doc", "delay": BAR_DELAY_S}
    with show_bar(shown=progress, desc="looking over documents", **options) as bar:
        documents = collection.documents(0, encoder.longest_text)
        while block := list(islice(documents, ENCODE_BLOCK)):
            for document in block:
                for text in (document.doc_id, document.content):
                    for start in range(0, len(text), PIECE):  # encoded as a whole it would be there twice
                        digest.update(text[start : start + PIECE].encode())
                    digest.update(b"\0")
            doc_ids.append(np.array([document.doc_id.encode() for document in block]))
            bar.update(len(block))
    key = f"{encoder.fingerprint(queries=False)} {digest.hexdigest()} {precision}"
    folder = cache / hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
    return CorpusStore(encoder.dimension, folder), doc_ids


class CorpusStore:
    """Vectors of a corpus in a file, which grows block by block.

    Args:
        dimension: of the vectors.
        folder: keeps them as vectors.f32, and in done.json how many are whole; None: they go away with the process.
    Attributes:
        done: how many are in the file.
    """

    def __init__(self, dimension: int, folder: Path | None = None):
        self._dimension, self._folder, self.done = dimension, folder, 0
        self._file: IO[bytes] | None = None
        with self._explaining_errors():
            if folder is None:
                self._file = tempfile.TemporaryFile(prefix="gradret-")
                return
            folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "vectors.f32"
        self._read_done()

    def _read_done(self) -> None:
        assert self._folder is not None
        with suppress(OSError, ValueError, KeyError, TypeError):  # not there, or torn: start over
            done = json.loads((self._folder / "done.json").read_bytes())["documents"]
            if 0 <= done <= self._path.stat().st_size // (4 * self._dimension):
                self.done = int(done)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """While this process alone adds vectors to the folder, behind those that others have added."""
        assert self._folder is not None
        with hold_lock(self._folder / "gradret.lock", "embeds the same documents"):
            self._read_done()
            yield

    def append(self, parts: Sequence[np.ndarray]) -> None:
        """Write (n, D) vectors behind those that are there; in a folder, record them once they are on disk.

        Raises: GradretError when they cannot be written.
        """
        with self._explaining_errors():
            if self._file is None:  # only now: a cache that is whole may be one that cannot be written to
                self._file = open(self._path, "r+b" if self._path.exists() else "w+b")
            # Plain writes, not a writable map: a full disk is then an error and not a bus fault.
            self._file.seek(4 * self._dimension * self.done)
            for part in parts:
                self._file.write(part.tobytes())
            self._file.flush()
            self.done += sum(map(len, parts))
            if self._folder is not None:
                os.fsync(self._file.fileno())
                write_json(self._folder / "done.json", {"documents": self.done})

    def open(self) -> np.ndarray:
        """(documents, D) float32, mapped."""
        with self._file or open(self._path, "rb") as file:
            return np.memmap(file, np.float32, "r", shape=(self.done, self._dimension))

    @contextmanager
    def _explaining_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            advice = "set GRADRET_CACHE to another disk, and run again: finished blocks are kept"
            raise GradretError(
                f"{self._folder or tempfile.gettempdir()}: corpus embeddings could not be written ({error.strerror}); "
                f"free space or {advice if self._folder is not None else 'set TMPDIR to another disk'}"
            ) from error


def top_k(
    queries: np.ndarray,
    documents: np.ndarray,
    k: int,
    *,
    device: str | torch.device = "cpu",
    block: int = SEARCH_BLOCK,
    progress: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """The k documents of highest dot product for each query, exactly.

    Only a block of documents and the best so far are in memory. Of equal scores the earlier document comes
    first, whatever the block size.

    Args:
        queries: (B, D) float32.
        documents: (N, D) float32; may be memory-mapped.
        k: at most N are given.
        progress: whether a bar shows up where a block of queries takes long.
    Returns: scores (B, k) float32, descending, and positions (B, k) int64.
    """
    k = min(k, len(documents))
    all_scores, all_positions = [], []
    for start in range(0, len(queries), QUERY_BLOCK):
        rows = torch.from_numpy(queries[start : start + QUERY_BLOCK]).to(device)
        best, positions = rows.new_empty(len(rows), 0), torch.empty(len(rows), 0, dtype=torch.int64, device=device)
        blocks = range(0, len(documents), block)
        for first in show_bar(blocks, shown=progress, desc="searching", unit="block", delay=BAR_DELAY_S):
            part = torch.from_numpy(np.array(documents[first : first + block])).to(device)
            # What is held so far stands to the left: earlier documents, so "leftmost first" is "earlier first".
            scores = torch.cat([best, rows @ part.T], 1)
            columns = _leftmost_top(scores, min(k, scores.shape[1]))
            origin = torch.arange(first, first + len(part), device=device).expand(len(rows), -1)
            best, positions = scores.gather(1, columns), torch.cat([positions, origin], 1).gather(1, columns)
        all_scores.append(best.cpu().numpy())
        all_positions.append(positions.cpu().numpy())
    return np.concatenate(all_scores), np.concatenate(all_positions)


def _leftmost_top(scores: Tensor, k: int) -> Tensor:
    """Columns (B, k) of the k highest scores in order, the leftmost first among equals."""
    # topk chooses freely among equals: rows where the k-th score has equals outside are chosen again.
    values, columns = scores.topk(k, dim=1)
    crowded = (scores >= values[:, -1:]).sum(1) > k
    for row in crowded.nonzero()[:, 0].tolist():
        columns[row] = scores[row].sort(dim=0, descending=True, stable=True).indices[:k]
    columns = columns.sort(1).values  # left to right, then stably by score
    order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True).indices
    return columns.gather(1, order)


def search(
    encoder: Embedder,
    collection: Collection,
    corpus: CorpusEmbeddings,
    *,
    depth: int,
    batch_size: int = 32,
    precision: str = "float32",
    progress: bool = True,
) -> dict[str, list[tuple[str, float]]]:
    """Rank the corpus for every query: query id -> [(doc id, score)], best first, at most `depth`.

    Equal scores stand in descending order of doc id, as trec_eval reads them. With the collection's drop_self a
    document whose id is the query's is left out.
    """
    query_ids, vectors = list(collection.queries), [np.zeros((0, encoder.dimension), np.float32)]
    with show_bar(shown=progress, total=len(query_ids), desc="embedding queries", unit="query") as bar:
        for start in range(0, len(query_ids), QUERY_BLOCK):
            ids = query_ids[start : start + QUERY_BLOCK]
            texts = [collection.queries[query_id] for query_id in ids]
            vectors.append(embed_texts(encoder, texts, "query", ids=ids, batch_size=batch_size, precision=precision))
            bar.update(len(texts))
    best = depth + collection.drop_self
    scores, positions = top_k(np.concatenate(vectors), corpus.vectors, best, device=encoder.device, progress=progress)
    overflowed = np.flatnonzero(~np.isfinite(scores).all(1))
    if len(overflowed):
        query_id = query_ids[overflowed[0]]
        raise GradretError(f"scores of query '{query_id}' are not finite: the embeddings are too large for float32")
    run = {}
    for query_id, row_scores, row in zip(query_ids, scores.tolist(), positions, strict=True):
        ranking = zip((i.decode() for i in corpus.doc_ids[row]), row_scores, strict=True)
        run[query_id] = order_ranking(ranking, query_id if collection.drop_self else None)[:depth]
    return run


def order_ranking(ranking: Iterable[tuple[str, float]], left_out: str | None = None) -> list[tuple[str, float]]:
    """Pairs of doc id and score, best first, equal scores in descending order of doc id; without the id left out."""
    kept = [pair for pair in ranking if pair[0] != left_out]
    return sorted(kept, key=lambda pair: (pair[1], pair[0]), reverse=True)


def write_run(
    path: str | os.PathLike[str], run: Mapping[str, Sequence[tuple[str, float]]], tag: str = "gradret"
) -> None:
    """Write a TREC run: `qid Q0 docid rank score tag`, scores with all the digits a float32 has.

    Raises: GradretError when an id holds white space, which the format cannot carry, or a score is no finite number,
        and nothing is written; or when the file cannot be written. ValueError when the tag holds white space.
    """
    if tag.split() != [tag]:
        raise ValueError(f"tag must be a word without white space, got {tag!r}")
    write_whole(path, _format_run(path, run, tag))


def _format_run(
    path: str | os.PathLike[str], run: Mapping[str, Sequence[tuple[str, float]]], tag: str
) -> Iterator[str]:
    for query_id, ranking in show_bar(run.items(), desc=f"writing {path}", unit="query", delay=BAR_DELAY_S):
        for rank, (doc_id, score) in enumerate(ranking, 1):
            if any(not isinstance(i, str) or i.split() != [i] for i in (query_id, doc_id)):
                raise GradretError(f"{path}: a TREC run cannot hold the ids '{query_id}' and '{doc_id}': white space")
            if not math.isfinite(score):
                raise GradretError(f"{path}: score {score} of '{doc_id}' for '{query_id}' is no finite number")
            yield f"{query_id} Q0 {doc_id} {rank} {score:.9g} {tag}\n"

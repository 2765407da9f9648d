"""Rankings as TREC runs, for other tools."""

import errno
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from gradret.console import PATIENCE_S, GradretError, show_bar
from gradret.data.collections import Collection
from gradret.distributed import ALONE, Processes
from gradret.encoder.load import load_encoder
from gradret.encoder.model import Encoder, Kind
from gradret.files import replace_json

EmbeddingFunction = Callable[[list[str], Kind], Any]  # texts and "query" or "document" to (n, D), an array or a tensor


class Embedder(Protocol):
    """What embedding a corpus and searching it need of an encoder; see Encoder."""

    @property
    def device(self) -> torch.device: ...

    @property
    def dimension(self) -> int: ...

    def encode(
        self, texts: Sequence[str], kind: Kind = "document", *, batch_size: int = 32, precision: str = "float32"
    ) -> np.ndarray: ...

    def search_vectors(self, embeddings: Tensor) -> Tensor: ...

    def fingerprint(self, *, queries: bool = True) -> str: ...


class OutsideEmbedder:
    """A function of texts as an Embedder; what it depends on is not known, so none of it is cached.

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

    def encode(
        self, texts: Sequence[str], kind: Kind = "document", *, batch_size: int = 32, precision: str = "float32"
    ) -> np.ndarray:
        """(n, D) float32. Raises: ValueError when what the function gave is something else, or not finite."""
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
        if not np.isfinite(result).all():
            raise ValueError(f"the embeddings of {kind} texts are not finite; expected finite numbers")
        return result

    def search_vectors(self, embeddings: Tensor) -> Tensor:
        return nnf.normalize(embeddings, dim=-1) if self._normalize else embeddings

    def fingerprint(self, *, queries: bool = True) -> str:
        """Nothing: see evaluation.evaluate, which keeps none of these embeddings."""
        return ""


def as_embedder(model: Encoder | str | Path | EmbeddingFunction, probe: str) -> Embedder:
    """An Embedder of what the user has.

    Args:
        model: an Encoder; the name of one, see load_encoder; a sentence-transformers model, whose encode_query,
            encode_document and similarity are used; or a function of a list of n texts and their kind, "query" or
            "document", to (n, D) embeddings, an array or a tensor, whose dot product is the similarity.
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

WRITE_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
)


def default_cache() -> Path:
    """Where corpus embeddings are kept: $GRADRET_CACHE, else gradret/ in the user's cache folder."""
    base = os.environ.get("GRADRET_CACHE")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gradret"


@dataclass
class CorpusEmbeddings:
    """A collection's documents as vectors, both arrays on disk.

    Attributes:
        vectors: (documents, D) float32, memory-mapped; their dot product with a query's is its score.
        doc_ids: (documents,) bytes, memory-mapped.
    """

    vectors: np.ndarray
    doc_ids: np.ndarray


def embed_corpus(
    encoder: Embedder,
    collection: Collection,
    cache: Path,
    *,
    batch_size: int = 32,
    precision: str = "float32",
    progress: bool = True,
    processes: Processes = ALONE,
    check: Callable[[], None] | None = None,
) -> CorpusEmbeddings | None:
    """Embed every document, block by block, into files under `cache`; what is there is not computed again.

    The folder's name is a key made of the encoder's content, the documents' content and the precision, so a
    changed weight or word never meets an old vector. An interrupted run goes on at the block it was in, with as many
    processes as it then has.

    Args:
        processes: who share the work; all of them call, the first one writes, and `cache` need not exist elsewhere.
        check: called now and then; what it raises ends the work. By default whether the other processes are there.
    Returns: the embeddings; None in all processes but the first.
    Raises: GradretError when the disk is full or the collection has no documents.
    """
    store, check = None, check or processes.check
    with processes.agree():
        if processes.is_first:
            store = CorpusStore(encoder, collection, cache, precision, check, progress=progress)
    done, count = processes.broadcast((store.done, store.count) if store is not None else None)
    documents = collection.documents(done)
    options = {"total": count, "initial": done, "desc": "embedding documents", "unit": "doc"}
    with show_bar(shown=progress and processes.is_first, **options) as bar:
        while done < count:
            size = min(ENCODE_BLOCK * processes.size, count - done)
            own = processes.split(size)
            vectors, ids = [np.zeros((0, encoder.dimension), np.float32)], []
            with processes.agree(), explain_errors(collection.name, cache):
                block = list(islice(documents, size))[own.start : own.stop]
                for start in range(0, len(block), ENCODE_PART):
                    check()
                    part = block[start : start + ENCODE_PART]
                    found = encoder.encode([d.content for d in part], batch_size=batch_size, precision=precision)
                    vectors.append(encoder.search_vectors(torch.from_numpy(found)).numpy())
                    ids += [d.doc_id.encode() for d in part]
                    bar.update(len(part))
            parts = processes.collect_objects((np.concatenate(vectors), ids))
            with processes.agree():
                if store is not None:
                    store.append(parts)
            done += size
            bar.update(done - bar.n)
    return store.open() if store is not None else None


class CorpusStore:
    """The files that hold a corpus as an encoder embeds it: vectors.f32, doc_ids.bin, and done.json, what is whole.

    Attributes:
        done, count: documents that are on disk, and of the collection.
    Raises: GradretError, see embed_corpus.
    """

    def __init__(
        self,
        encoder: Embedder,
        collection: Collection,
        cache: Path,
        precision: str,
        check: Callable[[], None],
        *,
        progress: bool,
    ):
        self._name = collection.name
        with explain_errors(self._name, cache):
            content, self.count, self._id_width = _digest_documents(collection, check, progress)
            if not self.count:
                raise GradretError(f"{collection.name}: no documents")
            key = f"{encoder.fingerprint(queries=False)} {content} {precision}"
            self._folder = cache / hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
            self._paths = self._folder / "vectors.f32", self._folder / "doc_ids.bin"
            self._dimension = encoder.dimension
            self._row_bytes = 4 * self._dimension, self._id_width
            self._folder.mkdir(parents=True, exist_ok=True)
            self.done = self._read_done()

    def _read_done(self) -> int:
        """How many documents are whole on disk: what was recorded, if both files are that long, else 0."""
        try:
            done = json.loads((self._folder / "done.json").read_bytes())["documents"]
            sizes = [path.stat().st_size for path in self._paths]
        except (OSError, ValueError, KeyError, TypeError):  # not there, or torn: start over
            return 0
        whole = isinstance(done, int) and 0 <= done <= self.count
        return done if whole and all(s >= done * r for s, r in zip(sizes, self._row_bytes, strict=True)) else 0

    def append(self, parts: Sequence[tuple[np.ndarray, list[bytes]]]) -> None:
        """Write (n, D) vectors and n ids of each part behind what is there, and record them once they are on disk."""
        with explain_errors(self._name, self._folder):
            # Plain writes, not a writable map: a full disk is then an error and not a bus fault.
            for path, size, column in zip(self._paths, self._row_bytes, range(2), strict=True):
                with open(path, "r+b" if path.exists() else "w+b") as file:
                    file.seek(self.done * size)
                    for part in parts:
                        rows = part[column] if column == 0 else np.array(part[column], f"S{self._id_width}")
                        file.write(rows.tobytes())
                    file.flush()
                    os.fsync(file.fileno())
            self.done += sum(len(ids) for _, ids in parts)
            replace_json(self._folder / "done.json", {"documents": self.done})

    def open(self) -> CorpusEmbeddings:
        """Both arrays, mapped."""
        shapes, types = ((self.count, self._dimension), (self.count,)), (np.dtype(np.float32), f"S{self._id_width}")
        return CorpusEmbeddings(
            *(np.memmap(p, t, "r", shape=s) for p, t, s in zip(self._paths, types, shapes, strict=True))
        )


@contextmanager
def explain_errors(name: str, folder: Path) -> Iterator[None]:
    """Say of an OSError whether the documents of the collection `name` or the files in `folder` are at fault."""
    try:
        yield
    except OSError as error:
        if error.errno not in WRITE_ERRORS:
            raise GradretError(f"{name}: documents could not be read ({error})") from error
        raise GradretError(
            f"{folder}: corpus embeddings could not be written ({error.strerror}); free space or set GRADRET_CACHE "
            "to another disk, and run again: finished blocks are kept"
        ) from error


def _digest_documents(collection: Collection, check: Callable[[], None], progress: bool) -> tuple[str, int, int]:
    """Digest of all ids and texts, how many, and the longest id in bytes."""
    digest, count, id_width = hashlib.blake2b(digest_size=16), 0, 1
    options = {"total": collection.document_count, "desc": "looking over documents", "unit": "doc"}
    for document in show_bar(collection.documents(), shown=progress, delay=PATIENCE_S, **options):
        if count % ENCODE_BLOCK == 0:
            check()
        doc_id = document.doc_id.encode()
        digest.update(doc_id + b"\0" + document.content.encode() + b"\0")
        count, id_width = count + 1, max(id_width, len(doc_id))
    return digest.hexdigest(), count, id_width


def top_k(
    queries: np.ndarray,
    documents: np.ndarray,
    k: int,
    *,
    device: str | torch.device = "cpu",
    block: int = SEARCH_BLOCK,
    check: Callable[[], None] = lambda: None,
    progress: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """The k documents of highest dot product for each query, exactly.

    Only a block of documents and the best so far are in memory. Of equal scores the earlier document comes
    first, whatever the block size.

    Args:
        queries: (B, D) float32.
        documents: (N, D) float32; may be memory-mapped.
        k: at most N are given.
        check: called before each block of documents; what it raises ends the search.
        progress: whether a bar shows up where a block of queries takes long.
    Returns: scores (B, k) float32, descending, and positions (B, k) int64.
    """
    k = min(k, len(documents))
    results = []
    for start in range(0, len(queries), QUERY_BLOCK):
        rows = torch.from_numpy(queries[start : start + QUERY_BLOCK]).to(device)
        best, positions = rows.new_empty(len(rows), 0), torch.empty(len(rows), 0, dtype=torch.int64, device=device)
        blocks = range(0, len(documents), block)
        for first in show_bar(blocks, shown=progress, desc="searching", unit="block", delay=PATIENCE_S):
            check()
            part = torch.from_numpy(np.array(documents[first : first + block])).to(device)
            # What is held so far stands to the left: earlier documents, so "leftmost first" is "earlier first".
            scores = torch.cat([best, rows @ part.T], 1)
            columns = _leftmost_top(scores, min(k, scores.shape[1]))
            origin = torch.arange(first, first + len(part), device=device).expand(len(rows), -1)
            best, positions = scores.gather(1, columns), torch.cat([positions, origin], 1).gather(1, columns)
        results.append((best.cpu().numpy(), positions.cpu().numpy()))
    return tuple(np.concatenate(parts) for parts in zip(*results, strict=True))


def _leftmost_top(scores: Tensor, k: int) -> Tensor:
    """Columns (B, k) of the k highest scores in order, the leftmost first among equals.

    topk chooses freely among equals: rows where the k-th score has equals outside are chosen again.
    """
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
    check: Callable[[], None] = lambda: None,
    progress: bool = True,
) -> dict[str, list[tuple[str, float]]]:
    """Rank the corpus for every query: query id -> [(doc id, score)], best first, at most `depth`.

    Equal scores stand in descending order of doc id, as trec_eval reads them. With the collection's drop_self a
    document whose id is the query's is left out. What `check` raises, called now and then, ends the search.
    """
    query_ids, vectors = list(collection.queries), [np.zeros((0, encoder.dimension), np.float32)]
    with show_bar(shown=progress, total=len(query_ids), desc="embedding queries", unit="query") as bar:
        for start in range(0, len(query_ids), QUERY_BLOCK):
            check()
            part = [collection.queries[query_id] for query_id in query_ids[start : start + QUERY_BLOCK]]
            found = encoder.encode(part, "query", batch_size=batch_size, precision=precision)
            vectors.append(encoder.search_vectors(torch.from_numpy(found)).numpy())
            bar.update(len(part))
    best = depth + collection.drop_self
    options = {"device": encoder.device, "check": check, "progress": progress}
    scores, positions = top_k(np.concatenate(vectors), corpus.vectors, best, **options)
    run = {}
    for query_id, row_scores, row in zip(query_ids, scores.tolist(), positions, strict=True):
        check()
        ranking = list(zip((i.decode() for i in corpus.doc_ids[row]), row_scores, strict=True))
        if collection.drop_self:
            ranking = [(doc_id, score) for doc_id, score in ranking if doc_id != query_id]
        ranking.sort(key=lambda pair: pair[0], reverse=True)
        ranking.sort(key=lambda pair: -pair[1])
        run[query_id] = ranking[:depth]
    return run


def write_run(
    path: str | os.PathLike[str], run: Mapping[str, Sequence[tuple[str, float]]], tag: str = "gradret"
) -> None:
    """Write a TREC run: `qid Q0 docid rank score tag`, scores with all the digits a float32 has.

    Raises: GradretError when an id holds white space, which the format can not carry, and nothing is written; or when
        the file can not be written.
    """
    for query_id, ranking in run.items():
        for doc_id, _ in ranking:
            if query_id.split() != [query_id] or doc_id.split() != [doc_id]:
                raise GradretError(f"{path}: a TREC run can not hold the ids '{query_id}' and '{doc_id}': white space")
    rankings = show_bar(run.items(), desc=f"writing {path}", unit="query", delay=PATIENCE_S)
    try:
        with open(path, "w", encoding="utf-8") as file:
            for query_id, ranking in rankings:
                for rank, (doc_id, score) in enumerate(ranking, 1):
                    file.write(f"{query_id} Q0 {doc_id} {rank} {score:.9g} {tag}\n")
    except OSError as error:
        raise GradretError(f"{path}: can not be written ({error.strerror})") from None

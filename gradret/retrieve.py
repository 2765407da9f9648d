"""Corpus embeddings, cached and resumable, and exact top-k over them by blocks."""

import errno
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from gradret.collection import Collection
from gradret.encoder import Encoder
from gradret.errors import GradretError
from gradret.files import replace_json

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
    encoder: Encoder,
    collection: Collection,
    cache: Path,
    *,
    batch_size: int = 32,
    precision: str = "float32",
    progress: bool = True,
) -> CorpusEmbeddings:
    """Embed every document, block by block, into files under `cache`; what is there is not computed again.

    The folder's name is a key made of the encoder's content, the documents' content and the precision, so a
    changed weight or word never meets an old vector. An interrupted run goes on at the block it was in.

    Raises: GradretError when the disk is full or the collection has no documents.
    """
    content, count, id_width = _digest_documents(collection)
    if not count:
        raise GradretError(f"{collection.name}: no documents")
    key = hashlib.blake2b(
        f"{encoder.fingerprint(queries=False)} {content} {precision}".encode(), digest_size=16
    ).hexdigest()
    folder = cache / key
    paths = folder / "vectors.f32", folder / "doc_ids.bin"
    shapes = (count, encoder.dimension), (count,)
    types = np.dtype(np.float32), np.dtype(f"S{id_width}")
    row_bytes = 4 * encoder.dimension, id_width
    try:
        folder.mkdir(parents=True, exist_ok=True)
        done = _read_done(folder, paths, row_bytes, count)
        if done < count:
            _write_blocks(encoder, collection, folder, paths, row_bytes, done, count, batch_size, precision, progress)
    except OSError as error:
        if error.errno not in WRITE_ERRORS:
            raise GradretError(f"{collection.name}: documents could not be read ({error})") from error
        raise GradretError(
            f"{folder}: corpus embeddings could not be written ({error.strerror}); free space or set GRADRET_CACHE "
            "to another disk, and run again: finished blocks are kept"
        ) from error
    return CorpusEmbeddings(*(np.memmap(p, t, "r", shape=s) for p, t, s in zip(paths, types, shapes, strict=True)))


def _digest_documents(collection: Collection) -> tuple[str, int, int]:
    """Digest of all ids and texts, how many, and the longest id in bytes."""
    digest, count, id_width = hashlib.blake2b(digest_size=16), 0, 1
    for document in collection.documents():
        doc_id = document.doc_id.encode()
        digest.update(doc_id + b"\0" + document.content.encode() + b"\0")
        count, id_width = count + 1, max(id_width, len(doc_id))
    return digest.hexdigest(), count, id_width


def _read_done(folder: Path, paths: tuple[Path, Path], row_bytes: tuple[int, int], count: int) -> int:
    """How many documents are whole on disk: what was recorded, if both files are that long, else 0."""
    try:
        done = json.loads((folder / "done.json").read_bytes())["documents"]
        sizes = [path.stat().st_size for path in paths]
    except (OSError, ValueError, KeyError, TypeError):  # not there, or torn: start over
        return 0
    whole = isinstance(done, int) and 0 <= done <= count
    return done if whole and all(s >= done * r for s, r in zip(sizes, row_bytes, strict=True)) else 0


def _write_blocks(encoder, collection, folder, paths, row_bytes, done, count, batch_size, precision, progress) -> None:
    # Plain writes, not a writable map: a full disk is then an error and not a bus fault.
    files = [open(path, "r+b" if path.exists() else "w+b") for path in paths]
    documents = collection.documents(done)
    bar = tqdm(total=count, initial=done, desc="embedding documents", unit="doc", disable=None if progress else True)
    try:
        for file, size in zip(files, row_bytes, strict=True):
            file.seek(done * size)
        while block := list(islice(documents, ENCODE_BLOCK)):
            for start in range(0, len(block), ENCODE_PART):
                part = block[start : start + ENCODE_PART]
                vectors = encoder.encode([d.content for d in part], batch_size=batch_size, precision=precision)
                files[0].write(encoder.search_vectors(torch.from_numpy(vectors)).numpy().tobytes())
                files[1].write(np.array([d.doc_id.encode() for d in part], f"S{row_bytes[1]}").tobytes())
                bar.update(len(part))
            done += len(block)
            for file in files:
                file.flush()
                os.fsync(file.fileno())
            replace_json(folder / "done.json", {"documents": done})
    finally:
        bar.close()
        for file in files:
            file.close()


def top_k(
    queries: np.ndarray, documents: np.ndarray, k: int, *, device: str | torch.device = "cpu", block: int = SEARCH_BLOCK
) -> tuple[np.ndarray, np.ndarray]:
    """The k documents of highest dot product for each query, exactly.

    Only a block of documents and the best so far are in memory. Of equal scores the earlier document comes
    first, whatever the block size.

    Args:
        queries: (B, D) float32.
        documents: (N, D) float32; may be memory-mapped.
        k: at most N are given.
    Returns: scores (B, k) float32, descending, and positions (B, k) int64.
    """
    k = min(k, len(documents))
    results = []
    for start in range(0, len(queries), QUERY_BLOCK):
        rows = torch.from_numpy(queries[start : start + QUERY_BLOCK]).to(device)
        best, positions = rows.new_empty(len(rows), 0), torch.empty(len(rows), 0, dtype=torch.int64, device=device)
        for first in range(0, len(documents), block):
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
    encoder: Encoder,
    collection: Collection,
    corpus: CorpusEmbeddings,
    *,
    depth: int,
    batch_size: int = 32,
    precision: str = "float32",
) -> dict[str, list[tuple[str, float]]]:
    """Rank the corpus for every query: query id -> [(doc id, score)], best first, at most `depth`.

    Equal scores stand in descending order of doc id, as trec_eval reads them. With the collection's drop_self a
    document whose id is the query's is left out.
    """
    query_ids = list(collection.queries)
    vectors = encoder.encode(list(collection.queries.values()), "query", batch_size=batch_size, precision=precision)
    vectors = encoder.search_vectors(torch.from_numpy(vectors)).numpy()
    scores, positions = top_k(vectors, corpus.vectors, depth + collection.drop_self, device=encoder.device)
    run = {}
    for query_id, row_scores, row in zip(query_ids, scores.tolist(), positions, strict=True):
        ranking = list(zip((i.decode() for i in corpus.doc_ids[row]), row_scores, strict=True))
        if collection.drop_self:
            ranking = [(doc_id, score) for doc_id, score in ranking if doc_id != query_id]
        ranking.sort(key=lambda pair: pair[0], reverse=True)
        ranking.sort(key=lambda pair: -pair[1])
        run[query_id] = ranking[:depth]
    return run


def write_run(path: str | os.PathLike, run: dict[str, Sequence[tuple[str, float]]], tag: str = "gradret") -> None:
    """Write a TREC run: `qid Q0 docid rank score tag`, scores with all the digits a float32 has.

    Raises: GradretError when an id holds white space, which the format can not carry.
    """
    with open(path, "w", encoding="utf-8") as file:
        for query_id, ranking in run.items():
            for rank, (doc_id, score) in enumerate(ranking, 1):
                if query_id.split() != [query_id] or doc_id.split() != [doc_id]:
                    raise GradretError(
                        f"{path}: a TREC run can not hold the ids '{query_id}' and '{doc_id}': white space"
                    )
                file.write(f"{query_id} Q0 {doc_id} {rank} {score:.9g} {tag}\n")

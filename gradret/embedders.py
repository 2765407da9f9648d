"""What can be measured: an encoder, a sentence-transformers model, or any function that embeds texts."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from gradret.encoder import Encoder, Kind
from gradret.encoder_load import load_encoder

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

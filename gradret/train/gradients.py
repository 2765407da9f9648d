"""The gradient of a batch: texts encoded in chunks, embeddings shared by all processes, gradient caching.

The loss needs all embeddings of a batch at once, the encoder needs only some texts at a time. So every chunk of texts
is encoded, the loss gives the gradient of each embedding, and each chunk is taken backward with its own: with its
activations kept, or encoded again (gradient caching). What a chunk holds and the state of its dropout depend on the
batch, the seed and the step alone, so that neither the caching nor the number of processes changes the gradient.

Source: gradient caching, Gao et al., arXiv 2101.06983.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradret.data.lists import hash64
from gradret.distributed import ALONE, Processes
from gradret.encoder.model import Encoder, autocast, deal_chunks, plan_chunks
from gradret.loss.functions import mix_losses
from gradret.loss.one_pass import ONE_PASS
from gradret.loss.retrieval import prepare_pairs, wasserstein_retrieval_loss
from gradret.settings import LOSSES, FitSettings
from gradret.train.batches import Batch, tokenize_batch

BLOCK_ELEMENTS = 1 << 22  # of the scores that exist at once: 16 MiB in float32, and as much for each step of a loss


class Objective:
    """A run's loss.

    Args:
        settings: loss, order, temperature, targets, ground and positive_from are used.
        default_grade: of the other lists' documents; None: a list has its own documents alone.
    """

    def __init__(self, settings: FitSettings, default_grade: float | None):
        self.settings, self.default_grade = settings, default_grade
        self._losses = settings.loss_weights.keys()

    def backward(
        self, queries: Tensor, documents: Tensor, batch: Batch, processes: Processes = ALONE, scale: float = 1.0
    ) -> float:
        """Add the gradient of `scale` times the loss to the .grad of both, and return that value.

        Scores are dot products of queries (B, D) and documents (N, D). With several processes: of this one's lists
        alone; the sum over the processes is that of the batch.
        """
        count = len(batch.queries)
        if "gaussian" in self._losses:  # one value for the whole batch: everyone computes all of it
            parts, shares = [slice(0, count)], [1 / processes.size]
        else:
            own = processes.split(count)
            size = self._block_rows(batch)
            parts = [slice(i, min(i + size, own.stop)) for i in range(own.start, own.stop, size)]
            shares = [(part.stop - part.start) / count for part in parts]
        total = 0.0
        for part, share in zip(parts, shares, strict=True):
            loss = self._loss_of(queries[part], documents, batch, part) * (share * scale)
            loss.backward()
            total += loss.item()  # waits for the device
        return total

    @property
    def skips_matrix(self) -> bool:
        """Whether scores go straight into the loss, without a matrix of them."""
        if self.default_grade is None or not self._losses <= set(ONE_PASS):
            return False
        # Where other lists' documents have target mass, wasserstein alone needs no matrix.
        others_weigh = self.settings.targets == "softmax" or self.default_grade > 0
        return self._losses == {"wasserstein"} or not others_weigh

    def _block_rows(self, batch: Batch) -> int:
        """How many lists at once."""
        if self.skips_matrix:
            return len(batch.queries)
        columns = batch.columns.shape[1] if self.default_grade is None else len(batch.documents)
        per_list = columns**2 if "ranknet" in self._losses else columns
        return max(1, BLOCK_ELEMENTS // per_list)

    def _loss_of(self, queries: Tensor, documents: Tensor, batch: Batch, part: slice) -> Tensor:
        s, device = self.settings, queries.device
        if self.skips_matrix:
            shape = (len(queries), len(documents))
            given = {"default_grade": self.default_grade, "targets": s.targets, "ground": s.ground}
            pairs = prepare_pairs(*batch.list_pairs(part), shape, **given)
            options = {"loss": s.loss, "order": s.order, "temperature": s.temperature}
            return wasserstein_retrieval_loss(queries, documents, pairs.to(device), **options)
        if self.default_grade is None:
            columns, grades, mask = (t[part].to(device) for t in (batch.columns, batch.grades, batch.mask))
            scores = (documents[columns] @ queries[:, :, None]).squeeze(-1)  # (b, n, D) (b, D, 1): (b, n)
        else:
            grades, mask = batch.spread_grades(self.default_grade, part).to(device), None
            scores = queries @ documents.T  # (b, N)
        options = {name: getattr(s, name) for taken in LOSSES.values() for name in taken}
        return mix_losses(s.loss, scores, grades, mask=mask, **options)


@dataclass(frozen=True)
class BatchGradients:
    """How the gradients of a run's batches are computed.

    Attributes:
        encoder: trained, on its device.
        precision: "float32" or "bfloat16" (autocast).
        chunk: the tokens that are encoded at once, as those of so many longest texts; see encoder/model.plan_chunks.
        cached: whether chunks are encoded twice instead of keeping their activations.
        processes: who share each batch.
    """

    encoder: Encoder
    objective: Objective
    precision: str
    chunk: int
    cached: bool
    processes: Processes = ALONE

    def accumulate(self, batch: Batch, seed: str, scale: float = 1.0) -> float:
        """Add this process's part of the gradient of `scale` times the batch's loss to the parameters, return the loss.

        The batch is the same in all processes, and so is the loss; gradients are still to be summed over them. Dropout
        depends on `seed`.
        """
        encoder = self.encoder
        tokens = tokenize_batch(batch, encoder, self.processes)
        lengths = [len(text) for text in tokens]
        plan = plan_chunks(lengths, self.chunk)
        own_chunks = deal_chunks(plan, lengths, self.processes.size)[self.processes.rank]
        cached = self.cached and len(own_chunks) > 1  # the activations of one chunk fit
        kept: list[Tensor] = []
        embeddings = torch.zeros((len(tokens), encoder.dimension), dtype=encoder.dtype, device=encoder.device)
        with autocast(encoder.device, self.precision), torch.set_grad_enabled(not cached):
            for number in own_chunks:
                embedded = self._embed(tokens, plan[number], seed, number)
                embeddings[plan[number]] = embedded.detach()
                if not cached:
                    kept.append(embedded)
        self.processes.sum_tensors([embeddings])  # (B + N, D); the others' rows were 0 here
        gradients = torch.zeros_like(embeddings)
        sizes = [len(batch.queries), len(batch.documents)]
        queries, documents = (part.requires_grad_() for part in embeddings.split(sizes))
        queries.grad, documents.grad = gradients.split(sizes)
        own = self.objective.backward(queries, documents, batch, self.processes, scale)
        loss = torch.tensor(own, dtype=torch.float64)
        self.processes.sum_tensors([gradients, loss])
        with autocast(encoder.device, self.precision):
            for number in own_chunks:
                embedded = self._embed(tokens, plan[number], seed, number) if cached else kept.pop(0)
                with torch.autocast(encoder.device.type, enabled=False):
                    embedded.backward(gradients[plan[number]])
                del embedded
        return loss.item()

    def _embed(self, tokens: Sequence[np.ndarray], rows: np.ndarray, seed: str, number: int) -> Tensor:
        """(n, D) embeddings of a chunk, with the dropout that belongs to it."""
        torch.manual_seed(hash64(seed, str(number)) >> 1)
        return self.encoder.search_vectors(self.encoder.embed_tokens([tokens[i] for i in rows]))

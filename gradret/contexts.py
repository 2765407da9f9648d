"""The gradient of a batch: texts encoded in chunks, embeddings shared by all processes, gradient caching.

The loss needs all embeddings of a batch at once, the encoder needs only some texts at a time. So every chunk of texts
is encoded, the loss gives the gradient of each embedding, and each chunk is taken backward with its own: with its
activations kept, or encoded again (gradient caching). What a chunk holds and the state of its dropout depend on the
batch, the seed and the step alone, so that neither the caching nor the number of processes changes the gradient.

Source: gradient caching, Gao et al., arXiv 2101.06983.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradret.batches import Batch, tokenize_batch
from gradret.chunks import deal_chunks, plan_chunks
from gradret.encoder import Encoder, autocast
from gradret.lists import hash64
from gradret.objective import Objective
from gradret.processes import ALONE, Processes


@dataclass(frozen=True)
class Contexts:
    """How the batches of a run are computed.

    Attributes:
        encoder: trained, on its device.
        objective: the loss.
        precision: "float32" or "bfloat16" (autocast).
        chunk: texts encoded at once, see chunks.plan_chunks.
        cached: whether chunks are encoded twice instead of keeping their activations.
        processes: who share each batch.
        check: called before each chunk; what it raises ends the batch.
    """

    encoder: Encoder
    objective: Objective
    precision: str
    chunk: int
    cached: bool
    processes: Processes = ALONE
    check: Callable[[], None] = lambda: None

    def add_gradients(self, batch: Batch, seed: str, scale: float = 1.0) -> float:
        """Add this process's part of the gradient of `scale` times the batch's loss to the parameters, return the loss.

        The loss is the whole batch's; gradients are still to be summed over the processes.

        Args:
            batch: the same in all processes.
            seed: names the batch; dropout depends on it.
        """
        tokens = tokenize_batch(batch, self.encoder, self.processes)
        lengths = [len(text) for text in tokens]
        plan = plan_chunks(lengths, self.chunk)
        mine = deal_chunks(plan, lengths, self.processes.size)[self.processes.rank]
        cached = self.cached and len(mine) > 1  # the activations of one chunk fit
        kept: list[Tensor] = []
        encoder = self.encoder
        shape = len(tokens), encoder.dimension  # (B + N, D)
        embeddings = torch.zeros(shape, dtype=encoder.dtype, device=encoder.device)
        with self._autocast(), torch.set_grad_enabled(not cached):
            for number in mine:
                self.check()
                embedded = self._embed(tokens, plan[number], seed, number)
                embeddings[plan[number]] = embedded.detach()
                if not cached:
                    kept.append(embedded)
        self.processes.add([embeddings])  # the others' rows were 0 here
        gradients = torch.zeros_like(embeddings)
        sizes = [len(batch.queries), len(batch.documents)]
        queries, documents = (part.requires_grad_() for part in embeddings.split(sizes))
        queries.grad, documents.grad = gradients.split(sizes)
        loss = self.objective.add_gradients(queries, documents, batch, self.processes, scale)
        self.processes.add([gradients])
        with self._autocast():
            for number in mine:
                self.check()
                embedded = self._embed(tokens, plan[number], seed, number) if cached else kept.pop(0)
                with torch.autocast(self.encoder.device.type, enabled=False):
                    embedded.backward(gradients[plan[number]])
                del embedded
        return self.processes.add_number(loss)

    def _embed(self, tokens: Sequence[np.ndarray], rows: np.ndarray, seed: str, number: int) -> Tensor:
        """(n, D) embeddings of a chunk, with the dropout that belongs to it."""
        torch.manual_seed(hash64(seed, str(number)) >> 1)
        return self.encoder.search_vectors(self.encoder.embed_tokens([tokens[i] for i in rows]))

    def _autocast(self):
        return autocast(self.encoder.device, self.precision)

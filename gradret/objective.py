"""The loss of a batch from its embeddings, in memory that does not grow with the number of lists."""

from torch import Tensor

from gradret.batches import Batch
from gradret.losses import make_loss, mix_losses
from gradret.pairs import prepare_pairs
from gradret.processes import ALONE, Processes
from gradret.retrieval_loss import wasserstein_retrieval_loss
from gradret.settings import FitSettings

BLOCK_ELEMENTS = 1 << 22  # of the scores that exist at once: 16 MiB in float32, and as much for each step of a loss


class Objective:
    """A run's loss.

    Args:
        settings: loss, order, temperature, targets, ground, positive_from, in_batch, kl_share and
            contrast_share are used.
        floor: grade of the other lists' documents; None: a list has its own documents alone.
    """

    def __init__(self, settings: FitSettings, floor: float | None):
        self.settings, self.floor = settings, floor
        names = ("order", "temperature", "targets", "ground", "positive_from")
        self._loss = make_loss(settings.loss, **{name: getattr(settings, name) for name in names})

    def add_gradients(
        self, queries: Tensor, documents: Tensor, batch: Batch, processes: Processes = ALONE, scale: float = 1.0
    ) -> float:
        """Add the gradient of `scale` times the loss to the embeddings' .grad, and return that value.

        With several processes: of this one's lists alone; the sum over the processes is that of the batch.

        Args:
            queries: (B, D) leaf that requires gradients; its dot products with documents are the scores.
            documents: (N, D), likewise.
        """
        count = len(batch.queries)
        if self.settings.loss == "gaussian":  # one value for the whole batch: everyone computes all of it
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
    def is_fused(self) -> bool:
        """Whether scores go straight into the loss, without a matrix of them."""
        s, floor = self.settings, self.floor
        weighs = floor is not None and (s.targets == "softmax" or floor > 0)  # whether other lists' documents have mass
        return s.loss == "wasserstein" and floor is not None and not (any(s.shares.values()) and weighs)

    def _block_rows(self, batch: Batch) -> int:
        """How many lists at once."""
        if self.is_fused:
            return len(batch.queries)
        columns = batch.columns.shape[1] if self.floor is None else len(batch.documents)
        per_list = columns**2 if self.settings.loss == "ranknet" else columns
        return max(1, BLOCK_ELEMENTS // per_list)

    def _loss_of(self, queries: Tensor, documents: Tensor, batch: Batch, part: slice) -> Tensor:
        s, device = self.settings, queries.device
        if self.is_fused:
            shape = (len(queries), len(documents))
            given = {"default_grade": self.floor, "targets": s.targets, "ground": s.ground}
            pairs = prepare_pairs(*batch.list_pairs(part), shape, **given)
            shares = {"kl_share": s.kl_share, "contrast_share": s.contrast_share}
            options = {"order": s.order, "temperature": s.temperature, **shares}
            return wasserstein_retrieval_loss(queries, documents, pairs.to(device), **options)
        if self.floor is None:
            columns, grades, mask = (t[part].to(device) for t in (batch.columns, batch.grades, batch.mask))
            scores = (documents[columns] @ queries[:, :, None]).squeeze(-1)  # (b, n, D) (b, D, 1): (b, n)
        else:
            grades, mask = batch.spread_grades(self.floor, part).to(device), None
            scores = queries @ documents.T  # (b, N)
        options = {"temperature": s.temperature, "targets": s.targets, "mask": mask}
        return mix_losses(self._loss, s.shares, scores, grades, **options)

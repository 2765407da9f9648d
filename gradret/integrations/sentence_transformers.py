"""The Wasserstein list loss for SentenceTransformerTrainer."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as nnf
from sentence_transformers import SentenceTransformer
from sentence_transformers.util.distributed import all_gather_with_grad, get_rank
from torch import Tensor, nn

from gradret.loss.functions import mix_losses
from gradret.loss.retrieval import wasserstein_retrieval_loss
from gradret.settings import (
    DEFAULT_GROUND,
    DEFAULT_LOSS,
    DEFAULT_ORDER,
    DEFAULT_TARGETS,
    DEFAULT_TEMPERATURE,
    FitSettings,
)


class WassersteinLoss(nn.Module):
    """What `gradret fit` minimises, for rows of a query, passages and the passages' grades.

    Inputs: columns (query, passage_1, ..., passage_n), n >= 2, and a label column with a list of n grades per row, any
    real numbers in any order. With `in_batch` every query is also scored against the passages of the other rows. A
    passage that two rows share counts there as one of the default grade, so keep such rows apart:
    batch_sampler=BatchSamplers.NO_DUPLICATES.

    Args:
        model: its similarity_fn_name, "cosine" or "dot", is the score.
        loss: "wasserstein", or a mixture of it, "kl" and "contrast" (gradret.kl_loss and contrast_loss), spelled as for
            `gradret fit`, whose default this is.
        order, temperature, targets, ground: see gradret.wasserstein_loss. Unlike the `scale` of other losses, the
            temperature divides the scores.
        in_batch: whether the other rows' passages join each list, with the default grade.
        default_grade: theirs.
        gather_across_devices: the other rows are those of all processes.

    Raises: ValueError where similarity, grades or options cannot be used.
    Source: SyCL, arXiv 2503.23239, whose loss is the Gaussian form of this one.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        *,
        loss: str = DEFAULT_LOSS,
        order: int = DEFAULT_ORDER,
        temperature: float = DEFAULT_TEMPERATURE,
        targets: str = DEFAULT_TARGETS,
        ground: str = DEFAULT_GROUND,
        in_batch: bool = True,
        default_grade: float = 0.0,
        gather_across_devices: bool = False,
    ) -> None:
        super().__init__()
        if model.similarity_fn_name not in ("cosine", "dot"):
            raise ValueError(f"the model's similarity must be 'cosine' or 'dot', got {model.similarity_fn_name!r}")
        if gather_across_devices and not in_batch:
            raise ValueError("gather_across_devices gathers the other rows' passages, so it needs in_batch")
        self.model = model
        self.loss = FitSettings(loss=loss, targets=targets).loss  # or raises
        self.order, self.temperature, self.targets, self.ground = order, temperature, targets, ground
        self.in_batch, self.default_grade = in_batch, default_grade
        self.gather_across_devices = gather_across_devices
        self._compute(*self._stack([torch.zeros(2, 2)] * 3), torch.ones(2, 2), 0)  # tells options that do not do

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """The loss, a scalar.

        Args:
            sentence_features: of the query and of each passage column.
            labels: (B, n) grades.
        Raises: ValueError without labels, or where they do not fit the passages.
        """
        if not isinstance(labels, Tensor):  # a trainer gives None where the data set has no such column
            raise ValueError(f"the data set needs a column of labels, a list of n grades per row; got {labels!r:.100}")
        embeddings = [self.model(features)["sentence_embedding"] for features in sentence_features]
        return self.compute_loss_from_embeddings(embeddings, labels)

    def compute_loss_from_embeddings(self, embeddings: Sequence[Tensor], labels: Tensor) -> Tensor:
        """The loss from n + 1 tensors (B, D), of the queries and of each passage column, and (B, n) grades."""
        shape = (len(embeddings[0]), len(embeddings) - 1)
        if shape[1] < 2:
            raise ValueError(f"columns must be a query and at least 2 passages, got {len(embeddings)} columns")
        if labels.shape != shape:
            raise ValueError(
                f"labels must hold a grade for each of {shape[1]} passages per row, got {tuple(labels.shape)}"
            )
        offset = 0
        queries, *columns = embeddings
        if self.gather_across_devices:
            columns = [all_gather_with_grad(column) for column in columns]
            offset = get_rank() * shape[0]
        return self._compute(*self._stack([queries, *columns]), labels, offset)

    def _stack(self, embeddings: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Queries (B, D) and passages (n, W, D), scored by their dot products; W rows of all processes."""
        queries, *columns = (e.to(torch.promote_types(e.dtype, torch.float32)) for e in embeddings)
        documents = torch.stack(columns)
        if self.model.similarity_fn_name == "cosine":
            queries, documents = nnf.normalize(queries, dim=-1), nnf.normalize(documents, dim=-1)
        return queries, documents

    def _compute(self, queries: Tensor, documents: Tensor, labels: Tensor, offset: int) -> Tensor:
        """The loss of rows that are rows `offset` to `offset` + B of the documents."""
        options: dict[str, Any] = {"order": self.order, "temperature": self.temperature}
        options |= {"targets": self.targets, "ground": self.ground}
        if not self.in_batch:
            scores = (queries * documents).sum(-1).T  # (B, n)
            return mix_losses(self.loss, scores, labels, **options)
        count, width = labels.shape
        rows = torch.arange(count, device=labels.device)
        columns = torch.arange(width, device=labels.device) * documents.shape[1]
        return wasserstein_retrieval_loss(
            queries,
            documents.flatten(0, 1),
            (rows.repeat_interleave(width), (rows[:, None] + offset + columns).flatten(), labels.flatten()),
            loss=self.loss,
            default_grade=self.default_grade,
            **options,
        )

    def get_config_dict(self) -> dict[str, Any]:
        """The options, for the model card."""
        names = ("loss", "order", "temperature", "targets", "ground", "in_batch", "default_grade")
        return {name: getattr(self, name) for name in (*names, "gather_across_devices")}

    @property
    def citation(self) -> str:
        """Whom to cite, for the model card."""
        return """
@inproceedings{esfandiarpoor2025beyond,
    title={Beyond Contrastive Learning: Synthetic Data Enables List-wise Training with Multiple Levels of Relevance},
    author={Esfandiarpoor, Reza and Zerveas, George and Zhang, Ruochen and Mgonzo, Macton and Eickhoff, Carsten and
        Bach, Stephen H.},
    booktitle={Findings of the Association for Computational Linguistics: EMNLP 2025},
    year={2025},
    url={https://arxiv.org/abs/2503.23239},
}
"""

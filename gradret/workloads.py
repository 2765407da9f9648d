"""What the loss benchmark runs: the tensors of a shape, the rows that are measured on them, and their float64 truth.

B is the number of lists or queries, N of documents, D of dimensions. A row is built from its workload's fields and its
name alone, so that another process can measure the same row.
"""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor

from gradret import rivals
from gradret.grades import prepare_grades
from gradret.losses import gaussian_loss, wasserstein_loss
from gradret.pairs import prepare_pairs
from gradret.retrieval_loss import wasserstein_retrieval_loss

TEMPERATURE = 0.05
INFONCE = "InfoNCE"
BASELINE = "cross_entropy"  # of the scores as they are: InfoNCE without its division by the temperature
# A list's graded documents, others are 0: a few, as in judged collections; the highest grade is always there.
LIST_GRADES = (3.0, 2.0, 1.0, 2.0, 1.0, 1.0, 2.0, 1.0, 1.0)
TRUTH_ELEMENTS = 1 << 20  # float64 truth is computed in blocks of about so many scores
COMPILED = "torch.compile"  # the names of compiled rows begin with it
LARGEST_MATRIX = {"cpu": 1024, "cuda": 4096}  # above it a float64 decomposition takes a minute


@dataclass(frozen=True)
class Row:
    """A line of the benchmark.

    Attributes:
        name: unique in its workload.
        order: the p of W_p^p, None for other losses.
        inputs: what the loss is differentiated in.
        loss: computes the scalar loss, None when the row is skipped.
        truth: the name of what it must equal, see ListWorkload.truth, None when there is none.
        skipped: why it is not measured.
    """

    name: str
    order: int | None = None
    inputs: tuple[Tensor, ...] = ()
    loss: Callable[[], Tensor] | None = None
    truth: str | None = None
    skipped: str | None = None

    @property
    def compiled(self) -> bool:
        return self.name.startswith(COMPILED)

    @property
    def external(self) -> bool:
        """Whether a compiler or another library computes it: a wrong value is then that one's, not gradret's."""
        return self.name.startswith((COMPILED, "POT"))

    @property
    def foreign(self) -> bool:
        """Whether it depends on a compiler or library that may fail; then it is skipped and the others go on."""
        return self.external or self.name.startswith("SyCL")


class TrueGradient(NamedTuple):
    """d loss / d input in float64 for the input's first rows; where `defined` (b,) is False it jumps."""

    values: Tensor
    defined: Tensor | None = None


class Truth(NamedTuple):
    """A loss in float64, and the gradients of a Wasserstein loss in the row's inputs."""

    loss: float
    gradients: tuple[TrueGradient, ...] = ()


class ListWorkload:
    """Lists of graded documents with their scores: cosine-like, higher for higher grades, of spread 3 in the softmax.

    Attributes:
        scores: (B, N) in dtype, requires grad. grades: (B, N) float32. positive: (B,) int64, a column of grade 3.
    """

    def __init__(self, shape: Sequence[int], dtype: str, device: str):
        self.shape = B, N = tuple(shape)
        self.device = torch.device(device)
        random = torch.Generator(self.device).manual_seed(0)
        graded = torch.tensor(LIST_GRADES[: N - 1], device=self.device)
        start = torch.randint(N, (B, 1), generator=random, device=self.device)
        columns = (start + torch.arange(len(graded), device=self.device) * (N // len(graded))) % N
        kept = torch.rand(columns.shape, generator=random, device=self.device) < 0.8
        kept[:, 0] = True
        self.grades = torch.zeros(B, N, device=self.device).scatter_(1, columns, graded * kept)
        self.positive = columns[:, 0].contiguous()
        scores = torch.randn(B, N, generator=random, device=self.device).mul_(0.15).add_(self.grades, alpha=0.1)
        self.scores = scores.clamp_(-1, 1).to(getattr(torch, dtype)).requires_grad_()

    def rows(self, orders: Sequence[int], *, compiled: bool = True) -> list[Row]:
        """All rows: gradret's, PyTorch's, compiled ones, POT's, the Gaussians, InfoNCE, and cross_entropy last."""
        if compiled:
            torch.compiler.reset()  # a function is compiled for eight shapes at most
        return [
            *(row for order in orders for row in self._wasserstein_rows(order, compiled)),
            *self._gaussian_rows(),
            self._row(INFONCE, rivals.infonce, self.positive, truth=INFONCE),
            Row(BASELINE, None, (self.scores,), partial(nnf.cross_entropy, self.scores, self.positive), BASELINE),
        ]

    def _row(self, name: str, loss: Callable, *arguments, order: int | None = None, truth: str | None = None) -> Row:
        if order is not None:
            arguments, truth = (*arguments, order), "wasserstein"
        return Row(name, order, (self.scores,), partial(loss, self.scores, *arguments, TEMPERATURE), truth)

    def _wasserstein_rows(self, order: int, compiled: bool) -> Iterator[Row]:
        grades, name = self.grades, f"W{order}"
        sorting = rivals.sort_grades(grades, order)
        # Eager on a CPU, scattering is fastest; elsewhere and compiled, a sum for each level is.
        levels = self._levels if self.device.type == "cpu" else self._byte_levels
        yield self._row(f"gradret {name}", _gradret, self._prepared, order=order)
        yield self._row(f"gradret {name}, raw grades", _gradret, grades, order=order)
        yield self._row(f"PyTorch {name}", rivals.textbook_wasserstein, grades, order=order)
        yield self._row(f"PyTorch {name}, presorted", rivals.sorted_wasserstein, sorting, order=order)
        yield self._row(f"PyTorch {name}, by level", rivals.level_wasserstein, levels, order=order)
        textbook, by_level = f"{COMPILED} {name}", f"{COMPILED} {name}, by level"
        if compiled:
            compile_loss = partial(torch.compile, dynamic=False)
            yield self._row(textbook, compile_loss(rivals.textbook_wasserstein), grades, order=order)
            yield self._row(by_level, compile_loss(rivals.level_wasserstein), self._byte_levels, order=order)
        else:
            yield from (Row(n, order, skipped="switched off by --no-compile") for n in (textbook, by_level))
        if importlib.util.find_spec("ot"):
            yield self._row(f"POT {name}", rivals.pot_wasserstein, grades, order=order)
        else:
            yield Row(f"POT {name}", order, skipped="POT is not installed; install it: pip install POT")

    def _gaussian_rows(self) -> Iterator[Row]:
        limit = LARGEST_MATRIX.get(self.device.type, 0)
        for name, loss, dimension, wanted in (
            ("SyCL Gaussian", rivals.published_gaussian, 1, "eigenvalues"),
            ("gradret Gaussian", _gradret_gaussian, 0, "singular values"),
        ):
            size = self.shape[dimension]
            if self.shape[0] < 2:
                yield Row(name, skipped="a covariance needs two lists")
            elif size > limit:
                reason = f"{wanted} of a {size} x {size} float64 matrix take too long on {self.device}"
                yield Row(name, skipped=f"{reason}; measured up to {limit}")
            else:
                yield self._row(name, loss, self.grades, truth="gaussian" if self.shape[0] <= limit else None)

    @cached_property
    def _prepared(self):
        return prepare_grades(self.grades)

    @cached_property
    def _levels(self):
        return rivals.find_levels(self.grades, torch.int64)

    @cached_property
    def _byte_levels(self):
        return rivals.find_levels(self.grades, torch.uint8)

    def truth(self, name: str, order: int | None) -> Truth:
        """In float64: "wasserstein" of an order, with gradients; INFONCE, BASELINE or "gaussian", without."""
        B, N = self.shape
        if name == "gaussian":
            return Truth(rivals.true_gaussian(*self._block(0, B), TEMPERATURE).item())
        total, gradients = 0.0, []
        for begin in range(0, B, step := max(1, TRUTH_ELEMENTS // N)):
            scores, grades = self._block(begin, begin + step)
            if name in (INFONCE, BASELINE):
                positive = self.positive[begin : begin + step].to(scores.device)
                temperature = TEMPERATURE if name == INFONCE else 1.0
                total += nnf.cross_entropy(scores / temperature, positive, reduction="sum").item()
                continue
            values, defined = rivals.true_wasserstein(scores.requires_grad_(begin == 0), grades, order, TEMPERATURE)
            total += values.sum().item()
            if begin == 0:
                gradients.append(TrueGradient(torch.autograd.grad(values.sum() / B, scores)[0], defined))
        return Truth(total / B, tuple(gradients))

    def _block(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Some lists' scores in float64 and their grades, on a device that has float64."""
        device = "cpu" if self.device.type == "mps" else self.device
        return self.scores.detach()[begin:end].to(device, torch.float64), self.grades[begin:end].to(device)


class RetrievalWorkload:
    """Queries and documents of length 1; each query has up to four documents of its own, grades 3, 2, 1, 0, others 0.

    Attributes:
        queries: (B, D), documents: (N, D), in dtype, require grad. grades: rows, columns and grades, (G,) each.
        positive: (B,) int64, the column of the document of grade 3.
    """

    def __init__(self, shape: Sequence[int], dtype: str, device: str):
        self.shape = B, N, D = tuple(shape)
        self.device = torch.device(device)
        random = torch.Generator(self.device).manual_seed(0)
        documents = torch.randn(N, D, generator=random, device=self.device)
        own = max(1, min(4, N // B))
        rows = torch.arange(B, device=self.device).repeat_interleave(own)
        columns = torch.arange(B * own, device=self.device) % N
        grades = torch.tensor([3.0, 2.0, 1.0, 0.0], device=self.device)[:own].repeat(B)
        self.grades, self.positive = (rows, columns, grades), columns[::own].contiguous()
        noise = torch.randn(B, D, generator=random, device=self.device)
        queries = noise.index_add_(0, rows, documents[columns] * grades[:, None] / 4)
        dtype = getattr(torch, dtype)
        self.queries, self.documents = (
            nnf.normalize(x, dim=-1).to(dtype).requires_grad_() for x in (queries, documents)
        )

    def rows(self, orders: Sequence[int], *, compiled: bool = True) -> list[Row]:
        """The fused loss, the same loss on the B x N matrix of scores, and cross_entropy on it. None is compiled."""
        inputs = self.queries, self.documents
        found = []
        for order in orders:
            for name, loss in (
                (f"fused scoring W{order}", partial(self._fused, self._pairs)),
                (f"fused scoring W{order}, raw grades", partial(self._fused, self.grades)),
                (f"score matrix W{order}", partial(self._by_matrix, self._prepared)),
                (f"score matrix W{order}, raw grades", self._by_matrix),
            ):
                found.append(Row(name, order, inputs, partial(loss, order=order), "wasserstein"))
        return [*found, Row(f"score matrix {BASELINE}", None, inputs, self._cross_entropy, BASELINE)]

    def _fused(self, grades, order: int) -> Tensor:
        return wasserstein_retrieval_loss(self.queries, self.documents, grades, order=order, temperature=TEMPERATURE)

    def _by_matrix(self, grades=None, *, order: int) -> Tensor:
        """Without grades, their matrix is made in the call."""
        grades = self._matrix_grades() if grades is None else grades
        return _gradret(self.queries @ self.documents.T, grades, order, TEMPERATURE)

    def _cross_entropy(self) -> Tensor:
        return nnf.cross_entropy(self.queries @ self.documents.T, self.positive)

    def _matrix_grades(self) -> Tensor:
        rows, columns, grades = self.grades
        return torch.zeros(self.shape[:2], device=self.device).index_put_((rows, columns), grades)

    @cached_property
    def _prepared(self):
        return prepare_grades(self._matrix_grades())

    @cached_property
    def _pairs(self):
        return prepare_pairs(*self.grades, self.shape[:2])

    def truth(self, name: str, order: int | None) -> Truth:
        """In float64: "wasserstein" of an order, with gradients, or "cross_entropy", without."""
        B, N, _ = self.shape
        documents = self._wide(self.documents).requires_grad_()
        rows, columns, grades = (x.to(documents.device) for x in self.grades)
        total, queries_gradient, documents_gradient = 0.0, None, torch.zeros_like(documents)
        for begin in range(0, B, step := max(1, TRUTH_ELEMENTS // N)):
            queries = self._wide(self.queries[begin : begin + step]).requires_grad_()
            scores = queries @ documents.T
            if name == BASELINE:
                positive = self.positive[begin : begin + step].to(scores.device)
                total += nnf.cross_entropy(scores, positive, reduction="sum").item()
                continue
            inside = (rows >= begin) & (rows < begin + len(queries))
            matrix = torch.zeros_like(scores).index_put_(
                (rows[inside] - begin, columns[inside]), grades[inside].double()
            )
            values, defined = rivals.true_wasserstein(scores, matrix, order, TEMPERATURE)
            total += values.sum().item()
            of_queries, of_documents = torch.autograd.grad(values.sum() / B, (queries, documents))
            documents_gradient += of_documents
            queries_gradient = queries_gradient or TrueGradient(of_queries, defined)
        if name == BASELINE:
            return Truth(total / B)
        return Truth(total / B, (queries_gradient, TrueGradient(documents_gradient)))

    def _wide(self, x: Tensor) -> Tensor:
        return x.detach().to("cpu" if x.device.type == "mps" else x.device, torch.float64)


def make_workload(shape: Sequence[int], dtype: str, device: str) -> ListWorkload | RetrievalWorkload:
    """Lists for a shape (B, N), embeddings for (B, N, D)."""
    return (ListWorkload if len(shape) == 2 else RetrievalWorkload)(shape, dtype, device)


def _gradret(scores: Tensor, grades, order: int, temperature: float) -> Tensor:
    return wasserstein_loss(scores, grades, order=order, temperature=temperature)


def _gradret_gaussian(scores: Tensor, grades: Tensor, temperature: float) -> Tensor:
    return gaussian_loss(scores, grades, temperature=temperature, targets="softmax")

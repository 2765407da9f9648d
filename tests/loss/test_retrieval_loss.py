"""Fused scoring against the plain path: all scores, dense grades, wasserstein_loss."""

import pytest
import torch
from plain import PLAIN, prepare_pairs, wasserstein_loss, wasserstein_retrieval_loss

from gradret.loss import kernels
from gradret.loss import retrieval as retrieval_loss
from gradret.loss.functions import mix_losses

F64 = {"dtype": torch.float64}
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def path(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(kernels, "compiled", None)
    elif kernels.compiled is None:
        pytest.skip(f"no compiled kernels: {kernels.missing}")


@pytest.fixture(params=[(retrieval_loss.TILE_ROWS, retrieval_loss.TILE_ELEMENTS), (4, 20), (3, 1)], ids=str)
def tile_size(request, monkeypatch):
    monkeypatch.setattr(retrieval_loss, "TILE_ROWS", request.param[0])
    monkeypatch.setattr(retrieval_loss, "TILE_ELEMENTS", request.param[1])


def make_batch(rows=7, columns=23, pairs=40, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    queries, documents = torch.randn(rows, 8, **F64), torch.randn(columns, 8, **F64)
    chosen = torch.randperm(rows * columns)[:pairs]
    grades = torch.randint(0, 8, (pairs,)).double() / 2
    triples = (chosen // columns, chosen % columns, grades)
    return queries.to(dtype), documents.to(dtype), triples


def plain(queries, documents, triples, default=0.0, weights=None, loss="wasserstein", **options):
    shape = (len(queries), len(documents))
    dense = torch.full(shape, default, **F64).index_put(triples[:2], triples[2])
    if weights is not None:
        options["targets"] = torch.zeros(shape, **F64).index_put(triples[:2], weights)
    scores = queries @ documents.T
    if loss == "wasserstein":
        return wasserstein_loss(scores, dense, **options)
    return mix_losses(loss, scores, dense, **PLAIN | options)


def value_and_gradients(function, queries, documents, *arguments, **options):
    queries, documents = (t.detach().clone().requires_grad_() for t in (queries, documents))
    value = function(queries, documents, *arguments, **options)
    factors = torch.arange(1, value.numel() + 1).to(value).view(value.shape)
    return value.detach(), *torch.autograd.grad(value, (queries, documents), factors)


@pytest.mark.parametrize(
    ("order", "default", "targets", "reduction"),
    [(1, 0.0, "gain", "mean"), (1, 1.0, "softmax", "none"), (2, 0.0, "softmax", "sum"), (2, 1.0, "gain", "none")],
)
def test_equals_the_plain_path_in_float64(order, default, targets, reduction, tile_size):
    batch = make_batch()
    options = {"order": order, "temperature": 2.0, "targets": targets, "reduction": reduction}
    expected = value_and_gradients(plain, *batch, default=default, **options)
    found = value_and_gradients(wasserstein_retrieval_loss, *batch, default_grade=default, **options)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("ground", "default"), [("grade", 0.0), ("gain", -2.0), ("sqrt", 0.0), ("sqrt", -2.0)])
def test_ground_distances_and_roots_as_targets(ground, default, tile_size):
    batch = make_batch()
    options = {"order": 2, "temperature": 2.0, "targets": "sqrt", "ground": ground}
    options["loss"] = "wasserstein:.3+kl:.4+contrast:.3"
    expected = value_and_gradients(plain, *batch, default=default, **options)
    found = value_and_gradients(wasserstein_retrieval_loss, *batch, default_grade=default, **options)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("loss", "temperature"),
    [("wasserstein:.7+kl:.3", 2.0), ("wasserstein:.7+contrast:.3", 0.05), ("kl", 0.05), ("contrast", 2.0)],
)
@pytest.mark.parametrize("pairs", [40, 3, 161])  # some rows without pairs; no others but pairs
def test_mixtures(loss, pairs, temperature, tile_size):
    batch = make_batch(pairs=pairs)
    for weights in (None, torch.linspace(0, 1, pairs, **F64)):
        options = {"order": 2, "temperature": temperature, "loss": loss}
        expected = value_and_gradients(plain, *batch, weights=weights, **options)
        options["targets"] = "gain" if weights is None else weights
        found = value_and_gradients(wasserstein_retrieval_loss, *batch, **options)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("loss", "slope"), [("wasserstein", 0.0), ("wasserstein:.5+kl:.5", -0.5), ("wasserstein:.5+contrast:.5", -0.5)]
)
def test_a_mixture_keeps_pulling_where_the_softmax_has_collapsed(loss, slope):
    """The right document's share of p is e^-90: transport alone has no gradient left, the other losses have all."""
    queries, documents = torch.tensor([[1.0]]), torch.tensor([[0.0], [90.0]], requires_grad=True)
    triple = (torch.tensor([0]), torch.tensor([0]), torch.tensor([3.0]))
    value = wasserstein_retrieval_loss(queries, documents, triple, loss=loss)
    assert torch.autograd.grad(value, documents)[0][0].item() == pytest.approx(slope, abs=1e-30)


def test_a_row_whose_scores_are_all_minus_infinity_counts_as_nothing():
    queries, documents = torch.tensor([[1.0]], requires_grad=True), torch.tensor([[-torch.inf], [-torch.inf]])
    triple = (torch.tensor([0]), torch.tensor([0]), torch.tensor([3.0]))
    assert wasserstein_retrieval_loss(queries, documents, triple, loss="wasserstein:.5+kl:.5").item() == 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("order", [1, 2])
def test_equals_the_plain_path_in_float32(order, device):
    for rows, columns, pairs in ((1, 1, 1), (3, 200, 9), (100, 3000, 700), (2100, 600, 5000)):
        queries, documents, triples = make_batch(rows, columns, pairs, seed=1)
        truth = value_and_gradients(plain, queries, documents, triples, order=order, temperature=0.7)
        triples = tuple(t.to(device) for t in triples)
        single = queries.float().to(device), documents.float().to(device), triples
        found = value_and_gradients(wasserstein_retrieval_loss, *single, order=order, temperature=0.7)
        for ours, exact in zip(found, truth, strict=True):
            # float32 embeddings of length 3 leave scores an error of 1e-6, as the plain path has it
            assert (ours.cpu() - exact).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_scored_in_float32(dtype):
    queries, documents, triples = make_batch(dtype=dtype)
    exact = value_and_gradients(plain, queries.double(), documents.double(), triples, temperature=0.7)
    found = value_and_gradients(wasserstein_retrieval_loss, queries, documents, triples, temperature=0.7)
    assert found[0].dtype == torch.float32
    assert found[1].dtype == found[2].dtype == dtype
    torch.testing.assert_close(found[0], exact[0].float(), rtol=1e-5, atol=0)
    for ours, theirs in zip(found[1:], exact[1:], strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_autocast_leaves_the_scores_in_float32():
    queries, documents, triples = make_batch(dtype=torch.float32)
    expected = value_and_gradients(wasserstein_retrieval_loss, queries, documents, triples)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = value_and_gradients(wasserstein_retrieval_loss, queries, documents, triples)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("order", [1, 2])
def test_gradcheck(order):
    queries, documents, triples = make_batch(3, 6, 7)
    arguments = (queries.requires_grad_(), documents.requires_grad_())
    assert torch.autograd.gradcheck(
        lambda q, d: wasserstein_retrieval_loss(q, d, triples, order=order, temperature=2.0), arguments
    )


def test_weights_of_pairs_as_targets():
    queries, documents, triples = make_batch()
    weights = torch.rand(len(triples[2]), **F64)
    expected = value_and_gradients(plain, queries, documents, triples, weights=weights, temperature=2.0)
    found = value_and_gradients(
        wasserstein_retrieval_loss, queries, documents, triples, targets=weights, temperature=2.0
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_a_default_grade_is_equal_to_the_same_grade_of_a_pair_in_float32():
    queries, documents, (rows, columns, grades) = make_batch()
    tenths, weights = (grades / 10).float(), torch.rand(len(grades), **F64)
    options = {"loss": "contrast", "temperature": 2.0}
    exact = (rows, columns, tenths.double())
    expected = plain(queries, documents, exact, default=torch.tensor(0.1).item(), weights=weights, **options)
    pairs = prepare_pairs(rows, columns, tenths, (7, 23), default_grade=0.1, targets=weights)
    torch.testing.assert_close(wasserstein_retrieval_loss(queries, documents, pairs, **options), expected)


def test_rows_of_pairs_only_rows_without_and_no_pairs_at_all():
    queries, documents, _ = make_batch(4, 5, 1)
    rows, columns = torch.arange(2).repeat_interleave(5), torch.arange(5).repeat(2)
    grades = torch.tensor([3.0, 2, 1, 0, 0, 0, 0, 0, 0, 0], **F64)  # a full row, a row without mass, two empty ones
    expected = value_and_gradients(plain, queries, documents, (rows, columns, grades), reduction="none")
    found = value_and_gradients(
        wasserstein_retrieval_loss, queries, documents, (rows, columns, grades), reduction="none"
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    assert (found[0] > 0).tolist() == [True, False, False, False]
    empty = torch.zeros(0, dtype=torch.int64)
    loss, *gradients = value_and_gradients(wasserstein_retrieval_loss, queries, documents, (empty, empty, empty))
    assert loss == 0 and all((g == 0).all() for g in gradients)


def test_empty_batches():
    empty = torch.zeros(0, dtype=torch.int64)
    for rows, columns in ((0, 3), (3, 0), (0, 0)):
        queries, documents = torch.zeros(rows, 4, requires_grad=True), torch.zeros(columns, 4, requires_grad=True)
        loss = wasserstein_retrieval_loss(queries, documents, (empty, empty, empty), reduction="none")
        loss.sum().backward()
        assert loss.tolist() == [0.0] * rows
        assert queries.grad.shape == (rows, 4) and documents.grad.shape == (columns, 4)


def test_prepared_pairs_serve_several_steps_and_one_side_may_be_frozen():
    queries, documents, triples = make_batch()
    expected = value_and_gradients(wasserstein_retrieval_loss, queries, documents, triples)
    prepared = prepare_pairs(*triples, (7, 23)).to("cpu")
    for _ in range(2):
        found = value_and_gradients(wasserstein_retrieval_loss, queries, documents, prepared)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    for which in (0, 1):
        sides = [queries.clone(), documents.clone()]
        sides[which].requires_grad_()
        wasserstein_retrieval_loss(*sides, prepared).backward()
        assert sides[1 - which].grad is None
        assert torch.equal(sides[which].grad, expected[1 + which])


def test_backward_twice_and_second_derivatives():
    queries, documents, triples = make_batch()
    queries.requires_grad_()
    loss = wasserstein_retrieval_loss(queries, documents, triples)
    first, second = (torch.autograd.grad(loss, queries, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (gradient,) = torch.autograd.grad(loss, queries, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        gradient.sum().backward()


def test_a_score_that_is_no_number_shows():
    queries, documents, triples = make_batch(dtype=torch.float32)
    documents[3, 0] = torch.nan
    assert wasserstein_retrieval_loss(queries, documents, triples, reduction="none").isnan().all()


I2 = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("triples", "options", "message"),
    [
        ((I2, I2, torch.ones(3)), {}, "three vectors of one length"),
        ((I2, torch.tensor([0, 5]), torch.ones(2)), {}, "columns must be 0 to 4; got 0 to 5"),
        ((torch.tensor([-1, 0]), I2, torch.ones(2)), {}, "rows must be 0 to 2; got -1 to 0"),
        ((I2.float(), I2, torch.ones(2)), {}, "rows must be integer, got torch.float32"),
        ((I2 * 0, I2 * 0 + 4, torch.ones(2)), {}, "row 0 and column 4 has more than one grade"),
        ((I2, I2, torch.ones(2)), {"targets": "rank"}, "targets must be"),
        ((I2, I2, torch.ones(2)), {"targets": torch.ones(3)}, "targets must be"),
        ((I2, I2, torch.ones(2)), {"ground": "rank"}, "ground must be 'grade', 'gain' or 'sqrt'"),
        ((I2, I2, torch.ones(2)), {"order": 3}, "order must be 1 or 2, got 3"),
        ((I2, I2, torch.ones(2)), {"temperature": 0}, "temperature must be above 0"),
        ((I2, I2, torch.ones(2)), {"reduction": "max"}, "reduction must be"),
        ((I2, I2, torch.ones(2)), {"loss": "infonce"}, "loss 'infonce': only wasserstein, kl and contrast are"),
        ((I2, I2, torch.ones(2)), {"loss": "kl", "targets": "softmax"}, "documents of the default grade no mass"),
        (prepare_pairs(I2, I2, torch.ones(2), (2, 5)), {}, r"\(2, 5\) queries and documents, the embeddings"),
        (prepare_pairs(I2, I2, torch.ones(2), (3, 5)), {"default_grade": 1}, "part of prepared pairs"),
        (prepare_pairs(I2, I2, torch.ones(2), (3, 5)), {"ground": "gain"}, "part of prepared pairs"),
    ],
)  # fmt: skip
def test_wrong_arguments(triples, options, message):
    with pytest.raises(ValueError, match=message):
        wasserstein_retrieval_loss(torch.zeros(3, 4), torch.zeros(5, 4), triples, **options)


def test_wrong_embeddings():
    with pytest.raises(ValueError, match="must be"):
        wasserstein_retrieval_loss(torch.zeros(3, 4), torch.zeros(5, 3), (I2, I2, torch.ones(2)))
    with pytest.raises(ValueError, match="of one type"):
        wasserstein_retrieval_loss(torch.zeros(3, 4), torch.zeros(5, 4).half(), (I2, I2, torch.ones(2)))


def op_samples():
    queries, documents, triples = make_batch(dtype=torch.float32)
    prepared = prepare_pairs(*triples, (7, 23))
    where = (queries, documents, prepared.offsets, prepared.columns)
    yield retrieval_loss.score_pairs_op, (*where, 0.7)
    of_pairs, others, *folded = retrieval_loss.score_pairs_op(*where, 0.7)
    yield retrieval_loss.score_pairs_backward_op, (*where, *folded, of_pairs, others, 0.7)


def test_opcheck():
    for op, arguments in op_samples():
        torch.library.opcheck(op, arguments)


def test_compiled_whole():
    queries, documents, triples = make_batch()
    prepared = prepare_pairs(*triples, (7, 23))

    def function(q, d):
        options = {"loss": "wasserstein:.5+kl:.25+contrast:.25", "order": 2, "temperature": 2.0}
        return wasserstein_retrieval_loss(2 * q, d, prepared, **options).square()

    expected = value_and_gradients(function, queries, documents)
    found = value_and_gradients(torch.compile(function, fullgraph=True, backend="aot_eager"), queries, documents)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_many_documents_that_each_weigh_little():
    queries, documents = torch.tensor([[1.0]]), torch.full((1 << 20, 1), 0.1)
    documents[5] = 14.0
    triples = (torch.tensor([0]), torch.tensor([5]), torch.tensor([1.0]))
    exact = value_and_gradients(plain, queries.double(), documents.double(), (*triples[:2], triples[2].double()))
    found = value_and_gradients(wasserstein_retrieval_loss, queries, documents, triples)
    # Not the query's gradient: a float32 matrix product over a million documents is no better on the plain path.
    for which in (0, 2):
        assert (found[which] - exact[which]).abs().max() <= 3e-6 * exact[which].abs().max()


def test_few_long_rows_are_shared_among_threads_and_keep_their_bits():
    torch.manual_seed(3)
    queries, documents = torch.randn(2, 4), torch.randn(70_001, 4)
    triples = torch.tensor([0, 1, 1]), torch.tensor([69_999, 5, 33_000]), torch.tensor([2.0, 1.0, 3.0])
    expected = value_and_gradients(plain, queries.double(), documents.double(), (*triples[:2], triples[2].double()))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            folded = retrieval_loss._score_pairs(queries, documents, *folding(triples, 2, 70_001), 1.0)
            results.append((folded, value_and_gradients(wasserstein_retrieval_loss, queries, documents, triples)))
    finally:
        torch.set_num_threads(before)
    for folded, found in results:
        assert all(torch.equal(a, b) for a, b in zip(folded, results[0][0], strict=True))
        for ours, exact in zip(found, expected, strict=True):
            assert (ours - exact).abs().max() <= 1e-5 * exact.abs().max()


def folding(triples, rows, columns):
    prepared = prepare_pairs(*triples, (rows, columns))
    return prepared.offsets, prepared.columns


def test_one_query_with_all_documents_costs_no_matrix():
    rows, columns = 300, 5000
    many = torch.cat([torch.zeros(columns, dtype=torch.int64), torch.arange(1, rows)])
    triples = (many, torch.cat([torch.arange(columns), torch.arange(1, rows)]), torch.randint(0, 4, many.shape))
    prepared = prepare_pairs(*triples, (rows, columns))
    held = prepared.offsets.numel() + prepared.columns.numel()
    for *own, grades in prepared.lists:
        held += sum(tensor.numel() for tensor in (*own, *grades.tables))
    assert held < 100 * (rows + len(many)) < rows * columns
    queries, documents = torch.randn(rows, 8, **F64), torch.randn(columns, 8, **F64)
    triples = (*triples[:2], triples[2].double())
    expected = value_and_gradients(plain, queries, documents, triples, order=2, temperature=2.0)
    found = value_and_gradients(wasserstein_retrieval_loss, queries, documents, prepared, order=2, temperature=2.0)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("loss", ["wasserstein", "wasserstein:.25+kl:.5+contrast:.25"])
def test_every_tensor_is_made_where_the_embeddings_are(loss):
    queries, documents = torch.randn(2, 3).requires_grad_(), torch.randn(4, 3).requires_grad_()
    triples = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 2]), torch.tensor([3.0, 1.0, 2.0])
    with torch.device("meta"):  # by default
        for grades in (triples, prepare_pairs(*triples, (2, 4))):
            wasserstein_retrieval_loss(queries, documents, grades, loss=loss).backward()
    assert queries.grad.isfinite().all() and documents.grad.isfinite().all()

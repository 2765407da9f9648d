"""The CUDA kernels on a device: against the CPU's float64 path, and what callers may rely on. Skipped without one."""

import pytest
import torch
from plain import prepare_grades, prepare_pairs, wasserstein_loss, wasserstein_retrieval_loss

from gradret.loss import kernels
from gradret.loss.one_pass import ONE_PASS, one_pass_loss

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or kernels.backend("cuda") != "cuda", reason="needs a CUDA device and kernels for it"
)
# One warp a list; several; a whole block; slices and streams, beyond the registers; beyond what a block sorts.
COLUMNS = [1, 3, 32, 64, 511, 512, 513, 1024, 4099, 8192, 8193, 16384, 16385, 100_003]


def make_lists(rows, columns, kind="few", seed=0):
    torch.manual_seed(seed)
    scores = torch.randn(rows, columns).cuda()
    grades = (
        torch.randint(0, 4, (rows, columns)).cuda().float() if kind == "few" else 3 * torch.rand(rows, columns).cuda()
    )
    return scores, grades, torch.rand(rows, columns).cuda() > 0.1


def run(scores, grades, reduction="none", **options):
    scores = scores.detach().requires_grad_()
    loss = wasserstein_loss(scores, grades, temperature=0.5, reduction=reduction, **options)
    factors = torch.arange(1, loss.numel() + 1, device=loss.device).to(loss).view(loss.shape)
    (gradient,) = torch.autograd.grad(loss, scores, factors)
    return loss.detach(), gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("kind", ["few", "real"])
@pytest.mark.parametrize("columns", COLUMNS)
def test_equals_float64_on_the_cpu(columns, kind, order, dtype):
    for rows in (3, 200) if columns < 20_000 else (3,):
        scores, grades, mask = make_lists(rows, columns, kind)
        scores = scores.to(dtype)
        truth, slope = run(scores.double().cpu(), grades.cpu(), order=order, mask=mask.cpu())
        ready = prepare_grades(grades, mask=mask)
        for options in ({"grades": grades, "mask": mask}, {"grades": ready}, {"grades": ready.to("cpu").to("cuda")}):
            loss, gradient = run(scores, order=order, **options)
            torch.testing.assert_close(loss.cpu(), truth.float(), rtol=1e-4, atol=1e-6)
            worst = (gradient.double().cpu() - slope).abs().amax(-1) / slope.abs().amax(-1).clamp_min(1e-30)
            # sums in float32 decide near-ties otherwise than float64: allow a jump in one list of a hundred
            bound = 1e-4 + torch.finfo(dtype).eps
            assert (worst > bound).sum() <= rows // 100


@pytest.mark.parametrize("weights", [(0.15, 0, 0.85), (0.25, 0.25, 0.5), (0, 1, 0), (0, 0, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["few", "real"])
@pytest.mark.parametrize("columns", [1, 64, 513, 8193, 16385])
def test_mixtures_equal_float64_on_the_cpu(columns, kind, dtype, weights):
    scores, grades, mask = make_lists(40, columns, kind)
    grades = (grades - 1).clamp_min(0)
    scores = scores.to(dtype)
    prepared = prepare_grades(grades, mask=mask)
    results = []
    for s, g in ((scores.double().cpu(), prepare_grades(grades.cpu(), mask=mask.cpu())), (scores, prepared)):
        s.requires_grad_()
        mixture = dict(zip(ONE_PASS, weights, strict=True))
        loss = one_pass_loss(mixture, s, g, temperature=0.5, reduction="none")
        results.append((loss.detach().cpu(), torch.autograd.grad(loss.sum(), s)[0].cpu()))
    (truth, slope), (loss, gradient) = results
    torch.testing.assert_close(loss, truth.float(), rtol=1e-4, atol=1e-6)
    worst = (gradient.double() - slope).abs().amax(-1) / slope.abs().amax(-1).clamp_min(1e-30)
    assert (worst > 1e-4 + torch.finfo(dtype).eps).sum() == 0


@pytest.mark.parametrize("columns", [64, 1024, 16385])
def test_a_saturated_softmax(columns):
    grades = make_lists(50, columns)[1]
    scores = 30 * torch.rand(50, columns).cuda()
    for order in (1, 2):
        truth, slope = run(scores.double().cpu(), grades.cpu(), order=order)
        loss, gradient = run(scores, prepare_grades(grades), order=order)
        torch.testing.assert_close(loss.cpu(), truth.float(), rtol=1e-4, atol=1e-6)
        worst = (gradient.double().cpu() - slope).abs().amax(-1) / slope.abs().amax(-1)
        assert worst.median() < 1e-4


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_scaling_in_backward(reduction):
    scores, grades, mask = make_lists(37, 333)
    truth = run(scores.double().cpu(), grades.cpu(), reduction, mask=mask.cpu())
    for dtype in (torch.float32, torch.bfloat16):
        s = scores.to(dtype).requires_grad_()
        loss = wasserstein_loss(s, grades, temperature=0.5, mask=mask, reduction=reduction)
        factors = torch.arange(1, loss.numel() + 1, device="cuda").to(loss).view(loss.shape)
        kept = torch.autograd.grad(loss, s, factors, retain_graph=True)[0]
        copy = kept.clone()
        last = torch.autograd.grad(loss, s, factors)[0]
        assert torch.equal(kept, copy)
        assert torch.equal(kept, last)
        if dtype == torch.float32:
            assert (last.cpu() - truth[1]).abs().max() <= 1e-4 * truth[1].abs().max()


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("kind", ["few", "real"])
def test_the_same_bits_every_time_and_no_waiting(columns, kind):
    scores, grades, mask = make_lists(5, columns, kind)
    prepared = prepare_grades(grades, mask=mask)
    first = run(scores, prepared, order=2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = [run(scores, prepared, order=2) for _ in range(3)]
        run(scores, grades, order=2, mask=mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for loss, gradient in again:
        assert torch.equal(loss, first[0]) and torch.equal(gradient, first[1])


def test_in_a_cuda_graph():
    scores, grades, mask = make_lists(20, 700)
    prepared = prepare_grades(grades, mask=mask)
    static = scores.clone().requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.autograd.grad(wasserstein_loss(static, prepared), static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = wasserstein_loss(static, prepared)
        (gradient,) = torch.autograd.grad(loss, static)
    other = torch.randn_like(scores)
    with torch.no_grad():
        static.copy_(other)
    graph.replay()
    s = other.clone().requires_grad_()
    expected = wasserstein_loss(s, prepared)
    assert torch.equal(loss, expected)
    assert torch.equal(gradient, torch.autograd.grad(expected, s)[0])


def test_on_the_current_stream():
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        scores = torch.zeros(400, 4096, device="cuda")
        torch.cuda._sleep(50_000_000)  # whoever does not wait for the stream reads zeros
        scores += torch.randn(400, 4096, device="cuda")
        loss, gradient = run(scores, prepare_grades(torch.arange(4096, device="cuda").expand(400, -1) % 4))
    stream.synchronize()
    expected = run(scores, prepare_grades(torch.arange(4096, device="cuda").expand(400, -1) % 4))
    assert torch.equal(loss, expected[0]) and torch.equal(gradient, expected[1])


def test_two_devices():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    scores, grades, mask = make_lists(5, 300)
    expected = run(scores, grades, mask=mask)
    found = run(scores.to("cuda:1"), grades.to("cuda:1"), mask=mask.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(found, expected, strict=True))


def test_inputs_are_never_written_and_more_rows_than_a_grid_has_in_y():
    scores, grades, _ = make_lists(70_000, 8)
    prepared = prepare_grades(grades)
    kept = [t.clone() for t in (scores, grades, *prepared.tables)]
    truth = run(scores.double().cpu(), grades.cpu())[0]
    torch.testing.assert_close(run(scores, prepared)[0].cpu(), truth.float(), rtol=1e-4, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(kept, (scores, grades, *prepared.tables), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_scoring(dtype):
    torch.manual_seed(0)
    queries, documents = torch.randn(300, 64).cuda().to(dtype), torch.randn(5000, 64).cuda().to(dtype)
    rows = torch.arange(300).repeat_interleave(4)
    triples = tuple(t.cuda() for t in (rows, torch.randperm(5000)[:1200], torch.tensor([3.0, 2, 1, 0]).repeat(300)))
    results = []
    for device, kind in (("cpu", torch.float64), ("cuda", dtype)):
        q, d = (t.to(device, kind).requires_grad_() for t in (queries, documents))
        pairs = prepare_pairs(*(t.to(device) for t in triples), (300, 5000))
        loss = wasserstein_retrieval_loss(q, d, pairs, temperature=4.0)
        loss.backward()
        results.append((loss.detach(), q.grad, d.grad))
    rounding = 1e-4 + torch.finfo(dtype).eps
    for exact, found in zip(*results, strict=True):
        assert (found.cpu().double() - exact).abs().max() <= rounding * exact.abs().max()

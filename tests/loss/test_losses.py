"""A hand-worked table first, then invariants, properties, and the reference (POT) in float64."""

import inspect
import math

import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain import (
    gaussian_loss,
    infonce_loss,
    kl_loss,
    make_plain,
    prepare_grades,
    ranknet_loss,
    wasserstein_loss,
)

from benchmarks.speed.rivals import published_gaussian
from gradret.loss import kernels
from gradret.loss.functions import LOSS_FUNCTIONS, mix_losses
from gradret.settings import LOSSES, FitSettings

F64 = {"dtype": torch.float64}
CALLS = {name: make_plain(name) for name in LOSSES} | {"wasserstein 2": make_plain("wasserstein", order=2)}


@pytest.fixture(scope="module", params=["compiled", "torch"], autouse=True)
def path(request):
    """Every test runs on the compiled kernels and on plain PyTorch."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setattr(kernels, "compiled", None)
        elif kernels.compiled is None:
            pytest.skip(f"no compiled kernels: {kernels.missing}")
        yield request.param


def logits(*masses):
    """Scores whose softmax is the given row of masses."""
    return torch.tensor([masses], **F64).log()


# Two documents of grades 1 and 0: all target mass on the first (gain 1 and 0).
# p = (.75, .25): a quarter of the mass is one grade too low. W1 = .25, W2^2 = .25, KL = -ln .75.
# Grades 2, 1, 0: gains 3, 1, 0, q = (.75, .25, 0). p = (.25, .25, .5): F from grade 0 up is .5, .75, G is 0, .25:
# W1 = .5 + .5 = 1. Quantiles: u in (0, .25): 0 -> 1, (.25, .5): 0 -> 2, (.5, .75): 1 -> 2, (.75, 1): 2 -> 2.
# W2^2 = .25 * 1 + .25 * 4 + .25 * 1 = 1.5.
# Grades 3, 0 with equal p: q = (1, 0), half the mass is three grades too low: W1 = 1.5, W2^2 = 4.5.
HAND = [
    ("wasserstein", (0.75, 0.25), (1, 0), 0.25),
    ("wasserstein 2", (0.75, 0.25), (1, 0), 0.25),
    ("kl", (0.75, 0.25), (1, 0), -math.log(0.75)),
    ("infonce", (0.75, 0.25), (1, 0), -math.log(0.75)),
    ("ranknet", (0.75, 0.25), (1, 0), math.log1p(1 / 3)),
    ("wasserstein", (0.25, 0.25, 0.5), (2, 1, 0), 1.0),
    ("wasserstein 2", (0.25, 0.25, 0.5), (2, 1, 0), 1.5),
    ("kl", (0.25, 0.25, 0.5), (2, 1, 0), 0.75 * math.log(3)),
    ("infonce", (0.25, 0.25, 0.5), (2, 1, 0), math.log(4)),
    # pairs (2,1), (2,0), (1,0): score gaps 0, -ln 2, -ln 2
    ("ranknet", (0.25, 0.25, 0.5), (2, 1, 0), (math.log(2) + 2 * math.log(3)) / 3),
    ("wasserstein", (0.5, 0.5), (3, 0), 1.5),
    ("wasserstein 2", (0.5, 0.5), (3, 0), 4.5),
    # two positives against the one negative: each e_i / (e_i + e_neg) = .4 / .6
    ("infonce", (0.4, 0.4, 0.2), (1, 1, 0), -math.log(2 / 3)),
    ("contrast", (0.75, 0.25), (1, 0), -math.log(0.75)),
    # gains 3, 1, 0: q = (.75, .25, 0); each against the lower ones: e_i / (e_i + their sum) = .25 / 1.25 and .5 / 1
    ("contrast", (0.25, 0.5, 0.5), (2, 1, 0), 0.75 * math.log(5) + 0.25 * math.log(2)),
    ("contrast", (0.25, 0.75), (2, 1), 0.75 * math.log(4)),  # the second has none below it
    ("contrast", (0.25, 0.75), (2, 2), 0.0),
]


@pytest.mark.parametrize(("name", "masses", "grades", "expected"), HAND)
def test_hand_worked(name, masses, grades, expected):
    value = CALLS[name](logits(*masses), torch.tensor([grades], **F64))
    assert value.item() == pytest.approx(expected, abs=1e-12)


def test_hand_worked_gradient():
    # p = (.75, .25) on grades 1 and 0: t = 1 on the one gap, so c_1 = -F = -.25, c_0 = S = .75.
    scores = logits(0.75, 0.25).requires_grad_()
    wasserstein_loss(scores, torch.tensor([[1, 0]]), temperature=1.0).backward()
    assert scores.grad.tolist()[0] == pytest.approx([-0.75 * 0.25, 0.25 * 0.75], abs=1e-15)


def test_every_loss_takes_the_settings_of_the_table_with_the_defaults_of_fit():
    for name, taken in LOSSES.items():
        parameters = inspect.signature(LOSS_FUNCTIONS[name]).parameters
        assert {*parameters} - {"scores", "grades", "mask", "reduction"} == set(taken)
        assert {key: parameters[key].default for key in taken} == {key: getattr(FitSettings(), key) for key in taken}


@pytest.mark.parametrize("name", CALLS)
def test_zero_at_equality(name):
    grades = torch.tensor([[3.0, 2, 1, 0], [1, 3, 0, 2]], **F64)
    if name in ("infonce", "contrast", "ranknet"):  # these vanish as the gaps grow
        scores = grades * 1e3
    else:
        scores = (torch.exp2(grades) - 1).clamp_min(1e-300).log()
    scores.requires_grad_()
    value = CALLS[name](scores, grades)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-7)
    assert scores.grad.abs().max() < 1e-7


@pytest.mark.parametrize("name", CALLS)
def test_permuting_documents_and_shifting_scores_changes_nothing(name):
    torch.manual_seed(0)
    scores, grades = torch.randn(3, 9, **F64), torch.randint(0, 4, (3, 9))
    order = torch.randperm(9)
    value = CALLS[name](scores, grades)
    torch.testing.assert_close(CALLS[name](scores[:, order], grades[:, order]), value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(CALLS[name](scores + 5, grades), value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CALLS)
def test_a_masked_document_is_as_good_as_absent(name):
    torch.manual_seed(1)
    scores, grades = torch.randn(4, 6, **F64), torch.randint(0, 4, (4, 6))
    mask = torch.zeros(4, 9, dtype=torch.bool)
    mask[:, :6] = True
    wide_scores = torch.cat([scores, torch.full((4, 3), 50.0, **F64)], 1).requires_grad_()
    wide_grades = torch.cat([grades, torch.full((4, 3), 9)], 1)
    value = CALLS[name](wide_scores, wide_grades, mask=mask)
    torch.testing.assert_close(value, CALLS[name](scores, grades), rtol=1e-12, atol=1e-12)
    value.backward()
    assert (wide_scores.grad[:, 6:] == 0).all()


@pytest.mark.parametrize("name", [n for n in CALLS if n != "gaussian"])
def test_lists_without_mass_are_zero_and_get_no_gradient(name):
    scores = torch.randn(3, 4, requires_grad=True)
    grades = torch.tensor([[0, 0, 0, 0], [3, 2, 1, 0], [2, 1, 0, 3]])
    mask = torch.tensor([[True] * 4, [False] * 4, [True] * 4])
    value = CALLS[name](scores, grades, mask=mask)
    value.backward()
    assert value.item() == pytest.approx(CALLS[name](scores[2:], grades[2:]).item() / 3, rel=1e-6)
    assert (scores.grad[0] == 0).all()
    assert (scores.grad[1] == 0).all()
    assert scores.grad.isfinite().all()


def pot_loss(scores, grades, mask, order, temperature, targets):
    """The mean over lists, each by POT on its present documents, differentiable."""
    values = []
    for s, y, m in zip(scores, grades, mask, strict=True):
        s, y = s[m], y[m].double()
        weights = torch.exp2(y) - 1 if targets == "gain" else torch.exp(y)
        if len(s) and weights.sum() > 0:
            p = torch.softmax(s / temperature, 0)
            values.append(ot.wasserstein_1d(y, y, p, weights / weights.sum(), p=order))
    return sum(values) / len(scores) if values else None


@pytest.mark.filterwarnings("ignore:The use of `x.T`")
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(("kind", "targets"), [("whole", "gain"), ("real", "softmax"), ("few", "gain")])
def test_loss_and_gradient_equal_pot(order, targets, kind):
    torch.manual_seed(2)
    compared = 0
    for _ in range(40):
        n = int(torch.randint(1, 40, ()))
        scores = (3 * torch.randn(3, n, **F64)).requires_grad_()
        if kind == "real":
            grades = 3 * torch.rand(3, n, **F64)
            grades[:, : n // 3] = grades[:, :1]  # ties
        else:
            grades = torch.randint(0, 4 if kind == "whole" else 2, (3, n)) * (1 if kind == "whole" else 3)
        mask = torch.rand(3, n) > 0.2
        expected = pot_loss(scores, grades, mask, order, 0.7, targets)
        value = wasserstein_loss(scores, grades, order=order, temperature=0.7, targets=targets, mask=mask)
        if expected is None:
            assert value.item() == 0
            continue
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-10)
        ours, theirs = (torch.autograd.grad(v, scores)[0] for v in (value, expected))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
        compared += 1
    assert compared > 35


@pytest.mark.parametrize("name", CALLS)
def test_gradcheck(name):
    torch.manual_seed(3)
    scores = torch.randn(3, 6, **F64, requires_grad=True)
    grades = torch.tensor([[3.0, 2, 1, 0, 0, 2], [2.4, 0.3, 1.1, 0, 3, 0], [1, 1, 0, 0, 0, 0]], **F64)
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[1, 4:] = False
    assert torch.autograd.gradcheck(lambda s: CALLS[name](s, grades, temperature=0.6, mask=mask), (scores,))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("spread", [10, 30])
def test_float32_gradient_survives_a_saturated_softmax(order, spread):
    # phi - mean phi would cancel to nothing here; the bound is on the relative error of the largest entry.
    torch.manual_seed(4)
    grades = torch.randint(0, 4, (8, 64))
    scores = (torch.rand(8, 64, **F64) * spread).requires_grad_()
    scores.data[:, 0] = spread * 2.0  # one document takes nearly everything
    truth = torch.autograd.grad(wasserstein_loss(scores, grades, order=order), scores)[0]
    single = scores.detach().float().requires_grad_()
    found = torch.autograd.grad(wasserstein_loss(single, grades, order=order), single)[0]
    worst = ((found - truth).abs().amax(1) / truth.abs().amax(1)).max()
    assert worst < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_computed_in_float32(dtype):
    torch.manual_seed(5)
    scores, grades = torch.randn(4, 50).to(dtype).requires_grad_(), torch.randint(0, 4, (4, 50))
    value = wasserstein_loss(scores, grades)
    value.backward()
    assert value.dtype == torch.float32
    assert scores.grad.dtype == dtype
    torch.testing.assert_close(value, wasserstein_loss(scores.float(), grades))


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_bounds(data):
    """0 <= W1 <= range, and W1^2 <= W2^2 <= range * W1 (Jensen; no mass moves further than the range)."""
    n = data.draw(st.integers(1, 30))
    row = st.lists(st.floats(-20, 20), min_size=n, max_size=n)
    scores = torch.tensor([data.draw(row)], **F64)
    grades = torch.tensor([data.draw(st.lists(st.floats(0, 5), min_size=n, max_size=n))], **F64)
    first, second = (wasserstein_loss(scores, grades, order=order).item() for order in (1, 2))
    reach = (grades.max() - grades.min()).item()
    assert -1e-12 <= first <= reach + 1e-9
    assert first**2 - 1e-9 <= second <= reach * first + 1e-9


def test_gaussian_equals_the_published_formula():
    torch.manual_seed(6)
    for b, n in ((8, 5), (5, 20), (16, 64)):
        scores, grades = torch.randn(b, n, **F64), torch.randint(0, 4, (b, n)).double()
        expected = published_gaussian(scores, grades, temperature=0.5)
        found = gaussian_loss(scores, grades, temperature=0.5, targets="softmax")
        # eigenvalues near 0 carry an error of sqrt(eps) in the published form
        assert found.item() == pytest.approx(expected.item(), abs=2e-7)


def test_gaussian_of_one_list_is_the_distance_of_the_means():
    scores, grades = torch.tensor([[0.0, 0.0]], **F64), torch.tensor([[1, 0]])
    assert gaussian_loss(scores, grades).item() == pytest.approx(0.5)


def test_targets_and_ground_distances_hand_worked():
    # Grades 4, 1, 0: roots 2, 1, 0, so q = (2/3, 1/3, 0), at places 4, 1, 0 ("grade"), 15, 1, 0 or 2, 1, 0. With
    # p = (1/3, 1/3, 1/3) from grade 0 up F - G is 1/3 below grade 1 and 2/3 - 1/3 below grade 4.
    scores, grades = torch.zeros(1, 3, **F64), torch.tensor([[4, 1, 0]])
    for ground, reach in (("grade", 4), ("gain", 15), ("sqrt", 2)):
        value = wasserstein_loss(scores, grades, targets="sqrt", ground=ground)
        assert value.item() == pytest.approx(reach / 3)
    # Negative grades have no target mass, and stand at minus the root.
    value = wasserstein_loss(logits(0.5, 0.5), torch.tensor([[1.0, -4.0]]), targets="sqrt", ground="sqrt")
    assert value.item() == pytest.approx(0.5 * 3)


@pytest.mark.parametrize("ground", ["gain", "sqrt"])
@pytest.mark.parametrize("order", [1, 2])
def test_a_ground_distance_moves_the_grades_alone(order, ground):
    torch.manual_seed(10)
    scores = torch.randn(4, 40, **F64, requires_grad=True)
    for grades in (torch.randint(-1, 4, (4, 40)), 3 * torch.rand(4, 40, **F64) - 0.5):  # by level, and sorted
        mask = torch.rand(4, 40) > 0.2
        real = grades.double()
        places = 2**real - 1 if ground == "gain" else real.sign() * real.abs().sqrt()
        options = {"order": order, "temperature": 0.7, "mask": mask}
        for targets in ("gain", "softmax", "sqrt"):
            weights = {"gain": 2**real - 1, "softmax": real.exp(), "sqrt": real.clamp_min(0).sqrt()}[targets]
            expected = wasserstein_loss(scores, places, targets=weights.clamp_min(0), **options)
            value = wasserstein_loss(scores, grades, targets=targets, ground=ground, **options)
            torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
            ours, theirs = (torch.autograd.grad(v, scores)[0] for v in (value, expected))
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
            prepared = prepare_grades(grades, targets=targets, ground=ground, mask=mask)
            torch.testing.assert_close(wasserstein_loss(scores, prepared, order=order, temperature=0.7), value)


def test_explicit_targets():
    scores = torch.randn(2, 5, **F64)
    grades = torch.tensor([[3, 2, 1, 0, 0], [0, 0, 1, 2, 2]])
    for loss in (wasserstein_loss, kl_loss, gaussian_loss):
        torch.testing.assert_close(loss(scores, grades, targets=2.0**grades - 1), loss(scores, grades))


def test_inputs_are_never_written_and_may_be_strided():
    torch.manual_seed(7)
    scores, grades = torch.randn(6, 4, **F64).T, torch.randint(0, 4, (6, 4)).T
    kept = scores.clone(), grades.clone()
    for loss in CALLS.values():
        torch.testing.assert_close(loss(scores, grades), loss(scores.contiguous(), grades.contiguous()))
    assert torch.equal(scores, kept[0])
    assert torch.equal(grades, kept[1])


def test_differentiating_twice_is_refused():
    scores = torch.randn(2, 3, requires_grad=True)
    squared = wasserstein_loss(scores, torch.tensor([[2, 1, 0]] * 2)) ** 2
    (gradient,) = torch.autograd.grad(squared, scores, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grades": torch.zeros(2, 4)}, "scores and grades must both be"),
        ({"order": 3}, "order must be 1 or 2, got 3"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"targets": "rank"}, "targets must be 'gain', 'softmax', 'sqrt' or weights, got 'rank'"),
        ({"ground": "rank"}, "ground must be 'grade', 'gain' or 'sqrt', got 'rank'"),
        ({"mask": torch.ones(2, 3)}, "mask must be bool"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        wasserstein_loss(**{"scores": torch.zeros(2, 3), "grades": torch.zeros(2, 3), **arguments})


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("argument", ["scores", "grades", "mask"])
def test_arrays_and_lists_in_place_of_tensors_are_named(name, argument):
    whole = {"scores": torch.zeros(2, 3), "grades": torch.ones(2, 3), "mask": torch.ones(2, 3, dtype=torch.bool)}
    for other in (whole[argument].numpy(), whole[argument].tolist()):
        with pytest.raises(TypeError, match=f"^{argument} must be a tensor, got (ndarray|list); see torch.as_tensor"):
            LOSS_FUNCTIONS[name](**whole | {argument: other})


@pytest.mark.parametrize("temperature", [None, "1", math.nan])
def test_temperatures_that_are_no_numbers(temperature):
    with pytest.raises(ValueError, match="temperature must be above 0, got"):
        wasserstein_loss(torch.zeros(1, 2), torch.ones(1, 2), temperature=temperature)


def test_infonce_with_positives_from_a_grade_on():
    # Grades 3, 2, 1, 0 with masses .4, .3, .2, .1: positives .4 and .3, each against the .3 below: .4 / .7 and .3 / .6.
    scores, grades = logits(0.4, 0.3, 0.2, 0.1), torch.tensor([[3, 2, 1, 0]])
    expected = -(math.log(4 / 7) + math.log(1 / 2)) / 2
    assert infonce_loss(scores, grades, positive_from=2).item() == pytest.approx(expected)
    assert infonce_loss(scores, grades, positive_from=3).item() == infonce_loss(scores, grades).item()
    for lowest in (4, -1):  # no positive, no negative
        scores.requires_grad_(True).grad = None
        value = infonce_loss(scores, grades, positive_from=lowest)
        value.backward()
        assert value.item() == 0
        assert not scores.grad.any()


def test_infonce_and_ranknet_take_real_grades_and_no_targets():
    scores, grades = torch.zeros(1, 3), torch.tensor([[2.5, 2.4, 0.0]])
    assert infonce_loss(scores, grades).item() == pytest.approx(math.log(3))
    assert ranknet_loss(scores, grades).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("name", CALLS)
def test_masked_positions_do_not_exist_whatever_they_hold(name):
    torch.manual_seed(8)
    scores, grades = torch.randn(3, 5, **F64), torch.randint(0, 4, (3, 5)).double()
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[:, 5:] = False
    padding = torch.tensor([[math.nan, math.inf]] * 3, **F64)
    wide = torch.cat([scores, padding], 1).requires_grad_()
    value = CALLS[name](wide, torch.cat([grades, padding.flip(1)], 1), mask=mask)
    torch.testing.assert_close(value, CALLS[name](scores, grades))
    value.backward()
    assert wide.grad.isfinite().all()


@pytest.mark.parametrize("order", [1, 2])
def test_grades_whose_gain_would_overflow(order):
    scores = torch.tensor([[1.0, 0.0, 2.0]])
    grades = torch.tensor([[200.0, 1.0, 0.0]])
    # all target mass is on the first document, up to 2^-199
    p = torch.softmax(scores[0].double(), 0)
    expected = (p[1] * 199**order + p[2] * 200**order).item()
    assert wasserstein_loss(scores, grades, order=order).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", CALLS)
def test_a_score_that_is_nan_shows_in_the_loss(name):
    scores = torch.randn(3, 4)
    scores[1, 2] = math.nan
    assert CALLS[name](scores, torch.tensor([[3, 2, 1, 0]] * 3)).isnan()


@pytest.mark.parametrize("name", CALLS)
def test_a_score_of_minus_infinity_without_target_mass_is_no_nan(name):
    scores = torch.tensor([[1.0, 0.5, -math.inf], [0.0, 1.0, 2.0]], requires_grad=True)
    value = CALLS[name](scores, torch.tensor([[3, 1, 0], [2, 1, 0]]))
    value.backward()
    assert value.isfinite()
    assert scores.grad.isfinite().all()


@pytest.mark.parametrize("name", ["infonce", "contrast"])
def test_rows_of_minus_infinity_alone_count_as_nothing(name):
    """No positive, or no negative, and a finite gradient all the same."""
    scores = torch.full((2, 2), -math.inf).requires_grad_()
    value = CALLS[name](scores, torch.tensor([[0, 0], [1, 1]]))
    value.backward()
    assert value.item() == 0
    assert (scores.grad == 0).all()


@pytest.mark.parametrize("name", CALLS)
def test_documents_of_minus_infinity_take_part_as_absent(name):
    scores = torch.tensor([[-math.inf] * 4, [-math.inf, 1.0, 0.5, -math.inf], [2.0, 0.0, 1.0, 3.0]], requires_grad=True)
    grades, present = torch.tensor([[3, 2, 0, 0]] * 3), scores.detach() != -math.inf
    value = CALLS[name](scores, grades)
    value.backward()
    assert value.isfinite() and value > 0
    assert (scores.grad[~present] == 0).all() and scores.grad.isfinite().all()
    assert CALLS[name](scores[:1].detach(), grades[:1]).item() == 0
    if not name.startswith("wasserstein"):  # which keeps the target mass
        assert value.item() == CALLS[name](scores.detach().masked_fill(~present, 0), grades, mask=present).item()


@pytest.mark.parametrize("name", ["kl", "wasserstein", "wasserstein 2"])
def test_a_row_without_predicted_mass_counts_as_nothing(name):
    scores = torch.tensor([[-math.inf] * 3, [0.0, 1.0, 2.0]], requires_grad=True)
    grades, mask = torch.tensor([[1, 0, 0]] * 2), torch.tensor([[True, True, False]] * 2)
    value = CALLS[name](scores, grades, mask=mask)
    value.backward()
    assert value.item() == pytest.approx(CALLS[name](scores[1:], grades[1:], mask=mask[1:]).item() / 2)
    assert (scores.grad[0] == 0).all() and scores.grad[1, 0] < 0


def test_a_mixture_of_losses():
    torch.manual_seed(2)
    scores, grades = torch.randn(3, 5, **F64), torch.randint(0, 4, (3, 5))
    mask = torch.rand(3, 5) > 0.2
    options = {"temperature": 0.5, "targets": "sqrt", "mask": mask}
    mixed = mix_losses("wasserstein:.25+kl:.25+infonce:.5", scores, grades, order=2, ground="sqrt", **options)
    parts = wasserstein_loss(scores, grades, order=2, ground="sqrt", **options), kl_loss(scores, grades, **options)
    parts += (infonce_loss(scores, grades, temperature=0.5, mask=mask),)
    torch.testing.assert_close(mixed, 0.25 * parts[0] + 0.25 * parts[1] + 0.5 * parts[2])
    assert mix_losses("kl", scores, grades, order=2, **options) == parts[1]


def test_gaussian_leaves_out_rows_without_mass_and_null_directions():
    torch.manual_seed(9)
    scores, grades = torch.randn(3, 4, **F64), torch.tensor([[3, 2, 1, 0], [0, 1, 3, 0], [2, 0, 0, 1]])
    more = torch.cat([scores, torch.randn(2, 4, **F64)]).requires_grad_()
    mask = torch.tensor([[True] * 4] * 4 + [[False] * 4])
    value = gaussian_loss(more, torch.cat([grades, torch.zeros(2, 4, dtype=torch.int64)]), mask=mask)
    torch.testing.assert_close(value, gaussian_loss(scores, grades))
    value.backward()
    assert (more.grad[3:] == 0).all()
    # Equal rows: no spread of p, so only the means pull.
    equal = torch.zeros(3, 4, **F64, requires_grad=True)
    found = torch.autograd.grad(gaussian_loss(equal, grades), equal)[0]
    q = (torch.exp2(grades.double()) - 1) / (torch.exp2(grades.double()) - 1).sum(1, keepdim=True)
    means = (torch.softmax(equal, 1).mean(0) - q.mean(0)).square().sum()
    torch.testing.assert_close(found, torch.autograd.grad(means, equal)[0])


def test_float32_gradients_hold_where_the_potential_changes_sign():
    torch.manual_seed(10)
    scores, grades = torch.randn(300, 50, **F64) * 10, torch.randint(0, 4, (300, 50))
    for order in (1, 2):
        gradients = []
        for dtype in (torch.float64, torch.float32):
            s = scores.float().to(dtype).requires_grad_()
            gradients.append(torch.autograd.grad(wasserstein_loss(s, grades, order=order), s)[0].double())
        worst = ((gradients[1] - gradients[0]).abs().amax(1) / gradients[0].abs().amax(1)).max()
        assert worst < 1e-6


# Devices: what a GPU is needed for to fail there fails here where tensors are made on another device by default.


@pytest.mark.parametrize(("grades", "masked"), [([3.0, 2.0, 1.0, 0.0], False), ([0.3, 2.2, 1.7, 0.9], True)])
@pytest.mark.parametrize("name", CALLS)
def test_every_tensor_is_made_where_the_scores_are(name, grades, masked):
    scores, grades = torch.randn(3, 4).requires_grad_(), torch.tensor([grades] * 3)
    mask = torch.ones(3, 4, dtype=torch.bool) if masked else None
    with torch.device("meta"):
        CALLS[name](scores, grades, mask=mask).backward()
        if name.startswith("wasserstein"):
            CALLS[name](scores, prepare_grades(grades, mask=mask)).backward()
    assert scores.grad.isfinite().all()

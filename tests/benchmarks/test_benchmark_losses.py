"""The losses of the benchmark's own, by hand."""

from math import log, log2

import pytest
import torch

from benchmarks.quality import losses
from gradret.loss import functions
from gradret.settings import FitSettings

GRADES = torch.tensor([[3.0, 1.0, 0.0]])
EVEN = torch.zeros(1, 3, dtype=torch.float64)


def logits(*masses: float) -> torch.Tensor:
    return torch.tensor([masses], dtype=torch.float64).log()


def of(name: str, scores, grades, **options) -> float:
    function, taken = losses.LOSSES[name]
    defaults = {"temperature": 1.0, "targets": "sqrt", "order": 2}
    return function(scores, grades, **{key: defaults[key] for key in taken} | options).item()


def test_bixse_asks_each_pair_for_its_grade():
    # At equal scores the best bias makes every probability their mean, 4 / 9.
    expected = -sum(z * log(4 / 9) + (1 - z) * log(5 / 9) for z in (1, 1 / 3, 0))
    assert of("bixse", EVEN, GRADES) == pytest.approx(expected, rel=1e-6)
    assert of("bixse", torch.tensor([[50.0, 0.0, -50.0]]), torch.tensor([[3.0, 1.5, 0.0]])) == pytest.approx(
        log(2), rel=1e-4
    )


def test_rince_sets_each_grade_against_all_lower_ones():
    # 3 against 1 and 0 at temperature 1; 1 against 0 alone at 1.5.
    assert of("rince", EVEN, GRADES) == pytest.approx(log(3) + log(2))
    scores = torch.tensor([[9.0, 3.0, 0.0]], dtype=torch.float64)
    first = functions.infonce_loss(scores, GRADES, temperature=1.0).item()
    assert of("rince", scores, GRADES) == pytest.approx(first + torch.tensor(-2.0).exp().log1p().item())


def test_the_flat_contrast_sees_grades_as_weights_only():
    q = 3**0.5 / (3**0.5 + 1)
    scores = torch.tensor([[0.5, 0.25, 0.25]]).log()
    expected = q * log(1.5) + (1 - q) * log(2)  # each against the last
    assert of("flat-contrast", scores, GRADES) == pytest.approx(expected)
    found = functions.contrast_loss(scores, GRADES, temperature=1.0, targets="sqrt").item()
    assert found == pytest.approx(q * log(2) + (1 - q) * log(2))  # the first against both


def test_lambda_weighs_a_pair_by_what_its_order_changes():
    ideal = 7 + 1 / log2(3)
    one, two = 1 - 1 / log2(3), 1 / log2(3) - 1 / 2  # what a place costs, from the first and from the second
    pairs = {(0, 1): (one, one, 6), (0, 2): (one + two, two, 7), (1, 2): (two, one, 1)}
    scores = torch.tensor([[2.0, 1.0, 0.0]], dtype=torch.float64)
    expected = sum(
        (swap + 10 * near) * gain / ideal * log2(1 + torch.tensor(float(i - j)).exp().item())
        for (i, j), (swap, near, gain) in pairs.items()
    )
    assert of("lambda", scores, GRADES) == pytest.approx(expected, rel=1e-5)


def test_brier_is_of_masses():
    q = torch.tensor([3**0.5, 1, 0]) / (3**0.5 + 1)
    assert of("brier", EVEN, GRADES) == pytest.approx((q - 1 / 3).square().sum().item())
    scores, grades = logits(0.25, 0.25, 0.5), torch.tensor([[2, 1, 0]])
    assert of("brier", scores, grades, targets="gain") == pytest.approx(0.5)


def test_the_own_list_is_what_has_no_negative_grade():
    scores = torch.tensor([[0.3, 0.1, 0.2, 0.9]], dtype=torch.float64)
    grades = torch.tensor([[3.0, 1.0, 0.0, -1.0]])
    expected = functions.wasserstein_loss(scores[:, :3], GRADES, temperature=losses.OWN_TEMPERATURE).item()
    assert of("own-wasserstein", scores, grades) == pytest.approx(expected)
    p = (scores[0, :3] / losses.OWN_TEMPERATURE).softmax(0)
    mass = 3**0.5 + 1
    gaps = (p[2].item() - 0, (p[2] + p[1]).item() - 1 / mass)  # F - G below grades 1 and 3
    crps = gaps[0] ** 2 * 1 + gaps[1] ** 2 * (3**0.5 - 1)
    assert of("own-crps", scores, grades) == pytest.approx(crps)


@pytest.mark.parametrize("name", losses.LOSSES)
def test_what_is_masked_does_not_count(name):
    torch.manual_seed(9)
    scores, grades = torch.randn(3, 9, dtype=torch.float64), torch.randint(0, 4, (3, 9)).double()
    mask = torch.ones(3, 11, dtype=torch.bool)
    mask[:, 9:] = False
    wide = torch.cat([scores, torch.full((3, 2), torch.nan)], 1).requires_grad_()
    function, taken = losses.LOSSES[name]
    options = {key: {"temperature": 1.0, "targets": "sqrt", "order": 2}[key] for key in taken}
    loss = function(wide, torch.cat([grades, grades[:, :2]], 1), mask=mask, **options)
    assert loss.item() == pytest.approx(function(scores, grades, **options).item())
    loss.backward()
    assert (wide.grad[:, 9:] == 0).all() and (wide.grad[:, :9] != 0).any()


def test_they_are_losses_once_they_are_registered():
    with pytest.raises(ValueError, match="loss 'brier': 'brier' is not one of"):
        FitSettings(loss="brier")
    losses.register()
    assert FitSettings(loss="brier").takes("targets") and not FitSettings(loss="brier").takes("order")
    assert functions.mix_losses("brier", torch.zeros(1, 2), torch.ones(1, 2), temperature=1, order=2) == 0
    settings = FitSettings(loss="contrast:.8+own-wasserstein:.2", in_batch_grade=-1)
    assert settings.loss == "contrast:.8+own-wasserstein:.2"

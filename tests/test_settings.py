"""What can be set, and what is refused."""

import pytest

from gradret.settings import DEFAULT_LOSS, FitSettings, parse_loss, spell_loss


@pytest.mark.parametrize(
    ("spelling", "weights", "canonical"),
    [
        ("wasserstein", {"wasserstein": 1.0}, "wasserstein"),
        ("kl:1.0", {"kl": 1.0}, "kl"),
        (DEFAULT_LOSS, {"wasserstein": 0.15, "contrast": 0.85}, DEFAULT_LOSS),
        ("contrast:.850 + wasserstein:0.15", {"wasserstein": 0.15, "contrast": 0.85}, DEFAULT_LOSS),
        ("ranknet:.5+infonce:.5", {"infonce": 0.5, "ranknet": 0.5}, "infonce:.5+ranknet:.5"),
    ],
)  # fmt: skip
def test_a_loss_has_one_spelling(spelling, weights, canonical):
    found = parse_loss(spelling)
    assert list(found.items()) == list(weights.items())
    assert spell_loss(spelling) == FitSettings(loss=spelling).loss == canonical


@pytest.mark.parametrize(
    ("spelling", "message"),
    [
        ("hinge", "'hinge' is not one of wasserstein, gaussian, infonce, kl, contrast, ranknet; mix them as wasserst"),
        ("", "'' is not one of"),
        ("kl:.5+", "'' is not one of"),
        ("kl:.5+kl:.5", "'kl' stands there twice"),
        ("kl+contrast:.5", "'kl' has no weight; mix losses as wasserstein:.15+contrast:.85"),
        ("kl:half", "the weight 'half' is not a number"),
        ("kl:", "the weight '' is not a number"),
        ("kl:0+contrast:1", "the weight of 'kl' must be above 0, got 0"),
        ("kl:nan", "the weight of 'kl' must be above 0, got nan"),
        ("kl:.5+contrast:.6", "the weights must sum to 1, got 1.1"),
        ("wasserstein:2", "the weights must sum to 1, got 2"),
    ],
)
def test_losses_that_are_refused(spelling, message):
    with pytest.raises(ValueError) as error:
        parse_loss(spelling)
    assert str(error.value).startswith(f"loss '{spelling}': {message}")


def test_settings_are_those_of_any_loss_in_the_mixture():
    settings = FitSettings(loss="wasserstein:.5+infonce:.5", positive_from=2)
    assert all(settings.takes(name) for name in ("order", "targets", "positive_from", "temperature", "epochs"))
    assert not FitSettings(loss="infonce:.5+kl:.5").takes("order")
    with pytest.raises(ValueError, match="positive_from is for loss infonce, not kl"):
        FitSettings(loss="kl", positive_from=2)

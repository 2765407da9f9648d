"""What can be set, and what is refused."""

from dataclasses import fields

import pytest

from gradret.settings import DEFAULT_LOSS, FitSettings, parse_loss, parse_setting, spell_loss


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


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epochs": 0}, "epochs must be above 0, got 0"),
        ({"epochs": "2"}, "epochs must be a number or 'auto', got '2'"),
        ({"max_steps": 2.0}, "max_steps must be a whole number, got 2.0"),
        ({"seed": -1}, "seed must be 0 or above, got -1"),
        ({"order": True}, "order must be one of 1, 2; got True"),
        ({"in_batch": 1}, "in_batch must be yes or no, got 1"),
        ({"model": None}, "model must be text, got None"),
        ({"dev": ""}, "dev must not be empty; give a value or leave it out"),
        ({"chunk": "all"}, "chunk must be a whole number or 'auto', got 'all'"),
        ({"chunk": 0}, "chunk must be 1 or above, got 0"),
        ({"lora": 2, "lora_targets": ["query"]}, "lora_targets must be names, got ['query']"),
        ({"data": (3,)}, "data must be names, got (3,)"),
        ({"pooling": "max"}, "pooling must be one of 'mean', 'cls', 'last'; got 'max'"),
        ({"warmup": float("nan")}, "warmup must be a finite number, got nan"),
        ({"warmup": 1.5}, "warmup must be 0 to 1, got 1.5"),
        ({"interpolate": 0.0}, "interpolate must be above 0 and at most 1, got 0.0"),
        ({"lora": 2, "lora_dropout": 1.0}, "lora_dropout must be 0 or above and below 1, got 1.0"),
    ],
)
def test_each_setting_is_checked_as_it_is_declared(given, message):
    with pytest.raises(ValueError) as error:
        FitSettings(**given)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("layers", "3", 3),
        ("clip", "0", 0.0),
        ("normalize", "No", False),
        ("lora_targets", "query, value", ("query", "value")),
        ("chunk", "auto", "auto"),
        ("chunk", "8", 8),
        ("order", "1", 1),
        ("loss", "kl:1", "kl"),
    ],
)
def test_a_text_becomes_a_value(name, text, value):
    (declared,) = (one for one in fields(FitSettings) if one.name == name)
    found = parse_setting(declared, text)
    assert (found, type(found)) == (value, type(value))


def test_settings_are_those_of_any_loss_in_the_mixture():
    settings = FitSettings(loss="wasserstein:.5+infonce:.5", positive_from=2)
    assert all(settings.takes(name) for name in ("order", "targets", "positive_from", "temperature", "epochs"))
    assert not FitSettings(loss="infonce:.5+kl:.5").takes("order")
    with pytest.raises(ValueError, match="--positive-from is for --loss infonce, not kl"):
        FitSettings(loss="kl", positive_from=2)

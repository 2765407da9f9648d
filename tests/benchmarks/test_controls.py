"""The negative control of the benchmark."""

import runpy

import pytest
import torch
from conftest import REPOSITORY

from gradret.loss import functions
from gradret.settings import FitSettings

controls = runpy.run_path(str(REPOSITORY / "benchmarks" / "quality" / "controls.py"))
sorted_loss = controls["sorted_loss"]


@pytest.mark.parametrize(("masses", "grades"), [((0.25, 0.25, 0.5), (2, 1, 0)), ((0.25, 0.75), (1, 0))])
def test_hand_worked(masses, grades):
    # Sorted masses .5, .25, .25 against .75, .25, 0: right at no document, and a loss of .125 only.
    scores = torch.tensor([masses], dtype=torch.float64).log()
    value = sorted_loss(scores, torch.tensor([grades]), temperature=1.0, targets="gain")
    assert value.item() == pytest.approx(0.125)


def test_it_does_not_know_which_document_has_which_grade():
    torch.manual_seed(9)
    scores, grades = torch.randn(3, 9, dtype=torch.float64), torch.randint(0, 4, (3, 9))
    shuffled = sorted_loss(scores[:, torch.randperm(9)], grades)
    assert shuffled.item() == pytest.approx(sorted_loss(scores, grades).item())
    mask = torch.ones(3, 11, dtype=torch.bool)
    mask[:, 9:] = False
    wide = torch.cat([scores, torch.full((3, 2), torch.nan)], 1)
    assert sorted_loss(wide, torch.cat([grades, grades[:, :2]], 1), mask=mask) == sorted_loss(scores, grades)


def test_it_is_a_loss_once_it_is_registered(monkeypatch):
    with pytest.raises(ValueError, match="loss 'sorted': 'sorted' is not one of"):
        FitSettings(loss="sorted")
    controls["register"]()
    assert FitSettings(loss="sorted").takes("targets") and not FitSettings(loss="sorted").takes("order")
    assert functions.mix_losses("sorted", torch.zeros(1, 2), torch.ones(1, 2), order=2) == 0

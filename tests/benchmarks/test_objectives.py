"""The benchmark of candidate objectives: its own losses, its settings, and which of them it still has to try."""

import json
import math
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import list_record

from benchmarks import objectives
from gradret.console import GradretError
from gradret.data.lists import parse_list

AXIS = {"targets": "gain", "ground": "grade"}
OWN = {
    "log_wasserstein 1": {"loss": "log_wasserstein", "order": 1, **AXIS},
    "log_wasserstein 2": {"loss": "log_wasserstein", "order": 2, **AXIS},
    "threshold": {"loss": "threshold", **AXIS},
    "cost_augmented": {"loss": "cost_augmented", "margin": 1.0, **AXIS},
    "cumulative": {"loss": "cumulative", "ground": "grade"},
    "geometric": {"loss": "geometric", "steepness": 3.0, **AXIS},
}
# Grades 2, 1, 0: gains 3, 1, 0, so q = (.75, .25, 0); p = (.25, .25, .5).
# W1 = 1 and W2^2 = 1.5 (test_losses); at worst, all of p at grade 0, 1.75 and 3.25.
# Above grade 0: 1 of q, .5 of p. Above grade 1: .75 of q, .25 of p.
# The mean distance from q is .25, .75 and 1.75: the margins turn p into p * exp of these, normalised.
# From grade 1 on two positives, each .25 against .5: ln 3; from grade 2 on one, .25 against .75: ln 4.
MARGINS = [p * math.exp(cost) for p, cost in ((0.25, 0.25), (0.25, 0.75), (0.5, 1.75))]
HAND = {
    "log_wasserstein 1": -math.log(1 - 1 / 1.75),
    "log_wasserstein 2": -math.log(1 - 1.5 / 3.25),
    "threshold": -math.log(0.5) + 0.75 * math.log(0.75 / 0.25) + 0.25 * math.log(0.25 / 0.75),
    "cost_augmented": sum(q * math.log(q * sum(MARGINS) / m) for q, m in zip((0.75, 0.25), MARGINS[:2], strict=True)),
    "cumulative": math.log(3) + math.log(4),
}


def make_own(name: str, **changes):
    return objectives.make_objective(OWN[name] | {"temperature": 1.0} | changes)


def draw_lists(seed: int, columns: int = 7):
    """Scores (3, N) float64, and grades 3 to 0 in another order in each list, then 0."""
    generator = torch.Generator().manual_seed(seed)
    grades = torch.zeros(3, columns, dtype=torch.float64)
    for row in grades:
        row[torch.randperm(columns, generator=generator)[:4]] = torch.tensor([3.0, 2.0, 1.0, 0.0], dtype=torch.float64)
    return torch.randn(3, columns, generator=generator, dtype=torch.float64), grades


@pytest.mark.parametrize("name", HAND)
def test_by_hand(name):
    scores = 0.1 * torch.tensor([[0.25, 0.25, 0.5]], dtype=torch.float64).log()
    loss = make_own(name, temperature=0.1)(scores, torch.tensor([[2.0, 1.0, 0.0]]))
    assert loss.item() == pytest.approx(HAND[name], abs=1e-6)


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("changes", [{}, {"ground": "sqrt"}, {"temperature": 0.5}])
def test_gradients_are_those_of_finite_differences(name, changes):
    scores, grades = draw_lists(0)
    objective = make_own(name, **changes)
    assert torch.autograd.gradcheck(lambda s: objective(s, grades), scores.requires_grad_())


@pytest.mark.parametrize("name", OWN)
def test_documents_change_places_with_their_grades_and_not_without(name):
    scores, grades = draw_lists(1)
    objective, order = make_own(name), torch.tensor([3, 1, 6, 0, 2, 5, 4])
    loss = objective(scores, grades)
    assert objective(scores[:, order], grades[:, order]).item() == pytest.approx(loss.item())
    assert objective(scores + 5, grades).item() == pytest.approx(loss.item())
    assert abs(objective(scores[:, order], grades) - loss) > 0.01


@pytest.mark.parametrize("name", ["log_wasserstein 1", "log_wasserstein 2", "threshold", "cost_augmented"])
def test_the_minimum_is_the_target_mass(name):
    """Of the augmented softmax: q less the margins."""
    _, grades = draw_lists(2)
    grades = grades[:, :4].clamp_min(0.5)  # every document has mass: its logarithm is finite
    q, _ = objectives.place_mass(grades, "gain", "grade")
    scores = q.log()
    if name == "cost_augmented":
        scores = scores - (q[:, None] * (grades[:, :, None] - grades[:, None]).abs()).sum(-1)
    objective = make_own(name)
    assert objective(scores, grades).item() == pytest.approx(0, abs=1e-6)
    for seed in range(5):
        noise = torch.randn(scores.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert objective(scores + 0.3 * noise, grades) > 1e-4


@pytest.mark.parametrize("name", ["log_wasserstein 1", "log_wasserstein 2"])
def test_where_the_mass_has_collapsed_on_a_wrong_document_the_logarithm_keeps_a_gradient(name):
    scores, grades = torch.tensor([[0.0, 0.0, 15.0]]), torch.tensor([[3.0, 1.0, 0.0]])
    slopes = {}
    for loss in ("wasserstein", "log_wasserstein"):
        leaf = scores.clone().requires_grad_()
        make_own(name, loss=loss)(leaf, grades).backward()
        slopes[loss] = leaf.grad[0, 2].item()
    assert slopes["wasserstein"] < 1e-4 and slopes["log_wasserstein"] > 0.1


@pytest.mark.parametrize("name", OWN)
def test_lists_of_one_grade_and_without_target_mass_are_finite(name):
    scores = torch.tensor([[0.9, -0.9, 0.1]] * 3, requires_grad=True)
    loss = make_own(name, temperature=0.01)(scores, torch.tensor([[3.0, 2.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]))
    loss.backward()
    assert loss.isfinite() and scores.grad.isfinite().all()


@pytest.mark.parametrize("steepness", [0.1, 1.0, 10.0])
def test_the_geometric_conjugate_is_the_minimum_over_the_simplex(steepness):
    scores, grades = draw_lists(5, columns=4)
    simplex = np.array([part for part in product(range(41), repeat=4) if sum(part) == 40]) / 40
    q, _ = objectives.place_mass(grades, "gain", "grade")
    for s, y, mass in zip(scores.numpy(), grades.numpy(), q.numpy(), strict=True):
        cost = s[:, None] + s + steepness * np.abs(y[:, None] - y)
        least = np.einsum("ai,ij,aj->a", simplex, np.exp(-cost / 2), simplex).min()  # a little above the true one
        found = make_own("geometric", steepness=steepness)(torch.tensor(s)[None], torch.tensor(y)[None]).item()
        assert -1e-9 <= found + math.log(least) + mass @ s < 5e-3


def test_steep_the_geometric_loss_is_the_cross_entropy_of_places():
    scores, grades = draw_lists(6)
    q, _ = objectives.place_mass(grades, "gain", "grade")
    kl = objectives.make_objective({"loss": "kl", "temperature": 1.0, "targets": "gain"})(scores, grades)
    loss = make_own("geometric", steepness=200.0)(scores, grades)
    # Each list has one document at each grade that has mass, so places and documents have the same.
    assert loss.item() == pytest.approx((kl - torch.xlogy(q, q).sum(-1).mean()).item())


@pytest.mark.parametrize("name", ["kl", "contrast"])
def test_a_share_is_mixed_in(name):
    scores, grades = draw_lists(3)
    alone, mixed = make_own("threshold"), make_own("threshold", **{f"{name}_share": 0.3})
    other = objectives.make_objective({"loss": name, "temperature": 1.0, "targets": "gain"})
    expected = 0.7 * alone(scores, grades) + 0.3 * other(scores, grades)
    assert mixed(scores, grades).item() == pytest.approx(expected.item())


def test_a_schedule_goes_from_its_first_number_to_its_last():
    scores, grades = draw_lists(3)
    moving = make_own("threshold", temperature=[1.0, 0.5], kl_share=[1.0, 0.0])
    for progress, now in ((0.0, (1.0, 1.0)), (0.25, (0.875, 0.75)), (1.0, (0.5, 0.0))):
        still = make_own("threshold", temperature=now[0], kl_share=now[1])
        assert moving(scores, grades, progress).item() == pytest.approx(still(scores, grades).item())


def test_every_setting_is_another_and_has_a_gradient():
    scores, grades = draw_lists(4)
    trained = [setting for setting in objectives.SETTINGS if setting["loss"] != "untrained"]
    assert len({json.dumps(s, sort_keys=True) for s in objectives.SETTINGS}) == len(trained) + 1
    for setting in trained:
        leaf = (0.1 * scores.float()).requires_grad_()
        objectives.make_objective(setting)(leaf, grades.float()).backward()
        assert leaf.grad.isfinite().all() and leaf.grad.abs().sum() > 0, setting


def make_vectors(lists: int = 8, dimension: int = 16) -> objectives.Vectors:
    """Random vectors of lists that measure themselves."""
    generator = torch.Generator().manual_seed(0)
    ranking_lists = [parse_list(list_record(str(i)), "here") for i in range(lists)]

    collection = SimpleNamespace(
        name="own",
        queries={r.query_id: r.query for r in ranking_lists},
        qrels={r.query_id: {p.content: p.grade for p in r.passages} for r in ranking_lists},
    )

    def draw(texts):
        return torch.nn.functional.normalize(torch.randn(len(texts), dimension, generator=generator), dim=-1)

    queries, documents = list(collection.queries.values()), [p.content for r in ranking_lists for p in r.passages]
    q, d = draw(queries), draw(documents)
    maps = [dict(zip(texts, vectors, strict=True)) for texts, vectors in ((queries, q), (documents, d))]
    return objectives.Vectors(ranking_lists, *maps, {"own": (collection, documents, d, q)})


def test_the_network_starts_as_the_identity_and_learns_its_lists(monkeypatch, one_thread):
    vectors = make_vectors()
    _, _, documents, queries = vectors.collections["own"]
    untrained = objectives.train(vectors, {"loss": "untrained"}, seed=0).eval()
    assert torch.allclose(untrained(queries), queries, atol=1e-6)
    discounts, gains = 1 / np.log2(np.arange(10) + 2), []
    for query_id, row in zip(range(8), (queries @ documents.T).topk(10).indices.tolist(), strict=True):
        grades = [3 - i % 4 if i // 4 == query_id else 0 for i in row]
        gains.append(grades @ discounts / ([3, 2, 1] @ discounts[:3]))
    assert objectives.measure(vectors, untrained)["own"] == pytest.approx(np.mean(gains), abs=1e-4)
    monkeypatch.setattr(objectives, "TRAINING", {"epochs": 20.0, "batch_lists": 4, "learning_rate": 3e-3})
    row = objectives.try_setting(vectors, OWN["threshold"] | {"temperature": 0.1})
    assert row["mean"] == pytest.approx(row["nDCG@10"]["own"]) and row["mean"] > np.mean(gains) + 0.2
    assert row["training"]["lists"] == 8 and row["sd"] >= 0 and row["setting"]["loss"] == "threshold"


def test_settings_that_are_done_are_skipped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(objectives, "embed", lambda: "vectors")
    tried = []

    def try_setting(vectors, setting):
        assert vectors == "vectors"
        tried.append(setting)
        return {"setting": setting, "mean": 0.5, "sd": 0.0}

    monkeypatch.setattr(objectives, "try_setting", try_setting)
    path = tmp_path / "rows.jsonl"
    objectives.main.callback(path)
    assert tuple(tried) == objectives.SETTINGS
    lines = path.read_text().splitlines()
    path.write_text("".join(line + "\n" for line in lines[:5] + lines[7:]))
    objectives.main.callback(path)
    assert tuple(tried[len(lines) :]) == objectives.SETTINGS[5:7]
    assert sorted(path.read_text().splitlines()) == sorted(lines)
    monkeypatch.setattr(objectives, "embed", None)  # nothing is left: nothing is embedded
    objectives.main.callback(path)
    path.write_text(lines[0] + "\n" + lines[1][:20])
    with pytest.raises(GradretError, match=r"rows.jsonl:2: not valid JSON"):
        objectives.main.callback(path)
    assert len(capsys.readouterr().out.splitlines()) == len(lines) + 2

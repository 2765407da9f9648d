import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from gradret.evaluation.significance import DRAWS, compare_systems, correct_holm, find_differences, randomisation_tests

DIFFERENCES = st.lists(st.floats(-1, 1).map(lambda x: round(x, 3)), min_size=2, max_size=24).map(np.array)


def randomisation_test(sample) -> float | None:
    return randomisation_tests([sample])[0]


def normal(seed: int, *sizes: int, mean: float = 0.0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.normal(mean, 1.0, size) for size in sizes]


def test_differences_are_paired_by_query():
    assert find_differences({"a": 0.5, "b": 0.25}, {"b": 1.0, "a": 0.25}).tolist() == [0.25, -0.75]
    # The mean over three seeds of the same values in another order is the same.
    assert find_differences({"a": (0.1 + 0.7 + 0.2) / 3}, {"a": (0.2 + 0.1 + 0.7) / 3}).tolist() == [0.0]


@pytest.mark.parametrize(
    ("sample", "p"),
    [
        ([[1, 1, 1]], 2 / 8),  # +++ and ---
        ([[3, 2, 1]], 2 / 8),
        ([[3, 2, -1]], 4 / 8),  # sum 4: +++ and ++- and their mirror images
        ([[3, -1]], 1.0),
        ([[1, 0, 1]], 2 / 4),  # a query that does not differ changes nothing
        ([[1, 1], [1, 1, 1, 1]], 2 / 64),
        ([[1, 1], [-1, -1, -1]], 1.0),  # each collection counts the same: the mean is 0
        # +-.5 +-.5 +-.25 +-.5, really .75: 3 of the 4 signs of the second with ++, 3 with --, 2 with +- and with -+.
        ([[2, 2], [1, -2]], 10 / 16),
    ],
)
def test_randomisation_by_hand(sample, p):
    assert randomisation_test([np.array(d, dtype=float) for d in sample]) == p


def test_one_collection_against_scipy():
    for seed in range(5):
        (d,) = normal(seed, 11, mean=0.4)
        options = {"permutation_type": "samples", "n_resamples": math.inf, "vectorized": True}
        exact = stats.permutation_test((d,), lambda x, axis: x.mean(axis=axis), **options).pvalue
        assert randomisation_test([d]) == pytest.approx(exact)


def test_each_collection_counts_the_same():
    large, small = np.tile([0.1, -0.1], 500), np.array([1.0, 1.1, 0.9, 1.0, 1.2])
    # The small one must have one of 2 in 32 signs, and the large one add to it and not take from it.
    assert randomisation_test([large, small]) == pytest.approx(1 / 32, abs=0.003)


def test_drawn_signs_come_near_all_signs():
    (d,) = normal(1, 40, mean=0.3)
    (e,) = normal(2, 17, mean=0.3)
    exact_17 = np.mean(
        np.abs((1 - 2 * (np.arange(2**17)[:, None] >> np.arange(17) & 1)) @ e) >= abs(e.sum()) * (1 - 1e-12)
    )
    found = randomisation_test([e])
    assert found == pytest.approx(exact_17, abs=4 * math.sqrt(exact_17 / DRAWS))
    assert found == randomisation_test([e])
    assert randomisation_test([d]) == pytest.approx(stats.ttest_1samp(d, 0).pvalue, abs=0.02)
    assert randomisation_test([np.ones(40)]) == 1 / (1 + DRAWS)  # no drawn sign pattern is as extreme


def test_tests_made_together_are_those_made_alone():
    random = np.random.default_rng(3)
    samples = [[random.normal(0.1, 1, n) for n in sizes] for sizes in [(40,), (3,), (20, 20), (70, 5), (40,), (1,)]]
    samples += [[random.normal(0, 1, 40)] for _ in range(200)]
    together = randomisation_tests(samples)
    assert len(together) == len(samples)
    assert together[:8] == [randomisation_test(sample) for sample in samples[:8]]


def test_what_cannot_be_tested():
    assert randomisation_test([np.array([0.5])]) is None
    assert randomisation_test([np.array([0.5, 0.1]), np.array([0.5])]) is None
    assert randomisation_test([]) is None
    assert randomisation_test([np.zeros(5)]) == 1.0
    assert randomisation_test([np.zeros(50), np.zeros(3)]) == 1.0


def test_families_are_corrected_apart():
    ones, small = [np.ones(3)], [np.array([3.0, 2.0, -1.0])]
    found = compare_systems({"first": {"a": ones, "b": small, "c": [np.array([1.0])]}, "second": {"a": ones}})
    assert found["first"] == {
        "a": {"randomisation": 0.25, "randomisation_holm": 0.5},
        "b": {"randomisation": 0.5, "randomisation_holm": 0.5},
        "c": {"randomisation": None, "randomisation_holm": None},
    }
    assert found["second"] == {"a": {"randomisation": 0.25, "randomisation_holm": 0.25}}
    assert compare_systems({}) == {} and compare_systems({"none": {}}) == {"none": {}}


@settings(max_examples=60, deadline=None)
@given(st.lists(DIFFERENCES, min_size=1, max_size=3))
def test_exchanging_the_systems_changes_nothing(sample):
    mirrored = [-d for d in sample]
    assert randomisation_test(sample) == randomisation_test(mirrored)
    assert 0 < randomisation_test(sample) <= 1


@pytest.mark.parametrize("sizes", [(25,), (30, 20)])
def test_p_is_uniform_where_nothing_differs(sizes):
    samples = [normal(seed, *sizes) for seed in range(400)]
    p = randomisation_tests(samples)
    assert stats.kstest(p, "uniform").statistic < 0.068  # its 95 % bound of 400
    assert 0.025 < np.mean(np.array(p) < 0.05) < 0.085


def test_holm_by_hand():
    assert correct_holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert correct_holm([0.4, 0.5, 0.6]) == [1.0, 1.0, 1.0]
    assert correct_holm([0.02]) == [0.02]
    assert correct_holm([]) == []


def test_holm_does_not_count_what_was_not_tested():
    found = correct_holm([0.01, None, 0.04])
    assert found[1] is None
    assert [found[0], found[2]] == pytest.approx([0.02, 0.04])


@given(st.lists(st.one_of(st.none(), st.floats(0, 1)), max_size=12))
def test_holm_is_monotone_and_between_p_and_bonferroni(p_values):
    corrected = correct_holm(p_values)
    assert [c is None for c in corrected] == [p is None for p in p_values]
    pairs = sorted((p, c) for p, c in zip(p_values, corrected, strict=True) if p is not None)
    assert [c for _, c in pairs] == sorted(c for _, c in pairs)
    assert all(p <= c <= min(1, p * len(pairs)) for p, c in pairs)

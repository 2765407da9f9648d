"""Whether a difference between two systems could be chance: the paired randomisation test, Holm's correction.

A sample is one array of differences a collection, each with a difference a query. The statistic is the mean over the
collections of their mean differences, so each collection counts the same, whatever its number of queries; with one
collection it is the plain mean. Tests are two-sided.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

DRAWS = 100_000
SEED = 0
BLOCK = 1 << 20  # elements of the largest array that a randomisation test makes: 8 MiB
ROUNDING = 1e-9  # below what a measure kept to 4 digits can differ by, above the rounding of means over seeds
TIE = 1e-11  # of the sum of the weights: two sums of the same terms in another order differ by less

Sample = Sequence[np.ndarray]


def find_differences(ours: Mapping[str, float], theirs: Mapping[str, float]) -> np.ndarray:
    """(n,) float64, ours - theirs of each query, paired by id."""
    differences = np.array([ours[query] - theirs[query] for query in ours], dtype=np.float64)
    differences[np.abs(differences) < ROUNDING] = 0.0
    return differences


def compare_systems(families: Mapping[Any, Mapping[str, Sample]]) -> dict[Any, dict[str, dict[str, float | None]]]:
    """p-values of several systems against one baseline, in one or more families of tests.

    Args:
        families: family -> name of a system -> its differences from the baseline. One correction is for a family.
    Returns: family -> name -> {"randomisation": p, "randomisation_holm": p corrected}; None where the test cannot be
        made.
    """
    # Made together, the tests share the work of drawing signs.
    found = iter(randomisation_tests([sample for family in families.values() for sample in family.values()]))
    tested = {}
    for key, family in families.items():
        p_values = [next(found) for _ in family]
        both = zip(family, p_values, correct_holm(p_values), strict=True)
        tested[key] = {name: {"randomisation": p, "randomisation_holm": corrected} for name, p, corrected in both}
    return tested


def randomisation_tests(samples: Sequence[Sample]) -> list[float | None]:
    """p-values of paired randomisation tests: how often do random signs give a mean as far from 0 as the real ones?

    If the two systems do not differ, each query's difference may as well have the other sign. With 16 differing
    queries or fewer all signs are tried: p = count / 2^n. Otherwise 100,000 are drawn and the real ones are one more:
    p = (1 + count) / (1 + draws). The draws have one seed and depend on the number of queries alone, so a p-value does
    not depend on which tests are made together; together they share the work of drawing.

    Returns: as many; None when a collection has fewer than two queries, 1 when no query differs.
    Source: Smucker, Allan, Carterette, A Comparison of Statistical Significance Tests for IR Evaluation, CIKM 2007.
    """
    found: list[float | None] = [None] * len(samples)
    drawn: dict[int, list[tuple[int, np.ndarray]]] = {}
    for number, sample in enumerate(samples):
        if not sample or any(len(d) < 2 for d in sample):
            continue
        weights = np.concatenate([d / (len(d) * len(sample)) for d in sample])
        differing = weights[weights != 0]  # the sign of 0 changes nothing
        if 2 ** len(differing) <= DRAWS:
            bits = np.arange(2 ** len(differing))[:, None] >> np.arange(len(differing)) & 1
            found[number] = int(_count_extremes(bits, differing[:, None])[0]) / len(bits)
        else:
            drawn.setdefault(len(weights), []).append((number, weights))
    for tests in drawn.values():
        counts = _draw_signs(np.stack([weights for _, weights in tests], axis=1))
        for (number, _), count in zip(tests, counts, strict=True):
            found[number] = (1 + int(count)) / (1 + DRAWS)
    return found


def correct_holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p-values corrected for having made all these tests (Holm's step-down method).

    The i-th smallest of m is multiplied by m - i + 1, is at least the one before it and at most 1. None stands for a
    test that was not made: it does not count in m and stays None.

    Source: Holm, Scandinavian Journal of Statistics 6 (1979).
    """
    made = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, i) in enumerate(made):
        highest = max(highest, min(1.0, p * (len(made) - rank)))
        corrected[i] = highest
    return corrected


def _draw_signs(weights: np.ndarray) -> np.ndarray:
    """(K,) int: of the draws, those at least as extreme as the real signs; weights (n, K), a test a column."""
    length, tests = weights.shape
    random = np.random.default_rng(SEED)
    rows = max(1, BLOCK // max(length, tests))
    counts = np.zeros(tests, dtype=np.int64)
    for first in range(0, DRAWS, rows):
        # Whole 64-bit words, so that the size of a block does not change what is drawn.
        words = random.integers(0, 2**64, size=(min(rows, DRAWS - first), -(-length // 64)), dtype=np.uint64)
        bits = np.unpackbits(words.astype("<u8").view(np.uint8), axis=1, count=length)
        counts += _count_extremes(bits, weights)
    return counts


def _count_extremes(bits: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(K,) int: rows of bits (R, n) whose signs give |sum| >= |sum of the weights (n, K)|, or equal to rounding."""
    observed = weights.sum(axis=0)
    sums = bits.astype(np.float64) @ (2 * weights) - observed
    return (np.abs(sums) >= np.abs(observed) - TIE * np.abs(weights).sum(axis=0)).sum(axis=0)

"""The CUDA source without a GPU: the kernels run on the CPU through cuda_shim/, and what nvcc makes of them.

The reference here shares nothing with the package: losses come from POT, gradients from the formula, in float64.
"""

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import ot
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
CSRC, SHIM = ROOT / "csrc", Path(__file__).with_name("cuda_shim")
SCALARS = {"float32": 0, "bfloat16": 1, "float16": 2}
ABSENT = 255

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


class Tile(ctypes.Structure):
    """gradret::Tile of csrc/kernels.h."""

    _fields_ = [
        ("scores", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("first_column", ctypes.c_int64),
        ("pair_offsets", ctypes.c_void_p),
        ("pair_columns", ctypes.c_void_p),
        ("pair_values", ctypes.c_void_p),
        ("temperature", ctypes.c_double),
        ("top", ctypes.c_void_p),
        ("sum", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
    ]


class Lists(ctypes.Structure):
    """gradret::Lists of csrc/kernels.h."""

    _fields_ = [
        ("scores", ctypes.c_void_p),
        ("scalar", ctypes.c_int),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("index", ctypes.c_void_p),
        ("sorted", ctypes.c_bool),
        ("values", ctypes.c_void_p),
        ("mass", ctypes.c_void_p),
        ("share", ctypes.c_void_p),
        ("counts", ctypes.c_void_p),
        ("width", ctypes.c_int64),
        ("order", ctypes.c_int),
        ("transport", ctypes.c_double),
        ("cross", ctypes.c_double),
        ("contrast", ctypes.c_double),
        ("temperature", ctypes.c_double),
        ("scale", ctypes.c_double),
        ("loss", ctypes.c_void_p),
        ("gradient", ctypes.c_void_p),
    ]


def compile_shim(folder: Path) -> Path:
    """launch.cu and the shim as one shared library."""
    compile_object = ["g++", "-std=c++20", "-fPIC", f"-I{SHIM}", f"-I{CSRC}", "-c"]
    warnings = ["-Wall", "-Wno-unknown-pragmas"]
    checks = ["-fsanitize=alignment,bounds"]  # 16-byte accesses that x86 would forgive
    kernels = [*compile_object, "-O1", *warnings, *checks, "-x", "c++", CSRC / "launch.cu", "-o", "launch.o"]
    subprocess.run(kernels, cwd=folder, check=True)
    for name in ("fibers", "driver"):
        subprocess.run([*compile_object, "-O2", SHIM / f"{name}.cpp", "-o", f"{name}.o"], cwd=folder, check=True)
    library = folder / "shim.so"
    objects = ["launch.o", "fibers.o", "driver.o"]
    subprocess.run(["g++", "-shared", *checks, *objects, "-o", library], cwd=folder, check=True)
    return library


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    loaded = ctypes.CDLL(str(compile_shim(tmp_path_factory.mktemp("shim"))))
    loaded.shim_scratch_bytes.restype = ctypes.c_int64
    return loaded


@pytest.fixture(autouse=True)
def no_undefined_behaviour(capfd):
    """The sanitizers of the library write to stderr and go on."""
    yield
    errors = capfd.readouterr().err
    assert "runtime error" not in errors, errors


def solve_list(scores, grades, mass, order, temperature):
    """Loss and gradient of one list in float64; all arguments (N,), no document absent."""
    x = scores / temperature
    p = np.exp(x - x.max())
    p /= p.sum()
    if mass.sum() == 0:
        return 0.0, np.zeros_like(p)
    q = mass / mass.sum()
    loss = ot.wasserstein_1d(grades, grades, p, q, p=order)
    by_grade = np.argsort(grades, kind="stable")
    v, P, Q = grades[by_grade], p[by_grade], q[by_grade]
    F, G = P.cumsum()[:-1], Q.cumsum()
    gaps = np.diff(v)
    if order == 1:
        equal = np.abs(F - G[:-1]) <= 1e-6 * np.maximum(F, G[:-1])  # at P = Q the subgradient is 0
        t = gaps * np.where(equal, 0, np.sign(F - G[:-1]))
    else:
        last = np.nonzero(Q)[0][-1]
        left, right = (v[np.minimum(np.searchsorted(G, F, side=side), last)] for side in ("left", "right"))
        t = 2 * gaps * ((left + right) / 2 - (v[:-1] + v[1:]) / 2)
    below, above = P.cumsum()[:-1], P[::-1].cumsum()[::-1][1:]
    c = np.zeros_like(p)
    c[1:] -= (t * below).cumsum()
    c[:-1] += (t * above)[::-1].cumsum()[::-1]
    gradient = np.zeros_like(p)
    gradient[by_grade] = P * c / temperature
    return loss, gradient


def mix_list(scores, grades, mass, order, temperature, weights):
    """solve_list with KL and the contrast, each times its weight; for these two a score of -inf is no document."""
    loss, gradient = (weights[0] * part for part in solve_list(scores, grades, mass, order, temperature))
    x, q = scores / temperature, np.where(scores > -np.inf, mass, 0)
    if q.sum() == 0:
        return loss, gradient
    q = q / q.sum()
    good = q > 0
    log_p = x - np.logaddexp.reduce(x)
    loss += weights[1] * (q[good] * (np.log(q[good]) - log_p[good])).sum()
    gradient += weights[1] * (np.exp(log_p) - q) / temperature
    for grade in np.unique(grades[good]):
        here, rivals = good & (grades == grade), (grades < grade) & (x > -np.inf)
        if rivals.any():
            rival = np.logaddexp.reduce(x[rivals])
            loss += weights[2] * (q[here] * np.logaddexp(0, rival - x[here])).sum()
            pull = q[here] / (1 + np.exp(x[here] - rival))
            gradient[here] -= weights[2] * pull / temperature
            gradient[rivals] += weights[2] * np.exp(x[rivals] - rival) * pull.sum() / temperature
    return loss, gradient


def reference(scores, grades, mass, present, order, temperature, weights):
    """mix_list over rows; absent documents and lists without any count as 0."""
    loss, gradient = np.zeros(len(scores)), np.zeros(scores.shape)
    for row, here in enumerate(present):
        if here.any():
            loss[row], gradient[row, here] = mix_list(
                scores[row, here], grades[row, here], mass[row, here], order, temperature, weights
            )
    return loss, gradient


def pointer(array):
    return None if array is None else array.data_ptr() if isinstance(array, torch.Tensor) else array.ctypes.data


def pointers(*arrays):
    return [ctypes.c_void_p(pointer(array)) for array in arrays]


def sizes(*numbers):
    return [ctypes.c_int64(number) for number in numbers]


TRANSPORT = (1.0, 0.0, 0.0)


def run_mixture(
    library,
    scores,
    index,
    values,
    mass,
    share,
    counts,
    *,
    order,
    temperature,
    weights=TRANSPORT,
    scale=1.0,
    gradient=True,
):
    """scores: (B, N) tensor, any row stride. The outputs start as NaN, so that what is not written shows."""
    rows, columns = scores.shape
    is_sorted = index.dtype == np.int32
    loss = torch.full((rows,), torch.nan)
    guarded = torch.full((rows * columns + 16,), torch.nan, dtype=scores.dtype)
    guarded[rows * columns :] = 7
    out = guarded[: rows * columns].view(rows, columns) if gradient else None
    lists = Lists(
        scores=pointer(scores),
        scalar=SCALARS[str(scores.dtype).removeprefix("torch.")],
        rows=rows,
        columns=columns,
        stride=scores.stride(0),
        index=pointer(index),
        sorted=is_sorted,
        values=pointer(values),
        mass=pointer(mass),
        share=pointer(share),
        counts=pointer(counts),
        width=values.shape[1],
        order=order,
        transport=weights[0],
        cross=weights[1],
        contrast=weights[2],
        temperature=temperature,
        scale=scale,
        loss=pointer(loss),
        gradient=pointer(out),
    )
    size = library.shim_scratch_bytes(ctypes.byref(lists))
    scratch = torch.full((size // 4 + 4,), torch.nan)
    scratch[size // 4 :] = 7
    assert library.shim_mix(ctypes.byref(lists), *pointers(scratch)) == 0
    assert (scratch[size // 4 :] == 7).all() and (guarded[rows * columns :] == 7).all()
    return loss.double().numpy(), None if out is None else out.double().numpy()


def level_form(grades, mass, present):
    """index, values, mass, share, counts of csrc/kernels.h; documents of one grade give their mass to it."""
    rows, columns = grades.shape
    distinct = [np.unique(grades[row, present[row]]) for row in range(rows)]
    width = max(1, max(map(len, distinct)))
    index = np.full((rows, columns), ABSENT, np.uint8)
    values, table, share = np.zeros((3, rows, width), np.float32)
    for row, levels in enumerate(distinct):
        here = present[row]
        index[row, here] = np.searchsorted(levels, grades[row, here])
        values[row, : len(levels)] = levels
        sums = np.bincount(index[row, here], mass[row, here], len(levels)) if len(levels) else np.zeros(0)
        table[row, : len(levels)] = sums / (sums.sum() or 1)
        share[row, : len(levels)] = table[row, : len(levels)] / np.bincount(index[row, here], minlength=len(levels))
    return index, values, table, share, np.array([len(levels) for levels in distinct], np.int32)


def make_lists(seed, rows, columns, levels, *, spread=3.0, absent=0.2, dtype=torch.float32, padding=0):
    """Random lists: grades in {0 .. levels - 1} / 2 or real, gain-like mass, some documents absent with wild scores."""
    rng = np.random.default_rng(seed)
    grades = rng.integers(0, levels, (rows, columns)) / 2 if levels else rng.random((rows, columns)).astype(np.float32)
    grades = grades.astype(np.float64)
    present = rng.random((rows, columns)) >= absent
    mass = (np.exp2(grades) - 1) * rng.random((rows, columns)) * present
    wide = torch.empty(rows, columns + padding, dtype=dtype)
    scores = wide[:, :columns]
    scores.copy_(torch.from_numpy(rng.normal(size=(rows, columns)) * spread))
    wild = torch.from_numpy(rng.choice([np.nan, np.inf, -np.inf, 30000.0], present.shape))
    scores.copy_(torch.where(torch.from_numpy(present), scores, wild.to(dtype)))
    return scores, grades, mass, present


def check(scores, grades, mass, present, order, temperature, loss, gradient, scale=1.0, weights=TRANSPORT):
    """Float32 sums of mass 1 are good to some 1e-6, times the span of the grades for a loss; a gradient is compared
    with its row's largest entry, for entries far below it are differences of such sums. Then rounding to the dtype."""
    wanted_loss, wanted = reference(scores.double().numpy(), grades, mass, present, order, temperature, weights)
    span = np.ptp(grades, axis=1) ** order
    assert np.isfinite(loss).all()
    np.testing.assert_array_less(np.abs(loss - wanted_loss), 1e-5 * wanted_loss + 1e-6 * span + 1e-30)
    if gradient is None:
        return
    wanted = wanted * scale
    rounding = {torch.float32: 0, torch.bfloat16: 2**-8, torch.float16: 2**-11}[scores.dtype]
    tiny = 6e-8 if scores.dtype == torch.float16 else 1e-37
    largest = np.abs(wanted).max(axis=1, keepdims=True)
    np.testing.assert_array_less(np.abs(gradient - wanted), 3e-5 * largest + rounding * np.abs(wanted) + tiny)
    assert (gradient[~present] == 0).all()


# One warp a list, whole packs or not; several warps; a whole block; several tiles of it.
LEVEL_SHAPES = [(5, 1), (6, 7), (5, 64), (3, 131), (3, 512), (3, 513), (2, 1100), (1, 16384), (2, 16385), (1, 26000)]
# One tile; several; beyond what sort_grades takes.
SORTED_SHAPES = [(5, 1), (6, 7), (3, 131), (2, 1030), (1, 5000), (1, 9001)]


def pair_with_orders(shapes):
    """Both orders for lists that are soon done, one in turn for the long ones."""
    both = [(*shape, order) for shape in shapes for order in (1, 2) if shape[1] < 2000]
    return both + [(*shape, number % 2 + 1) for number, shape in enumerate(s for s in shapes if s[1] >= 2000)]


def sorted_form(library, grades, mass, present):
    """index, values, mass, share, counts of csrc/kernels.h, the order by the kernel where it takes the list."""
    rows, columns = grades.shape
    values, index = np.full((rows, columns), np.nan, np.float32), np.full((rows, columns), -1, np.int32)
    counts = np.full(rows, -1, np.int32)
    if columns <= 8192:
        given = grades.astype(np.float32), present.astype(np.uint8)
        done = library.shim_sort_grades(*pointers(*given), *sizes(rows, columns), *pointers(index, values, counts))
        assert done == 0
    else:
        index[:] = np.argsort(np.where(present, grades, np.inf), axis=1, kind="stable")
        counts[:] = present.sum(1)
        values[:] = np.take_along_axis(grades, index, 1)
    total = mass.sum(1, keepdims=True)
    table = np.take_along_axis(mass / np.where(total > 0, total, 1), index, 1).astype(np.float32)
    return index, values, table, table, counts


@pytest.mark.parametrize("rows, columns, order", pair_with_orders(LEVEL_SHAPES))
def test_level_form_agrees_with_the_reference(library, rows, columns, order):
    for number, dtype in enumerate([torch.float32, torch.bfloat16, torch.float16]):
        if columns > 10000 and number != columns % 3:
            continue
        for levels in (4, 32):
            problem = make_lists(columns + levels, rows, columns, levels, dtype=dtype, padding=8 * (columns % 2))
            table = level_form(*problem[1:])
            loss, gradient = run_mixture(library, problem[0], *table, order=order, temperature=0.7, scale=0.25)
            check(*problem, order, 0.7, loss, gradient, scale=0.25)


@pytest.mark.parametrize("rows, columns, order", pair_with_orders(SORTED_SHAPES))
def test_sorted_form_agrees_with_the_reference(library, rows, columns, order):
    for number, dtype in enumerate([torch.float32, torch.bfloat16, torch.float16]):
        if columns > 4000 and number != columns % 3:
            continue
        for levels in (0, 5):  # real grades; many of each
            problem = make_lists(columns + levels, rows, columns, levels, dtype=dtype)
            table = sorted_form(library, *problem[1:])
            loss, gradient = run_mixture(library, problem[0], *table, order=order, temperature=0.7, scale=0.25)
            check(*problem, order, 0.7, loss, gradient, scale=0.25)


# Forms and shapes at which a kernel goes other ways: one warp, several, several tiles; sorted, one tile and several.
KERNELS = [("levels", 40), ("levels", 600), ("levels", 16400), ("sorted", 40), ("sorted", 2100)]


def prepare(library, form, grades, mass, present):
    return level_form(grades, mass, present) if form == "levels" else sorted_form(library, grades, mass, present)


# Scores as they come; target mass far above the rest, far below it, on both sides of it; and each grade far above or
# below the next lower.
MOVES = {"usual": (0, 0), "above": (70, 70), "below": (-70, -70), "apart": (-70, 70), "up": 200, "down": -200}
MIXTURES = {  # of transport, KL and contrast, which the sorted form does not have
    "levels": [(0.15, 0.0, 0.85), (0.25, 0.25, 0.5), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)],
    "sorted": [(0.25, 0.75, 0.0), (0.0, 1.0, 0.0)],
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("form, columns", [("levels", 1), *KERNELS])
def test_mixtures_agree_with_the_reference(library, form, columns, move):
    for number, weights in enumerate(MIXTURES[form] if columns < 10000 else MIXTURES[form][:1]):
        dtype = torch.bfloat16 if number == 3 else torch.float32
        scores, grades, mass, present = make_lists(columns, 3, columns, 4, dtype=dtype)
        mass = (np.exp2(grades) - 1) * present  # equal grades weigh the same
        far = MOVES[move]
        moved = far * grades if isinstance(far, int) else np.where(np.arange(columns) % 2, *far) * (mass > 0)
        scores += torch.from_numpy(moved).to(dtype)
        if columns > 1:
            scores[:, ::7] = torch.where(torch.from_numpy(present[:, ::7]), -torch.inf, scores[:, ::7])
        table = prepare(library, form, grades, mass, present)
        options = {"order": 1 + number % 2, "temperature": 0.7, "weights": weights, "scale": 0.25}
        loss, gradient = run_mixture(library, scores, *table, **options)
        check(scores, grades, mass, present, loss=loss, gradient=gradient, **options)


@pytest.mark.parametrize(
    "form, columns, weights", [(*kernel, w) for kernel in KERNELS[:2] + KERNELS[3:4] for w in MIXTURES[kernel[0]]]
)
def test_mixtures_of_lists_with_little_in_them(library, form, columns, weights):
    scores, grades, _, present = make_lists(23, 7, columns, 4)
    present[0] = False
    scores[1, torch.from_numpy(present[1])] = -torch.inf
    grades[2] = 0  # nothing with target mass, and scores that are no numbers
    scores[2, np.nonzero(present[2])[0][0]] = torch.nan
    scores[3, np.nonzero(present[3])[0][-1]] = torch.nan
    grades[4] += 1  # nothing without
    scores[5, torch.from_numpy(present[5] & (grades[5] == 0))] = -torch.inf  # nor here, in the scores
    scores[6, torch.from_numpy(present[6] & (grades[6] > 0))] = -torch.inf
    mass = (np.exp2(grades) - 1) * present
    table = prepare(library, form, grades, mass, present)
    options = {"order": 2, "temperature": 1.0, "weights": weights}
    loss, gradient = run_mixture(library, scores, *table, **options)
    assert (loss[:3] == 0).all() and (gradient[:3] == 0).all()
    assert np.isnan(loss[3]) and np.isnan(gradient[3, present[3]]).all() and (gradient[3, ~present[3]] == 0).all()
    rest = slice(4, 7)
    check(scores[rest], grades[rest], mass[rest], present[rest], loss=loss[rest], gradient=gradient[rest], **options)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("form, columns", KERNELS)
def test_saturated_softmax_keeps_its_gradient(library, form, columns, order):
    """Scores that spread by 30: gradients are far below 1 and must not drown in rounding."""
    problem = make_lists(7, 3, columns, 4, spread=30.0, absent=0)
    table = prepare(library, form, *problem[1:])
    loss, gradient = run_mixture(library, problem[0], *table, order=order, temperature=1.0)
    check(*problem, order, 1.0, loss, gradient)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("form, columns", KERNELS)
def test_lists_without_mass_and_with_nan(library, form, columns, order):
    scores, grades, mass, present = make_lists(11, 6, columns, 4)
    present[0] = False  # nothing there, whatever the scores hold
    scores[1, torch.from_numpy(present[1])] = -torch.inf  # no predicted mass
    mass[2] = 0  # no target mass, and scores that are no numbers
    first = np.nonzero(present[2])[0][0]
    scores[2, first] = torch.nan
    scores[3, np.nonzero(present[3])[0][-1]] = torch.nan
    scores[4, np.nonzero(present[4])[0][::2]] = -torch.inf  # some documents without predicted mass
    mass[present == 0] = 0
    table = prepare(library, form, grades, mass, present)
    loss, gradient = run_mixture(library, scores, *table, order=order, temperature=1.0)
    assert (loss[:3] == 0).all() and (gradient[:3] == 0).all()
    assert np.isnan(loss[3]) and np.isnan(gradient[3, present[3]]).all() and (gradient[3, ~present[3]] == 0).all()
    rest = slice(4, 6)
    check(scores[rest], grades[rest], mass[rest], present[rest], order, 1.0, loss[rest], gradient[rest])


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("form, columns", KERNELS)
def test_gradient_is_0_at_equality(library, form, columns, order):
    """p = q up to float32 rounding: sign(F - G) must not turn that rounding into a gradient."""
    scores, grades, _, present = make_lists(13, 2, columns, 4)
    scores = scores.nan_to_num(0, 0, 0)
    mass = torch.softmax(scores.double().masked_fill(~torch.from_numpy(present), -torch.inf), -1).numpy()
    table = prepare(library, form, grades, mass, present)
    loss, gradient = run_mixture(library, scores, *table, order=order, temperature=1.0)
    np.testing.assert_allclose(loss, 0, atol=2e-6)
    assert (gradient == 0).all()


@pytest.mark.parametrize("form, columns", KERNELS)
def test_quantiles_end_at_the_highest_target_mass(library, form, columns):
    """F may reach the end of G, or go beyond it by rounding: G^-1 stays at the last grade with target mass."""
    grades = np.tile(np.arange(columns) % 2 + 1.0, (1, 1))
    scores = torch.from_numpy(np.where(grades == 2, -17.0 - np.log(columns), 0)).float()
    problem = scores, grades, (grades == 1).astype(float), np.ones_like(grades, bool)
    loss, gradient = run_mixture(library, scores, *prepare(library, form, *problem[1:]), order=2, temperature=1.0)
    check(*problem, 2, 1.0, loss, gradient)

    grades = np.tile(np.arange(columns) % 3, (1, 1)).astype(float)
    scores = torch.from_numpy(np.where(grades > 0, -25.0, 0)).float()
    problem = scores, grades, grades, np.ones_like(grades, bool)
    index, values, mass, share, counts = prepare(library, form, *problem[1:])
    table = index, values, mass * np.float32(1 - 3e-7), share, counts
    loss, gradient = run_mixture(library, scores, *table, order=2, temperature=1.0)
    check(*problem, 2, 1.0, loss, gradient)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("form, columns", KERNELS)
def test_nan_targets_show(library, form, columns, order):
    scores, grades, mass, present = make_lists(19, 2, columns, 4)
    table = prepare(library, form, grades, mass, present)
    table[2][0, 1] = np.nan
    loss, gradient = run_mixture(library, scores, *table, order=order, temperature=1.0)
    assert np.isnan(loss[0]) and np.isnan(gradient[0, present[0]]).all()
    check(scores[1:], grades[1:], mass[1:], present[1:], order, 1.0, loss[1:], gradient[1:])


@pytest.mark.parametrize("form, columns", KERNELS)
def test_results_do_not_depend_on_what_is_asked_for(library, form, columns):
    """Without a gradient the loss has the same bits, and so has a second run; rows that are not aligned agree."""
    problem = make_lists(17, 3, columns, 4)
    table = prepare(library, form, *problem[1:])
    loss, gradient = run_mixture(library, problem[0], *table, order=2, temperature=0.7)
    again, same = run_mixture(library, problem[0], *table, order=2, temperature=0.7)
    np.testing.assert_array_equal(loss, again)
    np.testing.assert_array_equal(gradient, same)
    alone, nothing = run_mixture(library, problem[0], *table, order=2, temperature=0.7, gradient=False)
    assert nothing is None
    np.testing.assert_array_equal(loss, alone)
    for offset, padding in ((1, 8), (0, 3)):  # rows that start off a multiple of 16 bytes: all, or most
        wide = torch.full((3, columns + padding), torch.nan)
        shifted = wide[:, offset : columns + offset]
        shifted.copy_(problem[0])
        other_loss, other_gradient = run_mixture(library, shifted, *table, order=2, temperature=0.7)
        np.testing.assert_allclose(other_loss, loss, rtol=1e-5)
        np.testing.assert_allclose(other_gradient, gradient, atol=1e-5 * np.abs(gradient).max())


@pytest.mark.parametrize("form", ["levels", "sorted"])
def test_empty_shapes(library, form):
    index = np.zeros((3, 0), np.uint8 if form == "levels" else np.int32)
    nothing = np.zeros((3, 0), np.float32)
    loss, gradient = run_mixture(
        library, torch.zeros(3, 0), index, *[nothing] * 3, np.zeros(3, np.int32), order=1, temperature=1.0
    )
    assert (loss == 0).all() and gradient.shape == (3, 0)
    loss, _ = run_mixture(
        library,
        torch.zeros(0, 4),
        index[:0],
        nothing[:0],
        nothing[:0],
        nothing[:0],
        np.zeros(0, np.int32),
        order=1,
        temperature=1.0,
    )
    assert loss.shape == (0,)


@pytest.mark.parametrize("columns", [1, 9, 1024, 1025, 8192])
def test_sort_grades(library, columns):
    rng = np.random.default_rng(columns)
    grades = np.round(rng.normal(size=(3, columns)) * 4).astype(np.float32) / 2  # ties, -0 among them
    mask = (rng.random((3, columns)) < 0.8).astype(np.uint8)
    mask[0] = 0
    for given in (mask, None):
        index, values = np.full((3, columns), -1, np.int32), np.full((3, columns), np.nan, np.float32)
        counts = np.full(3, -1, np.int32)
        done = library.shim_sort_grades(*pointers(grades, given), *sizes(3, columns), *pointers(index, values, counts))
        assert done == 0
        present = np.ones_like(mask) if given is None else mask
        key = np.where(present, grades, np.inf)
        np.testing.assert_array_equal(index, np.argsort(key, axis=1, kind="stable"))
        np.testing.assert_array_equal(counts, present.sum(1))
        top = np.where(present, grades, -np.inf).max(1, keepdims=True)
        wanted = np.where(np.arange(columns) < counts[:, None], np.sort(key, axis=1), np.where(counts[:, None], top, 0))
        np.testing.assert_array_equal(values, wanted)
    too_long = library.shim_sort_grades(*pointers(grades, None), *sizes(3, 8193), *pointers(index, values, counts))
    assert too_long != 0


@pytest.mark.parametrize("widths", [(5,), (700, 300), (5000, 1, 64)])
def test_tiles_fold_into_one_log_sum_exp(library, widths):
    """Tiles of one matrix one after another, pairs left out; then back into the gradient of each score."""
    rows, columns, temperature = 3, sum(widths), 0.3
    rng = np.random.default_rng(columns)
    scores = (rng.normal(size=(rows, columns)) + np.linspace(0, 3, columns)).astype(np.float32)  # the top moves
    pairs = [np.sort(rng.choice(columns, size, replace=False)) for size in (3, 0, columns)]  # the last row: all
    offsets = np.cumsum([0, *map(len, pairs)])
    pair_columns = np.concatenate(pairs).astype(np.int32)
    scores[0, pairs[0][0]] = np.nan
    pair_values = np.full(len(pair_columns), np.nan, np.float32)
    pair_gradients = rng.normal(size=len(pair_columns)).astype(np.float32)
    top, total = np.full(rows, -np.inf, np.float32), np.zeros(rows, np.float64)
    weight = np.array([2.0, -0.5, 3.0], np.float32)
    out = np.zeros((rows, columns))
    for name, values in (("fold", pair_values), ("unfold", pair_gradients)):
        for first, width in zip(np.cumsum([0, *widths[:-1]]), widths, strict=True):
            part = np.full((rows, width + 2), np.nan, np.float32)
            part[:, :width] = scores[:, first : first + width]
            tile = Tile(
                scores=pointer(part),
                rows=rows,
                columns=width,
                stride=width + 2,
                first_column=first,
                pair_offsets=pointer(offsets),
                pair_columns=pointer(pair_columns),
                pair_values=pointer(values),
                temperature=temperature,
                top=pointer(top),
                sum=pointer(total),
                weight=pointer(weight),
            )
            assert getattr(library, f"shim_{name}_tile")(ctypes.byref(tile)) == 0
            out[:, first : first + width] = part[:, :width]
            assert np.isnan(part[:, width:]).all()
    paired = np.zeros((rows, columns), bool)
    for row, at in enumerate(pairs):
        paired[row, at] = True
    np.testing.assert_array_equal(pair_values, scores[paired])
    rest = np.where(paired, -np.inf, scores.astype(np.float64) / temperature)
    wanted_sum = np.log(np.exp(rest[:2]).sum(1))
    np.testing.assert_allclose(np.log(total[:2]) + top[:2] / temperature, wanted_sum, rtol=1e-6)
    assert total[2] == 0 and top[2] == -np.inf
    wanted = np.zeros((rows, columns))
    wanted[:2] = weight[:2, None] * np.exp(rest[:2] - wanted_sum[:, None])
    wanted[paired] = pair_gradients
    np.testing.assert_allclose(out, wanted, rtol=2e-5, atol=1e-12)


@pytest.fixture(scope="module")
def races(tmp_path_factory):
    """races.cpp under the thread sanitizer; the scheduler of the fibers stays outside it."""
    folder = tmp_path_factory.mktemp("races")
    command = ["g++", "-std=c++20", "-g", "-O1", f"-I{SHIM}", f"-I{CSRC}"]
    sanitized = ["-fsanitize=thread", "-Wno-unknown-pragmas", "-c", SHIM / "races.cpp", "-o", "races.o"]
    subprocess.run([*command, *sanitized], cwd=folder, check=True)
    subprocess.run([*command, "-DSHIM_TSAN", "-c", SHIM / "fibers.cpp", "-o", "fibers.o"], cwd=folder, check=True)
    subprocess.run(["g++", "-fsanitize=thread", "races.o", "fibers.o", "-o", "races"], cwd=folder, check=True)
    return folder / "races"


def run_races(races, **environment):
    return subprocess.run([races], env=os.environ | environment, capture_output=True, text=True, timeout=120)


def test_kernels_have_no_races(races):
    done = run_races(races)
    assert done.returncode == 0, done.stderr[:4000]


BARRIERS = [
    f"{file.name}:{number}"
    for file in sorted(CSRC.glob("*.cuh"))
    for number, line in enumerate(file.read_text().splitlines(), 1)
    if "__syncthreads()" in line
]


def test_barriers_are_found():
    files = {name.split(":")[0] for name in BARRIERS}
    assert files == {"block.cuh", "levels.cuh", "sorted.cuh", "tiles.cuh"}


@pytest.mark.nightly  # a test of the test above
@pytest.mark.parametrize("barrier", BARRIERS)
def test_every_barrier_is_needed(races, barrier):
    """The sanitizer must notice the lack of any one; else it would not notice a forgotten one either."""
    done = run_races(races, SHIM_SKIP_BARRIER=barrier)
    assert f"skips {barrier}" in done.stderr
    assert "data race" in done.stderr and done.returncode == 66, done.stderr[:4000]


def newest_architecture():
    names = subprocess.run(["nvcc", "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    return max(int(name.removeprefix("sm_")) for name in names if name.removeprefix("sm_").isdigit())


NO_NVCC = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


@NO_NVCC
@pytest.mark.nightly
@pytest.mark.parametrize("architecture", [80, 90, "newest"])
def test_kernels_compile_without_spills(tmp_path, architecture):
    architecture = newest_architecture() if architecture == "newest" else architecture
    command = ["nvcc", "-std=c++17", f"-arch=sm_{architecture}", "-Xptxas", "-v", "--keep", "-c", CSRC / "launch.cu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    usage = {}
    for part in done.stderr.split("Compiling entry function '")[1:]:
        memory = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        usage[part.split("'")[0]] = [int(size) for size in memory.groups()]
    for kernel in ("mix_levels", "mix_sorted", "sort_by_grade", "fold_rows"):
        assert any(kernel in name for name in usage), kernel
    assert {name: used for name, used in usage.items() if any(used)} == {}
    ptx = next(tmp_path.glob("*.ptx")).read_text()
    for kernel in re.findall(r"\.entry (\w*mix_levels\w*)\((.*?)\n}", ptx, re.S):
        assert re.search(r"ld\.global(?:\.nc)?\.v4", kernel[1]), f"{kernel[0]} has no 16-byte loads"
        assert re.search(r"st\.global\.v4", kernel[1]), f"{kernel[0]} has no 16-byte stores"

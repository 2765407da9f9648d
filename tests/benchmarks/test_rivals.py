"""Other ways to the losses: equal to POT, and measured beside gradret's."""

import json
import os
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner

from benchmarks.speed import loss as command
from benchmarks.speed import rivals
from gradret.bench import loss as speed
from gradret.bench import memory
from gradret.bench.memory import fresh_environment

ot = pytest.importorskip("ot")
ROWS = [
    *(
        row.format(order)
        for order in ("W1", "W2")
        for row in ("PyTorch {}", "PyTorch {}, presorted", "PyTorch {}, by level", "POT {}")
    ),
    *("SyCL Gaussian", "cross_entropy"),
]


@pytest.fixture
def lists():
    """Scores in float64 and whole grades of six lists."""
    torch.manual_seed(0)
    grades = torch.randint(0, 4, (6, 30)).float()
    grades[:, 0] = 3
    return torch.randn(6, 30, dtype=torch.float64).requires_grad_(), grades


@pytest.fixture
def no_peaks(monkeypatch):
    """For tests of something else: peaks take a process per row."""
    monkeypatch.setattr(memory, "measure_cpu_peaks", lambda make, names, arguments: ((None, "left out") for _ in names))


def measure(rivals: str = "list_rivals", shape=(4, 16)) -> dict[str, dict]:
    measured = speed.measure_speed([shape], device="cpu", repeats=3, rivals=f"benchmarks.speed.rivals:{rivals}")
    return {row["row"]: row for row in measured["rows"]}


@pytest.mark.filterwarnings("ignore:The use of `x.T`")
@pytest.mark.parametrize("order", [1, 2])
def test_rivals_equal_pot(lists, order):
    scores, grades = lists
    p, q = torch.softmax(scores / 0.3, -1), torch.exp2(grades.double()) - 1
    each = zip(grades.double(), p, q, strict=True)
    expected = sum(ot.wasserstein_1d(y, y, mass, target / target.sum(), p=order) for y, mass, target in each) / 6
    gradient = torch.autograd.grad(expected, scores)[0]
    for loss, prepared in (
        (rivals.textbook_wasserstein, grades),
        (rivals.sorted_wasserstein, rivals.sort_grades(grades, order)),
        (rivals.level_wasserstein, rivals.find_levels(grades, torch.int64)),
        (rivals.level_wasserstein, rivals.find_levels(grades, torch.uint8)),
        (rivals.pot_wasserstein, grades),
    ):
        value = loss(scores, prepared, order=order, temperature=0.3)
        assert value.item() == pytest.approx(expected.item(), rel=1e-5)
        torch.testing.assert_close(torch.autograd.grad(value, scores)[0], gradient, rtol=1e-3, atol=1e-5)


def test_the_published_formula_equals_the_gaussian_truth(lists):
    value = rivals.published_gaussian(*lists, temperature=speed.TEMPERATURE).item()
    assert speed.true_gaussian(*lists, None)[0].tolist() == pytest.approx([value] * 6, rel=1e-6)


def test_rivals_are_measured_beside_gradrets(no_peaks):
    rows = measure()
    assert [name for name in rows if name in ROWS] == ROWS
    assert all(row["both_ms"] and (row["loss_error"] or 0) < 1e-3 for row in rows.values())


def test_what_cannot_be_measured_says_why(monkeypatch, no_peaks):
    monkeypatch.setattr(rivals.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(speed, "LARGEST_MATRIX", {"cpu": 15})
    rows = measure()
    assert rows["POT W1"]["skipped"] == "POT is not installed; install it: pip install POT"
    assert rows["SyCL Gaussian"]["skipped"] == (
        "eigenvalues of a 16 x 16 float64 matrix take too long on cpu; measured up to 15"
    )
    assert measure(shape=(1, 8))["SyCL Gaussian"]["skipped"] == "a covariance needs two lists"


@pytest.mark.nightly
def test_compiled_rows_are_measured(no_peaks):
    rows = measure("list_compiled_rivals")
    compiled = [row for name, row in rows.items() if name.startswith("torch.compile")]
    assert len(compiled) == 4 and all(row["both_ms"] and row["loss_error"] < 1e-5 for row in compiled)


@pytest.mark.nightly
def test_the_command_writes_what_the_tables_are_made_of(tmp_path, monkeypatch, no_peaks):
    monkeypatch.setattr(command, "SHAPES", ((4, 16), (6, 24, 8)))
    result = CliRunner().invoke(command.main, ["--no-compile", "--device", "cpu", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "loss.json").read_text())
    assert {*ROWS, "gradret W1", "gradret default loss"} <= {row["row"] for row in document["rows"]}
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_pot_loads_no_jax(tmp_path):
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").write_text("print('loaded')")
    environment = {k: v for k, v in fresh_environment().items() if not k.startswith("POT_")}
    environment["PYTHONPATH"] = os.pathsep.join([environment["PYTHONPATH"], str(tmp_path)])
    script = (
        "import torch; from benchmarks.speed.rivals import pot_wasserstein\n"
        "assert pot_wasserstein(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), order=1, temperature=1.0) == 0.5"
    )
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr

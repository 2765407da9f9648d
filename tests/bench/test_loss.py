"""The loss benchmark: its truth against POT, wrong losses refused, what is written for each row, how time is taken."""

import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import ot
import pytest
import torch
from click.testing import CliRunner

from gradret.bench import loss as speed
from gradret.bench import memory
from gradret.bench.loss import Embeddings, Lists, Row, draw_speed, format_speed
from gradret.cli import main
from gradret.console import GradretError

CPU = torch.device("cpu")
FIRST = ["InfoNCE", "gradret default loss", "gradret default loss, raw grades"]
NAMES = ["default loss", "transport of it", "W1", "W2"]
ROWS = ["InfoNCE", *(f"gradret {name}{raw}" for name in NAMES for raw in ("", ", raw grades")), "gradret Gaussian"]
RETRIEVAL_ROWS = ["InfoNCE"] + [
    f"gradret {name}{way}{raw}" for name in NAMES for way in ("", ", score matrix") for raw in ("", ", raw grades")
]


needs_clear_refs = pytest.mark.skipif(not memory.can_restart_peak(), reason="needs Linux's /proc/self/clear_refs")


def invoke(*arguments):
    return CliRunner().invoke(main, ["bench", "loss", *map(str, arguments)])


def test_a_shape_beyond_memory_is_told(tmp_path):
    result = invoke("--shapes", "999999999x999999999", "--out", tmp_path)
    assert (result.exit_code, result.stderr) == (
        1,
        "Error: --shapes 999999999x999999999: does not fit into memory; give a smaller one\n",
    )


@pytest.fixture
def lists():
    """Scores in float64 and whole grades of six lists, one with a tie of all scores, one saturated."""
    torch.manual_seed(0)
    scores = torch.randn(6, 30, dtype=torch.float64)
    scores[0], scores[1, 3] = 0.5, 9.0
    grades = torch.randint(0, 4, (6, 30)).float()
    grades[:, 0] = 3
    return scores.requires_grad_(), grades


def pot_lists(scores, grades, order, temperature):
    """Each list's loss by POT in float64."""
    p = torch.softmax(scores / temperature, -1)
    q = torch.exp2(grades.double()) - 1
    grades = grades.double()
    return [
        ot.wasserstein_1d(y, y, mass, target / target.sum(), p=order)
        for y, mass, target in zip(grades, p, q, strict=True)
    ]


@pytest.mark.filterwarnings("ignore:The use of `x.T`")
@pytest.mark.parametrize("order", [1, 2])
def test_the_truth_equals_pot(lists, order, monkeypatch):
    scores, grades = lists
    monkeypatch.setattr(speed, "TEMPERATURE", 0.3)
    values, defined = speed.true_mixture(speed.MIXTURES[f"W{order}"], scores, grades, None)
    expected = torch.stack(pot_lists(scores, grades, order, 0.3))
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-12)
    assert defined.sum() >= 5
    ours, theirs = (torch.autograd.grad(v[defined].sum(), scores)[0] for v in (values, expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


def test_the_truth_says_where_its_gradient_jumps(monkeypatch):
    monkeypatch.setattr(speed, "TEMPERATURE", 1.0)
    w1 = speed.MIXTURES["W1"]
    # p = (.5, .5) at grades 1 and 0; gain targets put all mass on grade 1: F = .5, G = 0. Grades 2, 1: G = 1/4.
    scores = torch.zeros(2, 2, dtype=torch.float64)
    assert speed.true_mixture(w1, scores, torch.tensor([[1.0, 0.0], [1.0, 0.0]]), None)[1].all()
    scores = torch.tensor([[3.0, 1.0]], dtype=torch.float64).log()  # p = (3/4, 1/4) = q
    assert not speed.true_mixture(w1, scores, torch.tensor([[2.0, 1.0]]), None)[1].any()


def test_the_default_losss_truth_by_hand(monkeypatch):
    monkeypatch.setattr(speed, "TEMPERATURE", 1.0)
    # p = (.5, .25, .25), grades 1, 4, 0: roots 1, 2, 0, so q = (1/3, 2/3, 0) at the places 1, 2, 0.
    # W_2^2: cdf of p by place .25, .75, 1, of q 0, 1/3, 1: quantiles differ by 1 on .25 and by 1 on .75 - 1/3.
    # Contrast: -log(.5 / .75) / 3 - 2 log(.25 / 1) / 3.
    scores = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log()
    found, _ = speed.true_mixture(speed.MIXTURES["default loss"], scores, torch.tensor([[1.0, 4.0, 0.0]]), None)
    transport, contrast = 0.25 + (0.75 - 1 / 3), math.log(1.5) / 3 + 2 * math.log(4) / 3
    assert found.item() == pytest.approx(0.15 * transport + 0.85 * contrast)


def test_lists_are_as_in_retrieval():
    workload = Lists((50, 200), "float32", "cpu")
    grades, scores = workload.grades, workload.scores.detach()
    assert grades.unique().tolist() == [0, 1, 2, 3]
    assert (grades.gather(1, workload.positive[:, None]) == 3).all()
    assert 3 <= (grades > 0).sum(1).float().mean() <= 9
    assert scores.abs().max() <= 1
    assert scores[grades == 3].mean() > scores[grades == 1].mean() > scores[grades == 0].mean() + 0.05
    assert torch.equal(scores, Lists((50, 200), "float32", "cpu").scores)


def test_embeddings_are_as_in_retrieval():
    workload = Embeddings((10, 45, 16), "float32", "cpu")
    rows, columns, grades = workload.graded
    assert (rows.bincount() == 4).all()
    assert len(set(zip(rows.tolist(), columns.tolist(), strict=True))) == 40
    assert grades[:4].tolist() == [3, 2, 1, 0]
    assert workload.positive.tolist() == [*range(0, 40, 4)]
    queries, documents = workload.inputs
    assert torch.allclose(queries.norm(dim=1), torch.ones(10))
    assert torch.equal(workload.grades[rows, columns], grades) and workload.grades.sum() == grades.sum()
    scores = (queries @ documents.T).detach()
    assert scores.gather(1, workload.positive[:, None]).mean() > scores.mean() + 0.2
    assert Embeddings((6, 4, 8), "float32", "cpu").positive.tolist() == [0, 1, 2, 3, 0, 1]


def test_command_prints_writes_and_draws_every_row(tmp_path, monkeypatch, no_peaks):
    monkeypatch.setattr(sys, "argv", ["gradret", "bench", "loss"])
    arguments = ("--shapes", "4x16,2x12,6x24x8", "--all", "--chart", "--repeats", 4, "--device", "cpu")
    result = invoke(*arguments, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].split()[:2] in (["path:", "cpu"], ["path:", "torch"])
    assert lines[1].startswith("4x16 float32, ")
    document = json.loads((tmp_path / "loss.json").read_text())
    assert document["command"] == "gradret bench loss"
    assert document["versions"]["torch"] == torch.__version__
    assert document["threads"] == torch.get_num_threads()
    assert document["path"] in lines[0]
    for shape, names in (([4, 16], ROWS), ([2, 12], ROWS), ([6, 24, 8], RETRIEVAL_ROWS)):
        rows = [row for row in document["rows"] if row["shape"] == shape]
        assert [row["row"] for row in rows] == names
        for row in rows:
            check_row_record(row)
    assert len(document["rows"]) == 2 * len(ROWS) + len(RETRIEVAL_ROWS)
    for row in document["rows"]:
        assert any(line.startswith(row["row"] + " ") for line in lines)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def check_row_record(row):
    assert row["skipped"] is None and row["dtype"] == "float32"
    assert 3 <= row["repeats"] <= 4
    for time in ("forward_ms", "both_ms"):
        assert 0 < row[time]["p20"] <= row[time]["median"] <= row[time]["p80"]
    assert (row["times_infonce"] == 1) == (row["row"] == "InfoNCE")
    assert (row["peak_mib"] is None) == (row["peak_reason"] is not None)
    assert 0 <= row["loss_error"] < 1e-4
    assert len(row["gradient_errors"]) == (
        0 if row["row"] in ("InfoNCE", "gradret Gaussian") else len(row["shape"]) - 1
    )
    assert all(0 <= error < 1e-3 for error in row["gradient_errors"])


def test_json_is_one_document(tmp_path):
    arguments = ("--shapes", "3x8", "--repeats", 3, "--json")
    result = invoke(*arguments, "--dtype", "bfloat16", "--device", "cpu", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert result.stderr.startswith("path: ")
    assert document == json.loads((tmp_path / "loss.json").read_text())
    assert [row["row"] for row in document["rows"]] == FIRST
    assert not (tmp_path / "loss.png").exists()
    assert {row["dtype"] for row in document["rows"]} == {"bfloat16"}


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--shapes", "16x", "'16x' is not BxN or BxNxD in whole numbers, such as 512x2048 or 2048x16384x384"),
        ("--shapes", "16x64,8", "'8' is not BxN or BxNxD in whole numbers, such as 512x2048 or 2048x16384x384"),
        ("--shapes", "16x64x2x2", "'16x64x2x2' is not BxN or BxNxD in whole numbers, such as"),
        ("--shapes", "0x64", "'0x64' has too little: two documents and one of everything else at least"),
        ("--shapes", "16x1", "'16x1' has too little: two documents and one of everything else at least"),
        ("--shapes", "2x8,2x8", "'2x8,2x8': the same shape stands there twice"),
        ("--dtype", "float8", "'float8' is not one of 'float32', 'bfloat16', 'float16'"),
        ("--repeats", "0", "0 is not in the range x>=1"),
    ],
)
def test_wrong_options_exit_with_2(option, value, message):
    result = invoke(option, value)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith(f"Error: Invalid value for '{option}': {message}")


def test_a_device_or_folder_that_is_not_there_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    for arguments, start in (
        (("--device", "cuda:99"), "Error: device 'cuda:99' is not there ("),
        (("--out", tmp_path / "file"), f"Error: {tmp_path}/file: cannot be written ("),
    ):
        result = invoke(*arguments)
        assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
        assert result.stderr.startswith(start)


def double(loss):
    return lambda *arguments, **options: 2 * loss(*arguments, **options)


def double_gradient(loss):
    def wrong(*arguments, **options):
        value = loss(*arguments, **options)
        return value + (value - value.detach())

    return wrong


@pytest.mark.parametrize(
    ("name", "row", "shape"),
    [
        ("mix_losses", "gradret default loss", (4, 16)),
        ("mix_losses", "gradret default loss, score matrix", (4, 16, 8)),
        ("wasserstein_retrieval_loss", "gradret default loss", (4, 16, 8)),
    ],
)
@pytest.mark.parametrize(("change", "message"), [(double, "the loss is"), (double_gradient, "the gradient is 1 of")])
def test_a_wrong_loss_is_refused_before_timing(monkeypatch, name, row, shape, change, message):
    monkeypatch.setattr(speed, name, change(getattr(speed, name)))
    monkeypatch.setattr(speed, "time_in_turns", lambda *_: pytest.fail("timed"))
    with pytest.raises(GradretError, match=f"^{row} on {speed.name_shape(shape)}: {message}.*; nothing was timed$"):
        measure_small(shape)


@pytest.mark.parametrize(
    ("home", "name", "row"),
    [
        (speed, "gaussian_loss", "gradret Gaussian"),
        (Lists, "infonce", "InfoNCE"),
    ],
)
def test_the_other_losses_are_checked_too(monkeypatch, home, name, row):
    monkeypatch.setattr(home, name, double(getattr(home, name)))
    with pytest.raises(GradretError, match=f"^{row} on 4x16: the loss is"):
        measure_small((4, 16))


def test_what_was_measured_before_an_end_is_kept(monkeypatch, no_peaks, tmp_path):
    measure = speed.measure_shape

    def break_off(shape, *options):
        if shape == (2, 12):
            raise GradretError("broken off")
        return measure(shape, *options)

    monkeypatch.setattr(speed, "measure_shape", break_off)
    arguments = ("--shapes", "4x16,2x12", "--repeats", 3, "--device", "cpu")
    result = invoke(*arguments, "--out", tmp_path)
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (1, "Error: broken off")
    assert [path.name for path in tmp_path.iterdir()] == ["loss.json"]
    document = json.loads((tmp_path / "loss.json").read_text())
    assert {tuple(row["shape"]) for row in document["rows"]} == {(4, 16)}


@pytest.fixture
def no_peaks(monkeypatch):
    """For tests of something else: peaks take a process a row."""
    monkeypatch.setattr(memory, "measure_cpu_peaks", lambda make, names, arguments: ((None, "left out") for _ in names))


def measure_small(shape, *, dtype="float32"):
    return speed.measure_shape(shape, CPU, dtype, 3, True, None)


def test_what_cannot_be_measured_says_why(monkeypatch):
    monkeypatch.setattr(speed, "LARGEST_MATRIX", {"cpu": 3})
    monkeypatch.setattr(memory, "can_restart_peak", lambda: False)
    rows = {row["row"]: row for row in measure_small((4, 16))}
    assert rows["gradret Gaussian"]["skipped"] == (
        "singular values of a 4 x 4 float64 matrix take too long on cpu; measured up to 3"
    )
    measured = [row for row in rows.values() if not row["skipped"]]
    assert len(measured) == len(ROWS) - 1
    assert {(row["peak_mib"], row["peak_reason"]) for row in measured} == {(None, memory.NO_WAY)}
    rows = {row["row"]: row for row in measure_small((1, 8))}
    assert rows["gradret Gaussian"]["skipped"] == "a covariance needs two lists"


def test_a_row_that_is_too_slow_or_too_large_says_so(monkeypatch, no_peaks):

    def overflow(*_, **__):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(speed, "gaussian_loss", overflow)
        rows = {row["row"]: row for row in measure_small((4, 16))}
    assert rows["gradret Gaussian"]["skipped"] == "out of device memory"
    assert rows["gradret Gaussian"]["both_ms"] is None and rows["gradret W1"]["both_ms"] is not None
    slow = SimpleNamespace(blocked_autorange=lambda **_: SimpleNamespace(mean=20.04))
    monkeypatch.setattr(speed, "_make_timer", lambda call: slow)
    rows = measure_small((4, 16))
    assert {row["skipped"] for row in rows} == {"a step takes 20.04 s, longer than 20 s"}
    assert all(row["both_ms"] is row["times_infonce"] is None for row in rows)


def make_more(workload) -> list[Row]:
    """Rows of another library: one that is right, one that is wrong, one that fails."""

    def fail():
        raise RuntimeError("backend raised:\n\n no compiler found\nmore")

    truth = speed.MIXTURES["W1"]
    right = speed.bind_loss(workload, truth, raw=True, fused=False)
    losses = {"right": right, "wrong": lambda: 2 * right(), "failing": fail}
    return [Row(name, workload.inputs, loss, truth, external=True) for name, loss in losses.items()]


@pytest.mark.nightly
@needs_clear_refs
def test_further_rows_are_measured_and_skipped_alone(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    rows = speed.measure_shape((4, 16), CPU, "float32", 3, False, f"{__name__}:make_more")
    found = {row["row"]: row for row in rows}
    assert list(found) == [*FIRST, "right", "wrong", "failing"]
    assert found["right"]["both_ms"] and found["right"]["peak_reason"] is None
    assert found["wrong"]["skipped"].startswith("the loss is ")
    assert found["failing"]["skipped"] == "failed: backend raised: no compiler found"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_types_pass_the_check(dtype, no_peaks):
    for shape in ((4, 16), (4, 16, 8)):
        rows = measure_small(shape, dtype=dtype)
        assert {row["dtype"] for row in rows} == {dtype}
        assert all(row["both_ms"] for row in rows)


def measure_peaks(names, shape):
    arguments = {"shape": shape, "dtype": "float32", "rivals": "benchmarks.speed.rivals:list_rivals"}
    return memory.measure_cpu_peaks("gradret.bench.loss:make_call", names, arguments)


@needs_clear_refs
def test_cpu_peaks_hold_what_must_exist_at_once():
    names = ["cross_entropy", "PyTorch W2", "no such row"]
    found = list(measure_peaks(names, (256, 4096)))
    # cross_entropy, 4 MiB a matrix: in the end log-probabilities and two gradients; no more than five.
    assert 8 <= found[0][0] <= 20
    # Both prefix sums' merged steps, sorted, are (256, 8192) in float32 and their order in int64: 8 and 16 MiB.
    assert 24 <= found[1][0] <= 160
    assert [reason for _, reason in found[:2]] == [None, None]
    assert found[2] == (None, "the measuring process ended with 1")


def test_rows_take_turns_and_slow_ones_fewer(monkeypatch):
    visits = []

    class Counter:
        """A timer that measures nothing."""

        median = 0.002

        def __init__(self, call):
            self.call = call

        def blocked_autorange(self, min_run_time):
            self.call()
            return self

    def make(name):
        score = torch.zeros(2, requires_grad=True)
        return Row(name, (score,), loss=lambda: visits.append(name) or score.sum())

    monkeypatch.setattr(speed, "_make_timer", Counter)
    rows = [make("quick"), make("slow"), make("slowest")]
    times = speed.time_in_turns(rows, [1e-6, speed.ROW_S / 4, speed.ROW_S * 9], 12)
    assert [taken["repeats"] for taken in times] == [12, 4, 3]
    assert times[0]["both_ms"] == {"median": 2, "p20": 2, "p80": 2}
    assert visits[:8] == ["quick"] * 2 + ["slow"] * 2 + ["slowest"] * 2 + ["quick"] * 2  # forward, then both
    slow, slowest = ([i for i, visit in enumerate(visits) if visit == name][::2] for name in ("slow", "slowest"))
    # Every third round and every fourth, spread over all of them.
    assert [visits[:i].count("quick") // 2 for i in slow] == [1, 4, 7, 10]
    assert [visits[:i].count("quick") // 2 for i in slowest] == [1, 5, 9]
    assert speed.time_in_turns([], [], 12) == []


def test_a_timer_keeps_the_number_of_threads():
    found = []
    torch.set_num_threads(before := torch.get_num_threads())
    speed._make_timer(lambda: found.append(torch.get_num_threads())).timeit(1)
    assert {*found} == {before}


def test_percentiles():
    assert speed.find_percentiles([*range(11)]) == {"median": 5, "p20": 2, "p80": 8}


def make_result(**changes):
    """A result with one row measured and one skipped."""
    row = {
        "shape": [512, 4096],
        "row": "gradret W2",
        "both_ms": {"median": 0.0123, "p20": 0.0119, "p80": 1.5},
        "times_infonce": 0.567,
        "peak_mib": 8.04,
        "peak_reason": None,
        "loss_error": 2e-7,
        "gradient_errors": [3e-6],
        "skipped": None,
    }
    rows = [row | changes, row | {"row": "POT W2", "skipped": "out of device memory"}]
    return {"dtype": "float32", "threads": 2, "kernels": "cuda", "peak_resolution_mib": 0.25, "rows": rows}


def test_table_by_hand(tmp_path):
    assert format_speed(make_result()).splitlines() == [
        "512x4096 float32, 2 threads",
        "            forward + backward ms [20-80 %]  x InfoNCE  peak MiB  error",
        "----------  -------------------------------  ---------  --------  -----",
        "gradret W2             0.0123 [0.0119-1.50]       0.57       8.0  3e-06",
        "not measured: POT W2: out of device memory",
    ]
    draw_speed(make_result(), tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_below_the_resolution_or_unknown_is_not_shown_as_a_number():
    assert "<0.25" in format_speed(make_result(peak_mib=0.1)).splitlines()[3]
    changes = {"peak_mib": None, "peak_reason": "no way", "times_infonce": None, "loss_error": None}
    unknown = format_speed(make_result(**changes)).splitlines()
    assert unknown[3].split() == ["gradret", "W2", "0.0123", "[0.0119-1.50]", "?"]
    assert "peak MiB: no way" in unknown


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_rows():
    document = speed.measure_speed([(64, 256), (32, 128, 16)], device="cuda", repeats=3, every=True)
    measured = [row for row in document["rows"] if not row["skipped"]]
    assert len(measured) == len(ROWS) + len(RETRIEVAL_ROWS)
    assert all(row["both_ms"]["median"] > 0 and row["peak_mib"] > 0 for row in measured)


@pytest.mark.nightly
@pytest.mark.slow
@needs_clear_refs
def test_fused_scoring_needs_a_tenth_of_the_memory():
    names = ["gradret default loss", "gradret default loss, score matrix, raw grades", "cross_entropy"]
    peaks = [peak for peak, _ in measure_peaks(names, (2048, 16384, 384))]
    assert peaks[0] < peaks[1] / 10
    assert peaks[0] < peaks[2] / 10

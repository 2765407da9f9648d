"""The loss benchmark: rivals against POT, wrong losses refused, what is written for each row, how time is taken."""

import json
import math
import sys

import ot
import pytest
import torch
from click.testing import CliRunner

from gradret.bench import loss as speed
from gradret.bench import memory, workloads
from gradret.bench.report import draw_speed, format_speed
from gradret.bench.workloads import ListWorkload, RetrievalWorkload, Row
from gradret.cli import main
from gradret.console import GradretError
from gradret.loss import kernels

CPU = torch.device("cpu")
WASSERSTEIN_ROWS = [
    "gradret {}",
    "gradret {}, raw grades",
    "PyTorch {}",
    "PyTorch {}, presorted",
    "PyTorch {}, by level",
]
ROWS = [
    *(row.format(order) for order in ("W1", "W2") for row in WASSERSTEIN_ROWS),
    *("SyCL Gaussian", "gradret Gaussian", "InfoNCE", "cross_entropy"),
]
RETRIEVAL_ROWS = [
    f"{way} {order}{grades}"
    for order in ("W1", "W2")
    for way in ("fused scoring", "score matrix")
    for grades in ("", ", raw grades")
] + ["score matrix cross_entropy"]
SWITCHED_OFF = {row for row in ROWS if row.startswith("torch.compile")}


def invoke(*arguments):
    return CliRunner().invoke(main, ["bench", "loss", *map(str, arguments)])


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
def test_the_truth_equals_pot(lists, order):
    scores, grades = lists
    values, defined = workloads.true_wasserstein(scores, grades, order, 0.3)
    expected = torch.stack(pot_lists(scores, grades, order, 0.3))
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-12)
    assert defined.sum() >= 5
    ours, theirs = (torch.autograd.grad(v[defined].sum(), scores)[0] for v in (values, expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


def test_the_truth_says_where_its_gradient_jumps():
    # p = (.5, .5) at grades 1 and 0; gain targets put all mass on grade 1: F = .5, G = 0. Grades 2, 1: G = 1/4.
    scores = torch.zeros(2, 2, dtype=torch.float64)
    assert workloads.true_wasserstein(scores, torch.tensor([[1.0, 0.0], [1.0, 0.0]]), 1, 1.0)[1].all()
    scores = torch.tensor([[3.0, 1.0]], dtype=torch.float64).log()  # p = (3/4, 1/4) = q
    assert not workloads.true_wasserstein(scores, torch.tensor([[2.0, 1.0]]), 1, 1.0)[1].any()


@pytest.mark.filterwarnings("ignore:The use of `x.T`")
@pytest.mark.parametrize("order", [1, 2])
def test_rivals_equal_pot(lists, order):
    scores, grades = lists
    expected = sum(pot_lists(scores, grades, order, 0.3)) / len(scores)
    gradient = torch.autograd.grad(expected, scores)[0]
    for loss, prepared in (
        (workloads.textbook_wasserstein, grades),
        (workloads.sorted_wasserstein, workloads.sort_grades(grades, order)),
        (workloads.level_wasserstein, workloads.find_levels(grades, torch.int64)),
        (workloads.level_wasserstein, workloads.find_levels(grades, torch.uint8)),
        (workloads.pot_wasserstein, grades),
    ):
        value = loss(scores, prepared, order, 0.3)
        assert value.item() == pytest.approx(expected.item(), rel=1e-5)
        torch.testing.assert_close(torch.autograd.grad(value, scores)[0], gradient, rtol=1e-3, atol=1e-5)


def test_the_gaussian_truth_equals_the_published_formula(lists):
    value = workloads.published_gaussian(*lists, 0.3).item()
    assert workloads.true_gaussian(*lists, 0.3).item() == pytest.approx(value, rel=1e-6)


def test_lists_are_as_in_retrieval():
    workload = ListWorkload((50, 200), "float32", "cpu")
    grades, scores = workload.grades, workload.scores.detach()
    assert grades.unique().tolist() == [0, 1, 2, 3]
    assert (grades.gather(1, workload.positive[:, None]) == 3).all()
    assert 3 <= (grades > 0).sum(1).float().mean() <= 9
    assert scores.abs().max() <= 1
    assert scores[grades == 3].mean() > scores[grades == 1].mean() > scores[grades == 0].mean() + 0.05
    assert torch.equal(scores, ListWorkload((50, 200), "float32", "cpu").scores)


def test_embeddings_are_as_in_retrieval():
    workload = RetrievalWorkload((10, 45, 16), "float32", "cpu")
    rows, columns, grades = workload.grades
    assert (rows.bincount() == 4).all()
    assert len(set(zip(rows.tolist(), columns.tolist(), strict=True))) == 40
    assert grades[:4].tolist() == [3, 2, 1, 0]
    assert workload.positive.tolist() == [*range(0, 40, 4)]
    assert torch.allclose(workload.queries.norm(dim=1), torch.ones(10))
    scores = (workload.queries @ workload.documents.T).detach()
    assert scores.gather(1, workload.positive[:, None]).mean() > scores.mean() + 0.2
    assert RetrievalWorkload((6, 4, 8), "float32", "cpu").positive.tolist() == [0, 1, 2, 3, 0, 1]


def test_command_prints_writes_and_draws_every_row(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gradret", "bench", "loss"])
    arguments = ("--shapes", "4x16,2x12", "--retrieval", "6x24x8", "--repeats", 4, "--device", "cpu")
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
    assert (row["skipped"] is not None) == (row["row"] in SWITCHED_OFF)
    assert row["dtype"] == "float32"
    assert row["order"] == next((order for order in (1, 2) if f"W{order}" in row["row"]), None)
    if row["skipped"]:
        assert row["skipped"] == "switched off by --no-compile"
        assert row["both_ms"] is row["peak_mib"] is row["loss_error"] is None
        return
    assert 3 <= row["repeats"] <= 4
    for time in ("forward_ms", "backward_ms", "both_ms"):
        assert 0 < row[time]["p20"] <= row[time]["median"] <= row[time]["p80"]
    assert row["both_ms"]["median"] > row["forward_ms"]["p20"]
    assert row["wall_ms"] is row["floor_fraction"] is None
    assert (row["times_cross_entropy"] == 1) == row["row"].endswith("cross_entropy")
    assert (row["peak_mib"] is None) == (row["peak_reason"] is not None)
    assert 0 <= row["loss_error"] < 1e-4
    assert len(row["gradient_errors"]) == (0 if row["order"] is None else len(row["shape"]) - 1)
    assert all(0 <= error < 1e-3 for error in row["gradient_errors"])


def test_json_is_one_document(tmp_path):
    arguments = ("--shapes", "3x8", "--retrieval", "none", "--repeats", 3, "--order", 2, "--json")
    result = invoke(*arguments, "--dtype", "bfloat16", "--device", "cpu", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert result.stderr.startswith("path: ")
    assert document == json.loads((tmp_path / "loss.json").read_text())
    assert [row["row"] for row in document["rows"]] == [row for row in ROWS if "W1" not in row]
    assert {row["dtype"] for row in document["rows"]} == {"bfloat16"}


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--shapes", "16x", "'16x' is not BxN in whole numbers, such as 128x1024"),
        ("--shapes", "16x64,8", "'8' is not BxN in whole numbers, such as 128x1024"),
        ("--shapes", "16x64x2", "'16x64x2' is not BxN in whole numbers, such as 128x1024"),
        ("--shapes", "16x-64", "'16x-64' is not BxN in whole numbers, such as 128x1024"),
        ("--shapes", "0x64", "'0x64' has too little: two documents and one of everything else at least"),
        ("--shapes", "16x1", "'16x1' has too little: two documents and one of everything else at least"),
        ("--shapes", "2x8,2x8", "'2x8,2x8': the same shape stands there twice"),
        ("--retrieval", "16x64", "'16x64' is not BxNxD in whole numbers, such as 2048x16384x384"),
        ("--dtype", "float8", "'float8' is not one of 'float32', 'bfloat16', 'float16'"),
        ("--order", "3", "'3' is not one of '1', '2', 'both'"),
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
    ("home", "name", "row", "shape"),
    [
        (workloads, "wasserstein_loss", "gradret W1", (4, 16)),
        (workloads, "wasserstein_loss", "score matrix W1", (4, 16, 8)),
        (workloads, "wasserstein_retrieval_loss", "fused scoring W1", (4, 16, 8)),
        (workloads, "textbook_wasserstein", "PyTorch W1", (4, 16)),
        (workloads, "sorted_wasserstein", "PyTorch W1", (4, 16)),
        (workloads, "level_wasserstein", "PyTorch W1, by level", (4, 16)),
    ],
)
@pytest.mark.parametrize(("change", "message"), [(double, "the loss is"), (double_gradient, "the gradient is 1 of")])
def test_a_wrong_loss_is_refused_before_timing(monkeypatch, home, name, row, shape, change, message):
    monkeypatch.setattr(home, name, change(getattr(home, name)))
    monkeypatch.setattr(speed, "time_in_turns", lambda *_: pytest.fail("timed"))
    with pytest.raises(GradretError, match=f"^{row} on {speed.name_shape(shape)}: {message}.*; nothing was timed$"):
        measure_small(shape)


@pytest.mark.parametrize(
    ("home", "name", "row"),
    [
        (workloads, "gaussian_loss", "gradret Gaussian"),
        (workloads, "published_gaussian", "SyCL Gaussian"),
        (workloads, "infonce", "InfoNCE"),
    ],
)
def test_the_other_losses_are_checked_too(monkeypatch, home, name, row):
    monkeypatch.setattr(home, name, double(getattr(home, name)))
    with pytest.raises(GradretError, match=f"^{row} on 4x16: the loss is"):
        measure_small((4, 16))


def test_what_was_measured_before_an_end_is_kept(monkeypatch, no_peaks, tmp_path):
    measure = speed.measure_shape

    def break_off(shape, **options):
        if shape == (2, 12):
            raise GradretError("broken off")
        return measure(shape, **options)

    monkeypatch.setattr(speed, "measure_shape", break_off)
    arguments = ("--shapes", "4x16,2x12", "--retrieval", "none", "--repeats", 3, "--device", "cpu")
    result = invoke(*arguments, "--out", tmp_path)
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (1, "Error: broken off")
    assert [path.name for path in tmp_path.iterdir()] == ["loss.part.json"]
    document = json.loads((tmp_path / "loss.part.json").read_text())
    assert {tuple(row["shape"]) for row in document["rows"]} == {(4, 16)}


@pytest.fixture
def no_peaks(monkeypatch):
    """For tests of something else: peaks take a process a row."""
    monkeypatch.setattr(speed, "measure_cpu_peaks", lambda *arguments: ((None, "left out") for _ in arguments[-1]))


def measure_small(shape, *, compiled=False, orders=(1, 2), dtype="float32"):
    return speed.measure_shape(shape, device=CPU, dtype=dtype, orders=orders, repeats=3, compiled=compiled)[0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_types_pass_the_check(dtype, no_peaks):
    for shape in ((4, 16), (4, 16, 8)):
        rows = measure_small(shape, dtype=dtype)
        assert {row["dtype"] for row in rows} == {dtype}
        assert all(row["both_ms"] for row in rows if row["row"] not in SWITCHED_OFF)


needs_clear_refs = pytest.mark.skipif(not memory.can_restart_peak(), reason="needs Linux's /proc/self/clear_refs")


@needs_clear_refs
def test_cpu_peaks_hold_what_must_exist_at_once():
    names = ["cross_entropy", "PyTorch W2, presorted", "no such row"]
    found = list(memory.measure_cpu_peaks((256, 4096), "float32", (2,), names))
    # cross_entropy, 4 MiB a matrix: in the end log-probabilities and two gradients; no more than five.
    assert 8 <= found[0][0] <= 20
    # Both prefix sums' merged steps, sorted, are (256, 8192) in float32 and their order in int64: 8 and 16 MiB.
    assert 24 <= found[1][0] <= 160
    assert [reason for _, reason in found[:2]] == [None, None]
    assert found[2] == (None, "the measuring process ended with 1")


def test_rows_take_turns_and_slow_ones_fewer():
    visits = []

    def make(name):
        score = torch.zeros(2, requires_grad=True)

        def loss():
            visits.append(name)
            return score.sum()

        return Row(name, inputs=(score,), loss=loss)

    steps = [
        workloads.Step(workloads.BURST_S, 0),
        workloads.Step(workloads.ROW_S / 4, 0),
        workloads.Step(workloads.ROW_S * 9, 0),
    ]
    samples = workloads.time_in_turns([make("quick"), make("slow"), make("slowest")], steps, 12, CPU)
    assert [len(taken) for taken in samples] == [12, 4, 3]
    slow, slowest = ([i for i, visit in enumerate(visits) if visit == name] for name in ("slow", "slowest"))
    # Every third round of quick and slow: three visits of quick before each of slow; every fourth for slowest.
    assert [visits[:i].count("quick") for i in slow] == [3, 6, 9, 12]
    assert [visits[:i].count("quick") for i in slowest] == [4, 8, 12]
    assert workloads.time_in_turns([], [], 12, CPU) == []


def test_quick_rows_are_timed_in_bursts():
    calls = []
    score = torch.zeros(2, requires_grad=True)
    row = Row("quick", inputs=(score,), loss=lambda: calls.append(1) or score.sum())
    sample = workloads.HostTimer(CPU).take_sample(row, workloads.Step(workloads.BURST_S / 10, 0))
    assert len(calls) == 11  # one of them untimed
    assert sample.both_ms == pytest.approx(sample.forward_ms + sample.backward_ms)
    assert sample.wall_ms is None


def test_summary_percentiles():
    samples = [workloads.Sample(float(i), 2.0 * i, 3.0 * i, None) for i in range(11)]
    assert workloads.summarize(samples) == {
        "repeats": 11,
        "forward_ms": {"median": 5, "p20": 2, "p80": 8},
        "backward_ms": {"median": 10, "p20": 4, "p80": 16},
        "both_ms": {"median": 15, "p20": 6, "p80": 24},
        "wall_ms": None,
    }


def test_load_of_others_is_measured_and_reported(monkeypatch, capsys, no_peaks):
    readings = iter([(10.0, 100.0), (13.0, 110.0)])
    monkeypatch.setattr(workloads, "_read_processor_s", lambda: next(readings))
    rows, share = speed.measure_shape((2, 8), device=CPU, dtype="float32", orders=(1,), repeats=3, compiled=False)
    assert share == pytest.approx(0.3)
    assert len(rows) == len(ROWS) - len(WASSERSTEIN_ROWS)
    assert "2x8: others took 30% of the processors' time meanwhile; better run it again" in capsys.readouterr().err
    monkeypatch.setattr(workloads, "_read_processor_s", lambda: None)
    with workloads.OtherLoad() as others:
        pass
    assert others.share is None


def make_result(**changes):
    """A result as on CUDA: one row, one skipped."""
    time = {"median": 0.0123, "p20": 0.0119, "p80": 1.5}
    row = {
        "shape": [512, 4096],
        "row": "gradret W2",
        **{name: time for name in ("forward_ms", "backward_ms", "both_ms", "wall_ms")},
        "times_cross_entropy": 0.567,
        "floor_fraction": 0.42,
        "peak_mib": 8.04,
        "peak_reason": None,
        "skipped": None,
    }
    rows = [row | changes, row | {"row": "POT W2", "skipped": "out of device memory"}]
    result = {"dtype": "float32", "threads": 2, "kernels": "cuda", "copy_gb_s": 4300.4, "peak_resolution_mib": 0.25}
    return result | {"other_load": {"512x4096": None}, "rows": rows}


def test_table_on_cuda(tmp_path):
    lines = format_speed(make_result()).splitlines()
    assert lines[0] == "512x4096 float32, 2 threads"
    assert lines[3].split() == "gradret W2 0.0123 0.0123 0.0123 [0.0119-1.50] 0.57 8.0 0.0123 42%".split()
    assert lines[4] == "not measured: POT W2: out of device memory"
    assert lines[-1] == "copy rate 4300 GB/s: 100 % reads scores and levels and writes gradients once"
    draw_speed(make_result(), tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_peak_below_the_resolution_or_unknown_is_not_shown_as_a_number():
    assert "<0.25" in format_speed(make_result(peak_mib=0.1)).splitlines()[3]
    unknown = format_speed(make_result(peak_mib=None, peak_reason="no way")).splitlines()
    assert unknown[3].split()[-3:] == ["?", "0.0123", "42%"]
    assert "peak MiB: no way" in unknown


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_rows():
    document = speed.measure_speed(
        [(64, 256)], device=torch.device("cuda"), repeats=3, compiled=False, retrieval=(32, 128, 16)
    )
    assert document["copy_gb_s"] > 10
    measured = [row for row in document["rows"] if not row["skipped"]]
    assert {row["row"] for row in document["rows"]} - {row["row"] for row in measured} == SWITCHED_OFF
    for row in measured:
        assert row["wall_ms"]["median"] > 0
        assert row["peak_mib"] > 0
        assert (row["floor_fraction"] is not None) == (row["order"] is not None and len(row["shape"]) == 2)


@pytest.mark.slow
@needs_clear_refs
def test_fused_scoring_needs_a_tenth_of_the_memory():
    names = ["fused scoring W1", "score matrix W1, raw grades", "score matrix cross_entropy"]
    peaks = [peak for peak, _ in memory.measure_cpu_peaks((2048, 16384, 384), "float32", (1,), names)]
    assert peaks[0] < peaks[1] / 10
    assert peaks[0] < peaks[2] / 10


@pytest.mark.slow
@pytest.mark.skipif(kernels.compiled is None, reason="no compiled kernels")
def test_the_level_kernel_is_faster_than_pytorch():
    """The README has the figures of a quiet machine; the quickest of many calls is what a busy one can still tell."""
    workload = workloads.make_workload((512, 4096), "float32", "cpu")
    rows = {row.name: row for row in workload.rows((1, 2), compiled=False)}
    names = ["gradret W1", "gradret W2", "PyTorch W1", "PyTorch W2", "cross_entropy"]
    quickest = dict.fromkeys(names, math.inf)
    for _ in range(15):
        for name in names:
            quickest[name] = min(quickest[name], workloads.measure_step(rows[name], CPU).seconds)
    assert quickest["gradret W1"] < quickest["cross_entropy"]
    assert quickest["gradret W2"] < quickest["cross_entropy"]
    assert quickest["gradret W1"] < quickest["PyTorch W1"] / 5
    assert quickest["gradret W2"] < quickest["PyTorch W2"] / 8

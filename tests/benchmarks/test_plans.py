"""The plans of quality: their runs, which rows they find, and the tables and charts of the committed results."""

import json

import pytest
from click.testing import CliRunner
from conftest import REPOSITORY
from PIL import Image

from benchmarks import tables
from benchmarks.quality import PLANS, run
from benchmarks.quality.plan import Experiment, Plan, System, list_cells, list_runs
from benchmarks.script import RESULTS
from gradret.bench.quality import FIT, UNTRAINED, Rows
from gradret.settings import FitSettings


def make_plan(**changes) -> Plan:
    values = {
        "measures": ("nDCG@10",),
        "primary": "ours",
        "settings": {"epochs": 1.0, "temperature": 0.1},
        "encoders": {"small": {"model": "m", "layers": 1}, "large": {"model": "m", "temperature": 0.2}},
        "tuned": {"large": {"ours": {"learning_rate": 1e-3}}},
        "data": {"lists": ("a.jsonl", "b.jsonl?sample=1")},
        "collections": {"A": "a/test", "B": "b/test"},
        "systems": {
            "untrained": System("untrained", ranker=UNTRAINED),
            "infonce": System("InfoNCE", {"loss": "infonce"}),
            "ours": System("ours", {"temperature": 0.3}),
        },
        "experiments": {"main": Experiment("Main", seeds=2), "few": Experiment("Few", collections=("A",), seeds=1)},
    }
    return Plan(**values | changes)


def test_what_a_cell_runs_by_hand():
    cells = {(c.experiment, c.encoder, c.system): c.runs for c in list_cells(make_plan())}
    assert len(cells) == 12
    first, second = cells["main", "large", "ours"]
    expected = FitSettings(
        model="m",
        data=("a.jsonl", "b.jsonl?sample=1"),
        exclude=("a/test", "b/test"),
        epochs=1.0,
        temperature=0.3,  # the system's goes over the encoder's, which goes over the plan's
        learning_rate=1e-3,
    )
    assert (first.ranker, first.settings, first.sources) == (FIT, expected, ("a/test", "b/test"))
    assert second.settings.seed == 1 and second.title == "ours, seed 1 (large, lists)"
    assert cells["main", "small", "infonce"][0].settings.layers == 1
    assert [run.ranker for run in cells["main", "small", "untrained"]] == [UNTRAINED]


def test_equal_runs_are_one_with_all_collections():
    plan = make_plan()
    runs = list_runs(plan)
    assert len(runs) == 10 and len({run.key for run in runs}) == 10
    assert all(run.sources == ("a/test", "b/test") for run in runs)
    del plan.experiments["main"]
    assert all(run.sources == ("a/test",) for run in list_runs(plan))


def test_what_is_varied():
    shuffled = Experiment("Noise", vary="shuffle", values={0.0: {}, 0.4: {"source": "shuffle=0.4"}}, seeds=1)
    hot = Experiment("Hot", vary="temperature", values={0.9: {"temperature": 0.9}}, seeds=1)
    cells = list_cells(make_plan(experiments={"noise": shuffled, "hot": hot}))
    found = {(c.experiment, c.value): c.runs[0].settings for c in cells if c.system == "ours" and c.encoder == "small"}
    assert found["noise", 0.0].data == ("a.jsonl", "b.jsonl?sample=1")
    assert found["noise", 0.4].data == ("a.jsonl?shuffle=0.4", "b.jsonl?sample=1&shuffle=0.4")
    assert found["hot", 0.9].temperature == 0.9


def test_every_committed_row_is_a_run_of_the_plan():
    stored = Rows(RESULTS / "reported" / "rows.jsonl").read()
    assert stored and stored.keys() <= {run.key for run in list_runs(PLANS["reported"])}


def test_the_first_seed_of_everything_is_done_first():
    titles = [run.title for run in list_runs(make_plan(experiments={"main": Experiment("Main", seeds=2)}))]
    assert titles == [
        *("untrained (small)", "infonce, seed 0 (small, lists)", "ours, seed 0 (small, lists)"),
        *("untrained (large)", "infonce, seed 0 (large, lists)", "ours, seed 0 (large, lists)"),
        *("infonce, seed 1 (small, lists)", "ours, seed 1 (small, lists)"),
        *("infonce, seed 1 (large, lists)", "ours, seed 1 (large, lists)"),
    ]


def test_queries_that_are_reported_are_neither_tuned_on_nor_trained_on():
    folder = REPOSITORY / "benchmarks" / "queries"
    ids = {path.stem: set(path.read_text().split()) for path in folder.iterdir()}
    assert len(ids) == 6 and all(ids.values())
    assert all(int(i) % 2 for i in ids["dev-cranfield"])  # the even ones are reported
    lists = {
        line.split("\t")[0] for line in open(RESULTS / "lists" / "scifact" / "qrels" / "train.tsv", encoding="utf-8")
    }
    assert len(lists) == 305 and not ids["dev-scifact"] & lists  # a heading among them
    for plan in PLANS.values():
        assert all({*run.settings.exclude} == {*plan.collections.values()} for run in list_runs(plan))
    tuned = PLANS["development"].collections.values()
    assert not {*PLANS["reported"].collections.values()} & {*tuned}
    assert not any(part in source for source in tuned for part in ("test", "even"))


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (["loss"], 43),
        (["defaults"], 31),
        (["step"], 17),
        (["gen"], 5),
        (["fit"], 14),
        (["quality"], 51),
        (["leads"], 75),
        (["writers"], 24),
        (["transfer"], 14),
        (["curves"], 15),
        (["tuning"], 43),
    ],
)
def test_the_tables_of_the_pages_are_the_results(arguments, lines):
    table = CliRunner().invoke(tables.main, arguments).stdout.strip()
    assert len(table.splitlines()) == lines
    text = (REPOSITORY / "benchmarks" / "README.md").read_text()
    assert [part for part in table.split("\n\n") if part not in text] == []


def test_the_chart_and_the_code_behind_the_rows(tmp_path):
    chart = tmp_path / "curves.png"
    assert CliRunner().invoke(tables.main, ["curves", "--chart", str(chart)]).exit_code == 0
    drawn, committed = (Image.open(path).text for path in (chart, RESULTS / "curves.png"))
    assert drawn == committed and "curve wasserstein" in drawn["Description"]
    first, *commits = CliRunner().invoke(tables.main, ["runs"]).stdout.splitlines()
    rows = (RESULTS / "reported" / "rows.jsonl").read_text().splitlines()
    assert first == f"{len(rows)} of {len(list_runs(PLANS['reported']))} runs are done; made by"
    assert commits and all(line.startswith("- commit ") for line in commits)


def test_without_rows_or_lists_a_command_ends_with_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IR_DATASETS_HOME", str(tmp_path))
    (tmp_path / "rows.jsonl").touch()
    for command, arguments, message in (
        (
            tables.main,
            ["leads", "--rows", "rows.jsonl"],
            "rows.jsonl: holds no row of the plan; python -m benchmarks.quality.run",
        ),
        (tables.main, ["quality", "--rows", "no.jsonl"], "no.jsonl: holds no row of the plan"),
        (tables.main, ["fit", str(RESULTS / "loss-cpu.json")], "is no result of benchmarks.speed.fit"),
        (run.main, ["--out", "out", "--plan", "reported"], "is not there"),
    ):
        plan = make_plan(collections=dict.fromkeys("AB", "graded/no.jsonl"))
        monkeypatch.setattr(run, "list_runs", lambda _, plan=plan: list_runs(plan))
        result = CliRunner().invoke(command, arguments)
        assert (result.exit_code, result.stderr.count("\n")) == (1, 1), (result.stderr, result.exception)
        assert message.replace("is not there", "graded/no.jsonl: no such file") in result.stderr


def test_a_shard_does_its_own_runs(tmp_path, monkeypatch):
    taken = []

    def do_runs(runs, out, **options):
        taken.append([run.title for run in runs])
        return {run.key: {} for run in runs}, None

    monkeypatch.setattr(run, "do_runs", do_runs)
    monkeypatch.setitem(run.PLANS, "reported", make_plan())
    for shard in ("1/2", "2/2"):
        result = CliRunner().invoke(run.main, ["--shard", shard, "--out", str(tmp_path)])
        assert result.stdout == f"5 of 5 runs are done: {tmp_path}/rows.jsonl\n"
    every = [run.title for run in list_runs(make_plan())]
    assert sorted(taken[0] + taken[1]) == sorted(every) and taken[0] == every[::2]


def test_a_row_of_the_committed_ones_is_whole():
    row = json.loads((RESULTS / "reported" / "rows.jsonl").read_text().splitlines()[-1])
    assert row["versions"]["commit"] and row["code"] and row["content"].keys() == {"encoder", "data"}

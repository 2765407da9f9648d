"""The quality benchmark: its runs, each done once and kept, stopped and gone on with, shared out; its command."""

import json
import os
import shutil
import sys

import ir_measures
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import REPOSITORY, SAMPLE_FILE, list_record
from scipy.stats import ttest_rel

import gradret.bench.quality
import gradret.cli
from benchmarks.quality.controls import register
from gradret.bench.grid_file import read_grid
from gradret.bench.quality import run_grid
from gradret.cli import main
from gradret.console import GradretError
from gradret.data.sources import open_collection, parse_source
from gradret.encoder.load import default_device
from gradret.settings import DEFAULT_LOSS
from gradret.train.mining import search_bm25

pytestmark = pytest.mark.usefixtures("one_thread")

PLAN = """
measures = ["nDCG@10", "RR@10"]
seeds = 2
baselines = ["infonce"]
[settings]
max_steps = 2
batch_lists = 4
precision = "float32"
[encoders.tiny]
model = "{model}"
[data]
all = ["sample.jsonl"]
[collections]
"Even queries" = "sample?queries=even"
"Two grades" = "sample?queries=even&grades=2:0,1:0"
[systems.bm25]
ranker = "bm25"
[systems.untrained]
ranker = "untrained"
[systems.infonce]
loss = "infonce"
[systems.ours]
[[experiments]]
name = "main"
data = "all"
[[experiments]]
name = "heat"
data = "all"
systems = ["untrained", "ours"]
collections = ["Two grades"]
vary = "temperature"
values = [0.05, 1.0]
"""


@pytest.fixture
def plan(tiny_encoder, tmp_path, monkeypatch):
    """A plan of 8 runs: bm25, untrained, two seeds of infonce, of ours and of ours at temperature 1."""
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(SAMPLE_FILE, "sample.jsonl")
    path = tmp_path / "plan.toml"
    path.write_text(PLAN.replace("{model}", str(tiny_encoder)))
    return path


@pytest.fixture(scope="module")
def in_one_go(tiny_encoder, tmp_path_factory):
    """What all runs give when nothing stops them, by key."""
    folder, before = tmp_path_factory.mktemp("one-go"), os.getcwd()
    os.chdir(folder)
    try:
        shutil.copyfile(SAMPLE_FILE, "sample.jsonl")
        (folder / "plan.toml").write_text(PLAN.replace("{model}", str(tiny_encoder)))
        return run_grid(read_grid("plan.toml"), folder, progress=False)
    finally:
        os.chdir(before)


def find_measured(rows: dict) -> dict:
    return {key: row["collections"] for key, row in rows.items()}


def read_lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def invoke(*arguments):
    return CliRunner().invoke(main, ["bench", "quality", *map(str, arguments)])


def test_every_run_is_one_row_with_what_it_gave(in_one_go):
    assert (in_one_go.planned, len(in_one_go.rows), in_one_go.error) == (8, 8, None)
    sizes = {"queries": 48, "documents": 384}
    assert in_one_go.collections == {
        "Even queries": {"source": "sample?queries=even", **sizes},
        "Two grades": {"source": "sample?queries=even&grades=2:0,1:0", **sizes},
    }
    runs = [(row["run"], row) for row in in_one_go.rows.values()]
    shown = [(run["ranker"], run["seed"], *(row[k] for k in ("steps", "device", "precision"))) for run, row in runs]
    where = default_device()
    fits = [("fit", seed, 2, where, "float32") for _ in range(3) for seed in (0, 1)]
    assert shown == [("bm25", None, None, "cpu", None), ("untrained", None, None, where, "float32"), *fits]
    for row in in_one_go.rows.values():
        for found in row["collections"].values():
            assert list(found["measures"]) == ["nDCG@10", "RR@10"] and list(found["per_query"]) == ["nDCG@10"]
            values = list(found["per_query"]["nDCG@10"].values())
            assert len(values) == 48 and np.mean(values) == pytest.approx(found["measures"]["nDCG@10"], abs=5e-5)
    *shared, hot, _ = in_one_go.rows.values()
    assert [len(row["collections"]) for row in (*shared, hot)] == [2] * 6 + [1]  # ours serves both experiments


@pytest.mark.parametrize("native", [True, False])
def test_auto_trains_and_measures_in_what_the_machine_computes_in(plan, tmp_path, monkeypatch, native):
    plan.write_text(plan.read_text().replace('precision = "float32"', "").replace("seeds = 2", "seeds = 1"))
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: native)
    measured, evaluate = [], gradret.bench.quality.evaluate

    def record(encoder, collection, *, precision, **options):
        measured.append(precision)
        return evaluate(encoder, collection, precision=precision, **options)

    monkeypatch.setattr(gradret.bench.quality, "evaluate", record)
    rows = run_grid(read_grid(plan), tmp_path, device="cpu", max_runs=3, progress=False).rows.values()
    precision = "bfloat16" if native else "float32"
    assert [row["precision"] for row in rows] == [None, precision, precision]
    assert measured == [precision] * 4
    assert all("precision" not in row["run"]["settings"] for row in rows)  # the same run on another machine


def test_no_training_list_has_an_evaluated_query(in_one_go):
    # The file holds all 96 queries, of which 48 are measured.
    assert [row["lists"] for row in in_one_go.rows.values()] == [None, None, *[48] * 6]


def test_a_run_is_what_fit_and_evaluate_give_by_hand(in_one_go, plan, tmp_path):
    from gradret.encoder.load import load_encoder
    from gradret.evaluation.measures import evaluate
    from gradret.train.loop import fit

    row = next(r for r in in_one_go.rows.values() if r["run"]["settings"].get("loss") == "infonce")
    run = next(run for run in read_grid(plan).wanted() if run.settings.loss == "infonce")
    result = fit(run.settings, tmp_path / "by-hand", progress=False)
    collection = open_collection(parse_source("sample?queries=even"))
    expected = evaluate(load_encoder(str(result.out)), collection, measures=["nDCG@10", "RR@10"], progress=False)
    assert row["collections"]["sample?queries=even"]["measures"] == expected.measures


def test_a_torn_last_line_is_done_again(in_one_go, plan, tmp_path, capsys):
    outcome = run_grid(read_grid(plan), ".", max_runs=3, progress=False)
    assert len(outcome.rows) == 3
    rows = tmp_path / "rows.jsonl"
    whole = rows.read_bytes()
    rows.write_bytes(whole[:-100])
    capsys.readouterr()
    outcome = run_grid(read_grid(plan), ".", max_runs=1, progress=False)
    assert "2 of 8 runs are done already" in capsys.readouterr().err
    assert len(read_lines(rows)) == 3
    found = find_measured(outcome.rows)
    assert found.items() <= find_measured(in_one_go.rows).items() and len(found) == 3


def test_rows_of_another_version_are_done_again(plan, tmp_path, capsys):
    run_grid(read_grid(plan), ".", max_runs=2, progress=False)
    rows = tmp_path / "rows.jsonl"
    lines = read_lines(rows)
    lines[0]["versions"]["gradret"] = "0.0.9"
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    outcome = run_grid(read_grid(plan), ".", max_runs=1, progress=False)
    told = capsys.readouterr().err
    assert "rows.jsonl: 1 row is of gradret 0.0.9 and not used" in told and "1 of 8 runs are done already" in told
    assert len(outcome.rows) == 2 and len(read_lines(rows)) == 3


def test_what_is_there_is_shown_whatever_version_made_it(plan, tmp_path, capsys):
    made = run_grid(read_grid(plan), ".", max_runs=2, progress=False)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(rows.read_text().replace('"gradret": "', '"gradret": "0.0.'))
    capsys.readouterr()
    shown = run_grid(read_grid(plan), ".", max_runs=0)
    assert find_measured(shown.rows) == find_measured(made.rows) and capsys.readouterr().err == ""


def test_two_shards_in_one_folder_are_one_process(in_one_go, plan, tmp_path, capsys):
    grid = read_grid(plan)
    os.makedirs("out")
    first = run_grid(grid, "out", shard=(1, 2), progress=False)
    assert (len(first.rows), first.planned) == (4, 8)
    joined = run_grid(grid, "out", shard=(2, 2), progress=False)
    assert find_measured(joined.rows) == find_measured(in_one_go.rows)
    assert len(read_lines(tmp_path / "out" / "rows.jsonl")) == 8
    capsys.readouterr()
    run_grid(grid, "out", shard=(2, 2), progress=False)
    assert "4 of 4 runs of shard 2/2 are done already in out/rows.jsonl" in capsys.readouterr().err


def test_fresh_replaces_the_rows_of_its_own_runs_alone(plan, tmp_path):
    grid, rows = read_grid(plan), tmp_path / "rows.jsonl"
    run_grid(grid, ".", max_runs=2, progress=False)
    bm25, untrained = read_lines(rows)
    stranger = {**bm25, "run": {**bm25["run"], "ranker": "other"}}
    marked = {**bm25, "marked": True}
    rows.write_text("".join(json.dumps(line) + "\n" for line in (stranger, marked, untrained)))
    # The untrained encoder is the second shard's.
    outcome = run_grid(grid, ".", shard=(1, 2), max_runs=1, fresh=True, progress=False)
    lines = read_lines(rows)
    assert lines[:2] == [stranger, untrained] and lines[2] == bm25
    assert len(outcome.rows) == 2
    # With one process for all, it is the next run, which max_runs leaves alone.
    run_grid(grid, ".", max_runs=1, fresh=True, progress=False)
    assert read_lines(rows) == [stranger, untrained, bm25]


def test_what_is_wanted_decides_whether_a_row_will_do(plan, capsys):
    text = plan.read_text()
    plan.write_text(text.replace('name = "main"', 'name = "main"\ncollections = ["Two grades"]'))
    run_grid(read_grid(plan), ".", max_runs=2, progress=False)
    assert len(run_grid(read_grid(plan), ".", max_runs=0).rows) == 2
    plan.write_text(text)  # two collections wanted, one there
    assert run_grid(read_grid(plan), ".", max_runs=0).rows == {}
    run_grid(read_grid(plan), ".", max_runs=2, progress=False)
    assert len(run_grid(read_grid(plan), ".", max_runs=0).rows) == 2
    plan.write_text(text.replace('"RR@10"', '"AP"'))
    assert run_grid(read_grid(plan), ".", max_runs=0).rows == {}
    capsys.readouterr()
    run_grid(read_grid(plan), ".", max_runs=1, progress=False)
    told = capsys.readouterr().err
    assert "2 runs were done without a measure or a collection that is wanted now: again" in told
    plan.write_text(text.replace('"nDCG@10", "RR@10"', '"RR@10", "nDCG@10"'))  # no query's RR@10 is kept
    assert run_grid(read_grid(plan), ".", max_runs=0).rows == {}


def test_other_words_in_a_file_make_another_run(plan, tmp_path, capsys):
    run_grid(read_grid(plan), ".", max_runs=3, progress=False)
    with open("sample.jsonl", "a") as file:
        file.write(json.dumps(list_record("new")) + "\n")
    capsys.readouterr()
    outcome = run_grid(read_grid(plan), ".", max_runs=1, progress=False)
    told = capsys.readouterr().err
    assert "1 run was done with data, an encoder or a collection that changed since: again" in told
    assert "2 of 8 runs are done already" in told
    assert [row["lists"] for row in outcome.rows.values()] == [None, None, 49]


def test_rows_of_other_settings_are_told_and_kept(plan, tmp_path, capsys):
    run_grid(read_grid(plan), ".", max_runs=3, progress=False)
    plan.write_text(plan.read_text().replace("max_steps = 2", "max_steps = 1"))
    capsys.readouterr()
    run_grid(read_grid(plan), ".", max_runs=1, progress=False)
    told = capsys.readouterr().err
    assert "1 run was done with other settings or collections than are planned now: kept, not used" in told
    assert "2 of 8 runs are done already" in told and len(read_lines(tmp_path / "rows.jsonl")) == 4


def test_other_passages_make_the_untrained_rows_anew(plan, tmp_path, capsys):
    run_grid(read_grid(plan), ".", max_runs=2, progress=False)
    text = (tmp_path / "sample.jsonl").read_text()
    plan.write_text(plan.read_text().replace("sample?", "sample.jsonl?"))
    run_grid(read_grid(plan), ".", max_runs=2, progress=False)
    (tmp_path / "sample.jsonl").write_text(text.replace(" the ", " a "))
    capsys.readouterr()
    run_grid(read_grid(plan), ".", max_runs=2, progress=False)
    assert "2 runs were done with data, an encoder or a collection that changed since: again" in capsys.readouterr().err


def test_other_queries_in_a_file_make_another_run(plan, tmp_path, capsys):
    plan.write_text(plan.read_text().replace('"sample?queries=even"', '"sample?queries=chosen"'))
    ids = [json.loads(line)["query_id"] for line in SAMPLE_FILE.read_text().splitlines()]
    chosen = tmp_path / "chosen"
    chosen.write_text("\n".join(ids[:10]))
    before = run_grid(read_grid(plan), ".", max_runs=3, progress=False)
    chosen.write_text("\n".join(ids[10:20]))  # as many
    capsys.readouterr()
    after = run_grid(read_grid(plan), ".", max_runs=3, progress=False)
    assert "3 runs were done with data, an encoder or a collection that changed since: again" in capsys.readouterr().err
    for key, row in after.rows.items():
        old, new = (r["collections"]["sample?queries=chosen"]["per_query"]["nDCG@10"] for r in (before.rows[key], row))
        assert old.keys() == set(ids[:10]) and new.keys() == set(ids[10:20])


def test_queries_that_are_reported_are_neither_tuned_on_nor_trained_on():
    folder = REPOSITORY / "benchmarks" / "queries"
    ids = {path.stem: set(path.read_text().split()) for path in folder.iterdir()}
    assert len(ids) == 5 and all(ids.values())
    assert not ids["dev-cranfield"] & ids["held-out-cranfield"]
    assert not ids["dev-scifact"] & ids["held-out-scifact"]
    assert all(int(i) % 2 for i in ids["dev-cranfield"] | ids["held-out-cranfield"])  # the even ones are reported
    register()
    grid, dev = (read_grid(REPOSITORY / "benchmarks" / name) for name in ("quality.toml", "dev.toml"))
    assert set(grid.collections.values()) == set(grid.settings.exclude)
    assert not set(grid.collections.values()) & set(dev.collections.values())
    assert not any("test" in source or "even" in source for source in dev.collections.values())


CHECKS = [
    ('all = ["sample.jsonl"]', 'all = ["no.jsonl"]', "[data] all: no.jsonl: no such file"),
    ('"sample?queries=even&grades=2:0,1:0"', '"no.jsonl"', "[collections] Two grades: no.jsonl: no such file"),
    ("max_steps = 2", 'exclude = ["no.jsonl"]', "[settings] exclude: no.jsonl: no such file"),
    ('model = "', 'model = "/no', "[encoders.tiny]: /no{model}: no such directory"),
    (
        "[systems.ours]",
        '[systems.ours]\nmine = "k=1"',
        "[systems.ours]: mine 'k=1': grade is missing; give at least k=K,grade=GRADE, ",
    ),
    ("[systems.ours]", '[systems.ours]\nmine = "k=1,grade=0,from=no.jsonl"', "[systems.ours]: no.jsonl: no such file"),
    ("[systems.ours]", '[systems.ours]\ndev = "no.jsonl"', "[systems.ours]: no.jsonl: no such file"),
    ("[systems.ours]", '[systems.ours]\ndev_measure = "nDGC"', "[systems.ours]: measure 'nDGC' is not known"),
    ('all = ["sample.jsonl"]', 'all = ["sample?queries=even"]', "[data] all: no ranking list is left: "),
    (
        "[systems.ours]",
        '[systems.ours]\nmine = "k=1,grade=3"',
        "[systems.ours]: mine 'k=1,grade=3': mined passages are ",
    ),
    (
        '[data]\nall = ["sample.jsonl"]',
        'in_batch = false\n[data]\nall = ["sample.jsonl?grades=1:1,2:2,3:3"]',
        "[systems.ours]: loss wasserstein:.15+contrast:.85: contrast sets passages with target mass against ",
    ),
]


@pytest.mark.parametrize(("old", "new", "message"), CHECKS)
def test_everything_is_looked_at_before_the_first_run(plan, tiny_encoder, old, new, message):
    plan.write_text(plan.read_text().replace(old, new))
    with pytest.raises(GradretError) as error:
        run_grid(read_grid(plan), ".", fresh=True, progress=False)
    assert str(error.value).startswith(f"{plan}: {message.replace('{model}', str(tiny_encoder))}")
    assert not os.path.exists("rows.jsonl")


@pytest.mark.parametrize(
    ("package", "setting", "message"),
    [
        ("bm25s", "", "[systems.bm25]: ranker = 'bm25' needs the package bm25s: pip install 'gradret[bm25]'"),
        ("peft", "lora = 2", "[systems.ours]: lora needs the package peft: pip install 'gradret[lora]'"),
    ],
)
def test_a_package_that_a_run_needs_is_asked_for_first(plan, monkeypatch, package, setting, message):
    plan.write_text(plan.read_text().replace("[systems.ours]", f"[systems.ours]\n{setting}"))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(GradretError) as error:
        run_grid(read_grid(plan), ".", progress=False)
    assert str(error.value) == f"{plan}: {message}"
    if package == "bm25s":  # nobody else needs it
        plan.write_text(plan.read_text().replace('[systems.bm25]\nranker = "bm25"', "[systems.bm25]\nloss = 'kl'"))
        assert run_grid(read_grid(plan), ".", max_runs=1, progress=False).error is None


def test_each_run_is_told_with_what_is_left(plan, capsys):
    run_grid(read_grid(plan), ".", max_runs=3, progress=False)
    lines = capsys.readouterr().err.splitlines()
    runs = [line for line in lines if line.startswith("run ")]
    assert runs == ["run 1 of 8: bm25", "run 2 of 8: untrained (tiny)", "run 3 of 8: infonce, seed 0 (tiny, all)"]
    left = [line.partition(", about ")[0] for line in lines if " to go" in line]
    assert left == ["2 runs to go", "1 run to go"]
    assert len([line for line in lines if line.startswith(("Even queries: nDCG@10 0.", "Two grades: nDCG@10 0."))]) == 6


def test_the_bm25_row_is_what_bm25s_ranks(in_one_go):
    import bm25s

    (row,) = [r for r in in_one_go.rows.values() if r["run"]["ranker"] == "bm25"]
    lists = read_lines(SAMPLE_FILE)
    texts = {f"{r['query_id']}/{i}": p["text"] for r in lists for i, p in enumerate(r["passages"], 1)}
    tokenizer = bm25s.tokenization.Tokenizer()
    index = bm25s.BM25()
    index.index(tokenizer.tokenize(list(texts.values()), show_progress=False), show_progress=False)
    qrels, run = {}, {}
    for record in lists:
        query_id = record["query_id"]
        if int(query_id.rpartition("-")[2]) % 2 == 0:
            qrels[query_id] = {f"{query_id}/{i}": p["grade"] for i, p in enumerate(record["passages"], 1)}
            (words,) = tokenizer.tokenize([record["query"]], update_vocab=False, show_progress=False, return_as="ids")
            scores = index.get_scores_from_ids(words).tolist()
            run[query_id] = {doc: score for doc, score in zip(texts, scores, strict=True) if score > 0}
    measures = [ir_measures.parse_measure(m) for m in ("nDCG@10", "RR@10")]
    expected = {str(m): v for m, v in ir_measures.calc_aggregate(measures, qrels, run).items()}
    assert row["collections"]["sample?queries=even"]["measures"] == pytest.approx(expected, abs=1e-9)
    assert expected["nDCG@10"] > 0.3


def test_bm25_keeps_the_order_of_ties_and_leaves_out_the_query_itself(beir_directory):
    lines = [("a", "moon"), ("b", "moon"), ("c", "the"), ("d", "moon moon tide"), ("q1", "moon moon")]
    documents = [json.dumps({"_id": i, "title": "", "text": text}) for i, text in lines]
    (beir_directory / "corpus.jsonl").write_text("\n".join(documents) + "\n")
    (beir_directory / "queries.jsonl").write_text('{"_id": "q1", "text": "Moon?"}\n{"_id": "q2", "text": "yeast"}\n')
    qrels = "query-id\tcorpus-id\tscore\nq1\ta\t1\nq2\tb\t1\n"
    (beir_directory / "qrels" / "test.tsv").write_text(qrels)
    collection = open_collection(parse_source(str(beir_directory)))
    run = search_bm25(collection, depth=10)
    # "moon" twice in two words .50, once in one .46 (of equal scores the later id first), twice in three .42, each
    # times the idf, tf / (tf + 1.5 (.25 + .75 words / 1.4)); "the" is a stop word.
    assert [doc for doc, _ in run["q1"]] == ["q1", "b", "a", "d"]
    scores = [score for _, score in run["q1"]]
    assert scores == pytest.approx([scores[0] * s / 0.5022 for s in (0.5022, 0.4590, 0.4590, 0.4179)], rel=1e-3)
    assert run["q2"] == []
    collection.drop_self = True
    assert [doc for doc, _ in search_bm25(collection, depth=10)["q1"]] == ["b", "a", "d"]
    assert [doc for doc, _ in search_bm25(collection, depth=2)["q1"]] == ["b", "a"]


def test_the_commands_own_plan_and_its_second_call(tiny_encoder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ("--model", tiny_encoder, "--max-steps", 2, "--seeds", 2, "--precision", "float32", "--json")
    result = invoke(*arguments)
    assert result.exit_code == 0, result.stderr
    assert "run 2 of 5: infonce, seed 0 (" in result.stderr
    document = json.loads(result.stdout)
    assert document == json.loads((tmp_path / "gradret-bench" / "quality.json").read_text())
    (experiment,) = document["experiments"]
    column = "sample?queries=even"
    found = {row["system"]: row["columns"][column] for row in experiment["rows"]}
    assert list(found) == ["untrained", "infonce", DEFAULT_LOSS]
    rows = read_lines(tmp_path / "gradret-bench" / "rows.jsonl")
    per_query = [list(row["collections"][column]["per_query"]["nDCG@10"].values()) for row in rows]
    assert len(per_query) == 5
    # Runs 2 and 3 are infonce's seeds, 4 and 5 wasserstein's.
    ours, theirs = np.mean(per_query[3:], 0), np.mean(per_query[1:3], 0)
    assert found[DEFAULT_LOSS]["p"]["infonce"]["t"] == pytest.approx(ttest_rel(ours, theirs).pvalue)
    assert found["infonce"]["values"]["nDCG@10"] == [
        row["collections"][column]["measures"]["nDCG@10"] for row in rows[1:3]
    ]
    again = invoke(*arguments)
    assert "5 of 5 runs are done already in gradret-bench/rows.jsonl; --fresh measures again\n" in again.stderr
    assert "run " not in again.stderr.replace("runs", "")
    assert json.loads(again.stdout)["experiments"] == document["experiments"]

"""The quality benchmark: its runs, each done once and kept, stopped and gone on with; its tests, table and chart."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import ir_measures
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import SAMPLE_FILE
from forked import ForkedPython

import gradret
import gradret.bench.quality
from gradret.bench.quality import (
    BM25,
    FIT,
    MEAN,
    UNTRAINED,
    OpenedInputs,
    Rows,
    Run,
    choose_rows,
    digest_code,
    do_runs,
    draw_quality,
    find_key,
    format_quality,
    make_document,
    tabulate,
)
from gradret.cli import main
from gradret.console import GradretError
from gradret.data.sources import open_collection, parse_source
from gradret.encoder.load import default_device, load_encoder
from gradret.evaluation.measures import evaluate
from gradret.evaluation.significance import find_differences, randomisation_tests
from gradret.settings import FitSettings
from gradret.train.loop import Trainer, fit
from gradret.train.mining import search_bm25

pytestmark = pytest.mark.usefixtures("one_thread")
EVEN, TWO_GRADES = "sample?queries=even", "sample?queries=even&grades=2:0,1:0"
ODD = "sample?queries=odd"
MEASURES = ("nDCG@10", "RR@10")


def make_runs(encoder: Path, *, data: str = "sample.jsonl", sources=(EVEN, TWO_GRADES), **changes) -> list[Run]:
    """bm25, untrained, two seeds of infonce."""
    chosen = {"data": (data,), "exclude": tuple(sources), "loss": "infonce", "max_steps": 2, "batch_lists": 4}
    settings = [
        FitSettings(**{"model": str(encoder), "precision": "float32", "seed": seed} | chosen | changes)
        for seed in (0, 1)
    ]
    untrained = [Run(ranker, settings[0], tuple(sources), ranker) for ranker in (BM25, UNTRAINED)]
    return untrained + [Run(FIT, s, tuple(sources), f"infonce, seed {s.seed}") for s in settings]


def do(runs, out=".", **options):
    return do_runs(runs, out, **{"measures": MEASURES} | options)


@pytest.fixture
def runs(tiny_encoder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(SAMPLE_FILE, "sample.jsonl")
    return make_runs(tiny_encoder)


@pytest.fixture(scope="module")
def in_one_go(tiny_encoder, tmp_path_factory):
    """The rows of all runs when nothing stops them."""
    folder, before = tmp_path_factory.mktemp("one-go"), os.getcwd()
    os.chdir(folder)
    try:
        shutil.copyfile(SAMPLE_FILE, "sample.jsonl")
        runs = make_runs(tiny_encoder)
        found, error = do(runs)
        assert error is None and read_lines(folder / "rows.jsonl") == list(found.values())
        return [found[run.key] for run in runs]
    finally:
        os.chdir(before)


def find_measured(rows) -> list[dict]:
    return [row["collections"] for row in rows]


def read_lines(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


# --- runs and their rows


def test_every_run_is_one_row_with_what_it_gave(in_one_go, tmp_path):
    shown = [(row["run"]["ranker"], *(row[k] for k in ("steps", "lists", "device", "precision"))) for row in in_one_go]
    where = default_device()
    # The file holds all 96 queries, of which 48 are measured.
    fits = [("fit", 2, 48, where, "float32")] * 2
    assert shown == [("bm25", None, None, "cpu", None), ("untrained", None, None, where, "float32"), *fits]
    for row in in_one_go:
        assert list(row["collections"]) == [EVEN, TWO_GRADES] and row["code"] == digest_code()
        for found in row["collections"].values():
            assert list(found["measures"]) == list(MEASURES) and list(found["per_query"]) == ["nDCG@10"]
            assert (found["queries"], found["documents"]) == (48, 384)
            values = list(found["per_query"]["nDCG@10"].values())
            assert len(values) == 48 and np.mean(values) == pytest.approx(found["measures"]["nDCG@10"], abs=5e-5)


def test_a_run_is_what_fit_and_evaluate_give_by_hand(in_one_go, runs, tmp_path):
    result = fit(runs[2].settings, tmp_path / "by-hand", progress=False)
    expected = evaluate(load_encoder(str(result.out)), open_collection(parse_source(EVEN)), measures=MEASURES)
    assert in_one_go[2]["collections"][EVEN]["measures"] == expected.measures


@pytest.mark.parametrize("native", [True, False])
def test_auto_trains_and_measures_in_what_the_machine_computes_in(runs, tiny_encoder, monkeypatch, native):
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: native)
    measured = []

    def record(encoder, collection, *, precision, **options):
        measured.append(precision)
        return evaluate(encoder, collection, precision=precision, **options)

    monkeypatch.setattr(gradret.bench.quality, "evaluate", record)
    rows, _ = do(make_runs(tiny_encoder, precision="auto", sources=[EVEN])[1:3], device="cpu")
    precision = "bfloat16" if native else "float32"
    assert [row["precision"] for row in rows.values()] == measured == [precision] * 2
    # The same run on another machine.
    assert all(row["run"]["settings"]["precision"] == "auto" for row in rows.values())


def test_the_key_is_of_what_decides_a_run(tiny_encoder):
    def key(ranker, **changes):
        return Run(ranker, FitSettings(**{"model": str(tiny_encoder)} | changes), (), "").key

    assert key(FIT) != key(FIT, seed=1) and key(FIT) != key(UNTRAINED) and key(FIT) != key(FIT, exclude=("a",))
    assert key(UNTRAINED) == key(UNTRAINED, seed=1, learning_rate=1.0) != key(UNTRAINED, layers=1)
    assert key(UNTRAINED) != key(UNTRAINED, precision="bfloat16")
    assert key(BM25) == key(BM25, layers=1)
    run = Run(FIT, FitSettings(lora=2, lora_targets=("query",)), (), "")
    record = json.loads(json.dumps(run.record()))
    whole = find_key(record)
    assert whole == run.key
    del record["settings"]["patience"]  # of a row from before there was the setting
    assert find_key(record) == whole
    record["settings"]["no_longer"] = 1
    assert find_key(record) != whole


def test_only_rows_of_the_same_code_are_done(runs, tmp_path, monkeypatch, capsys):
    do(runs[:2])
    rows = Rows("rows.jsonl")
    monkeypatch.setattr(gradret.bench.quality, "digest_code", lambda *_: "another")
    capsys.readouterr()
    do(runs[:2])
    told = capsys.readouterr().err
    assert "2 runs were done with other code, data, encoders, collections or measures than there are now: again" in told
    assert [row["code"] for row in read_lines("rows.jsonl")] == [digest_code()] * 2 + ["another"] * 2
    # A report shows rows of any code, the latest first.
    shown = choose_rows(rows.read(), runs[:2], MEASURES)
    assert [row["code"] for row in shown.values()] == ["another"] * 2
    monkeypatch.setattr(gradret.bench.quality, "digest_code", lambda *_: "a third")
    assert choose_rows(rows.read(), runs[:2], MEASURES, OpenedInputs(runs[:2])) == {}


def test_the_codes_digest_is_of_what_trains_and_measures(tmp_path, monkeypatch):
    package, here = tmp_path / "gradret", Path(gradret.__file__).parent
    shutil.copytree(here, package, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    before = digest_code()
    monkeypatch.setattr(gradret.bench.quality, "__file__", str(package / "bench" / "quality.py"))
    assert digest_code() == before
    for name, decides in (
        ("bench/quality.py", False),
        ("cli.py", False),
        ("settings.py", True),
        ("train/loop.py", True),
        ("data/lists.py", True),
        ("loss/functions.py", True),
        ("encoder/model.py", True),
        ("evaluation/measures.py", True),
        ("distributed.py", True),
    ):
        with open(package / name, "a") as file:
            file.write("# changed\n")
        assert (digest_code() != before) == decides, name
        before = digest_code()


@pytest.mark.parametrize("phase", ["training", "measuring", "first"])
def test_stopped_in_the_middle_the_second_call_does_only_the_rest(in_one_go, runs, monkeypatch, capsys, phase):
    calls = []

    def interrupt(real, call, number=signal.SIGINT):
        def function(*arguments, **options):
            calls.append(call)
            if len(calls) == call:
                os.kill(os.getpid(), number)
            return real(*arguments, **options)

        return function

    with monkeypatch.context() as patch:
        if phase == "training":  # the third step is the second training's first
            patch.setattr(Trainer, "train_step", interrupt(Trainer.train_step, 3))
        elif phase == "measuring":  # untrained twice, then the first training
            patch.setattr(gradret.bench.quality, "evaluate", interrupt(evaluate, 4, signal.SIGTERM))
        else:
            patch.setattr(gradret.bench.quality, "search_bm25", interrupt(search_bm25, 1))
        rows, error = do(runs, fresh=phase == "measuring")
    done = {"training": 3, "measuring": 2, "first": 0}[phase]
    again = "the same command without --fresh" if phase == "measuring" else "the same command"
    assert error == f"stopped when {done} of 4 runs were done; {again} does the rest" and len(rows) == done
    kept = Path("rows.jsonl").read_text() if done else ""
    assert len(kept.splitlines()) == done
    capsys.readouterr()
    rows, error = do(runs)
    told = capsys.readouterr().err
    assert (f"{done} of 4 runs are done already in rows.jsonl; --fresh measures again" in told) == (done > 0)
    assert f"run {done + 1} of 4: " in told and f"run {done} of 4: " not in told
    assert error is None and Path("rows.jsonl").read_text().startswith(kept)
    assert find_measured(read_lines("rows.jsonl")) == find_measured(in_one_go)


def test_a_torn_last_line_is_done_again(runs, capsys):
    do(runs[:2])
    whole = Path("rows.jsonl").read_bytes()
    Path("rows.jsonl").write_bytes(whole[:-100])
    capsys.readouterr()
    do(runs[:2])
    told = capsys.readouterr().err
    assert "1 of 2 runs are done already" in told and "run 2 of 2: untrained" in told
    assert [row["run"]["ranker"] for row in read_lines("rows.jsonl")] == ["bm25", "untrained"]


def test_fresh_replaces_the_rows_of_its_own_runs_alone(runs):
    do(runs[:2])
    bm25, untrained = read_lines("rows.jsonl")
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ({**bm25, "marked": True}, untrained)))
    do(runs[:1], fresh=True)
    assert read_lines("rows.jsonl") == [untrained, bm25]


def test_what_is_wanted_decides_whether_a_row_will_do(runs, tiny_encoder, capsys):
    do(make_runs(tiny_encoder, sources=[EVEN])[:1])
    for options in (
        {},
        {"measures": ("nDCG@10", "AP")},
        {"measures": ("RR@10", "nDCG@10")},
    ):  # no query's RR@10 is kept
        capsys.readouterr()
        do(runs[:1], **options)
        assert "1 run was done with other code, data, encoders, collections or measures" in capsys.readouterr().err
    do(runs[:1], measures=("RR@10",))
    assert len(read_lines("rows.jsonl")) == 4


def test_what_changed_in_a_file_makes_another_run(tiny_encoder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(SAMPLE_FILE, "sample.jsonl")
    ids = [record["query_id"] for record in read_lines(SAMPLE_FILE)]
    Path("chosen").write_text("\n".join(ids[:10]))
    runs = make_runs(tiny_encoder, sources=["sample.jsonl?queries=chosen"])[1:3]

    def again() -> int:
        capsys.readouterr()
        rows, error = do(runs)
        assert error is None and len(rows) == 2
        return capsys.readouterr().err.count("run 1 of 2: ") + 2 * capsys.readouterr().err.count("run 2 of 2: ")

    do(runs)
    assert again() == 0
    Path("chosen").write_text("\n".join(ids[10:20]))  # as many queries
    assert again() == 1
    Path("sample.jsonl").write_text(Path("sample.jsonl").read_text().replace(" the ", " a "))
    assert again() == 1
    assert len(read_lines("rows.jsonl")) == 6


CHECKS = [
    ({"data": "no.jsonl"}, "no.jsonl: no such file"),
    ({"sources": ["no.jsonl"]}, "no.jsonl: no such file"),
    ({"exclude": ("no.jsonl",)}, "no.jsonl: no such file"),
    ({"dev": "no.jsonl"}, "no.jsonl: no such file"),
    ({"model": "/no/such"}, "/no/such: no such directory"),
    ({"mine": "k=1"}, "mine 'k=1': grade is missing"),
    ({"mine": "k=1,grade=0,from=no.jsonl"}, "no.jsonl: no such file"),
    ({"data": "sample?queries=even"}, "no ranking list is left: "),
]


@pytest.mark.parametrize(("changes", "message"), CHECKS)
def test_everything_is_looked_at_before_the_first_run(runs, tiny_encoder, changes, message):
    with pytest.raises(GradretError) as error:
        do(make_runs(tiny_encoder, **changes))
    assert message in str(error.value) and not os.path.exists("rows.jsonl")


def test_bm25_without_its_package_is_told_first(runs, monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(GradretError, match=r"BM25 needs the package bm25s: pip install 'gradret\[bm25\]'"):
        do(runs)


def test_a_run_that_fails_costs_no_other(runs, monkeypatch, capsys):
    def fail(settings, *arguments, **options):
        raise GradretError("no room") if settings.seed else ValueError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(gradret.bench.quality, "fit", fail)
        rows, error = do(runs)
    assert len(rows) == 2 and error == (
        "2 runs failed, which the same command tries again: "
        "run 3 of 4: infonce, seed 0: ValueError: a bug; run 4 of 4: infonce, seed 1: no room"
    )
    assert "Traceback" in capsys.readouterr().err
    assert do(runs)[1] is None


def test_each_run_is_told_with_what_is_left(runs, capsys):
    do(runs[:2])
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("run ")] == ["run 1 of 2: bm25", "run 2 of 2: untrained"]
    assert [line.partition(", about ")[0] for line in lines if " to go" in line] == ["1 run to go"]
    assert len([line for line in lines if line.startswith((f"{EVEN}: nDCG@10 0.", f"{TWO_GRADES}: nDCG@10 0."))]) == 4


def test_the_bm25_row_is_what_bm25s_ranks(in_one_go):
    import bm25s

    row = in_one_go[0]
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


APPENDER = """
from gradret.bench.quality import Rows
row = {"run": {"ranker": "bm25", "settings": {}}, "collections": {}, "versions": {}, "device": "x" * 100_000}
row |= dict.fromkeys(("fit_seconds", "steps", "lists"))
for _ in range(20):
    Rows("rows.jsonl").append(row)
"""


def test_two_processes_append_to_one_file(tmp_path):
    (tmp_path / "appender.py").write_text(APPENDER)
    for process in [ForkedPython(["appender.py"], folder=tmp_path) for _ in range(2)]:
        process.communicate(timeout=60)
        assert process.returncode == 0
    (rows,) = Rows(tmp_path / "rows.jsonl").read().values()
    assert len(rows) == 40


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", ":1: not valid JSON"),
        ("[]", ":1: is no row of gradret bench; remove the line"),
        ('{"run": {"ranker": "bm25", "settings": {}}}', ":1: is no row of gradret bench"),
    ],
)
def test_a_line_that_is_no_row_is_named(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(GradretError) as error:
        Rows(path).read()
    assert str(error.value).startswith(str(path) + message)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(GradretError, match=r"file/rows\.jsonl: cannot be written \("):
        Rows(tmp_path / "file" / "rows.jsonl").append({})


# --- what is made of rows


def make_row(run: Run, values: dict[str, list[float]]) -> dict:
    """A row as a run leaves it: collection -> nDCG@10 of each query; RR@10 is 1."""
    collections = {
        source: {
            "measures": {"nDCG@10": float(np.mean(found)), "RR@10": 1.0},
            "per_query": {"nDCG@10": {f"q{i}": value for i, value in enumerate(found)}},
            "queries": len(found),
            "documents": 9,
        }
        for source, found in values.items()
    }
    facts = {"run": run.record(), "versions": {"commit": "abc"}, "device": "cpu", "precision": "float32"}
    return facts | {"collections": collections, "fit_seconds": 1.0, "steps": 2, "lists": 3}


def make_results(*, seeds: int = 2, sources=("A", "B")):
    """Runs by name, and their rows: the loss kl is better than infonce by .1 on each query."""
    runs, rows = {"untrained": [Run(UNTRAINED, FitSettings(), sources, "untrained")]}, {}
    for name in ("infonce", "kl"):
        runs[name] = [Run(FIT, FitSettings(loss=name, seed=seed), sources, name) for seed in range(seeds)]
    for name, planned in runs.items():
        for number, run in enumerate(planned):
            base = {"untrained": 0.1, "infonce": 0.2, "kl": 0.3}[name] + 0.02 * number
            values = {"A": [base, base + 0.2, base + 0.4], "B": [base + 0.1] * 2}
            rows[run.key] = make_row(run, {source: values[source] for source in sources})
    return runs, rows


def test_means_spreads_and_tests_by_hand():
    runs, rows = make_results()
    untrained, infonce, kl = tabulate(runs, rows, MEASURES, ("A", "B"), ["infonce"])
    assert (kl["system"], kl["runs"], kl["wanted"]) == ("kl", 2, 2) and list(kl["columns"]) == ["A", "B", MEAN]
    column = kl["columns"]["A"]
    assert column["values"]["nDCG@10"] == pytest.approx([0.5, 0.52])
    assert (column["mean"]["nDCG@10"], column["sd"]["nDCG@10"]) == pytest.approx((0.51, 0.02 / 2**0.5))
    assert kl["columns"][MEAN]["mean"] == pytest.approx({"nDCG@10": 0.46, "RR@10": 1.0})
    assert untrained["columns"]["A"]["sd"] == {"nDCG@10": None, "RR@10": None}
    assert all(column["p"] == {} for column in infonce["columns"].values())
    # All three queries differ by the same: 2 of 8 signs; two tests, so Holm doubles the smallest p.
    assert column["p"] == {"infonce": {"randomisation": 0.25, "randomisation_holm": 0.5}}
    assert kl["columns"][MEAN]["p"]["infonce"]["randomisation"] == 2 / 32


def test_what_is_not_complete_or_has_one_seed_is_not_tested():
    runs, rows = make_results()
    del rows[runs["kl"][1].key]
    kl = tabulate(runs, rows, MEASURES, ("A",), ["infonce"])[2]
    assert (kl["runs"], kl["wanted"], kl["columns"]["A"]["p"]) == (1, 2, {})
    runs, rows = make_results(seeds=1)
    assert [row["columns"]["A"]["p"] for row in tabulate(runs, rows, MEASURES, ("A",), ["infonce"])] == [{}] * 3
    assert tabulate(runs, {}, MEASURES, ("A",), ["infonce"])[0]["columns"] == {}


def test_other_queries_of_a_collection_are_told():
    runs, rows = make_results()
    del rows[runs["kl"][0].key]["collections"]["A"]["per_query"]["nDCG@10"]["q1"]
    with pytest.raises(GradretError, match="A: rows differ in their queries, .*; measure with --fresh"):
        tabulate(runs, rows, MEASURES, ("A",), ["infonce"])
    del rows[runs["kl"][1].key]["collections"]["A"]["per_query"]["nDCG@10"]["q1"]
    with pytest.raises(GradretError, match="A: rows differ in their queries, .*; measure with --fresh"):
        tabulate(runs, rows, MEASURES, ("A",), ["infonce"])


def test_what_a_terminal_shows():
    runs, rows = make_results()
    text = format_quality(make_document({"tiny": runs}, rows, MEASURES, ("A", "B")))
    blocks = text.split("\n\n")
    assert [block.splitlines()[0] for block in blocks] == [
        "nDCG@10, 2 seeds",
        "A: 3 queries, 9 documents, 2 seeds",
        "B: 2 queries, 9 documents, 2 seeds",
        "mean of collections, 2 seeds",
        "p: paired randomisation test over queries against infonce, Holm-corrected for the systems compared",
    ]
    assert blocks[0].splitlines()[-1].split() == "kl 0.5100 ± 0.0141 0.4100 ± 0.0141 0.4600 ± 0.0141 0.125".split()
    assert blocks[1].splitlines()[1:] == [
        "tiny               nDCG@10            RR@10  p (nDCG@10)",
        "---------  ---------------  ---------------  -----------",
        "untrained           0.3000           1.0000        0.500",
        "infonce    0.4100 ± 0.0141  1.0000 ± 0.0000",
        "kl         0.5100 ± 0.0141  1.0000 ± 0.0000        0.500",
    ]
    del rows[runs["kl"][1].key]
    text = format_quality(make_document({"tiny": runs}, rows, MEASURES, ("A",)))
    assert "kl (1/2)" in text and text.endswith("4 of 5 runs are done")
    assert format_quality(make_document({"tiny": runs}, {}, MEASURES, ("A",))).endswith("0 of 5 runs are done")


def test_a_chart_of_any_document(tmp_path):
    runs, rows = make_results()
    runs["$x_$"] = runs.pop("kl")  # opens no formula
    for there in (rows, {}):
        draw_quality(
            make_document({"tiny": runs, "other": runs}, there, MEASURES, ("A", "B")), tmp_path / "quality.png"
        )
        assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")


# --- the command


def invoke(*arguments):
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


def test_the_command_and_its_second_call(tiny_encoder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gradret", "bench", "it's"])
    arguments = ("--data", ODD, "--dataset", EVEN, "--model", tiny_encoder, "--max-steps", 2, "--seeds", 2, "--json")
    result = invoke(*arguments)
    assert result.exit_code == 0, result.stderr
    assert "run 2 of 5: infonce, seed 0 (" in result.stderr
    document = json.loads(result.stdout)
    assert document["command"] == """gradret bench 'it'"'"'s'"""
    assert document == json.loads((tmp_path / "gradret-bench" / "quality.json").read_text())
    assert (tmp_path / "gradret-bench" / "quality.png").read_bytes().startswith(b"\x89PNG")
    found = {row["system"]: row["columns"][EVEN] for row in document["encoders"][0]["rows"]}
    assert list(found) == ["untrained", "infonce", FitSettings().loss]
    per_query = [row["collections"][EVEN]["per_query"]["nDCG@10"] for row in read_lines("gradret-bench/rows.jsonl")]
    assert len(per_query) == 5
    # Runs 2 and 3 are infonce's seeds, 4 and 5 those of the default loss.
    theirs, ours = ({q: (a[q] + b[q]) / 2 for q in a} for a, b in (per_query[1:3], per_query[3:]))
    p = randomisation_tests([[find_differences(ours, theirs)]])[0]
    assert found[FitSettings().loss]["p"]["infonce"]["randomisation"] == p
    again = invoke(*arguments)
    assert "5 of 5 runs are done already in gradret-bench/rows.jsonl; --fresh measures again\n" in again.stderr
    assert "run " not in again.stderr.replace("runs", "")
    assert json.loads(again.stdout)["encoders"] == document["encoders"]


def test_unknown_measures_are_one_line(tmp_path):
    result = invoke("quality", "--measures", "nDGC", "--out", tmp_path)
    assert result.exit_code == 1 and "measure 'nDGC' is not known" in result.stderr


def test_encoders_have_a_table_each(tiny_encoder, tmp_path):
    arguments = ("--data", ODD, "--dataset", EVEN, "--losses", "infonce", "--max-steps", 1, "--out", tmp_path)
    result = invoke(*arguments, "--model", f"{tiny_encoder}?layers=1", "--model", tiny_encoder)
    assert result.exit_code == 0, result.stderr
    small, whole = result.stdout.split("\n\n")
    name, title = tiny_encoder.name, "sample?queries=even: 48 queries, 384 documents, 1 seed"
    assert [block.splitlines()[0] for block in (small, whole)] == [title, title]
    assert small.splitlines()[1].startswith(f"{name}, 1 layer  ") and whole.splitlines()[1].startswith(f"{name}  ")
    assert small.splitlines()[3:] != whole.splitlines()[3:]
    document = json.loads((tmp_path / "quality.json").read_text())
    assert [found["settings"]["infonce"]["layers"] for found in document["encoders"]] == [1, None]
    result = invoke(*arguments, "--model", f"{tiny_encoder}?depth=1")
    assert result.exit_code == 1
    assert result.stderr == f"Error: {tiny_encoder}?depth=1: option 'depth=1' is not known; use layers=K\n"
    for name in ("layers", "dev_measure", "checkpoint_every"):  # of each --model, and without use here
        result = invoke(*arguments, "--set", f"{name}=1")
        assert result.exit_code == 2 and f"'{name}' is not a setting here" in result.stderr


def test_encoders_of_one_name_are_told_apart_and_none_is_trained_twice(tiny_encoder, tmp_path):
    arguments = ("--data", ODD, "--dataset", EVEN, "--losses", "infonce", "--max-steps", 1, "--out", tmp_path / "out")
    for folder in ("one", "two"):
        shutil.copytree(tiny_encoder, tmp_path / folder / "tiny")
    models = [tmp_path / "one" / "tiny", tmp_path / "two" / "tiny", f"{tmp_path / 'two' / 'tiny'}?"]
    result = invoke(*arguments, *(part for model in models for part in ("--model", model)))
    assert result.exit_code == 0, result.stderr
    encoders = json.loads((tmp_path / "out" / "quality.json").read_text())["encoders"]
    assert [found["encoder"] for found in encoders] == ["one/tiny", "two/tiny"]
    result = invoke(*arguments, "--model", "?layers=1")
    assert result.exit_code == 2 and "'?layers=1' names no encoder" in result.stderr


def test_the_first_command_measures_human_judgments(tiny_encoder, tmp_path):
    result = invoke("--model", tiny_encoder, "--max-steps", 1, "--losses", "infonce", "--out", tmp_path)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("medquad: 60 queries, 800 documents, 1 seed\n")

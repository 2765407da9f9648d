import json
import struct
from dataclasses import replace

import matplotlib.colors
import numpy as np
import pytest
from conftest import REPOSITORY
from quality_examples import (
    COLLECTIONS,
    SYSTEMS,
    VERSIONS,
    fill_rows,
    find_cell,
    make_experiment,
    make_facts,
    make_grid,
    make_row,
)
from scipy.stats import ttest_1samp

from benchmarks.quality.controls import register
from gradret.bench.grid import System
from gradret.bench.grid_file import read_grid
from gradret.bench.grid_rows import GridRows
from gradret.bench.quality import choose_rows, describe_collections
from gradret.bench.quality_charts import SET_OFF, describe_chart, make_figure
from gradret.bench.quality_report import draw_quality, format_quality, make_document
from gradret.bench.quality_tables import make_tables, show_p, show_setting, show_value
from gradret.bench.significance import correct_holm, randomisation_test, t_test
from gradret.console import GradretError
from gradret.data.lists import Passage, RankingList
from gradret.settings import FitSettings

NEWCOMER = """\
A: 4 queries, 9 documents, 2 seeds
system               nDCG@10            RR@10  p (nDCG@10)
-----------  ---------------  ---------------  -----------
untrained             0.4000           0.2000        0.250
infonce      0.6100 ± 0.0141  0.3050 ± 0.0071
wasserstein  0.7100 ± 0.0141  0.3550 ± 0.0071        0.250

p: paired randomisation test over queries against infonce, Holm-corrected for the systems compared"""
LEVELS = {"bm25": 0.5, "untrained": 0.4, "infonce": 0.6, "wasserstein": 0.7}


def make_filled(grid=None, **options) -> dict:
    grid = grid or make_grid()
    return make_document(grid, fill_rows(grid, LEVELS, **options), make_facts(grid))


def rows_of(document: dict, experiment: int = 0) -> dict[str, dict]:
    return {row["system"]: row for row in document["experiments"][experiment]["rows"]}


def read_png_size(path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", content[16:24])


# --- the document


def test_means_spreads_and_values_by_hand():
    grid = make_grid()
    first, second = find_cell(grid, "infonce").runs
    rows = {
        first.key: make_row(first, {"A": [0.1, 0.2, 0.3, 0.4], "B": [0.5, 0.7]}),
        second.key: make_row(second, {"A": [0.3, 0.4, 0.5, 0.6], "B": [0.5, 0.5]}),
    }
    document = make_document(grid, rows, make_facts(grid))
    row = rows_of(document)["infonce"]
    assert (row["runs"], row["wanted"], row["label"], row["data"]) == (2, 2, "InfoNCE", "lists")
    a, b, mean = (row["columns"][name] for name in ("A", "B", "mean"))
    assert list(row["columns"]) == ["A", "B", "mean"]
    assert a["values"]["nDCG@10"] == pytest.approx([0.25, 0.45])
    assert (a["mean"]["nDCG@10"], a["mean"]["RR@10"]) == pytest.approx((0.35, 0.175))
    assert a["sd"]["nDCG@10"] == pytest.approx(0.2 / 2**0.5)
    assert b["mean"]["nDCG@10"] == pytest.approx(0.55)
    assert mean["values"]["nDCG@10"] == pytest.approx([0.425, 0.475])  # each collection counts the same
    assert (mean["mean"]["nDCG@10"], mean["sd"]["nDCG@10"]) == pytest.approx((0.45, 0.05 / 2**0.5))
    assert a["p"] == b["p"] == mean["p"] == {}
    assert rows_of(document)["bm25"] == {
        "encoder": "small",
        "system": "bm25",
        "label": "BM25",
        "data": None,
        "value": None,
        "runs": 0,
        "wanted": 1,
        "columns": {},
    }
    assert (document["done"], document["planned"]) == (2, 6)


def test_p_values_of_each_querys_mean_over_seeds():
    grid = make_grid()
    queries = {
        "bm25": [{"A": [0.5, 0.2, 0.5, 0.1], "B": [0.3, 0.9]}],
        "untrained": [{"A": [0.1, 0.1, 0.2, 0.1], "B": [0.2, 0.3]}],
        "infonce": [{"A": [0.2, 0.3, 0.4, 0.2], "B": [0.5, 0.5]}, {"A": [0.4, 0.3, 0.2, 0.2], "B": [0.3, 0.5]}],
        "wasserstein": [{"A": [0.5, 0.4, 0.5, 0.4], "B": [0.4, 0.9]}, {"A": [0.7, 0.6, 0.5, 0.4], "B": [0.4, 0.7]}],
    }
    rows = {
        run.key: make_row(run, values)
        for system, seeds in queries.items()
        for run, values in zip(find_cell(grid, system).runs, seeds, strict=True)
    }
    found = rows_of(make_document(grid, rows, make_facts(grid)))
    assert found["infonce"]["columns"]["A"]["p"].keys() == {"untrained"}
    # wasserstein's means over seeds: A .6 .5 .5 .4, B .4 .8; infonce's: A .3 .3 .3 .2, B .4 .5
    differences = {
        "bm25": [np.array([0.2, -0.1, 0.2, -0.1]), np.array([-0.1, 0.4])],
        "untrained": [np.array([-0.2, -0.2, -0.1, -0.1]), np.array([-0.2, -0.2])],
        "wasserstein": [np.array([0.3, 0.2, 0.2, 0.2]), np.array([0.0, 0.3])],
    }
    p = {system: found[system]["columns"]["A"]["p"]["infonce"] for system in differences}
    assert p["wasserstein"]["randomisation"] == 2 / 16  # all four queries are ahead
    assert p["untrained"]["randomisation"] == 2 / 16
    assert p["bm25"]["randomisation"] == 12 / 16
    assert [p[s]["randomisation_holm"] for s in differences] == [0.75, 0.375, 0.375]
    for column, take in (("A", lambda d: d[:1]), ("B", lambda d: d[1:]), ("mean", lambda d: d)):
        p = [found[system]["columns"][column]["p"]["infonce"] for system in differences]
        expected = [t_test(take(d)) for d in differences.values()]
        assert [x["t"] for x in p] == pytest.approx(expected)
        assert [x["t_holm"] for x in p] == pytest.approx(correct_holm(expected))
        expected = [randomisation_test(take(d)) for d in differences.values()]
        assert [x["randomisation"] for x in p] == expected
        assert [x["randomisation_holm"] for x in p] == correct_holm(expected)


def test_the_rest_of_the_document():
    grid = make_grid(make_experiment(), make_experiment("again", title="Again", systems=("untrained", "infonce")))
    rows = fill_rows(grid, LEVELS)
    last = list(rows)[-1]
    rows[last] = rows[last] | {"versions": VERSIONS | {"threads": 8}}
    document = make_document(grid, rows, make_facts(grid))
    assert document == json.loads(json.dumps(document, allow_nan=False))
    assert document["title"] == "A benchmark"
    assert document["measures"] == ["nDCG@10", "RR@10"]
    assert (document["baselines"], document["primary"]) == (["infonce", "untrained"], "wasserstein")
    assert (document["done"], document["planned"]) == (6, 6)  # what both experiments show is one run
    assert document["settings"]["epochs"] == 1.0
    assert document["settings"].keys().isdisjoint({"data", "exclude", "seed", "model"})
    assert document["systems"]["wasserstein"]["settings"] == {"loss": "wasserstein", "order": 2}
    there = VERSIONS | {"ran_on": "cpu", "precision": "float32"}
    assert document["versions"] == [there | {"precision": None}, there, there | {"threads": 8}]  # BM25 has none
    runs = [{"lists": 80, "steps": 5, "seconds": seconds} for seconds in (10.0, 11.0)]
    assert document["training"] == {"infonce": runs, "wasserstein": runs}
    assert document["collections"]["A"] == {"source": "beir/a/test", "queries": 4, "documents": 9}
    assert document["command"] == "gradret bench quality --config 'g.toml'"
    assert [e["name"] for e in document["experiments"]] == ["main", "again"]
    # Holm corrects within a table: of two systems there is one test.
    p = rows_of(document, 1)["untrained"]["columns"]["A"]["p"]["infonce"]
    assert p["t_holm"] == p["t"]


def test_a_partial_grid_is_shown_and_not_tested():
    grid = make_grid()
    rows = fill_rows(grid, LEVELS)
    del rows[find_cell(grid, "wasserstein").runs[1].key]
    document = make_document(grid, rows, make_facts(grid))
    row = rows_of(document)["wasserstein"]
    assert (row["runs"], row["wanted"], row["columns"]["A"]["p"]) == (1, 2, {})
    assert row["columns"]["A"]["mean"]["nDCG@10"] == pytest.approx(0.7)
    assert row["columns"]["A"]["sd"]["nDCG@10"] is None
    assert rows_of(document)["bm25"]["columns"]["A"]["p"].keys() == {"infonce", "untrained"}
    assert (document["done"], document["planned"]) == (5, 6)
    del rows[find_cell(grid, "infonce").runs[0].key]
    document = make_document(grid, rows, make_facts(grid))
    assert rows_of(document)["bm25"]["columns"]["A"]["p"].keys() == {"untrained"}


def test_a_row_without_all_collections_is_not_done():
    grid = make_grid()
    rows = fill_rows(grid, LEVELS)
    key = find_cell(grid, "bm25").runs[0].key
    del rows[key]["collections"][COLLECTIONS["B"]]
    document = make_document(grid, rows, make_facts(grid))
    assert (document["done"], rows_of(document)["bm25"]["columns"]) == (5, {})


def test_systems_are_compared_at_the_same_value_and_encoder():
    experiment = make_experiment("curve", vary="temperature", values=(0.1, 0.2), encoders=("small", "large"))
    grid = make_grid(experiment)
    levels = LEVELS | {"untrained": 0.65}
    rows = fill_rows(grid, levels)
    document = make_document(grid, rows, make_facts(grid))
    found = document["experiments"][0]["rows"]
    assert [(r["encoder"], r["value"]) for r in found[::4]] == [
        ("small", 0.1), ("small", 0.2), ("large", 0.1), ("large", 0.2),
    ]  # fmt: skip
    assert document["experiments"][0]["vary"] == "temperature"
    assert document["experiments"][0]["values"] == [0.1, 0.2]
    for row in found:  # what is not trained stands at every value
        assert row["columns"].keys() == {"A", "B", "mean"}
        assert ("infonce" in row["columns"]["A"]["p"]) == (row["system"] != "infonce")
    # One value alone misses a run: only its comparisons are left out.
    del rows[find_cell(grid, "infonce", "curve", 0.2, "large").runs[0].key]
    found = make_document(grid, rows, make_facts(grid))["experiments"][0]["rows"]
    tested = {(r["encoder"], r["value"]) for r in found if "infonce" in r["columns"]["A"]["p"]}
    assert tested == {("small", 0.1), ("small", 0.2), ("large", 0.1)}


def test_what_is_trained_once_is_not_tested():
    grid = make_grid(make_experiment(), make_experiment("curve", vary="temperature", values=(0.1, 0.2)), seeds=1)
    document = make_filled(grid)
    found = rows_of(document)
    assert found["bm25"]["columns"]["A"]["p"].keys() == {"untrained"}
    assert found["infonce"]["columns"]["A"]["p"] == found["wasserstein"]["columns"]["mean"]["p"] == {}
    changes = {change["system"]: change["columns"]["A"] for change in document["experiments"][1]["changes"]}
    assert changes["wasserstein"] == {"change": pytest.approx(-0.1), "p": {}}
    assert changes["bm25"]["p"].keys() == {"untrained"}
    table = make_tables(document, document["experiments"][1])[0]
    assert [row[-2:] for row in table.rows][-1] == ["-0.1000", "–"]


def test_one_query_gives_no_p_value():
    grid = make_grid(make_experiment(collections=("A",)), collections={"A": COLLECTIONS["A"]})
    rows = {run.key: make_row(run, {"A": [0.5]}) for run in grid.wanted()}
    document = make_document(grid, rows, make_facts(grid))
    p = rows_of(document)["bm25"]["columns"]["A"]["p"]["infonce"]
    assert p == {"t": None, "randomisation": None, "t_holm": None, "randomisation_holm": None}
    assert "mean" not in rows_of(document)["bm25"]["columns"]
    assert format_quality(document).splitlines()[3].split()[-1] == "–"


def test_rows_of_another_collection_are_refused():
    grid = make_grid()
    rows = fill_rows(grid, LEVELS)
    run = find_cell(grid, "bm25").runs[0]
    rows[run.key] = make_row(run, {"A": [0.5, 0.6], "B": [0.5, 0.6]})
    with pytest.raises(GradretError, match="^rows of bm25 and infonce on beir/a/test: the queries differ, .* --fresh$"):
        make_document(grid, rows, make_facts(grid))
    grid = make_grid(make_experiment(systems=("wasserstein",), vary="temperature", values=(0.1, 0.2)), baselines=())
    rows = fill_rows(grid, LEVELS)
    run = find_cell(grid, "wasserstein", value=0.1).runs[1]
    rows[run.key] = make_row(run, {"A": [0.5, 0.6], "B": [0.5, 0.6]})
    with pytest.raises(GradretError, match="^rows of wasserstein on beir/a/test: the queries differ, .* --fresh$"):
        make_document(grid, rows, make_facts(grid))


# --- the tables


def test_numbers():
    assert (show_value(0.64789), show_value(0.64789, 0.00151)) == ("0.6479", "0.6479 ± 0.0015")
    assert [show_p(p) for p in (None, 0.0009, 0.001, 0.0123, 1.0)] == ["–", "<0.001", "0.001", "0.012", "1.000"]
    assert [show_setting(v) for v in (0.1, True, None, "3,0", ["a", 1])] == ["0.1", "true", "none", "3,0", "a, 1"]


def test_the_newcomers_table():
    names = ("untrained", "infonce", "wasserstein")
    systems = {name: replace(SYSTEMS[name], label=name) for name in names}
    experiment = make_experiment(systems=names, collections=("A",))
    grid = make_grid(
        experiment, systems=systems, collections={"A": COLLECTIONS["A"]}, encoders={"small": {"model": "M"}}
    )
    assert format_quality(make_filled(grid)) == NEWCOMER


def test_a_main_table():
    document = make_filled(make_grid(make_experiment(), make_experiment("again", title="Again", systems=("infonce",))))
    first, again = make_tables(document, document["experiments"][0]), make_tables(document, document["experiments"][1])
    assert [table.title for table in first + again] == [
        "All systems, encoder small: nDCG@10, 2 seeds",
        "Again, encoder small: nDCG@10, 2 seeds",
    ]
    assert first[0].header == ["system", "A", "B", "mean of collections", "p"]
    # Six queries, all of one sign: 2 of 64 sign patterns, times three systems tested.
    assert first[0].rows == [
        ["BM25", "0.5000", "0.4000", "0.4500", "0.094"],
        ["Untrained", "0.4000", "0.3000", "0.3500", "0.094"],
        ["InfoNCE", "0.6100 ± 0.0141", "0.5100 ± 0.0141", "0.5600 ± 0.0141", ""],
        ["W2", "0.7100 ± 0.0141", "0.6100 ± 0.0141", "0.6600 ± 0.0141", "0.094"],
    ]
    assert first[0].best == {(3, 1), (3, 2), (3, 3)}
    assert first[0].note.startswith("p: paired randomisation test over queries against InfoNCE, on the mean of coll")
    assert (again[0].best, again[0].note) == (frozenset(), "")  # one row is not the best of anything
    text = format_quality(document)
    assert "RR@10" not in text  # all measures only where there is one experiment
    assert "runs are done" not in text


def test_the_baseline_shown_is_the_first_that_a_table_has():
    grid = make_grid(make_experiment(systems=("untrained", "wasserstein")), make_experiment("b", systems=("bm25",)))
    table = make_tables(document := make_filled(grid), document["experiments"][0])[0]
    assert [row[-1] for row in table.rows] == ["", "0.031"]
    assert "against Untrained" in table.note
    assert make_tables(document, document["experiments"][1])[0].header[-1] == "mean of collections"


def test_what_one_encoder_names_is_still_a_setting_of_the_other():
    encoders = {"small": {"model": "M", "learning_rate": 5e-4}, "large": {"model": "L"}}
    document = make_filled(make_grid(encoders=encoders))
    assert document["settings"]["learning_rate"] == FitSettings().learning_rate
    assert document["encoders"]["small"]["learning_rate"] == 5e-4


def test_equals_are_all_best():
    grid = make_grid(make_experiment(systems=("bm25", "untrained", "infonce"), collections=("A",)))
    document = make_document(grid, fill_rows(grid, LEVELS | {"untrained": 0.5, "infonce": 0.3}), make_facts(grid))
    assert make_tables(document, document["experiments"][0])[0].best == {(0, 1), (1, 1)}


def test_numbers_varied_are_columns():
    grid = make_grid(make_experiment(vary="temperature", values=(0.1, 0.2), systems=("untrained", "wasserstein")))
    rows = fill_rows(grid, LEVELS)
    del rows[find_cell(grid, "wasserstein", value=0.2).runs[1].key]
    document = make_document(grid, rows, make_facts(grid))
    (table,) = make_tables(document, document["experiments"][0])
    assert table.title == "All systems, encoder small: nDCG@10 (mean of collections), 2 seeds"
    assert table.header == ["temperature", "0.1", "0.2", "change"]
    assert table.note == "change: from 0.1 to 0.2"
    assert table.rows == [
        ["Untrained", "0.3500", "0.3500", "+0.0000"],
        ["W2", "0.5600 ± 0.0141", "0.4500 (1/2)", "–"],
    ]
    assert table.best == {(1, 1), (0, 2)}  # what is not finished is not the best
    assert format_quality(document).splitlines()[-1] == "4 of 5 runs are done"


def test_the_change_along_a_curve_is_compared_with_the_baselines():
    # From .1 to .3 InfoNCE loses .2 on every query, the others less, by another amount on each query of A.
    systems = ("infonce", "wasserstein")
    experiment = make_experiment(vary="temperature", values=(0.1, 0.2, 0.3), systems=systems)
    grid = make_grid(experiment)
    rows = fill_rows(grid, LEVELS)
    kept = [0.15, 0.12, 0.2, 0.11]
    for run in find_cell(grid, "wasserstein", value=0.3).runs:
        values = list(rows[run.key]["collections"]["beir/a/test"]["per_query"]["nDCG@10"].values())
        rows[run.key] = make_row(run, {"A": [v + k for v, k in zip(values, kept, strict=True)], "B": [0.35, 0.25]})
    document = make_document(grid, rows, make_facts(grid))
    found = {change["system"]: change["columns"] for change in document["experiments"][0]["changes"]}
    assert found["infonce"]["mean"] == {"change": pytest.approx(-0.2), "p": {}}
    ours = found["wasserstein"]["A"]
    assert ours["change"] == pytest.approx(-0.2 + np.mean(kept))
    assert ours["p"]["infonce"]["t"] == pytest.approx(ttest_1samp(kept, 0).pvalue)
    assert ours["p"]["infonce"]["t_holm"] == ours["p"]["infonce"]["t"]  # one system is compared
    assert ours["p"]["infonce"]["randomisation"] == 2 / 16
    (table,) = make_tables(document, document["experiments"][0])
    assert table.header == ["temperature", "0.1", "0.2", "0.3", "change", "p"]
    assert table.rows[0][-2:] == ["-0.2000", ""]
    assert table.rows[1][-1] == show_p(found["wasserstein"]["mean"]["p"]["infonce"]["randomisation_holm"])
    assert table.note == (
        "change: from 0.1 to 0.3. p: paired randomisation test over queries against the change of InfoNCE, on the mean "
        "of collections, Holm-corrected for the systems compared"
    )
    # Settings that are no numbers have no first and last.
    grid = make_grid(make_experiment(vary="targets", values=("gain", "softmax"), systems=systems))
    assert make_filled(grid)["experiments"][0]["changes"] == []


def test_other_values_are_rows():
    systems = ("infonce", "wasserstein")
    grid = make_grid(make_experiment(vary="in_batch", values=(True, False), systems=systems, collections=("B",)))
    document = make_filled(grid, systems=("infonce",))
    (table,) = make_tables(document, document["experiments"][0])
    assert table.header == ["system", "B"]  # nothing is tested yet
    assert table.rows == [
        ["InfoNCE, in_batch true", "0.5100 ± 0.0141"],
        ["W2, in_batch true", "–"],
        ["InfoNCE, in_batch false", "0.5100 ± 0.0141"],
        ["W2, in_batch false", "–"],
    ]


def test_nothing_is_done_yet(tmp_path):
    for vary in ({}, {"vary": "temperature", "values": (0.1, 0.2)}):
        grid = make_grid(make_experiment(**vary))
        document = make_document(grid, {}, make_facts(grid))
        assert (document["done"], document["versions"], document["training"]) == (0, [], {})
        assert format_quality(document).splitlines()[-1].startswith("0 of ")
        draw_quality(document, tmp_path / "empty.png")
        assert read_png_size(tmp_path / "empty.png")[0] > 300
        assert describe_chart(document, document["experiments"][0]).endswith("no run is done yet")


def test_lines_fit_a_terminal():
    names = {"A": "SciFact test", "B": "Cranfield, even-numbered queries", "C": "Held-out lists, synthetic"}
    collections = {name: f"source-{key}" for key, name in names.items()}
    label = "Wasserstein order 2 with a share of the listwise cross-entropy"
    systems = {name: replace(system, label=f"{label} {name}") for name, system in SYSTEMS.items()}
    grid = make_grid(
        make_experiment(collections=tuple(collections), title="Main"),
        make_experiment("b", collections=("SciFact test",), title="A title of many words, " * 7),
        collections=collections,
        systems=systems,
    )
    rows = {}
    for run, sources in grid.wanted().items():
        level = LEVELS[run.settings.loss if run.ranker == "fit" else run.ranker] + 0.02 * run.settings.seed
        values = {
            s: {"measures": {"nDCG@10": level, "RR@10": level}, "per_query": {"nDCG@10": {"1": level, "2": level}}}
            for s in sources
        }
        rows[run.key] = make_row(run, {}) | {"collections": values}
    facts = {
        "command": "",
        "collections": {n: {"source": s, "queries": 2, "documents": 3} for n, s in collections.items()},
    }
    document = make_document(grid, rows, facts)
    lines = format_quality(document).splitlines()
    assert max(map(len, lines)) <= 110
    assert any(line.startswith("Wasserstein order 2 with a") and line.count("0.7100 ± 0.0141") == 4 for line in lines)
    for name in names.values():
        assert all(any(word in line for line in lines[1:5]) for word in name.split())


# --- the charts


def test_bars():
    document = make_filled()
    figure = make_figure(document, document["experiments"][0])
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["A", "B", "mean of collections"]
    a, _, mean = figure.axes
    assert [bar.get_width() for bar in a.patches] == pytest.approx([0.5, 0.4, 0.61, 0.71])
    assert [bar.get_width() for bar in mean.patches] == pytest.approx([0.45, 0.35, 0.56, 0.66])
    assert [text.get_text() for text in a.texts] == ["0.5000", "0.4000", "0.6100", "0.7100"]
    assert [label.get_text() for label in a.get_yticklabels()] == ["BM25", "Untrained", "InfoNCE", "W2"]
    assert a.get_ylim() == mean.get_ylim() == (3.5, -0.5)  # the first row on top, in every panel
    assert a.get_xlim()[0] == 0
    blue = [matplotlib.colors.to_hex(bar.get_facecolor()) == SET_OFF for bar in a.patches]
    assert blue == [False, False, False, True]
    whiskers = [c.lines[2][0].get_segments()[0][:, 0].tolist() for c in a.containers if hasattr(c, "has_xerr")]
    assert whiskers == [pytest.approx([0.61 - 0.0141421, 0.61 + 0.0141421]), pytest.approx([0.6958579, 0.7241421])]


def test_an_encoder_without_results_has_no_panel():
    grid = make_grid(make_experiment(encoders=("small", "large")))
    rows = {key: row for key, row in fill_rows(grid, LEVELS).items() if row["run"]["encoder"].get("model") != "L"}
    document = make_document(grid, rows, make_facts(grid))
    figure = make_figure(document, document["experiments"][0])
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["A", "B", "mean of collections"]
    nothing = make_document(grid, {}, make_facts(grid))
    assert len(make_figure(nothing, nothing["experiments"][0]).axes) == 2


def test_a_title_breaks_between_words_alone():
    grid = make_grid(make_experiment(encoders=("small", "large")))
    document = make_document(grid, fill_rows(grid, LEVELS), make_facts(grid))
    document = json.loads(json.dumps(document).replace('"large"', '"all-MiniLM-L6-v2"'))
    titles = [axes.get_title(loc="left") for axes in make_figure(document, document["experiments"][0]).axes]
    assert titles[-1] == "mean of collections,\nall-MiniLM-L6-v2"


def test_curves():
    systems = ("untrained", "infonce", "wasserstein")
    grid = make_grid(
        make_experiment(vary="temperature", values=(0.2, 0.1), systems=systems, encoders=("small", "large"))
    )
    rows = fill_rows(grid, LEVELS)
    del rows[find_cell(grid, "infonce", value=0.2).runs[1].key]  # a point that not all seeds have is none
    document = make_document(grid, rows, make_facts(grid))
    figure = make_figure(document, document["experiments"][0])
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == [
        "A, small", "B, small", "mean of collections, small", "A, large", "B, large", "mean of collections, large",
    ]  # fmt: skip
    lines = {c.get_label(): c.lines[0] for c in figure.axes[0].containers}
    assert list(lines) == ["Untrained", "InfoNCE", "W2"]
    assert lines["Untrained"].get_ydata() == pytest.approx([0.4, 0.4])
    assert list(lines["Untrained"].get_xdata()) == [0.1, 0.2]  # from end to end
    assert lines["InfoNCE"].get_ydata() == pytest.approx([0.51])
    assert lines["W2"].get_ydata() == pytest.approx([0.61, 0.51])  # from the lowest value on
    assert lines["W2"].get_xdata() == pytest.approx([0.1, 0.2], abs=0.005)
    assert lines["W2"].get_color() == SET_OFF
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["Untrained", "InfoNCE", "W2"]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["0.1", "0.2"]


@pytest.mark.parametrize(("values", "scale"), [((0.1, 0.2, 0.4), "linear"), ((0.01, 0.1), "log"), ((0.1,), "linear")])
def test_values_far_apart_get_a_logarithmic_axis(values, scale):
    document = make_filled(make_grid(make_experiment(vary="temperature", values=values)))
    assert make_figure(document, document["experiments"][0]).axes[0].get_xscale() == scale


def test_a_primary_system_that_is_not_trained(tmp_path):
    grid = make_grid(make_experiment(vary="temperature", values=(0.1, 0.2)), primary="bm25")
    draw_quality(make_filled(grid), tmp_path / "a.png")
    assert read_png_size(tmp_path / "a.png")[0] > 1000


def test_names_open_no_formula(tmp_path):
    systems = SYSTEMS | {"bm25": System("bm25", "costs $\\frac{ or $5", "bm25", {})}
    document = make_filled(make_grid(systems=systems))
    draw_quality(document, tmp_path / "a.png")
    draw_quality(document, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_chart_is_described():
    document = make_filled()
    assert describe_chart(document, document["experiments"][0]) == (
        "All systems: bars of nDCG@10 on A, B, mean of collections. On mean of collections: highest W2 with 0.6600, "
        "lowest Untrained with 0.3500"
    )


# --- the README's tables


def test_the_readmes_tables(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    import quality_table

    columns = (("main", "A", "A"), ("main", "mean", "mean"), ("other", "B", "only B"))
    monkeypatch.setattr(quality_table, "COLUMNS", columns)
    twin = replace(SYSTEMS["wasserstein"], name="twin", data="other")  # of the same label, for other data
    grid = make_grid(
        make_experiment(),
        make_experiment("other", systems=("infonce", "twin"), collections=("B",)),
        make_experiment("noise", systems=("infonce",), vary="temperature", values=(0.1, 0.2)),
        systems=SYSTEMS | {"twin": twin},
        data={"lists": ("lists.jsonl",), "other": ("other.jsonl",)},
    )
    levels = LEVELS | {"twin": 0.7}
    assert quality_table.make_tables(make_document(grid, fill_rows(grid, levels), make_facts(grid))) == [
        "| nDCG@10, small | A | mean | only B |",
        "|---|---:|---:|---:|",
        "| BM25 | 0.5000 | 0.4500 | – |",
        "| Untrained | 0.4000 | 0.3500 | – |",
        "| InfoNCE | 0.6100 ± 0.0141 | 0.5600 ± 0.0141 | 0.5100 ± 0.0141 |",
        "| W2 | 0.7100 ± 0.0141 | 0.6600 ± 0.0141 | 0.6100 ± 0.0141 |",
        "",
        "| W2 against | A | mean | only B |",
        "|---|---:|---:|---:|",
        "| InfoNCE | +0.1000 (0.375; 2/2) | +0.1000 (0.094; 2/2) | – |",
        "| Untrained | +0.3100 (0.375; 2/2) | +0.3100 (0.094; 2/2) | – |",
    ]
    missing = find_cell(grid, "wasserstein").runs[1].key
    rows = {key: row for key, row in fill_rows(grid, levels).items() if key != missing}
    lines = quality_table.make_tables(make_document(grid, rows, make_facts(grid)))
    assert lines[5] == "| W2 | 0.7000 (1 of 2) | 0.6500 (1 of 2) | 0.6100 ± 0.0141 |"
    assert lines[9] == "| InfoNCE | – | – | – |"
    rows = {key: row for key, row in rows.items() if row["run"]["data"] != ["other.jsonl"]}
    for run in find_cell(grid, "infonce").runs:
        del rows[run.key]
    assert quality_table.make_tables(make_document(grid, rows, make_facts(grid)))[0] == "| nDCG@10, small | A | mean |"
    assert quality_table.make_tables(make_document(grid, {}, make_facts(grid))) == []


def test_the_table_of_claims_apart(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    import apart

    monkeypatch.setattr(apart, "COLLECTION", "A")
    grid = make_grid(make_experiment(systems=("bm25", "wasserstein")), make_experiment("other"))
    rows = {find_cell(grid, "bm25").runs[0].key: make_row(find_cell(grid, "bm25").runs[0], {"A": [0.1, 0.2, 0.3, 0.6]})}
    for run, values in zip(find_cell(grid, "wasserstein").runs, ([0.4] * 4, [0.8, 0.8, 0.4, 0.4]), strict=True):
        rows[run.key] = make_row(run, {"A": values})
    assert apart.make_table(grid, rows, {"q0", "q1"}) == [
        "| nDCG@10, A | all | apart | near |",
        "|---|---:|---:|---:|",
        "| BM25, small | 0.3000 | 0.1500 | 0.4500 |",
        "| W2, small | 0.5000 | 0.6000 | 0.4000 |",
    ]


class NumberEncoder:
    """Texts are numbers, a document's score is the query's times its own; below 0 for a query taken for a document."""

    def encode(self, texts, kind="document", *, precision):
        assert precision == "float32"
        sign = 1 if kind == "document" else -1
        return np.array([[sign * float(text)] for text in texts], dtype=np.float32)

    def score(self, queries, documents):
        return -queries @ documents.T


def test_the_order_of_grades(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    import order

    def make_list(*passages):
        return RankingList("q", "1", [Passage(grade, score) for grade, score in passages])

    lists = [
        make_list((2, "4"), (1, "3"), (0, "2"), (0, "1")),
        make_list((0, "3"), (1, "2"), (2, "3")),  # 2 before 1 alone; grades 0 and 2 tie, for the first place, too
        make_list((0, "1"), (2, "2"), (1, "3")),
    ]
    assert order.measure_order(NumberEncoder(), lists) == {
        "pairs": {
            "1,0": {"pairs": 4, "right": 3},
            "2,0": {"pairs": 4, "right": 3},
            "2,1": {"pairs": 3, "right": 2},
        },
        "first": {"0": 1, "1": 1, "2": 1},
    }


# --- the committed results


def list_leaves(content, place=()):
    """(place, value) of everything in a JSON document that is neither a list nor a dict."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else None
    if items is None:
        return [(place, content)]
    return [leaf for key, value in items for leaf in list_leaves(value, (*place, key))]


@pytest.mark.slow
def test_the_committed_document_is_made_of_the_committed_rows():
    results = REPOSITORY / "benchmarks" / "results" / "quality"
    register()
    grid = read_grid(REPOSITORY / "benchmarks" / "quality.toml")
    rows = choose_rows(GridRows(results / "rows.jsonl").read(), grid.wanted(), grid.measures)
    committed = json.loads((results / "quality.json").read_text())
    facts = {"command": committed["command"], "collections": describe_collections(grid, rows, None)}
    found, expected = (list_leaves(document) for document in (make_document(grid, rows, facts), committed))
    assert [place for place, _ in found] == [place for place, _ in expected]
    for (place, value), (_, wanted) in zip(found, expected, strict=True):
        # Sums, and so a tie among the random signs now and then, differ between processors in their last bits.
        same = value == (pytest.approx(wanted, abs=3e-5) if isinstance(wanted, float) else wanted)
        assert same, (place, value, wanted)

import json

import pytest
from click.testing import CliRunner
from conftest import SAMPLE_FILE

from benchmarks.judge import PER_QUERY, calibrate, draw_lists, main
from gradret.data.lists import Passage, RankingList


def make_list(number, grades):
    passages = [Passage(grade, f"{number} {place} " + "word " * 200) for place, grade in enumerate(grades)]
    return RankingList(f"q{number}", f"query {number}", passages)


def test_passages_of_each_grade_are_drawn_from_queries_that_have_several():
    lists = [make_list(n, [0] * 9 + [2] * 9 + [1]) for n in range(9)] + [make_list(99, [1, 1])]
    drawn = draw_lists(lists, 20, 0)
    assert len(drawn) == 4 and len({r.query_id for r in drawn}) == 4
    for ranking in drawn:
        assert len(ranking.passages) == PER_QUERY and {p.grade for p in ranking.passages} == {0, 1, 2}
        assert all(len(p.text.split()) == 150 for p in ranking.passages)


def test_what_the_model_says_of_nothing_is_divided_out():
    assert calibrate({"1": 0.9, "0": 0.1}, {"1": 0.9, "0": 0.1}) == {"1": 0.5, "0": 0.5}
    assert calibrate({"1": 0.5, "0": 0.5}, {"1": 0.8, "0": 0.2}) == pytest.approx({"1": 0.2, "0": 0.8})


def test_a_source_is_measured(tiny_gguf, tiny_encoder, monkeypatch):
    pytest.importorskip("llama_cpp")
    monkeypatch.setattr("benchmarks.judge.DEFAULT_ENCODER", str(tiny_encoder))
    result = CliRunner().invoke(main, [str(SAMPLE_FILE), "--model", str(tiny_gguf), "--passages", "8"])
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)["sources"]
    assert (found["queries"], found["passages"]) == (2, 8)
    assert [found[name]["order"]["pairs"] for name in ("judge", "judge, calibrated", "encoder")] == [12] * 3
    assert set(found["judge"]["mean_judged"]) == {"3", "2", "1", "0"}

import math

import pytest
from conftest import list_record

from gradret.errors import GradretError
from gradret.evaluation import measure_run, parse_measures, split_measures
from gradret.sources import Source, open_collection


@pytest.fixture
def collection(write_jsonl):
    return open_collection(Source(str(write_jsonl("f.jsonl", [list_record("q1"), list_record("q2", (2.6, 0.2))]))))


def test_measures_by_hand(collection):
    # q1 has grades 3, 2, 1, 0; trec_eval's gain is the grade, the discount log2(rank + 1). q2 is not ranked at all.
    run = {"q1": [("q1/2", 0.9), ("q1/1", 0.8), ("q2/1", 0.7), ("q1/3", 0.6)]}
    found = measure_run(run, collection, ["nDCG@10", "RR@10", "R@100"])
    ideal = 3 + 2 / math.log2(3) + 1 / 2
    assert found.per_query["nDCG@10"]["q1"] == pytest.approx((2 + 3 / math.log2(3) + 1 / math.log2(5)) / ideal)
    assert found.per_query["RR@10"] == {"q1": 1.0, "q2": 0.0}
    assert found.measures["R@100"] == 0.5  # a query for which nothing was found counts as 0


def test_a_grade_that_is_not_whole_is_rounded(collection):
    run = {"q1": [("q1/1", 1.0)], "q2": [("q2/2", 1.0), ("q2/1", 0.5)]}
    assert measure_run(run, collection, ["RR@10"]).per_query["RR@10"]["q2"] == 0.5  # .2 is 0, 2.6 is 3


def test_an_unknown_measure():
    with pytest.raises(GradretError, match=r"^measure 'hits@3' is not known .*use ir_measures' names, such as nDCG@10"):
        parse_measures(["nDCG@10", "hits@3"])


def test_measure_names_may_hold_commas():
    names = split_measures("nDCG@10, P(rel=2,judged_only=True)@5,RR")
    assert names == ["nDCG@10", "P(rel=2,judged_only=True)@5", "RR"]
    assert len(parse_measures(names)) == 3


def test_canonical_names_and_ids_that_a_provider_can_not_read(collection):
    run = {"q1": [("q1/1", 0.9), ("q1/4", 0.8)], "q2": [("q2/1", 0.5)]}
    # MRR is another name of RR; gdeval, which computes ERR and the exponential nDCG, wants numbers for query ids.
    found = measure_run(run, collection, ["RR@10", "MRR@10", "ERR@20", 'nDCG(dcg="exp-log2")@10', "NumQ"]).measures
    assert list(found) == ["RR@10", "ERR@20", "nDCG(dcg='exp-log2')@10", "NumQ"]
    assert (found["RR@10"], found["NumQ"]) == (1.0, 2.0)
    ideal = 7 + 3 / math.log2(3) + 1 / 2
    assert found["nDCG(dcg='exp-log2')@10"] == pytest.approx((7 / ideal + 1) / 2, abs=1e-4)
    assert found["ERR@20"] > 0


@pytest.mark.parametrize("run", [[("q1/4", 0.5), ("q1/1", 0.5)], [("q1/1", 0.5), ("q1/4", 0.5)]])
def test_equal_scores_count_in_the_order_of_the_ranking(collection, run):
    found = measure_run({"q1": run}, collection, ["RR@10", "nDCG@1"])
    first = 1.0 if run[0][0] == "q1/1" else 0.0
    assert found.per_query["RR@10"]["q1"] == (1.0 if first else 0.5)
    assert found.per_query["nDCG@1"]["q1"] == first


@pytest.mark.parametrize("name", ["alpha_nDCG@10", "P", "nDCG(foo=1)@10", "nDCG@"])
def test_measures_that_can_not_be_computed(name):
    with pytest.raises(GradretError, match="is not known"):
        parse_measures([name])


def test_a_measure_below_the_depth():
    with pytest.raises(
        GradretError, match="measure 'R@100' looks at 100 documents, but only 5 are ranked; raise --depth"
    ):
        parse_measures(["R@100"], 5)

import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch
from conftest import list_record

from gradret.console import GradretError
from gradret.data.sources import Source, open_collection
from gradret.encoder.load import load_encoder
from gradret.evaluation.measures import evaluate, measure_run, parse_measures, split_measures


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


def hash_words(texts, kind):
    """(n, 64) counts of words by their hash: an embedding function that knows no kinds."""
    found = np.zeros((len(texts), 64))
    for row, text in zip(found, texts, strict=True):
        for word in text.lower().split():
            row[zlib.crc32(word.encode()) % 64] += 1
    return found


def test_any_function_that_embeds_texts(collection):
    found = evaluate(hash_words, collection, measures=["nDCG@10"], progress=False)
    documents = list(collection.documents())
    scores = (
        hash_words(list(collection.queries.values()), "query")
        @ hash_words([d.content for d in documents], "document").T
    )
    for (query_id, ranking), row in zip(found.run.items(), scores, strict=True):
        assert dict(ranking) == dict(zip((d.doc_id for d in documents), row, strict=True)), query_id
    assert found.measures == measure_run(found.run, collection, ["nDCG@10"]).measures


def test_a_function_learns_which_texts_are_queries(collection):
    kinds = {}

    def embed(texts, kind):
        kinds.setdefault(kind, []).extend(texts)
        return torch.ones(len(texts), 3, requires_grad=True)

    evaluate(embed, collection, progress=False)
    assert kinds["query"][-2:] == list(collection.queries.values())
    assert kinds["document"] == [d.content for d in collection.documents()]


def test_an_encoder_and_a_collection_by_name(tiny_encoder):
    found = evaluate(str(tiny_encoder), "sample?queries=even", progress=False)
    encoder, collection = load_encoder(str(tiny_encoder)), open_collection(Source("sample", queries="even"))
    assert found == evaluate(encoder, collection, progress=False)
    assert evaluate(encoder.encode, collection, progress=False).run.keys() == found.run.keys()


@pytest.mark.parametrize(
    ("embed", "message"),
    [
        (lambda texts, kind: ["a"] * len(texts), "must be a dense array of real numbers, .*got a list"),
        (lambda texts, kind: np.ones((len(texts), 3)) * 1j, "must be a dense array of real numbers, .*got a ndarray"),
        (
            lambda texts, kind: torch.eye(len(texts)).to_sparse(),
            "must be a dense array of real numbers, .*got a Tensor",
        ),
        (lambda texts, kind: scipy.sparse.eye(len(texts)), "must be a dense array of real numbers, .*got a dia_"),
        (lambda texts, kind: np.ones(3), r"embeddings of 1 texts must be \(1, D\), got \(3,\)"),
        (lambda texts, kind: np.ones((5, 3)), r"embeddings of 1 texts must be \(1, D\), got \(5, 3\)"),
        (lambda texts, kind: np.ones((len(texts), 3 + (kind == "document"))), "have 4 dimensions, not 3"),
        (lambda texts, kind: np.full((len(texts), 3), np.nan), "embedding of document '.*' is not finite"),
    ],
)
def test_embeddings_of_another_shape(embed, message, collection):
    with pytest.raises(ValueError, match=message):
        evaluate(embed, collection, progress=False)


def test_vectors_computed_before(collection):
    """Only the collection's texts are asked for; lists of numbers are vectors, too."""
    texts = [*collection.queries.values(), *(document.content for document in collection.documents())]
    table = {text: [float(place), 1.0] for place, text in enumerate(texts)}
    found = evaluate(lambda texts, kind: [table[text] for text in texts], collection, progress=False)
    assert (
        found.run
        == evaluate(
            lambda texts, kind: np.array([table[text] for text in texts], np.float16), collection, progress=False
        ).run
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "float16"}, "precision must be 'float32' or 'bfloat16', got 'float16'"),
        ({"measures": []}, "expected measures, depth and batch_size from 1 on"),
        ({"depth": 0}, "expected measures, depth and batch_size from 1 on"),
    ],
)
def test_arguments_out_of_range(options, message, collection):
    with pytest.raises(ValueError, match=message):
        evaluate(hash_words, collection, progress=False, **options)


def test_arguments_as_the_command_line_takes_them(tiny_encoder, collection, tmp_path):
    measures = "nDCG@10,P(rel=2)@5"
    found = evaluate(tiny_encoder, Path(collection.name), measures=measures, cache=str(tmp_path / "c"), progress=False)
    assert list(found.measures) == ["nDCG@10", "P(rel=2)@5"]
    assert any((tmp_path / "c").iterdir())


def test_what_a_function_can_not_have(collection, tmp_path):
    for option in ({"cache": tmp_path}, {"precision": "bfloat16"}):
        with pytest.raises(ValueError, match="cache and precision are for an Encoder"):
            evaluate(hash_words, collection, progress=False, **option)
    with pytest.raises(TypeError, match="expected an Encoder, its name, a SentenceTransformer or a function"):
        evaluate(torch.nn.Linear(2, 2), collection, progress=False)

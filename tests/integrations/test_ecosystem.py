"""gradret's files open in other people's tools, and its measures are theirs."""

import json

import datasets
import ir_measures
import numpy as np
import pytest
import pytrec_eval
from click.testing import CliRunner
from conftest import SAMPLE_FILE, SHARED
from ir_measures import RR, R, nDCG
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from gradret import FitSettings, evaluate, fit, load_encoder, read_lists, write_lists
from gradret.cli import main
from gradret.data.sources import open_collection, parse_source

BINARY = "sample?queries=even&grades=3:1,2:1,1:0,0:0"


@pytest.fixture(scope="module")
def trained(tiny_encoder, tmp_path_factory):
    """The directory of an encoder that fit has trained for a few steps."""
    out = tmp_path_factory.mktemp("trained") / "model"
    settings = FitSettings(
        data=("sample?queries=odd",), model=str(tiny_encoder), learning_rate=1e-3, precision="float32"
    )
    return fit(settings, out, progress=False).out


def write_trec(folder, model, source):
    """The collection's qrels as a file, the model's run as `bench eval` writes it, and what that printed."""
    qrels, run = folder / "qrels.txt", folder / "run.txt"
    collection = open_collection(parse_source(source))
    with open(qrels, "w") as file:
        for query_id in collection.queries:
            grades = collection.qrels[query_id].items()
            file.writelines(f"{query_id} 0 {doc_id} {grade:g}\n" for doc_id, grade in grades)
    arguments = ["bench", "eval", "--model", str(model), "--dataset", source, "--run", str(run), "--json"]
    arguments += ["--cache", str(folder / "cache")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.stderr
    return qrels, run, json.loads(result.stdout)["measures"]


def test_lists_open_in_datasets(tmp_path):
    found = datasets.load_dataset("json", data_files=str(SAMPLE_FILE), split="train", cache_dir=str(tmp_path / "cache"))
    lists = list(read_lists(SAMPLE_FILE))
    assert found["query"] == [ranking_list.query for ranking_list in lists]
    for row, ranking_list in zip(found, lists, strict=True):
        expected = [(passage.grade, passage.text) for passage in ranking_list.passages]
        assert [(passage["grade"], passage["text"]) for passage in row["passages"]] == expected
    # And back: lists that datasets writes are ranking lists, also those it has filled up with nulls.
    found.to_json(str(tmp_path / "lists.jsonl"))
    back = list(read_lists(tmp_path / "lists.jsonl"))
    assert [(r.query_id, r.query, [(p.grade, p.content) for p in r.passages]) for r in back] == [
        (r.query_id, r.query, [(p.grade, p.content) for p in r.passages]) for r in lists
    ]


def test_lists_with_optional_fields_open_in_datasets(tmp_path):
    """Fields that only some passages have, as gen writes them with --judge, become one column."""
    lists = list(read_lists(SAMPLE_FILE))[:4]
    for number, passage in enumerate(lists[1].passages):
        passage.title, passage.extra["judged"] = f"title {number}", 1.5
    lists[2].meta = {"attempt": 2}
    write_lists(tmp_path / "lists.jsonl", lists)
    found = datasets.load_dataset("json", data_files=str(tmp_path / "lists.jsonl"), cache_dir=str(tmp_path / "cache"))
    assert found["train"][1]["passages"][2]["title"] == "title 2"
    found["train"].to_json(str(tmp_path / "back.jsonl"))
    assert [r.passages for r in read_lists(tmp_path / "back.jsonl")] == [r.passages for r in lists]


def test_runs_open_in_trec_tools(trained, tmp_path):
    """ir_measures, trec_eval itself (by pytrec_eval) and ranx find on the written run what gradret printed."""
    qrels, run, printed = write_trec(tmp_path, trained, "sample?queries=even")
    assert set(printed) == {"nDCG@10", "R@100", "RR@10"}
    found = ir_measures.calc_aggregate(
        [nDCG @ 10, R @ 100, RR @ 10], ir_measures.read_trec_qrels(str(qrels)), ir_measures.read_trec_run(str(run))
    )
    assert {str(measure): value for measure, value in found.items()} == pytest.approx(printed, abs=1e-6)

    with open(qrels) as judged, open(run) as ranked:
        evaluator = pytrec_eval.RelevanceEvaluator(pytrec_eval.parse_qrel(judged), {"ndcg_cut.10", "recall.100"})
        by_query = evaluator.evaluate(pytrec_eval.parse_run(ranked)).values()
    assert np.mean([q["ndcg_cut_10"] for q in by_query]) == pytest.approx(printed["nDCG@10"], abs=1e-6)
    assert np.mean([q["recall_100"] for q in by_query]) == pytest.approx(printed["R@100"], abs=1e-6)


@pytest.mark.nightly
@pytest.mark.slow
def test_runs_open_in_ranx(trained, tmp_path):
    ranx = pytest.importorskip("ranx")
    qrels, run, printed = write_trec(tmp_path, trained, "sample?queries=even")
    opened = ranx.Qrels.from_file(str(qrels), kind="trec"), ranx.Run.from_file(str(run), kind="trec")
    found = ranx.evaluate(*opened, ["ndcg@10", "recall@100", "mrr@10"])
    assert [*found.values()] == pytest.approx([printed[name] for name in ("nDCG@10", "R@100", "RR@10")], abs=1e-6)


@pytest.mark.parametrize("source", [BINARY, pytest.param("beir/scifact/test", marks=pytest.mark.nightly)])
def test_one_ndcg_through_three_evaluators(source, trained, tmp_path):
    """gradret, ir_measures on the exported run, and sentence-transformers' own evaluator on the saved model."""
    if source != BINARY and not (SHARED / "ir_datasets").is_dir():
        pytest.skip("needs the shared collections")
    qrels, run, printed = write_trec(tmp_path, trained, source)
    (found,) = ir_measures.calc_aggregate(
        [nDCG @ 10], ir_measures.read_trec_qrels(str(qrels)), ir_measures.read_trec_run(str(run))
    ).values()
    assert found == pytest.approx(printed["nDCG@10"], abs=1e-6)

    collection = open_collection(parse_source(source))
    qrels_of = {query_id: collection.qrels[query_id] for query_id in collection.queries}
    relevant = {q: {d for d, grade in grades.items() if grade > 0} for q, grades in qrels_of.items()}
    evaluator = InformationRetrievalEvaluator(
        collection.queries,
        {document.doc_id: document.content for document in collection.documents()},
        relevant,
        ndcg_at_k=[10],
        batch_size=128,
        write_csv=False,
    )
    model = SentenceTransformer(str(trained), device="cpu")
    theirs = evaluator(model)
    (ndcg,) = (value for name, value in theirs.items() if name.endswith("cosine_ndcg@10"))
    assert ndcg == pytest.approx(printed["nDCG@10"], abs=1e-4)
    assert evaluate(model, collection, progress=False).measures["nDCG@10"] == pytest.approx(ndcg, abs=1e-4)
    assert 0 < ndcg < 1


def test_any_sentence_transformers_model_is_measured(trained):
    """In three lines, the same as the encoder it was saved from."""
    model = SentenceTransformer(str(trained), device="cpu")
    found = evaluate(model, "sample?queries=even", progress=False)
    expected = evaluate(load_encoder(str(trained)), "sample?queries=even", progress=False)
    assert found.measures == pytest.approx(expected.measures, abs=1e-6)
    model.similarity_fn_name = "dot"
    scores = evaluate(model, "sample?queries=even", progress=False).run
    query_id, ((doc_id, score), *_) = next(iter(scores.items()))
    collection = open_collection(parse_source("sample?queries=even"))
    texts = {document.doc_id: document.content for document in collection.documents()}
    query, document = model.encode_query([collection.queries[query_id]]), model.encode_document([texts[doc_id]])
    assert score == pytest.approx(float(query[0] @ document[0]), rel=1e-4)
    model.similarity_fn_name = "euclidean"
    with pytest.raises(ValueError, match="the model's similarity is 'euclidean'; only cosine and dot"):
        evaluate(model, "sample?queries=even", progress=False)

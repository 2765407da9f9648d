import json
import os
import subprocess
import sys

import ir_measures
import pytest
from conftest import SAMPLE_FILE, list_record

from gradret.console import GradretError
from gradret.data.export import FORMS, export_lists
from gradret.data.lists import read_lists
from gradret.data.sources import Source, open_collection, open_lists


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def two_lists(write_jsonl):
    """Two queries that share a text; one passage with title and doc_id."""
    first, second = list_record("q1", (3, 1, 0)), list_record("q2", (2, 0))
    first["passages"][1] |= {"title": "Größe", "doc_id": "D 1"}
    second["passages"].append({"grade": 1, "text": "passage 0 about q1"})
    return write_jsonl("lists.jsonl", [first, second])


CORPUS = [
    {"_id": "q1/1", "title": "", "text": "passage 0 about q1"},
    {"_id": "D 1", "title": "Größe", "text": "passage 1 about q1"},
    {"_id": "q1/3", "title": "", "text": "passage 2 about q1"},
    {"_id": "q2/1", "title": "", "text": "passage 0 about q2"},
    {"_id": "q2/2", "title": "", "text": "passage 1 about q2"},
]
QUERIES = [{"_id": "q1", "text": "what is q1"}, {"_id": "q2", "text": "what is q2"}]
COUNTS = {"queries": 2, "documents": 5, "judgements": 6}


def test_beir(two_lists, tmp_path):
    out = tmp_path / "made" / "beir"
    assert export_lists(str(two_lists), "beir", out) == COUNTS
    assert sorted(p.name for p in out.parent.iterdir()) == ["beir"]
    assert read_jsonl(out / "corpus.jsonl") == CORPUS
    assert read_jsonl(out / "queries.jsonl") == QUERIES
    assert (out / "qrels" / "train.tsv").read_text() == (
        "query-id\tcorpus-id\tscore\nq1\tq1/1\t3\nq1\tD 1\t1\nq1\tq1/3\t0\nq2\tq2/1\t2\nq2\tq2/2\t0\nq2\tq1/1\t1\n"
    )


def test_a_beir_export_is_the_collection_and_the_lists_it_came_from(tmp_path):
    export_lists(str(SAMPLE_FILE), "beir", tmp_path / "beir")
    exported, original = (open_collection(Source(name)) for name in (f"{tmp_path / 'beir'}:train", str(SAMPLE_FILE)))
    assert exported.queries == original.queries
    assert exported.qrels == original.qrels
    assert list(exported.documents()) == list(original.documents())
    lists = open_lists(Source(f"{tmp_path / 'beir'}:train"))
    for exported_list, original_list in zip(lists, read_lists(SAMPLE_FILE), strict=True):
        assert [(p.content, p.grade) for p in exported_list.passages] == [
            (p.content, p.grade) for p in original_list.passages
        ]


def test_trove_keeps_real_grades(write_jsonl, tmp_path):
    path = write_jsonl("lists.jsonl", [list_record("q1", (3, 2.4)), list_record("q2", (1, 0))])
    export_lists(str(path), "trove", tmp_path / "trove")
    assert sorted(p.name for p in (tmp_path / "trove").iterdir()) == ["corpus.jsonl", "qrels.jsonl", "queries.jsonl"]
    assert (tmp_path / "trove" / "qrels.jsonl").read_text() == (
        '{"qid": "q1", "docid": ["q1/1", "q1/2"], "score": [3.0, 2.4]}\n'
        '{"qid": "q2", "docid": ["q2/1", "q2/2"], "score": [1.0, 0.0]}\n'
    )


def test_trove_shares_corpus_and_queries_with_beir(two_lists, tmp_path):
    (tmp_path / "empty").mkdir()
    assert export_lists(str(two_lists), "trove", tmp_path / "empty") == COUNTS
    assert read_jsonl(tmp_path / "empty" / "corpus.jsonl") == CORPUS
    assert read_jsonl(tmp_path / "empty" / "queries.jsonl") == QUERIES


def test_tevatron(two_lists, tmp_path):
    out = tmp_path / "train.jsonl"
    assert export_lists(str(two_lists), "tevatron", out) == COUNTS
    first, second = read_jsonl(out)
    assert first == {
        "query_id": "q1",
        "query": "what is q1",
        "positive_passages": [{"docid": "q1/1", "title": "", "text": "passage 0 about q1"}],
        "negative_passages": [
            {"docid": "D 1", "title": "Größe", "text": "passage 1 about q1"},
            {"docid": "q1/3", "title": "", "text": "passage 2 about q1"},
        ],
    }
    assert [p["docid"] for p in second["positive_passages"]] == ["q2/1"]
    export_lists(str(two_lists), "tevatron", tmp_path / "wide.jsonl", positive_from=1)
    second = read_jsonl(tmp_path / "wide.jsonl")[1]
    assert [p["docid"] for p in second["positive_passages"]] == ["q2/1", "q1/1"]
    assert [p["docid"] for p in second["negative_passages"]] == ["q2/2"]


def test_trec_is_what_trec_eval_reads(two_lists, tmp_path):
    assert export_lists(str(write_plain(two_lists)), "trec", tmp_path / "trec") == COUNTS
    qrels = tmp_path / "trec" / "qrels" / "train.txt"
    assert qrels.read_text().splitlines()[:2] == ["q1 0 q1/1 3", "q1 0 D1 1"]
    found = [(q.query_id, q.doc_id, q.relevance) for q in ir_measures.read_trec_qrels(str(qrels))]
    assert found[:2] == [("q1", "q1/1", 3), ("q1", "D1", 1)] and len(found) == 6


def write_plain(path):
    """The same lists with ids that have no space."""
    plain = path.with_name("plain.jsonl")
    plain.write_text(path.read_text().replace("D 1", "D1"))
    return plain


@pytest.mark.parametrize("form", ["beir", "trove", "trec"])
def test_there_and_back(form, tmp_path):
    export_lists(str(SAMPLE_FILE), form, tmp_path / form)
    source = f"{tmp_path / form}:train"
    counts = export_lists(source, "lists", tmp_path / "back.jsonl")
    assert counts == export_lists(str(SAMPLE_FILE), form, tmp_path / "again")
    for back, original in zip(read_lists(tmp_path / "back.jsonl"), read_lists(SAMPLE_FILE), strict=True):
        assert (back.query_id, back.query) == (original.query_id, original.query)
        passages = [(p.title, p.text, p.grade) for p in original.passages]
        assert [(p.title, p.text, p.grade) for p in back.passages] == passages
        assert all(p.doc_id for p in back.passages)


def test_real_grades_come_back_from_trove(write_jsonl, tmp_path):
    path = write_jsonl("lists.jsonl", [list_record("q1", (3, 2.4)), list_record("q2", (1, -0.5))])
    export_lists(str(path), "trove", tmp_path / "trove")
    export_lists(str(tmp_path / "trove"), "lists", tmp_path / "back.jsonl")
    assert [[p.grade for p in r.passages] for r in read_lists(tmp_path / "back.jsonl")] == [[3, 2.4], [1, -0.5]]


def test_tevatrons_lists_are_lists_of_two_grades(two_lists, tmp_path):
    export_lists(str(two_lists), "tevatron", tmp_path / "tevatron.jsonl")
    first, second = open_lists(Source(str(tmp_path / "tevatron.jsonl")))
    assert [(p.grade, p.doc_id, p.title, p.text) for p in first.passages] == [
        (1, "q1/1", None, "passage 0 about q1"),
        (0, "D 1", "Größe", "passage 1 about q1"),
        (0, "q1/3", None, "passage 2 about q1"),
    ]
    assert (second.query_id, second.query, second.extra) == ("q2", "what is q2", {})
    export_lists(str(tmp_path / "tevatron.jsonl"), "tevatron", tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_text() == (tmp_path / "tevatron.jsonl").read_text()


def test_lists_keep_what_gradret_does_not_know(write_jsonl, tmp_path):
    record = list_record("q1") | {"meta": {"attempt": 1}, "own": [1]}
    record["passages"][0]["judged"] = 2.5
    path = write_jsonl("lists.jsonl", [record])
    export_lists(str(path), "lists", tmp_path / "copy.jsonl")
    assert read_jsonl(tmp_path / "copy.jsonl") == [record]


def test_a_source_with_options_is_refused(tmp_path):
    with pytest.raises(GradretError, match=r"sample\?grades=3: lists are written as they are; leave out the options"):
        export_lists("sample?grades=3", "lists", tmp_path / "out.jsonl")


def bad_lists():
    other_text = {"grade": 0, "text": "other", "doc_id": "q1/1"}
    doubled = list_record("q2")
    doubled["passages"].append(other_text)
    quote = list_record('"q"')
    return [
        (
            "beir",
            {},
            [list_record("q", (3, 2.4))],
            "1: list 'q' has the grade 2.4, but BEIR's are whole numbers; round",
        ),
        ("beir", {}, [list_record("a\tb")], 'jsonl:1: the id "a\\tb" does not fit into a line of BEIR\'s qrels'),
        (
            "trec",
            {},
            [list_record("a b")],
            'jsonl:1: the id "a b" does not fit into a line of TREC\'s qrels; rename it',
        ),
        ("trec", {}, [list_record("q", (3, 2.4))], "list 'q' has the grade 2.4, but TREC's are whole numbers; round"),
        ("beir", {}, [quote], 'jsonl:1: the id "\\"q\\"" does not fit into a line of BEIR'),
        *(
            (form, {}, [list_record("q1"), doubled], "2: list 'q2': doc_id 'q1/1' stands for two different texts")
            for form in FORMS
        ),
        *(
            (form, {}, [list_record("q"), list_record("q")], "2: query id 'q' was already used in line 1")
            for form in FORMS
        ),
        ("tevatron", {}, [list_record("q", (1, 1))], "1: list 'q' has no negative passage when grades from 1 on are"),
        (
            "tevatron",
            {"positive_from": 4},
            [list_record("q")],
            "1: list 'q' has no positive passage when grades from 4",
        ),
        ("trove", {"positive_from": 1}, [list_record("q")], "trove keeps every grade; only tevatron's passages"),
    ]


@pytest.mark.parametrize(("form", "options", "records", "message"), bad_lists())
def test_what_a_format_can_not_say_leaves_nothing_behind(write_jsonl, tmp_path, form, options, records, message):
    path = write_jsonl("lists.jsonl", records)
    with pytest.raises(GradretError) as error:
        export_lists(str(path), form, tmp_path / "out", **options)
    assert message in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["lists.jsonl"]


@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_overwritten(two_lists, tmp_path, form):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("mine")
    for out in (tmp_path / "taken", two_lists):
        with pytest.raises(GradretError, match="is already there, and nothing is overwritten; name another place"):
            export_lists(str(two_lists), form, out)
    assert [p.name for p in (tmp_path / "taken").iterdir()] == ["mine"]


def test_places_and_lists_that_are_not_there(two_lists, tmp_path):
    with pytest.raises(GradretError, match=r"cannot be written \(File exists\)|\(Not a directory\)"):
        export_lists(str(two_lists), "beir", two_lists / "below" / "it")
    with pytest.raises(GradretError, match=r"nowhere\.jsonl: no such file"):
        export_lists(str(tmp_path / "nowhere.jsonl"), "beir", tmp_path / "out")


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="needs root to mount a small file system")
@pytest.mark.parametrize("form", FORMS)
def test_a_full_disk_leaves_nothing_behind(tmp_path, form):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount here")
    try:
        with pytest.raises(GradretError, match=r"out: cannot be written \(No space left on device\)"):
            export_lists(str(SAMPLE_FILE), form, disk / "out")
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)

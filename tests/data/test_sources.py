import csv
import io
import json
import re
import shutil
import tracemalloc

import pytest
from conftest import list_record
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradret.console import GradretError
from gradret.data.collections import BEIR_HEADER, QRELS_FORMS, TROVE_FILE, read_qrels, read_records
from gradret.data.export import export_lists
from gradret.data.sources import (
    MixedLists,
    Source,
    check_lists,
    open_collection,
    open_lists,
    parse_grade_map,
    parse_source,
    query_selector,
)

EXPECTED = "expected OLD:NEW or GRADE, numbers between -1000 and 1000, separated by commas"


def grades_by_text(ranking_list):
    return {p.content: p.grade for p in ranking_list.passages}


def test_spelling():
    assert parse_source("beir/scifact/train?grades=1:3,0&sample=2&queries=even&drop_self=no") == Source(
        "beir/scifact/train", ((1, 3), (0, 0)), 2, queries="even", drop_self=False
    )
    assert parse_source("a?shuffle=0.25").shuffle == 0.25
    assert parse_grade_map("-1=4,1=4,2=3") == ((-1, 4), (1, 4), (2, 3))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a?sample=0", "a?sample=0: sample '0' is not a whole number above 0"),
        ("a?sample=1&sample=2", "a?sample=1&sample=2: sample stands there twice; give it once"),
        ("a?shuffle=1.5", "a?shuffle=1.5: shuffle '1.5' is not a number from 0 to 1"),
        ("a?shuffle=some", "a?shuffle=some: shuffle 'some' is not a number from 0 to 1"),
        (
            "a?size=3",
            "a?size=3: option 'size=3' is not known; "
            "use grades=OLD:NEW,..., sample=K, queries=even|odd|FILE, query_file=FILE, "
            "labels=intended|judged|agreed or drop_self=yes|no",
        ),
        ("a?drop_self=maybe", "a?drop_self=maybe: drop_self 'maybe' is not yes or no"),
        ("a?labels=all", "a?labels=all: labels 'all' is not intended, judged or agreed"),
        ("a?queries=", "a?queries=: queries '' is not even, odd or a file"),
        (
            "a?labels=judged&grades=3",
            "a?labels=judged&grades=3: judged grades are any real numbers, which grades= cannot list; "
            "leave out one of the two, or use labels=agreed",
        ),
        ("a?grades=x:1", f"grade map 'x:1': {EXPECTED}, got 'x:1'"),
        ("a?grades=3:2000", f"grade map '3:2000': {EXPECTED}, got '3:2000'"),
        ("a?grades=1:2,1:3", "grade map '1:2,1:3': grade 1 stands there twice; give it once"),
    ],
)
def test_bad_spelling(text, message):
    with pytest.raises(GradretError) as error:
        parse_source(text)
    assert str(error.value) == message


def test_beir_directory_is_read_whole(beir_directory):
    collection = open_collection(Source(str(beir_directory)))
    assert [(d.doc_id, d.content) for d in collection.documents()] == [
        ("d1", "Tides the moon pulls the sea"),
        ("d2", "bread needs yeast"),
        ("d3", "Bread rye"),
    ]
    assert [d.doc_id for d in collection.documents(2)] == ["d3"]
    assert collection.queries == {"q1": "why tides", "q2": "bread"}  # q3 has no judgment
    assert collection.qrels == {"q1": {"d1": 1}, "q2": {"d2": 2, "d3": 1}}
    assert collection.document_count == 3
    assert open_collection(Source(f"{beir_directory}:train")).queries == {"q2": "bread"}


def test_judged_lists_are_others_when_a_query_or_a_grade_is(beir_directory):
    def read_fingerprint() -> str:
        return MixedLists([parse_source(str(beir_directory))]).fingerprint

    before = read_fingerprint()
    for path, old, new in (("queries.jsonl", "why tides", "why ebb"), ("qrels/test.tsv", "d2\t2", "d2\t1")):
        file = beir_directory / path
        text = file.read_text()
        file.write_text(text.replace(old, new))
        assert read_fingerprint() != before
        file.write_text(text)
    assert read_fingerprint() == before


def test_a_qrels_file_with_the_wrong_header(beir_directory):
    path = beir_directory / "qrels" / "test.tsv"
    path.write_text("q1\td1\t1\n")
    with pytest.raises(GradretError) as error:
        open_collection(Source(str(beir_directory)))
    assert str(error.value) == (
        f"{path}:1: expected the header 'query-id<TAB>corpus-id<TAB>score', got 'q1\td1\t1'; add it as the first line"
    )
    path.write_text("query-id\tcorpus-id\tscore\nq1\td1\tone\n")
    with pytest.raises(GradretError, match=r"test\.tsv:2: expected .* with a whole number below 1000 as score"):
        open_collection(Source(str(beir_directory)))


def test_beirs_qrels_are_quoted_as_csv(beir_directory):
    path = beir_directory / "qrels" / "test.tsv"
    with open(path, "w", newline="") as file:
        rows = [("query-id", "corpus-id", "score"), ("q1", "d1", "1"), ("q2", 'the "second"', 2)]
        csv.writer(file, delimiter="\t", quoting=csv.QUOTE_ALL).writerows(rows)
    assert read_qrels(beir_directory, "test") == {"q1": {"d1": 1}, "q2": {'the "second"': 2}}


def test_a_judgment_with_two_grades_is_refused(beir_directory):
    path = beir_directory / "qrels" / "test.tsv"
    path.write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\td1\t1\nq1\td1\t0\n")
    with pytest.raises(GradretError) as error:
        open_collection(Source(str(beir_directory)))
    assert str(error.value) == (
        f"{path}:4: document 'd1' has grade 0 for query 'q1' here and 1 earlier; keep one of them"
    )


def test_an_id_used_twice_is_named_with_its_lines(beir_directory):
    for name, what in (
        ("corpus.jsonl", "document id 'd2' was already used in line 2"),
        ("queries.jsonl", "query id 'd2' had another text in an earlier line"),
    ):
        path = beir_directory / name
        before = path.read_text()
        path.write_text('{"_id": "d1", "text": "a"}\n{"_id": "d2", "text": "b"}\n\n{"_id": "d2", "text": "c"}\n')
        with pytest.raises(GradretError, match=rf"^{path}:4: {what}; give every (document|query) an id of its own$"):
            open_collection(Source(str(beir_directory)))
        path.write_text(before)


def test_judged_documents_and_queries_that_are_missing_are_told(beir_directory, capsys):
    path, name = beir_directory / "qrels" / "test.tsv", f"{beir_directory}:test"
    header = "query-id\tcorpus-id\tscore\n"
    path.write_text(f"{header}q1\td1\t1\nq1\tgone1\t1\nq1\tgone2\t0\nq2\td2\t1\nPLAIN-3\td2\t1\n")
    lists = MixedLists([Source(str(beir_directory))])
    assert capsys.readouterr().err.splitlines() == [
        f"{name}: 1 of 3 judged queries are missing from it, such as 'PLAIN-3'",
        f"{name}: 2 of 4 judged documents are missing from it, such as 'gone1'",
    ]
    assert "; 2 judgments left out, whose documents are missing" in str(check_lists(lists, refuse_negative=True))
    for line, what in (("q1\tgone", "documents"), ("gone\td1", "queries")):
        path.write_text(f"{header}{line}\t1\n")
        with pytest.raises(GradretError) as error:
            open_collection(Source(str(beir_directory)))
        assert str(error.value) == (
            f"{name}: 1 of 1 judged {what} are missing from it, such as 'gone'; "
            f"check that its {what} and qrels belong together"
        )


def test_trecs_qrels(beir_directory):
    (beir_directory / "qrels" / "test.tsv").unlink()
    for suffix in ("txt", "qrels", "trec"):
        path = beir_directory / "qrels" / f"test.{suffix}"
        path.write_text("q1 0 d1 1\n\nq2\t0\td2\t2\r\nq2 Q0 d3 -1\n")
        assert open_collection(Source(str(beir_directory))).qrels == {"q1": {"d1": 1}, "q2": {"d2": 2, "d3": -1}}
        path.write_text("q1 0 d1 1\nq2 d2 2\n")
        with pytest.raises(
            GradretError, match=rf"test\.{suffix}:2: expected 'QUERY 0 DOCUMENT GRADE' with a whole num"
        ):
            open_collection(Source(str(beir_directory)))
        path.write_text("q\u3000 0 d1\xa0 1\n")  # trec_eval splits at ASCII's white space alone
        assert read_qrels(beir_directory, "test") == {"q\u3000": {"d1\xa0": 1}}
        path.unlink()


def test_mtebs_qrels(beir_directory):
    (beir_directory / "qrels" / "test.tsv").unlink()
    path = beir_directory / "qrels" / "test.jsonl"
    line = '{"query-id": "q1", "corpus-id": "d1", "score": 1}\n'
    path.write_text(line + line.replace("q1", "q2").replace("1}", "0.5}"))
    assert open_collection(Source(str(beir_directory))).qrels == {"q1": {"d1": 1}, "q2": {"d1": 0.5}}
    for old, new in (('"q1"', "1"), (": 1", ": true"), (": 1", ": 1e3"), ("score", "grade"), (line, "[]")):
        path.write_text(line.replace(old, new))
        with pytest.raises(GradretError, match=r"test\.jsonl:1: expected a JSON object with the strings query-id and"):
            open_collection(Source(str(beir_directory)))


ids = st.text(st.characters(codec="utf-8", exclude_characters="\0\r\n\t\ufeff"), min_size=1)
judgments = st.dictionaries(st.tuples(ids, ids), st.integers(-999, 999), min_size=1)


def format_judgments(qrels: dict, form: str) -> str:
    if form == "trec":
        return "".join(f"{q}\t0 {d} {grade}\n" for (q, d), grade in qrels.items())
    if form == "mteb":
        rows = [dict(zip(BEIR_HEADER, (q, d, grade), strict=True)) for (q, d), grade in qrels.items()]
        return "".join(json.dumps(row) + "\n" for row in rows)
    rows = [BEIR_HEADER, *((q, d, grade) for (q, d), grade in qrels.items())]
    csv.writer(file := io.StringIO(), delimiter="\t").writerows(rows)
    return file.getvalue()


@pytest.mark.parametrize(("form", "suffix"), [("beir", "tsv"), ("trec", "qrels"), ("mteb", "jsonl")])
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(judgments)
def test_ids_in_qrels_survive(tmp_path, form, suffix, qrels):
    if form == "trec":
        qrels = {tuple(re.sub(r"\s", "_", i, flags=re.ASCII) for i in pair): grade for pair, grade in qrels.items()}
    (tmp_path / "qrels").mkdir(exist_ok=True)
    (tmp_path / "qrels" / f"test.{suffix}").write_bytes(format_judgments(qrels, form).encode())
    found = read_qrels(tmp_path, "test")
    assert {(q, d): grade for q, grades in found.items() for d, grade in grades.items()} == qrels


RECORD_PIECES = (
    b'{"_id": " d1", "text": "a"}',
    b'{"_id": "d1", "text": "\\u0000", "title": null}',
    b'{"_id": "\xc2\xa0", "text": "\xed\xa0\xbd"}',
    b'{"_id": "d\\u0000", "text": "a"}',
    b'{"_id": 1, "text": "a"}',
    b"\xef\xbb\xbf",
    b"\xff",
    b"\n",
    b"\r\n",
    b"\r",
)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary() | st.lists(st.sampled_from(RECORD_PIECES)).map(b"".join))
def test_any_bytes_are_records_or_one_line(tmp_path, content):
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(content)
    try:
        records = [record for record, _ in read_records(path)]
    except GradretError as error:
        assert re.match(rf"{path}:\d+: [^\n]+$", str(error))
    else:
        assert records == [json.loads(line) for line in content.decode("utf-8-sig").split("\n") if line.strip()]


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary() | st.text('q1 {}":_id\t\xa0\ufeff\r\n', max_size=20).map(str.encode))
def test_any_bytes_select_queries_or_are_one_line(tmp_path, content):
    path = tmp_path / "ids"
    path.write_bytes(content)
    try:
        select = query_selector(str(path))
    except GradretError as error:
        assert re.match(rf"{path}:\d+: [^\n]+$", str(error))
    else:
        for line in content.decode("utf-8-sig").split("\n"):
            assert select(line.rstrip("\r")) == select(line.strip()) == bool(line.strip())


TROVE_PIECES = b'{"qid": "q1", "docid": ["d1"], "score": [1]}', b"\n", b"\xff", b"\0", b'"', b"[]", b",", b"{", b"NaN"


@pytest.mark.parametrize("suffix", [*QRELS_FORMS, TROVE_FILE])
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary()
    | st.text('q1\t "\r\n\0\xa0\ufeff0').map(str.encode)
    | st.lists(st.sampled_from(TROVE_PIECES)).map(b"".join)
)
def test_any_bytes_are_judgments_or_one_line(tmp_path, suffix, content):
    (tmp_path / "qrels").mkdir(exist_ok=True)
    path = tmp_path / TROVE_FILE if suffix == TROVE_FILE else tmp_path / "qrels" / f"test{suffix}"
    path.write_bytes((b"query-id\tcorpus-id\tscore\n" if suffix == ".tsv" else b"") + content)
    try:
        qrels = read_qrels(tmp_path, "test")
    except GradretError as error:
        assert re.match(rf"{path}:\d+: [^\n]+$", str(error))
    else:
        assert sum(map(len, qrels.values())) <= len(content.split(b"\n"))
        assert all(name.encode() in content for q, grades in qrels.items() for name in (q, *grades) if '"' not in name)


def test_troves_qrels_serve_every_split(beir_directory):
    shutil.rmtree(beir_directory / "qrels")
    path = beir_directory / "qrels.jsonl"
    path.write_text('{"qid": "q1", "docid": ["d1"], "score": [1]}\n\n{"qid": "q2", "docid": [], "score": []}\n')
    for split in ("", ":train"):
        assert open_collection(Source(f"{beir_directory}{split}")).qrels == {"q1": {"d1": 1}}
    for line in (
        "[]",
        '{"qid": "q1", "docid": ["d1"]}',
        '{"qid": 1, "docid": ["d1"], "score": [1]}',
        '{"qid": "q1", "docid": [2], "score": [1]}',
        '{"qid": "q1", "docid": ["d1"], "score": ["1"]}',
        '{"qid": "q1", "docid": ["d1"], "score": [NaN]}',
        '{"qid": "q1", "docid": ["d1", "d2"], "score": [1]}',
        '{"qid": "q1", "docid": 3, "score": [1]}',
    ):
        path.write_text(line + "\n")
        with pytest.raises(
            GradretError, match=r"qrels\.jsonl:1: expected a JSON object with a string qid and two list"
        ):
            open_collection(Source(str(beir_directory)))


def test_sycls_layout_with_the_queries_of_another_collection(beir_directory, tmp_path):
    """Synthetic passages of grades 0 to 3 under ids of their own, for queries that are MS MARCO's."""
    lists = tmp_path / "llama33_70b"
    (lists / "qrels").mkdir(parents=True)
    passages = [f'{{"_id": "q1_l_{grade}", "text": "of grade {grade}"}}\n' for grade in (3, 2, 1, 0)]
    (lists / "corpus.jsonl").write_text("".join(passages))
    qrels = "".join(f"q1\tq1_l_{grade}\t{grade}\n" for grade in (3, 2, 1, 0))
    (lists / "qrels" / "train.tsv").write_text(f"query-id\tcorpus-id\tscore\n{qrels}")
    with pytest.raises(GradretError, match=r"llama33_70b/queries\.jsonl: no such file"):
        open_lists(parse_source(f"{lists}:train"))
    source = parse_source(f"{lists}:train?query_file={beir_directory}/queries.jsonl")
    (found,) = MixedLists([source])
    assert (found.query_id, found.query) == ("q1", "why tides")
    assert [(p.grade, p.text, p.doc_id) for p in found.passages] == [
        (grade, f"of grade {grade}", f"q1_l_{grade}") for grade in (3, 2, 1, 0)
    ]
    assert open_collection(source).document_count == 4
    given_to_gen = tmp_path / "queries.jsonl"
    given_to_gen.write_text('{"query_id": "q1", "query": "why tides"}\n')
    assert [*MixedLists([parse_source(f"{lists}:train?query_file={given_to_gen}")])] == [found]
    for name in ("sample", "cranfield"):
        for opened in (open_lists, open_collection):
            with pytest.raises(GradretError, match=f"^{name}: query_file is for a directory without queries.jsonl"):
                opened(Source(name, query_file="queries.jsonl"))


def test_tevatrons_records_that_do_not_do(write_jsonl):
    passage = {"docid": "d", "title": "", "text": "x"}
    record = {"query_id": "q", "query": "w", "positive_passages": [passage], "negative_passages": [3]}
    with pytest.raises(GradretError, match=r"1: negative_passages holds 3; expected JSON objects with docid and text"):
        open_lists(Source(str(write_jsonl("f.jsonl", [record]))))[0]
    record["negative_passages"] = [{"docid": "e"}]
    with pytest.raises(GradretError, match=r"1: passage 2: text null is not a string"):
        open_lists(Source(str(write_jsonl("f.jsonl", [record]))))[0]
    del record["negative_passages"]
    with pytest.raises(GradretError, match="1: list 'q' has no passages"):
        open_lists(Source(str(write_jsonl("f.jsonl", [record]))))[0]


def test_a_missing_split_names_those_there(beir_directory):
    with pytest.raises(GradretError, match=r"dev\.tsv: no such file; splits with qrels here: test, train$"):
        open_collection(Source(f"{beir_directory}:dev"))


@pytest.mark.parametrize("form", ["beir", "trec"])
def test_the_only_split_of_a_directory_need_not_be_named(tmp_path, form):
    export_lists("sample", form, tmp_path / "out")
    assert open_collection(Source(str(tmp_path / "out"))).name == f"{tmp_path / 'out'}:train"
    assert len(open_lists(Source(str(tmp_path / "out")))) == len(open_lists(Source("sample")))
    (tmp_path / "out" / "qrels" / "dev.tsv").touch()
    with pytest.raises(GradretError, match=r"test\.tsv: no such file; splits with qrels here: dev, train$"):
        open_collection(Source(str(tmp_path / "out")))


def test_queries_and_grades_of_a_collection(beir_directory):
    odd = open_collection(parse_source(f"{beir_directory}?queries=odd&grades=1:4"))
    assert list(odd.queries) == ["q1"]
    assert odd.qrels["q1"] == {"d1": 4}
    assert odd.qrels["q2"] == {"d2": 2, "d3": 4}  # what the map does not name stays


def test_queries_from_a_file(beir_directory, tmp_path):
    (tmp_path / "ids").write_text("q2\n")
    assert list(open_collection(Source(str(beir_directory), queries=str(tmp_path / "ids"))).queries) == ["q2"]
    (tmp_path / "ids").write_text('{"query_id": "q2", "query": "w", "passages": []}\n{"_id": "q7", "text": "x"}\n')
    assert list(open_collection(Source(str(beir_directory), queries=str(tmp_path / "ids"))).queries) == ["q2"]
    (tmp_path / "ids").write_text('{"id": "q2"}\n')
    with pytest.raises(GradretError, match=r"ids:1: has neither query_id nor _id; expected one query id per line"):
        open_collection(Source(str(beir_directory), queries=str(tmp_path / "ids")))
    (tmp_path / "ids").write_text("zzz\n")
    with pytest.raises(GradretError, match="selects none of its queries"):
        open_collection(Source(str(beir_directory), queries=str(tmp_path / "ids")))


def test_even_and_odd_need_numbers(write_jsonl):
    path = write_jsonl("f.jsonl", [list_record("alpha")])
    with pytest.raises(GradretError, match="query id 'alpha' does not end in a number; name a file of ids"):
        open_collection(Source(str(path), queries="even"))


@pytest.mark.parametrize(("name", "drops"), [("arguana", True), ("quora", True), ("scifact", False)])
def test_self_retrieving_collections_are_known_by_name(beir_directory, name, drops):
    root = beir_directory.rename(beir_directory.parent / name)
    assert open_collection(Source(str(root))).drop_self is drops
    assert open_collection(Source(str(root), drop_self=not drops)).drop_self is not drops


def test_a_list_file_is_a_collection_of_its_distinct_passages(write_jsonl):
    records = [list_record("q1", (3, 0)), list_record("q2", (2,))]
    records[1]["passages"].append({"grade": 1, "text": "passage 0 about q1"})
    collection = open_collection(Source(str(write_jsonl("f.jsonl", records))))
    assert [d.doc_id for d in collection.documents()] == ["q1/1", "q1/2", "q2/1"]
    assert collection.qrels == {"q1": {"q1/1": 3, "q1/2": 0}, "q2": {"q2/1": 2, "q1/1": 1}}


def test_an_unknown_id_and_one_without_qrels():
    with pytest.raises(GradretError) as error:
        open_collection(Source("nope/unknown"))
    assert str(error.value) == (
        "nope/unknown: no such file or directory, and not an ir_datasets id; "
        "check the path, or pick an id from https://ir-datasets.com"
    )
    with pytest.raises(GradretError) as error:
        open_collection(Source("beir/scifact"))
    assert str(error.value) == (
        "beir/scifact: this ir_datasets id has no qrels; "
        "name one that has, such as beir/scifact/test, beir/scifact/train"
    )


def test_sources_merge_into_one_list_per_query(write_jsonl, beir_directory):
    synthetic = list_record("q2", (2, 0)) | {"query": "bread"}
    other = list_record("q1", (3,))  # the id of a BEIR query, but not its words
    path = write_jsonl("f.jsonl", [synthetic, other])
    lists = MixedLists([Source(str(path)), parse_source(f"{beir_directory}?grades=1:3")])
    assert [r.query_id for r in lists] == ["q2", "q1", "q1"]
    assert grades_by_text(lists[0]) == {"passage 0 about q2": 2, "passage 1 about q2": 0, "Bread rye": 3}
    assert grades_by_text(lists[2]) == {"Tides the moon pulls the sea": 3}
    assert lists.colliding_ids == 1


def test_a_passage_that_comes_twice_keeps_the_first_source_grade(write_jsonl):
    first = write_jsonl("a.jsonl", [list_record("q", (3, 0))])
    second = write_jsonl("b.jsonl", [list_record("q", (1, 1, 1))])
    lists = MixedLists([Source(str(first)), Source(str(second))])
    assert [p.grade for p in lists[0].passages] == [3, 0, 1]


def test_sampling_is_seeded_and_differs_by_query(write_jsonl):
    path = write_jsonl("f.jsonl", [list_record(f"q{i}", range(20)) for i in range(20)])
    source = parse_source(f"{path}?sample=3")

    def draw(seed):
        return [[p.grade for p in r.passages] for r in MixedLists([source], seed=seed)]

    assert draw(0) == draw(0) != draw(1)
    assert {len(d) for d in draw(0)} == {3}
    assert len({tuple(d) for d in draw(0)}) > 10


def test_a_share_of_the_lists_has_its_grades_shuffled(write_jsonl, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the draw depends on the source's name, which must be the same in every test run
    path = write_jsonl("f.jsonl", [list_record(f"q{i}", range(8)) for i in range(200)]).name
    plain = [grades_by_text(r) for r in MixedLists([parse_source(str(path))])]

    def draw(share, seed=0):
        return [grades_by_text(r) for r in MixedLists([parse_source(f"{path}?shuffle={share}")], seed=seed)]

    def changed(lists):
        return sum(a != b for a, b in zip(lists, plain, strict=True))

    assert draw(0) == plain
    assert draw(0.3) == draw(0.3) != draw(0.3, seed=1)
    assert 40 <= changed(draw(0.3)) <= 80
    assert changed(draw(1)) == 200
    assert all(sorted(r.values()) == list(range(8)) for r in draw(1))
    less, more = draw(0.2), draw(0.4)  # what is noisy at 0.2 is as noisy at 0.4
    assert all(b == a for a, b, p in zip(less, more, plain, strict=True) if a != p)
    with pytest.raises(GradretError, match=r"shuffle=0\.5 is for training lists, not for a collection to measure"):
        open_collection(parse_source(f"{path}?shuffle=0.5"))


def test_check_counts_and_keeps_lists_of_one_grade_and_drops_empty_ones(write_jsonl):
    records = [list_record("a"), list_record("b", (2, 2)), list_record("c", (0, 1))]
    path = write_jsonl("f.jsonl", records)
    summary = check_lists(MixedLists([parse_source(f"{path}?grades=2,3")]), refuse_negative=True)
    assert summary.kept.tolist() == [0, 1]
    assert str(summary) == (
        "2 lists, 4 passages, grades 2 to 3; 1 list whose grades are all equal, kept; "
        "1 list left out: no passage is selected"
    )
    less = check_lists(MixedLists([Source(str(path))]), refuse_negative=True, exclude={"what is b"})
    assert less.kept.tolist() == [0, 2]
    assert str(less).endswith("; 1 list left out, whose query is one to be measured")
    with pytest.raises(GradretError, match="no ranking list is left"):
        check_lists(MixedLists([parse_source(f"{path}?grades=9")]), refuse_negative=True)


def test_a_negative_grade_under_gain_targets(write_jsonl):
    path = write_jsonl("f.jsonl", [list_record("a"), list_record("b", (3, -1))])
    lists = MixedLists([Source(str(path))])
    with pytest.raises(GradretError) as error:
        check_lists(lists, refuse_negative=True)
    assert str(error.value) == (
        f"{path}:2: list 'b' has the negative grade -1, to which targets of 2^grade - 1 or sqrt(grade) give nothing; "
        "map it (SOURCE?grades=-1:0,...) or use --targets softmax"
    )
    assert check_lists(lists, refuse_negative=False).lowest == -1


def judged_record(query_id, intended, judged):
    record = list_record(query_id, intended)
    for passage, grade in zip(record["passages"], judged, strict=True):
        passage["judged"] = grade
    return record


def test_judged_labels_are_the_grades_to_train_on(write_jsonl):
    path = write_jsonl(
        "f.jsonl", [judged_record("a", (3, 2, 0), (2.4, 2.9, 0.1)), judged_record("b", (1, 0), (1, -0.5))]
    )
    intended, judged = (MixedLists([parse_source(f"{path}?labels={labels}")]) for labels in ("intended", "judged"))
    assert [[p.grade for p in r.passages] for r in intended] == [[3, 2, 0], [1, 0]]
    assert [[p.grade for p in r.passages] for r in judged] == [[2.4, 2.9, 0.1], [1, -0.5]]
    assert [p.extra for p in judged[0].passages] == [{"judged": 2.4}, {"judged": 2.9}, {"judged": 0.1}]
    sampled = MixedLists([parse_source(f"{path}?labels=judged&sample=1")])[0].passages
    assert sampled[0].grade == sampled[0].extra["judged"]


@pytest.mark.parametrize(
    ("intended", "judged", "agree"),
    [
        ((3, 2, 1, 0), (2.1, 2.0, 0.3, 0.2), True),
        ((0, 1, 2, 3), (0.2, 0.3, 2.0, 2.1), True),
        ((3, 2, 1, 0), (2.0, 2.1, 0.3, 0.2), False),
        ((3, 2, 1, 0), (2.0, 2.0, 0.3, 0.2), False),  # judged the same is not judged higher
        ((3, 2, 1, 0), (3, 1.5, 1, 2), False),
        ((2, 2, 0), (1.9, 0.4, 0.3), True),  # passages of one grade may be judged in any order
        ((2, 0, 2), (1.9, 0.4, 0.3), False),
        ((2, 2), (0, 1), True),
    ],
)
def test_agreed_labels_keep_lists_where_both_orders_agree(write_jsonl, intended, judged, agree):
    path = write_jsonl("f.jsonl", [judged_record("a", intended, judged)])
    passages = MixedLists([parse_source(f"{path}?labels=agreed")])[0].passages
    assert [p.grade for p in passages] == (list(intended) if agree else [])


def test_lists_left_out_for_disagreement_are_counted(write_jsonl):
    records = [
        *(judged_record("1", (3, 0), (2, 1)), judged_record("2", (3, 0), (1, 2)), judged_record("3", (1, 0), (1, 0))),
        *(judged_record("4", (3, 0), (1, 2)), judged_record("6", (3, 0), (1, 2))),
    ]
    path = write_jsonl("f.jsonl", records)
    lists = MixedLists([parse_source(f"{path}?labels=agreed&queries=even")])
    with pytest.raises(GradretError, match="no ranking list is left: the chosen queries, grades and labels match none"):
        check_lists(lists, refuse_negative=True)
    summary = check_lists(MixedLists([parse_source(f"{path}?labels=agreed&grades=3")]), refuse_negative=True)
    assert summary.kept.tolist() == [0]
    assert str(summary) == (
        "1 list, 1 passage, grades 3 to 3; 1 list whose grades are all equal, kept; "
        "1 list left out: no passage is selected; "
        "3 lists left out: judged and intended grades are not in one order"
    )
    both = MixedLists([parse_source(f"{path}?labels=agreed"), parse_source(f"{path}?grades=3")])
    summary = check_lists(both, refuse_negative=True)  # another source has passages for those lists
    assert (len(summary.kept), summary.disagreeing, summary.empty) == (5, 0, 0)


@pytest.mark.parametrize("labels", ["judged", "agreed"])
def test_labels_need_judged_lists(write_jsonl, beir_directory, labels):
    path = write_jsonl("f.jsonl", [judged_record("1", (1, 0), (1, 0)), list_record("2")])
    lists = MixedLists([parse_source(f"{path}?labels={labels}")])
    assert len(lists[0].passages) == 2
    with pytest.raises(GradretError) as error:
        check_lists(lists, refuse_negative=True)
    assert str(error.value) == (
        f"{path}:2: passage 1: has no judged grade, which labels={labels} needs; "
        "write the lists with gradret gen --judge, or leave labels out"
    )
    assert len(
        check_lists(MixedLists([parse_source(f"{path}?labels={labels}&queries=odd")]), refuse_negative=True).kept
    )
    for wrong in ("high", True, float("nan"), 1e9):
        path = write_jsonl("f.jsonl", [judged_record("1", (1, 0), (1, wrong))])
        with pytest.raises(GradretError, match="f.jsonl:1: passage 2: its judged grade '.*' is not a finite number"):
            MixedLists([parse_source(f"{path}?labels={labels}")])[0]
    with pytest.raises(GradretError, match=f"labels={labels} is for training lists, not for a collection to measure"):
        open_collection(parse_source(f"{path}?labels={labels}"))
    for name in (beir_directory, "beir/scifact/test"):
        with pytest.raises(
            GradretError, match=f"^{name}: labels={labels} is for the ranking-list files of gradret gen"
        ):
            open_lists(parse_source(f"{name}?labels={labels}"))


@pytest.mark.parametrize("kind", ["lists", "beir"])
def test_long_texts_of_lists_are_read_in_little_memory(tmp_path, kind):
    """They are for an encoder, which reads their beginning; export has all of them."""
    long = "tides " * 2_000_000
    texts = {"3": "the moon", "2": long, "1": "\u2014 bread", "0": "rye"}
    if kind == "lists":
        source = tmp_path / "lists.jsonl"
        passages = [{"grade": int(grade), "text": text} for grade, text in texts.items()]
        lines = [{"query_id": str(i), "query": f"why {i}", "passages": passages[i % 2 :]} for i in range(3)]
        source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    else:
        source = tmp_path
        (source / "qrels").mkdir()
        (source / "queries.jsonl").write_text('{"_id": "0", "text": "why 0"}\n')
        corpus = ({"_id": grade, "text": text} for grade, text in texts.items())
        (source / "corpus.jsonl").write_text("".join(json.dumps(document) + "\n" for document in corpus))
        judged = "".join(f"0\t{grade}\t{grade}\n" for grade in texts)
        (source / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judged}")
    parsed = parse_source(str(source))
    assert long in {p.text for p in open_lists(parsed)[0].passages}
    tracemalloc.start()
    try:
        found = list(MixedLists([parsed]))
        assert tracemalloc.get_traced_memory()[1] < 30_000_000
    finally:
        tracemalloc.stop()
    assert [p.text for p in found[-1].passages[-2:]] == ["\u2014 bread", "rye"]
    (kept,) = (p.text for p in found[0].passages if p.grade == 2)
    assert len(kept) < 5_000_000 and long.startswith(kept[:131_072]) and long.endswith(kept[-131_072:])

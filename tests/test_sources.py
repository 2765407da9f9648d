import pytest
from conftest import list_record

from gradret.collection import QRELS_HEADER
from gradret.errors import GradretError
from gradret.mix import MixedLists, check_lists
from gradret.sources import Source, open_collection, parse_grade_map, parse_source


def grades_by_text(ranking_list):
    return {p.content: p.grade for p in ranking_list.passages}


def test_spelling():
    assert parse_source("beir/scifact/train?grades=1:3,0&sample=2&queries=even&drop_self=no") == Source(
        "beir/scifact/train", ((1, 3), (0, 0)), 2, "even", False
    )
    assert parse_grade_map("-1=4,1=4,2=3") == ((-1, 4), (1, 4), (2, 3))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a?sample=0", "a?sample=0: sample '0' is not a whole number above 0"),
        (
            "a?size=3",
            "a?size=3: option 'size=3' is not known; "
            "use grades=OLD:NEW,..., sample=K, queries=even|odd|FILE or drop_self=yes|no",
        ),
        ("a?grades=x:1", "grade map 'x:1': expected OLD:NEW or GRADE, separated by commas, got 'x:1'"),
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


def test_a_qrels_file_with_the_wrong_header(beir_directory):
    path = beir_directory / "qrels" / "test.tsv"
    path.write_text("q1\td1\t1\n")
    with pytest.raises(GradretError) as error:
        open_collection(Source(str(beir_directory)))
    assert str(error.value) == (
        f"{path}:1: expected the header 'query-id<TAB>corpus-id<TAB>score', got 'q1\td1\t1'; add it as the first line"
    )
    path.write_text("\t".join(QRELS_HEADER) + "\nq1\td1\tone\n")
    with pytest.raises(GradretError, match=r"test\.tsv:2: expected .* with a whole number as score"):
        open_collection(Source(str(beir_directory)))


def test_a_missing_split_names_those_there(beir_directory):
    with pytest.raises(GradretError, match=r"dev\.tsv: no such file; splits with qrels here: test, train$"):
        open_collection(Source(f"{beir_directory}:dev"))


def test_queries_and_grades_of_a_collection(beir_directory):
    odd = open_collection(parse_source(f"{beir_directory}?queries=odd&grades=1:4"))
    assert list(odd.queries) == ["q1"]
    assert odd.qrels["q1"] == {"d1": 4}
    assert odd.qrels["q2"] == {"d2": 2, "d3": 4}  # what the map does not name stays


def test_queries_from_a_file(beir_directory, tmp_path):
    (tmp_path / "ids").write_text("q2\n")
    assert list(open_collection(Source(str(beir_directory), queries=str(tmp_path / "ids"))).queries) == ["q2"]
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


def test_check_counts_and_keeps_lists_of_one_grade_and_drops_empty_ones(write_jsonl):
    records = [list_record("a"), list_record("b", (2, 2)), list_record("c", (0, 1))]
    path = write_jsonl("f.jsonl", records)
    summary = check_lists(MixedLists([parse_source(f"{path}?grades=2,3")]), refuse_negative=True)
    assert summary.kept.tolist() == [0, 1]
    assert str(summary) == (
        "2 lists, 4 passages, grades 2 to 3; 1 lists whose grades are all equal, kept; "
        "1 lists left out: none of their passages is selected"
    )
    less = check_lists(MixedLists([Source(str(path))]), refuse_negative=True, exclude={"what is b"})
    assert less.kept.tolist() == [0, 2]
    assert str(less).endswith("; 1 lists left out, whose query is one to be measured")
    with pytest.raises(GradretError, match="no ranking list is left"):
        check_lists(MixedLists([parse_source(f"{path}?grades=9")]), refuse_negative=True)


def test_a_negative_grade_under_gain_targets(write_jsonl):
    path = write_jsonl("f.jsonl", [list_record("a"), list_record("b", (3, -1))])
    lists = MixedLists([Source(str(path))])
    with pytest.raises(GradretError) as error:
        check_lists(lists, refuse_negative=True)
    assert str(error.value) == (
        f"{path}:2: list 'b' has the negative grade -1, which gain targets (2^grade - 1) do not allow; "
        "map it (SOURCE?grades=-1:0,...) or use --targets softmax"
    )
    assert check_lists(lists, refuse_negative=False).lowest == -1

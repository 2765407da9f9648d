import csv
import io
import re
from types import SimpleNamespace

import pytest
from conftest import list_record
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradret.console import GradretError
from gradret.data.lists import query_key
from gradret.generate.queries import FORMS, ID_NAMES, Query, parse_shard, read_queries, take_shard

TWO = [Query("1", "why tides"), Query("2", "größe & ünïcode")]
BEIR_LINES = '{"_id": "1", "text": "why tides"}\n\n{"_id": "2", "text": "größe & ünïcode", "metadata": {}}\n'
LIST_LINES = '{"query_id": 1, "query": "why tides", "passages": []}\n{"query_id": "2", "query": "größe & ünïcode"}'
TSV_LINES = "1\twhy tides\r\n2\tgröße & ünïcode\r\n"
PLAIN_LINES = " why tides\ngröße & ünïcode \n"
HEADED_LINES = "\tText\tQuery_ID\r\n0\twhy tides\t1\r\n1\tgröße & ünïcode\t2\r\n"  # pandas numbers rows


@pytest.mark.parametrize(
    ("suffix", "lines"),
    [
        (".jsonl", BEIR_LINES),
        (".jsonl", LIST_LINES),
        (".tsv", TSV_LINES),
        (".tsv", HEADED_LINES),
        (".csv", HEADED_LINES.replace("\t", ",")),
        (".csv", "sep=;\n" + HEADED_LINES.replace("\t", ";")),
        (".txt", PLAIN_LINES),
    ],
)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_line_formats(tmp_path, monkeypatch, suffix, lines, mark):
    content = (mark + lines).encode()
    for name in (f"queries{suffix}", "queries"):  # without a suffix, and on standard input, the first line decides
        (tmp_path / name).write_bytes(content)
        assert read_queries(str(tmp_path / name)) == TWO
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    assert read_queries("-") == TWO


def test_quoted_fields_are_read_as_csv_means_them(tmp_path):
    (tmp_path / "q.tsv").write_text(
        '1\t"what does ""affect"" mean"\n2\twhat is "ebb"\n3\t"affect" or "effect"\n4\t"open\n'
    )
    assert [q.text for q in read_queries(str(tmp_path / "q.tsv"))] == [
        'what does "affect" mean',
        'what is "ebb"',
        '"affect" or "effect"',
        '"open',
    ]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_spreadsheets_export(tmp_path, separator):
    texts = ["why, oh why; tides", 'the "ebb"', "two\nlines", "größe"]
    with open(tmp_path / "q.CSV", "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=separator).writerows([("ID", "Question"), *enumerate(texts, 1)])
    assert read_queries(str(tmp_path / "q.CSV")) == [Query(str(n), text) for n, text in enumerate(texts, 1)]
    (tmp_path / "excel.csv").write_text(f"sep={separator}\n1{separator}x\n")
    assert read_queries(str(tmp_path / "excel.csv")) == [Query("1", "x")]
    with open(tmp_path / "q.CSV", "a") as file:
        file.write(f"{separator}\n5{separator}x{separator}\n")
    with pytest.raises(GradretError, match=r"q\.CSV:8: expected an id and 2 columns, as in the header, got 3 columns:"):
        read_queries(str(tmp_path / "q.CSV"))


@pytest.mark.parametrize("header", ["Query ID\tQuery Text", "query-id\tquery", "Topic_ID\tquestion", "QueryId\tQUERY"])
def test_a_header_is_known_however_it_is_spelled(tmp_path, header):
    for suffix, separator in ((".tsv", "\t"), (".csv", ","), ("", ",")):
        (tmp_path / f"q{suffix}").write_text(f"{header}\n1\twhy\n".replace("\t", separator))
        assert read_queries(str(tmp_path / f"q{suffix}")) == [Query("1", "why")]
    (tmp_path / "q.tsv").write_text("topic_id\ttitle\n1\twhy\n")
    with pytest.raises(GradretError, match=r"q\.tsv:1: 'topic_id\ttitle' looks like a header"):
        read_queries(str(tmp_path / "q.tsv"))


table_ids = st.text(st.characters(codec="utf-8", exclude_characters="\0\r\n\ufeff"), min_size=1)
tables = st.dictionaries(
    table_ids.filter(lambda i: i.strip() and re.sub("[ _-]", "", i.strip().lower()) not in ID_NAMES),
    st.text(st.characters(codec="utf-8", exclude_characters="\0\r")).map(str.strip),
    min_size=1,
)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tables, st.sampled_from([(".csv", ","), (".csv", ";"), (".tsv", "\t")]), st.sampled_from(["\n", "\r\n"]))
def test_ids_in_tables_survive(tmp_path, table, form, end):
    (suffix, separator), path = form, tmp_path / f"q{form[0]}"
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = [("query_id", "text"), *table.items()]
        csv.writer(file, delimiter=separator, lineterminator=end).writerows(rows)
    try:
        found = {query.query_id: " ".join(query.text.split()) for query in read_queries(str(path))}
    except GradretError as error:
        assert suffix == ".tsv" and "\n" in "".join(table.values())  # a tab-separated file has a line per row
        assert re.match(rf"{path}:\d+: ", str(error))
    else:
        assert found == {query_id: " ".join(text.split()) for query_id, text in table.items()}


@pytest.mark.parametrize("suffix", ["", *FORMS])
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary() | st.text('1a\t,;"{}:\r\n \ufeff').map(str.encode))
def test_any_bytes_are_queries_or_one_line(tmp_path, suffix, content):
    path = tmp_path / f"q{suffix}"
    path.write_bytes(content)
    try:
        queries = read_queries(str(path))
    except GradretError as error:
        assert re.match(rf"{path}(:\d+: [^\n]+|: no queries; expected one per line)$", str(error))
    else:
        texts = content.decode("utf-8-sig")
        assert all('"' in texts or query.query_id in texts or suffix in ("", ".txt") for query in queries)
        assert len({query.query_id for query in queries}) == len(queries) <= len(texts.split("\n"))


def test_plain_queries_may_look_like_another_format_in_a_txt_file(tmp_path):
    (tmp_path / "q.txt").write_text('{"query": 1}\n\na\tb\n')
    assert read_queries(str(tmp_path / "q.txt")) == [Query("1", '{"query": 1}'), Query("3", "a\tb")]


def test_queries_with_commas_are_no_table_without_a_header(tmp_path):
    (tmp_path / "q").write_text("text, or query\n1,why tides\n")
    assert read_queries(str(tmp_path / "q")) == [Query("1", "text, or query"), Query("2", "1,why tides")]


def test_an_empty_text_is_left_to_the_caller(tmp_path):
    (tmp_path / "q.tsv").write_text("7\t\n8\tx\n")
    assert read_queries(str(tmp_path / "q.tsv")) == [Query("7", ""), Query("8", "x")]
    (tmp_path / "q.jsonl").write_text('{"_id": "7", "text": " "}')
    assert read_queries(str(tmp_path / "q.jsonl")) == [Query("7", " ")]


def test_a_query_is_keyed_as_a_list():
    assert Query("1", "a  b").key == query_key("1", "a b")


def test_sample_beir_directory_and_selection(beir_directory):
    assert len(read_queries("sample")) == 96
    assert len(read_queries("sample?queries=odd")) == 48
    assert [q.query_id for q in read_queries(str(beir_directory))] == ["q1", "q2", "q3"]
    assert read_queries(f"{beir_directory}:train") == [Query("q2", "bread")]
    with pytest.raises(GradretError, match=r"qrels/dev\.tsv: no such file; splits with qrels here: test, train$"):
        read_queries(f"{beir_directory}:dev")
    for option in ("grades=3", "query_file=x", "shuffle=.5"):
        with pytest.raises(GradretError, match="queries take no option but queries=even|odd|FILE"):
            read_queries(f"sample?{option}")
    (beir_directory / "none").write_text("zzz\n")
    with pytest.raises(GradretError, match=r"queries=.*none selects none of its queries$"):
        read_queries(f"sample?queries={beir_directory / 'none'}")


BAD = [
    (
        "q.jsonl",
        b'{"_id": "a", "text": "x"}\n{"_id": "a", "text": "x"}\n',
        "2: query id 'a' was already used in line 1",
    ),
    (
        "q.jsonl",
        b'{"_id": "a"}\n',
        "1: expected a JSON object with the strings _id and text, or query_id and query, got",
    ),
    ("q.jsonl", b'{"query_id": "", "query": "x"}\n', "1: query_id '' is not a non-empty string"),
    ("q.jsonl", b'["a", "x"]\n', '1: expected a JSON object .* got \\["a", "x"\\]$'),
    ("q.jsonl", b'\n{"_id": \n', "2: not valid JSON"),
    ("q.tsv", b"1\tx\n2 x\n", "2: expected ID<TAB>TEXT or, in CSV, ID,TEXT, got 1 columns: '2 x'$"),
    ("q.tsv", b"1\tx\ty\n", "1: expected ID<TAB>TEXT or, in CSV, ID,TEXT, got 3 columns: '1\tx\ty'$"),
    ("q.tsv", b"id\twhat\n1\tx\n", "1: 'id\twhat' looks like a header; name one column query_id and one text$"),
    ("q.tsv", b"qid\tquery\ttext\n1\tx\ty\n", "1: '.*' looks like a header; name one column query_id and one text$"),
    ("q.csv", b'1,x\n\n2,"x" y\n', "3: not readable as CSV"),
    ("q.csv", b'1,"x\ny\n', "1: not readable as CSV"),
    ("q.jsonl", b'{"_id": "a\\u0000", "text": "x"}\n', "1: _id .* holds a NUL character; rename it"),
    ("q.txt", b"fine\n\xe9t\xe9\n", "2: not UTF-8 text"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_bad_lines_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(GradretError, match=f"{name}:{message}"):
        read_queries(str(tmp_path / name))


def test_no_queries_and_no_file(tmp_path):
    (tmp_path / "q.txt").write_text("\n \n")
    with pytest.raises(GradretError, match=r"q\.txt: no queries; expected one per line$"):
        read_queries(str(tmp_path / "q.txt"))
    with pytest.raises(GradretError, match=r"nowhere\.jsonl: no such file$"):
        read_queries(str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(GradretError, match="^nope/unknown: no such file or directory, and not an ir_datasets id"):
        read_queries("nope/unknown")
    with pytest.raises(GradretError, match="^beir: this ir_datasets id has no queries; name one that has$"):
        read_queries("beir")


def test_the_judged_queries_of_a_directory(beir_directory, capsys):
    """With every form of qrels; those without a text are told."""
    folder = beir_directory / "qrels"
    for name, content in (
        ("dev.txt", "q1 0 d1 1\nq9 0 d1 1\n"),
        ("dev.jsonl", '{"query-id": "q1", "corpus-id": "d1", "score": 1}\n'),
    ):
        (folder / name).write_text(content)
        assert read_queries(f"{beir_directory}:dev") == [Query("q1", "why tides")]
        (folder / name).unlink()
    (beir_directory / "qrels.jsonl").write_text('{"qid": "q3", "docid": ["d1"], "score": [1]}\n')
    assert read_queries(f"{beir_directory}:dev") == [Query("q3", "unjudged")]
    told = f"{beir_directory}:dev: 1 of 2 judged queries are missing from it, such as 'q9'"
    assert capsys.readouterr().err.splitlines() == [told]
    (folder / "dev.txt").write_text("q9 0 d1 1\n")
    with pytest.raises(GradretError, match=r"1 of 1 judged queries are missing .*; check that its queries and qrels"):
        read_queries(f"{beir_directory}:dev")


def test_queries_of_ir_datasets(shared_home):
    queries = read_queries("beir/scifact/test")
    assert len(queries) == 300
    assert all(query.text for query in queries)


def test_lists_just_written_are_queries(write_jsonl):
    path = write_jsonl("lists.jsonl", [list_record("a"), list_record("b")])
    assert read_queries(str(path)) == [Query("a", "what is a"), Query("b", "what is b")]


def test_shards_are_disjoint_and_complete():
    queries = [Query(str(i), "x") for i in range(10)]
    shards = [take_shard(queries, parse_shard(f"{i}/3")) for i in (1, 2, 3)]
    assert [[q.query_id for q in s] for s in shards] == [list("0369"), list("147"), list("258")]
    assert take_shard(queries, (1, 1)) == queries


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "1/0", "-1/3", "a/b", "1/3/4", ""])
def test_bad_shards(text):
    with pytest.raises(GradretError) as error:
        parse_shard(text)
    assert str(error.value) == f"shard '{text}': expected I/N with 1 <= I <= N, such as 1/4"

import io
from types import SimpleNamespace

import pytest
from conftest import list_record

from gradret.console import GradretError
from gradret.data.lists import query_key
from gradret.generate.queries import Query, parse_shard, read_queries, take_shard

TWO = [Query("1", "why tides"), Query("2", "größe & ünïcode")]
BEIR_LINES = '{"_id": "1", "text": "why tides"}\n\n{"_id": "2", "text": "größe & ünïcode", "metadata": {}}\n'
LIST_LINES = '{"query_id": 1, "query": "why tides", "passages": []}\n{"query_id": "2", "query": "größe & ünïcode"}'
TSV_LINES = "1\twhy tides\r\n2\tgröße & ünïcode\r\n"
PLAIN_LINES = " why tides\ngröße & ünïcode \n"


@pytest.mark.parametrize(
    ("suffix", "lines"),
    [(".jsonl", BEIR_LINES), (".jsonl", LIST_LINES), (".tsv", TSV_LINES), (".txt", PLAIN_LINES)],
)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_line_formats(tmp_path, monkeypatch, suffix, lines, mark):
    content = (mark + lines).encode()
    for name in (f"queries{suffix}", "queries"):  # without a suffix, and on standard input, the first line decides
        (tmp_path / name).write_bytes(content)
        assert read_queries(str(tmp_path / name)) == TWO
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    assert read_queries("-") == TWO


def test_plain_queries_may_look_like_another_format_in_a_txt_file(tmp_path):
    (tmp_path / "q.txt").write_text('{"query": 1}\n\na\tb\n')
    assert read_queries(str(tmp_path / "q.txt")) == [Query("1", '{"query": 1}'), Query("3", "a\tb")]


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
    with pytest.raises(GradretError, match="queries take no option but queries=even|odd|FILE"):
        read_queries("sample?grades=3")
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
    ("q.jsonl", b'{"query_id": "", "query": "x"}\n', "1: expected a JSON object with the strings _id and text"),
    ("q.jsonl", b'["a", "x"]\n', '1: expected a JSON object .* got \\["a", "x"\\]$'),
    ("q.jsonl", b'\n{"_id": \n', "2: not valid JSON"),
    ("q.tsv", b"1\tx\n2 x\n", "2: expected ID<TAB>TEXT, got 1 columns: '2 x'$"),
    ("q.tsv", b"1\tx\ty\n", "1: expected ID<TAB>TEXT, got 3 columns: '1\tx\ty'$"),
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

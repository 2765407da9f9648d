import codecs
import io
import json
import math
import re
import tracemalloc

import numpy as np
import pytest
from conftest import SAMPLE_FILE, list_record
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradret.console import GradretError
from gradret.data import lists as lists_module
from gradret.data.lists import (
    PART,
    ListFile,
    Passage,
    RankingList,
    format_list,
    join_words,
    make_shingles,
    number_lines,
    parse_list,
    query_key,
    query_words,
    read_lines,
    read_lists,
    shorten_lines,
    split_words,
    write_lists,
)
from gradret.data.sources import open_collection, parse_source

LIST_PIECES = (
    b'{"query_id": "\xc3\xa9", "query": "w", "passages": [{"grade": 1, "text": "x"}]}',
    b'{"query_id": 7, "query": "\\u0000", "passages": [{"grade": 0.5, "text": "\\u00e9", "doc_id": " d"}]}',
    b'{"query_id": "a\\u0000", "query": "w", "passages": [{"grade": 1, "text": "x"}]}',
    b"\n",
    b"\r\n",
    b"\r",
    b"\0",
    b" ",
    b"\xed\xa0\xbd",
)


def test_a_line_becomes_a_list_and_keeps_unknown_keys():
    record = {
        "query_id": "q",
        "query": "why",
        "passages": [{"grade": 2.4, "text": "t", "title": "T", "doc_id": "d", "judge": "x"}],
        "meta": {"model": "m"},
        "source": "here",
    }
    parsed = parse_list(record, "f:1")
    assert parsed.passages == [Passage(2.4, "t", "T", "d", {"judge": "x"})]
    assert parsed.passages[0].content == "T t"
    assert (parsed.meta, parsed.extra) == ({"model": "m"}, {"source": "here"})
    assert json.loads(format_list(parsed)) == record


def test_a_whole_number_serves_as_query_id():
    assert parse_list(list_record("x") | {"query_id": 7}, "f:1").query_id == "7"


BAD = [
    ([1, 2], "f.jsonl:1: expected a JSON object, got [1, 2]"),
    (list_record("q") | {"query_id": ""}, "f.jsonl:1: query_id '' is not a non-empty string"),
    (list_record("q") | {"query": None}, "f.jsonl:1: query null of list 'q' is not a non-empty string"),
    (list_record("q", grades=()), "f.jsonl:1: list 'q' has no passages; give it at least one or remove the line"),
    (
        list_record("q", grades=(3, "high")),
        "f.jsonl:1: passage 2: grade 'high' is not a finite number below 1000; write one such as 0, 1, 2 or 3",
    ),
    (
        list_record("q", grades=(True,)),
        "f.jsonl:1: passage 1: grade true is not a finite number below 1000; write one such as 0, 1, 2 or 3",
    ),
    (
        list_record("q", grades=(float("nan"),)),
        "f.jsonl:1: passage 1: grade NaN is not a finite number below 1000; write one such as 0, 1, 2 or 3",
    ),
    (list_record("q") | {"passages": [{"grade": 1}]}, "f.jsonl:1: passage 1: text null is not a string"),
    (
        list_record("q") | {"passages": ["x"]},
        "f.jsonl:1: passage 1: expected a JSON object with grade and text, got 'x'",
    ),
]


@pytest.mark.parametrize(("record", "message"), BAD)
def test_a_bad_record_is_refused_with_its_place(record, message):
    with pytest.raises(GradretError) as error:
        parse_list(record, "f.jsonl:1")
    assert str(error.value) == message


texts = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)
ids = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1)


@given(
    st.builds(
        RankingList,
        ids,
        texts,
        st.lists(
            st.builds(
                Passage,
                st.floats(-999, 999),
                st.text(st.characters(codec="utf-8")),
                st.none() | texts,
                st.none() | ids,
            ),
            min_size=1,
        ),
    )
)
def test_format_and_parse_are_inverse(ranking_list):
    line = format_list(ranking_list)
    assert "\n" not in line
    assert parse_list(json.loads(line), "") == ranking_list


def test_a_file_is_left_as_it_is_until_all_lists_are_there(tmp_path):
    path = tmp_path / "lists.jsonl"
    good = RankingList("q", "why", [Passage(np.int64(3), "tea"), Passage(np.float32(0.5), "rye")])
    write_lists(path, [good])
    assert list(read_lists(path)) == [RankingList("q", "why", [Passage(3, "tea"), Passage(0.5, "rye")])]
    before = path.read_text()
    for bad, message in (
        (RankingList("q", "why", [Passage(math.nan, "tea")]), "list 2: passage 1: grade NaN is not a finite number"),
        (RankingList("q", " ", [Passage(1, "tea")]), "list 2: query ' ' of list 'q' is not a non-empty string"),
        (RankingList("q", "why", [Passage(1, "\ud800")]), "list 2: holds half of a surrogate pair"),
        (RankingList("q", "why", []), "list 2: list 'q' has no passages"),
    ):
        with pytest.raises(GradretError, match=message):
            write_lists(path, [good, bad])
    for wrong, message in (
        ([RankingList("q", "why", [Passage({1}, "tea")])], "cannot be written as JSON"),
        ([RankingList("q", "why", ["tea"])], r"list 1: passages must be Passage, got \['tea'\]"),
        ([{"query_id": "q"}], "lists must hold RankingList, got {'query_id': 'q'}"),
        ("why", "lists must hold RankingList, got 'w'"),
        (good, "lists must be several"),
    ):
        with pytest.raises(TypeError, match=message):
            write_lists(path, wrong)
    with pytest.raises(TypeError, match="path must be a file's name, got 3"):
        list(read_lists(3))
    assert path.read_text() == before
    write_lists(path, (ranking_list for ranking_list in read_lists(path)))  # a file may be read while it is rewritten
    assert path.read_text() == before
    with pytest.raises(GradretError, match=r"nowhere/lists.jsonl: cannot be written \(No such file or directory\)"):
        write_lists(tmp_path / "nowhere" / "lists.jsonl", [good])


def test_the_sample_is_what_gen_wrote():
    lists = list(read_lists(SAMPLE_FILE))
    assert len(lists) == 96
    assert all([p.grade for p in r.passages] == [3, 2, 1, 0] for r in lists)
    assert all({"thing", "answer", "broader", "near", "far"} == r.meta["plan"].keys() for r in lists)
    record = json.loads(SAMPLE_FILE.with_suffix(".gen.json").read_text())
    (settings,) = record["settings"]
    assert record["command"].startswith("gradret gen ")
    assert settings["model"].startswith("Qwen2.5 Coder 1.5B Instruct")
    written = [len(p.text) for r in lists for p in r.passages]
    assert settings["min_chars"] <= min(written) <= max(written) <= settings["max_chars"]


def test_file_is_read_by_position_as_in_order(tmp_path):
    lists = list(read_lists(SAMPLE_FILE))
    path = tmp_path / "copy.jsonl"
    write_lists(path, lists)
    path.write_text("\n" + path.read_text().replace("\n", "\n\n"))  # blank lines are no lists
    indexed = ListFile(path)
    assert len(indexed) == len(lists)
    assert [indexed[i] for i in reversed(range(len(indexed)))] == lists[::-1]
    assert indexed[1].where == f"{path}:4"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            [list_record("a"), "{"],
            "{path}:2: not valid JSON (Expecting property name enclosed in double quotes at column 2)",
        ),
        (
            [list_record("a"), list_record("b"), list_record("a")],
            "{path}:3: query id 'a' was already used in line 1; "
            "give every list an id of its own, or pass the files as two sources to merge them",
        ),
        ([], "{path}: no ranking lists; expected one JSON object per line"),
    ],
)
def test_a_bad_file_is_refused_when_it_is_opened(write_jsonl, lines, message):
    path = write_jsonl("f.jsonl", lines)
    with pytest.raises(GradretError) as error:
        ListFile(path)
    assert str(error.value) == message.replace("{path}", str(path))


def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(GradretError, match=r"nowhere\.jsonl: no such file$"):
        ListFile(tmp_path / "nowhere.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"query_id": "\xe9"}\n')
    with pytest.raises(GradretError, match=r"latin\.jsonl:1: not UTF-8 text"):
        ListFile(tmp_path / "latin.jsonl")


@given(st.text(st.sampled_from("ab \t\n\u00a0\u2003\x1c\u0301")), st.integers(1, 5))
def test_words_are_joined_piece_by_piece_as_all_at_once(text, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lists_module, "PIECE", size)
        assert join_words(text) == " ".join(text.split())


def test_words_of_a_long_text_are_joined_in_little_memory():
    text = "tea and rye  " * 300_000
    tracemalloc.start()
    try:
        assert len(join_words(text)) == 12 * 300_000 - 1
        assert tracemalloc.get_traced_memory()[1] < 4 * len(text)
    finally:
        tracemalloc.stop()


def test_one_query_is_the_same_id_and_the_same_words():
    assert query_key("1", "a\n b") == query_key("1", "a b")
    assert query_key("1", "a b") != query_key("1", "a c")
    assert query_key("1", "a b") != query_key("2", "a b")
    assert query_key("1", "caf\u00e9") == query_key("1", "cafe\u0301")  # NFC and NFD
    assert query_words("CAF\u00c9 \u00c5") == query_words("cafe\u0301  a\u030a")


def test_a_byte_order_mark_is_no_part_of_a_file(write_jsonl, tmp_path):
    """Windows' editors write one. Lists are read by position, too: the first begins behind it."""
    path = write_jsonl("f.jsonl", [list_record("a"), list_record("b")])
    marked = tmp_path / "marked.jsonl"
    marked.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    assert list(ListFile(marked)) == list(ListFile(path)) == list(read_lists(marked))
    assert ListFile(marked).fingerprint == ListFile(path).fingerprint


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_text_in_another_encoding_is_refused_whoever_reads_it(beir_directory, encoding):
    """Never replaced or left out: two ids could become one."""
    qrels = beir_directory / "qrels"
    (qrels / "trec.txt").write_text("q1 0 d1 1\n")
    (beir_directory / "ids").write_text("q1\n")
    source = str(beir_directory)
    for name, spelling in (
        ("corpus.jsonl", source),
        ("queries.jsonl", source),
        ("qrels/test.tsv", source),
        ("qrels/trec.txt", f"{source}:trec"),
        ("ids", f"{source}?queries={beir_directory}/ids"),
    ):
        path = beir_directory / name
        content = path.read_bytes()
        path.write_bytes(codecs.BOM_UTF8 + content)
        assert "q1" in open_collection(parse_source(spelling)).queries
        path.write_bytes(f"{content.decode()}é\n".encode(encoding))
        with pytest.raises(GradretError, match=rf"{path.name}:\d: not UTF-8 text \(.* at byte \d+\); save the file as"):
            open_collection(parse_source(spelling))
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\nb\n".encode("utf-16-le"), "1: holds a NUL character, as UTF-16 has; save the file as UTF-8"),
        (b"a\rb\r", "1: holds a carriage return within a line, as old Macs end them; save the file as UTF-8"),
        (b"a\n" + codecs.BOM_UTF8 + b"b\n", "2: begins with a byte order mark that does not open the file; remove it"),
        (2 * codecs.BOM_UTF8 + b"a\n", "1: begins with a byte order mark that does not open the file; remove it"),
        (b"a\n\xed\xa0\xbd\n", "2: not UTF-8 text (invalid continuation byte at byte 0); save the file as UTF-8"),
    ],
)
def test_bytes_that_leave_an_id_in_doubt_are_refused(tmp_path, content, message):
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(GradretError) as error:
        list(read_lines(tmp_path / "f"))
    assert str(error.value) == f"{tmp_path / 'f'}:{message}"


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0\r\n\ufeff"))), st.sampled_from(["\n", "\r\n"])
)
def test_lines_come_back_as_they_are(lines, end):
    content = codecs.BOM_UTF8 + end.join(lines).encode()
    found = list(number_lines(io.BytesIO(content), "f"))
    assert [(line.number, line.text) for line in found] == [(n, t) for n, t in enumerate(lines, 1) if t.strip()]


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary() | st.lists(st.sampled_from([codecs.BOM_UTF8, *LIST_PIECES])).map(b"".join))
def test_any_bytes_are_lists_or_one_line(tmp_path, content):
    path = tmp_path / "f.jsonl"
    path.write_bytes(content)
    try:
        lists = list(ListFile(path))
    except GradretError as error:
        assert re.match(rf"{path}(:\d+)?: [^\n]+$", str(error))
    else:
        records = [json.loads(line) for line in content.decode("utf-8-sig").split("\n") if line.strip()]
        assert [r.query_id for r in lists] == [str(r["query_id"]) for r in records]
        assert [[p.text for p in r.passages] for r in lists] == [[p["text"] for p in r["passages"]] for r in records]


@settings(deadline=None)
@given(
    records=st.lists(st.dictionaries(st.sampled_from("abc"), st.text(' abxz"\\\n\té☃🐈', max_size=150)), max_size=3),
    ascii=st.booleans(),
    ended=st.booleans(),
)
def test_shortened_lines_keep_both_ends_of_a_string(records, ascii, ended):
    content = "\n".join(json.dumps(record, ensure_ascii=ascii) for record in records) + "\n" * ended
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gradret.data.lists.PART_BYTES", 16)
        lines = list(shorten_lines(io.BytesIO(content.encode()), 2))
    for line, record in zip(lines, records, strict=True) if content.strip() else ():
        found = json.loads(line)
        assert found.keys() == record.keys()
        for key, text in record.items():
            assert found[key] == text or (len(found[key]) < len(text) and found[key][:2] == text[:2])
            assert found[key][-2:] == text[-2:] and found[key].strip()[:2] == text.strip()[:2]
            assert found[key].strip()[-2:] == text.strip()[-2:]


def test_white_space_does_not_count_as_a_strings_end():
    record = {"text": "  " * 300_000 + "START " + "w " * 600_000 + "ENDWORD" + " " * 600_000}
    (line,) = shorten_lines(io.BytesIO(json.dumps(record).encode()), 10_000)
    text = json.loads(line)["text"].strip()
    assert 20_000 < len(text) < 1_200_000
    assert text.startswith("START w w") and text.endswith("w w ENDWORD")


def test_a_string_without_spaces_is_shortened_by_reading_each_byte_once(monkeypatch):
    lengths = []

    class Watched:
        def match(self, piece):
            lengths.append(len(piece))
            return PART.match(piece)

    monkeypatch.setattr("gradret.data.lists.PART", Watched())
    content = json.dumps({"text": "START" + "xyz" * 1_000_000 + "END"}).encode()
    (line,) = shorten_lines(io.BytesIO(content), 10)
    text = json.loads(line)["text"]
    assert text.startswith("STARTxyz") and text.endswith("xyzEND") and len(text) < 1_200_000
    assert sum(lengths) <= len(content)


def test_words():
    assert split_words("Cats' Purring, 2nd_go") == ["cats", "purring", "2nd", "go"]
    assert split_words("हिन्दी में, Ünïted na\u0308rrow ไท") == ["हिन्दी", "में", "ünïted", "närrow", "ไ", "ท"]


def test_shingles():
    assert make_shingles(["a", "b", "c", "d"]) == {("a", "b", "c"), ("b", "c", "d")}
    assert make_shingles(["a", "b"]) == set()

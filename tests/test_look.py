"""`gradret look`: lists shown for reading, on the terminal, as JSON and as a page."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import list_record

from gradret.cli import main
from gradret.data.lists import Passage, RankingList
from gradret.evaluation.order import measure_order
from gradret.look import describe_lists, draw_lists, format_lists, format_page


def invoke(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def embed_lengths(texts, kind):
    return np.array([[1.0 if kind == "query" else len(text) / 100] for text in texts])


def describe(*lists, drawn=()):
    order = measure_order(lists, embed_lengths)
    return describe_lists("lists.jsonl", "mine", "dot", order, [(lists[i], order.similarities[i]) for i in drawn])


JUDGED = RankingList(
    "q1",
    "why do cats purr",
    [
        Passage(0, "Tides.", extra={"judged": 0.25}),
        Passage(3, "Purring is made in the larynx. " * 5, title="Cats", extra={"judged": 2.875}),
        Passage(1, "Cats meow.", extra={"judged": 1.0}),
    ],
)


def test_the_text():
    text = format_lists(describe(JUDGED, drawn=[0]))
    assert (
        text
        == """\
lists.jsonl: 1 list, 3 passages; 1 with all grades (3, 1, 0)
encoder: mine, dot of query and passage

pairs in order  pairs  by the encoder  by the judge
--------------  -----  --------------  ------------
all                 3           1.000         1.000
3>1                 1           1.000         1.000
3>0                 1           1.000         1.000
1>0                 1           1.000         1.000

grade  lists  passages  characters  words  similarity  judged
-----  -----  --------  ----------  -----  ----------  ------
3          1         1         159     31        1.59    2.88
1          1         1          10      2        0.10    1.00
0          1         1           6      1        0.06    0.25

no passage repeats one of another list

[q1] why do cats purr
  3 (1.59, judged 2.88): Cats Purring is made in the larynx. Purring is made in the larynx. Purring
    is made in the larynx. Purring is made in the larynx. Purring is made in the larynx.
  1 (0.10, judged 1.00): Cats meow.
  0 (0.06, judged 0.25): Tides."""
    )


def test_what_is_not_there_is_not_shown():
    alone = RankingList("q", "a query", [Passage(1, "some text")])
    document = describe(alone, RankingList("r", "a query", [Passage(1, "Some  text!")]))
    assert document["order"] == {"encoder": None, "judge": None} and document["warning"] == ""
    text = format_lists(document)
    assert "pairs" not in text and "judged" not in text
    assert "<ul>" not in format_page(describe(alone))
    assert text.endswith("2 passages repeat one of another list:\n  q (grade 1), r (grade 1): 100%")


def test_lists_upside_down_are_told():
    document = describe(RankingList("q", "a query", [Passage(1, "short"), Passage(0, "longer")]))
    message = "the grades of these lists do not follow the order of the encoder: 0.000 of the pairs are in order"
    assert document["warning"].startswith(message)
    assert format_lists(document).endswith(document["warning"])
    assert f'<p class="warning">{message}' in format_page(document)


class Tags(HTMLParser):
    """What a browser would find of tags and attributes."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text = [], set(), ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.text += data


def test_nothing_in_a_text_becomes_markup_or_moves_the_terminal():
    hostile = "</p><script>alert('1')</script><img src=x onerror=\"a\"> $body ${title} &lt; \x1b[2J\u202eevil\x00"
    lists = [RankingList(f"{i}{hostile}", hostile, [Passage(1, hostile, title=hostile), Passage(0, "x")]) for i in "ab"]
    document = describe(*lists, drawn=[0, 1]) | {"source": hostile, "encoder": hostile}
    page = format_page(document)
    tags = Tags(page)
    known = {"html", "meta", "title", "style", "h1", "h2", "p", "table", "tr", "th", "td", "ul", "li"}
    assert set(tags.tags) <= known
    assert tags.attributes == {"lang", "charset", "name", "content", "class", "dir"}  # nothing loads, nothing runs
    assert tags.text.count("<script>alert('1')</script>") >= 10 and "$body ${title} &lt; [2J evil" in tags.text
    assert not re.search(r"https?:|url\(|@import", page)
    for text in (page, format_lists(document | {"source": "lists.jsonl", "encoder": "mine"})):
        assert not re.search("[\x00-\x09\x0b-\x1f\u202e]", text)


def test_the_draw():
    assert draw_lists(3, 10, 0) == [0, 1, 2] and draw_lists(0, 10, 0) == []
    assert draw_lists(1000, 10, 0) == draw_lists(1000, 10, 0) != draw_lists(1000, 10, 1)


def test_the_command(write_jsonl, tiny_encoder, tmp_path):
    data = write_jsonl("lists.jsonl", [list_record(f"q{i}") for i in range(4)])
    page = tmp_path / "page.html"
    result = invoke("look", data, "--encoder", tiny_encoder, "--draw", 2, "--html", page)
    assert result.exit_code == 0, result.output
    assert "look: 4 lists, 16 passages, grades 0 to 3" in result.stderr and f"written: {page}" in result.stderr
    assert result.stdout.startswith(f"{data}: 4 lists, 16 passages; 4 with all grades (3, 2, 1, 0)\n")
    assert result.stdout.count("\n[q") == 2 and page.read_text().count("<h2") == 2
    result = invoke("look", data, f"{data}?grades=3,1", "--encoder", tiny_encoder, "--json", "-q")
    assert result.stderr == ""
    document = json.loads(result.stdout)
    assert (document["lists"], document["order"]["encoder"]["pairs"], len(document["drawn"])) == (4, 24, 4)
    assert document["grades"]["3"]["characters"] == 18
    assert (document["source"], document["similarity"]) == (f"{data} {data}?grades=3,1", "cosine")


def test_queries_whose_text_is_elsewhere_or_nowhere(beir_directory, tiny_encoder, tmp_path):
    elsewhere = tmp_path / "queries.jsonl"
    (beir_directory / "queries.jsonl").rename(elsewhere)
    source = f"{beir_directory}?query_file={elsewhere}"
    result = invoke("look", source, "--encoder", tiny_encoder, "--json")
    assert json.loads(result.stdout)["order"]["encoder"]["pairs"] == 1
    result = invoke("look", beir_directory, "--encoder", tiny_encoder)
    assert (result.exit_code, result.stderr) == (1, f"Error: {beir_directory}/queries.jsonl: no such file\n")
    elsewhere.write_text("".join(json.dumps({"_id": q, "text": ""}) + "\n" for q in ("q1", "q2")))
    document = json.loads(invoke("look", source, "--encoder", tiny_encoder, "--json").stdout)
    assert document["order"]["encoder"] is None
    assert {passage["similarity"] for drawn in document["drawn"] for passage in drawn["passages"]} == {None}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "Missing argument 'LISTS...'"),
        (("sample", "--draw", -1), 2, "Invalid value for '--draw'"),
        (("no.jsonl",), 1, "Error: no.jsonl: no such file\n"),
        (("sample?labels=judged",), 1, "passage 1: has no judged grade, which labels=judged needs"),
        (("sample", "--html", "no/page.html"), 1, "Error: no/page.html: cannot be written (No such file or directory)"),
        (("sample", "--encoder", "./no"), 1, "Error: ./no: no such directory\n"),
    ],
)
def test_exit_codes(arguments, code, message):
    result = invoke("look", *arguments)
    assert (result.exit_code, message in result.stderr) == (code, True), result.output

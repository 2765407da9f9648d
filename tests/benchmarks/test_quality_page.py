import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from quality_examples import SYSTEMS, fill_rows, find_cell, make_experiment, make_facts, make_grid

from benchmarks.quality.page import write_page
from gradret.bench.quality_report import make_document
from gradret.console import GradretError

LEVELS = {"bm25": 0.5, "untrained": 0.4, "infonce": 0.6, "wasserstein": 0.7}
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """What is on a page: tables by caption, images, links, all text; every tag must be closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.bold: dict[str, set[tuple[int, int]]] = {}
        self.headers: list[dict] = []
        self.images: list[dict] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self._rows: list[list[str]] = []
        self._bold: set[tuple[int, int]] = set()
        self._caption = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        assert tag not in ("script", "link", "iframe", "object"), tag
        assert not any(name.startswith("on") or name in ("srcset", "style") for name in given)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self._rows, self._bold, self._caption = [], set(), ""
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("th", "td"):
            self._rows[-1].append("")
            if tag == "th":
                self.headers.append(given)
        elif tag == "b":
            self._bold.add((len(self._rows) - 1, len(self._rows[-1]) - 1))
        elif tag == "img":
            self.images.append(given)
        elif tag == "a":
            self.links.append(given["href"])
        if "id" in given:
            self.ids.append(given["id"])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "table":
            assert self._caption not in self.tables
            self.tables[self._caption], self.bold[self._caption] = self._rows, self._bold

    def handle_data(self, data):
        if "caption" in self.open:
            self._caption += data
        elif {"th", "td"} & set(self.open):
            self._rows[-1][-1] += data
        elif "style" not in self.open:
            self.words.append(data)


def write(grid, rows, folder) -> Page:
    write_page(make_document(grid, rows, make_facts(grid)), folder)
    return Page((folder / "index.html").read_text(encoding="utf-8"))


@pytest.fixture
def grid():
    return make_grid(
        make_experiment(),
        make_experiment(
            "noise", title="Noise", vary="temperature", values=(0.1, 0.2), systems=("infonce", "wasserstein")
        ),
        make_experiment(
            "targets", title="Targets", vary="targets", values=("sqrt", "softmax"), systems=("wasserstein",)
        ),
        tuned={"small": {"wasserstein": {"learning_rate": 0.001}}},
    )


def test_the_main_table(grid, tmp_path):
    page = write(grid, fill_rows(grid, LEVELS), tmp_path)
    caption = "All systems, encoder small: nDCG@10, 2 seeds"
    columns = ["system", "A", "B", "mean of collections"]
    assert next(iter(page.tables)) == caption
    assert page.tables[caption] == [
        [*columns, "p"],
        ["BM25", "0.5000", "0.4000", "0.4500", "0.094"],
        ["Untrained", "0.4000", "0.3000", "0.3500", "0.094"],
        ["InfoNCE", "0.6100 ± 0.0141", "0.5100 ± 0.0141", "0.5600 ± 0.0141", ""],
        ["W2", "0.7100 ± 0.0141", "0.6100 ± 0.0141", "0.6600 ± 0.0141", "0.094"],
    ]
    assert page.bold[caption] == {(4, 1), (4, 2), (4, 3)}
    assert {header["scope"] for header in page.headers} == {"col", "row", "colgroup"}


def test_the_primary_system_is_set_off_also_while_runs_are_missing(grid, tmp_path):
    rows = fill_rows(grid, LEVELS)
    del rows[find_cell(grid, "wasserstein", "main").runs[1].key]
    write(grid, rows, tmp_path)
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert page.count('<tr class="primary">') == page.count('<tr class="primary"><th scope="row">W2 (1/2)</th>') == 1


def test_the_other_tables(grid, tmp_path):
    page = write(grid, fill_rows(grid, LEVELS), tmp_path)
    assert page.tables["Noise, encoder small: nDCG@10 (mean of collections), 2 seeds"] == [
        ["temperature", "0.1", "0.2", "change", "p"],
        ["InfoNCE", "0.4600 ± 0.0141", "0.3600 ± 0.0141", "-0.1000", ""],
        ["W2", "0.5600 ± 0.0141", "0.4600 ± 0.0141", "-0.1000", "1.000"],
    ]
    targets = page.tables["Targets, encoder small: nDCG@10, 2 seeds"]
    assert [row[0] for row in targets] == ["system", "W2, targets sqrt", "W2, targets softmax"]
    tested = page.tables["All systems: p against Untrained, encoder small, nDCG@10"]
    assert tested[0] == ["system", "A", "B", "mean of collections"]
    assert tested[1] == ["t-test", "t-test, Holm", "randomisation", "randomisation, Holm"] * 3
    assert [row[0] for row in tested[2:]] == ["BM25", "InfoNCE", "W2"]
    assert tested[2][3:5] == ["0.125", "0.375"]  # A: 2 of 16 sign patterns; three systems
    changed = page.tables["Noise: p against the change of InfoNCE, encoder small, nDCG@10"]
    assert [row[0] for row in changed[2:]] == ["W2"]
    assert page.tables["All systems: A, encoder small: 4 queries, 9 documents, 2 seeds"][-1][:3] == [
        "W2",
        "0.7100 ± 0.0141",
        "0.3550 ± 0.0071",
    ]
    assert page.tables["Systems"][3:] == [
        ["InfoNCE", "fit", "loss infonce", ""],
        ["W2", "fit", "loss wasserstein, order 2", ""],
    ]
    assert page.tables["Encoders"] == [["encoder", "settings"], ["small", "model M"], ["large", "model L"]]
    assert page.tables["Systems with one encoder"][1:] == [["small", "W2", "learning_rate 0.001"]]
    assert page.tables["Data"] == [["name", "sources"], ["lists", "lists.jsonl"]]
    assert page.tables["Collections"][1] == ["A", "beir/a/test", "4", "9"]
    assert page.tables["Versions"] == [["gradret", "commit", "torch"], ["0.6.0", "abc", "2.13"]]
    assert page.tables["Hardware"] == [
        ["device", "threads", "run on", "precision"],
        ["A CPU", "2", "cpu", ""],
        ["A CPU", "2", "cpu", "float32"],
    ]
    assert page.tables["Training"][1] == ["InfoNCE", "6", "80", "5", "10.5"]
    assert ["epochs", "1.0"] in page.tables[
        "Settings of every run, where its system, encoder or experiment names no other"
    ]


def test_the_page_opens_with_what_was_compared(grid, tmp_path):
    rows = fill_rows(grid, LEVELS)
    del rows[find_cell(grid, "bm25").runs[0].key]
    page = write(grid, rows, tmp_path)
    text = "".join(page.words)
    places = [
        text.index(part)
        for part in (
            "A benchmark",
            "4 systems (BM25; Untrained; InfoNCE; W2) with 1 encoder, measured on 2 collections (A; B) by nDCG@10, "
            "RR@10, with up to 2 seeds each.",
            "15 of 16 runs are done.",  # targets = sqrt is what W2 has anyway
            "Curves",
            "Ablations",
            "gradret bench quality --config 'g.toml'",
        )
    ]
    assert places == sorted(places)
    assert page.links == ["#main", "#noise", "#targets", "#_setup"]
    assert set(page.ids) == {link[1:] for link in page.links}
    assert page.tables["All systems, encoder small: nDCG@10, 2 seeds"][1][1:4] == ["–", "–", "–"]


def test_the_files_beside_the_page(grid, tmp_path):
    page = write(grid, fill_rows(grid, LEVELS), tmp_path / "deep" / "report")
    folder = tmp_path / "deep" / "report"
    assert {path.name for path in folder.iterdir()} == {
        "index.html", "quality.json", "main.png", "noise.png", "targets.png",
    }  # fmt: skip
    assert json.loads((folder / "quality.json").read_text()) == make_document(
        grid, fill_rows(grid, LEVELS), make_facts(grid)
    )
    inside = [base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) for image in page.images]
    assert inside == [(folder / f"{name}.png").read_bytes() for name in ("main", "noise", "targets")]
    assert all(content.startswith(b"\x89PNG\r\n\x1a\n") for content in inside)
    assert [image["alt"].split(" on ")[0] for image in page.images] == [
        "All systems: bars of nDCG@10",
        "Noise: curves of nDCG@10 by temperature",
        "Targets: bars of nDCG@10",
    ]
    assert "highest W2 with 0.6600" in page.images[0]["alt"]


def test_the_same_document_gives_the_same_page(grid, tmp_path):
    for folder in ("a", "b"):
        write(grid, fill_rows(grid, LEVELS), tmp_path / folder)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_what_users_wrote_is_escaped(tmp_path):
    nasty = "<script>alert('1')</script> & \"$x$\" </td>"
    systems = {name: replace(system, label=f"{nasty} {name}") for name, system in SYSTEMS.items()}
    plain = make_grid(make_experiment(title=nasty), title=nasty, systems=systems)
    rows = fill_rows(plain, LEVELS)
    document = make_document(plain, rows, {**make_facts(plain), "command": f"gradret '{nasty}'"})
    text = json.dumps(document)
    for name in ("A", "small", "lists"):
        text = re.sub(rf'"{name}"(?!: \d)', json.dumps(f"{nasty} {name}").replace("\\", r"\\"), text)
    write_page(json.loads(text), tmp_path)
    page = Page((tmp_path / "index.html").read_text(encoding="utf-8"))  # a script would be refused
    assert f"gradret '{nasty}'" in page.words
    assert page.tables["Data"][1][0] == f"{nasty} lists"
    table = next(iter(page.tables.values()))
    assert table[0][1] == f"{nasty} A"
    assert table[1][0] == f"{nasty} bm25"
    assert page.images[0]["alt"].startswith(nasty)


def test_nothing_is_fetched(grid, tmp_path):
    page = write(grid, fill_rows(grid, LEVELS), tmp_path)
    assert all(image["src"].startswith("data:image/png;base64,") for image in page.images)
    assert all(link.startswith("#") for link in page.links)
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "url(" not in text and "@import" not in text and "http" not in text
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text


@pytest.mark.parametrize("rows", [True, False])
def test_one_of_everything(rows, tmp_path):
    experiment = make_experiment(systems=("infonce",), collections=("B",))
    grid = make_grid(
        experiment, seeds=1, baselines=(), primary=None, systems={"infonce": SYSTEMS["infonce"]},
        collections={"B": "b"}, encoders={"small": {"model": "M"}},
    )  # fmt: skip
    rows = fill_rows(make_grid(experiment, seeds=1), LEVELS) if rows else {}
    for key in rows:
        rows[key]["collections"] = {"b": rows[key]["collections"]["cranfield?queries=even"]}
    page = write(grid, rows, tmp_path)
    caption = "All systems: nDCG@10, 1 seed"
    assert page.tables[caption] == ([["system", "B"], ["InfoNCE", "0.5000"]] if rows else [["system"], ["InfoNCE"]])
    assert "1 system (InfoNCE) with 1 encoder, measured on 1 collection (B)" in "".join(page.words)
    assert not any("p against" in caption for caption in page.tables)


def test_a_folder_that_cannot_be_written(grid, tmp_path):
    (tmp_path / "report").write_text("a file")
    with pytest.raises(GradretError, match="report: cannot be written"):
        write(grid, {}, tmp_path / "report")

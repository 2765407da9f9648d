"""One process at a time where ir_datasets downloads and unpacks."""

import threading
from types import SimpleNamespace

import ir_datasets
import numpy as np
import pytest
from ir_datasets.formats import GenericDoc, TrecSubQrel

import gradret.data.collections
import gradret.generate.queries
from gradret.console import GradretError
from gradret.data.collections import (
    LOCK_FILE,
    IrDatasetsCollection,
    iterate_documents,
    read_text,
    unpacking,
)
from gradret.data.sources import MixedLists, Source, check_lists
from gradret.evaluation.measures import evaluate
from gradret.generate.queries import read_queries


@pytest.fixture
def home(tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    monkeypatch.setattr("ir_datasets.util.home_path", lambda: tmp_path / "home")
    return tmp_path / "home"


def test_a_second_one_waits_and_says_so(home, capsys):
    entered = threading.Event()

    def enter():
        with unpacking():
            entered.set()

    second = threading.Thread(target=enter)
    with unpacking():
        second.start()
        assert not entered.wait(0.5)
    second.join(10)
    assert entered.is_set()
    told = capsys.readouterr().err
    assert told == f"waiting for another process that downloads or unpacks a collection ({home / LOCK_FILE})\n"


def test_an_error_inside_comes_out_as_it_is_and_lets_go(home, capsys):
    with pytest.raises(OSError, match="no route") as error, unpacking():
        raise OSError("no route")
    assert error.value.__context__ is None
    with unpacking():
        pass
    assert capsys.readouterr().err == ""


def test_without_a_home_that_can_be_written_to_there_is_no_lock(home):
    (home / LOCK_FILE).mkdir()
    with unpacking():
        pass
    with pytest.raises(ValueError) as error, unpacking():
        raise ValueError
    assert error.value.__context__ is None


class Damaged:
    """A dataset of ir_datasets whose documents can be read up to the second block."""

    def dataset_id(self):
        return "some/collection"

    def docs_iter(self):
        yield from ("first", "second")
        raise ValueError("corrupt input")


def test_what_a_damaged_file_raises_becomes_one_line(home):
    documents = iterate_documents(Damaged())
    assert [next(documents), next(documents)] == ["first", "second"]
    told = "^some/collection: ir_datasets could not provide it \\({}\\); if a file is damaged that it "
    with pytest.raises(
        GradretError, match=told.format("ValueError: corrupt input") + f"downloaded or made in {home}, remove that file"
    ):
        next(documents)


@pytest.mark.parametrize("part", ["docs_count", "qrels_iter", "queries_iter", "docs_store", "get_many"])
def test_whatever_part_is_damaged(home, monkeypatch, part):
    class Whole(Damaged):
        """A dataset all of whose parts can be read but for one."""

        def __getattribute__(self, name):
            if name == part != "get_many":
                raise EOFError(part)
            return super().__getattribute__(name)

        def has_docs(self):
            return True

        has_queries = has_qrels = has_docs

        def docs_iter(self):
            return iter([SimpleNamespace(doc_id="a", default_text=lambda: "words")])

        def docs_count(self):
            return 1

        def queries_iter(self):
            return [SimpleNamespace(query_id="q", default_text=lambda: "a word")]

        def qrels_iter(self):
            return [SimpleNamespace(query_id="q", doc_id="a", relevance=1)]

        def docs_store(self):
            return self

        def get_many(self, doc_ids):
            if doc_ids:  # there are none when it is opened
                raise EOFError("get_many")
            return {}

    for module in (gradret.data.collections, gradret.generate.queries):
        monkeypatch.setattr(module, "load_dataset", lambda dataset_id: Whole())
    readers = {
        "docs_count": lambda: IrDatasetsCollection("some/collection"),
        "qrels_iter": lambda: IrDatasetsCollection("some/collection"),
        "queries_iter": lambda: read_queries("some/collection"),
        "docs_store": lambda: IrDatasetsCollection("some/collection").read_documents(["a"]),
        "get_many": lambda: IrDatasetsCollection("some/collection").read_documents(["a"]),
    }
    with pytest.raises(GradretError, match=f"some/collection: ir_datasets could not provide it \\(EOFError: {part}\\)"):
        readers[part]()
    with unpacking():  # the lock was let go
        pass


def test_records_without_a_default_text():
    """ir_datasets does not promise one: the fields that hold text take its place, else one line names the class."""
    from ir_datasets.datasets.bright import BrightQuery
    from ir_datasets.datasets.clinicaltrials import ClinicalTrialsDoc
    from ir_datasets.datasets.codesearchnet import CodeSearchNetDoc
    from ir_datasets.datasets.wapo import TrecBackgroundLinkingQuery
    from ir_datasets.formats.argsme import ArgsMeProcessedDoc
    from ir_datasets.formats.touche_image import ToucheImageDoc

    def read(kind, **fields):
        return read_text(Damaged(), kind(**dict.fromkeys(kind._fields, None) | fields))

    assert read(BrightQuery, text="why tides", reasoning="moon") == "why tides"
    assert read(ClinicalTrialsDoc, title="T", summary="S", eligibility="E") == "T S E"
    assert read(CodeSearchNetDoc, code="def f(): pass", repo="r") == "def f(): pass"
    assert read(ArgsMeProcessedDoc, conclusion="C", premises_texts="P") == "C P"
    assert read(BrightQuery) == ""
    for kind in (TrecBackgroundLinkingQuery, ToucheImageDoc):
        with pytest.raises(
            GradretError, match=f"^some/collection: a {kind.__name__} of ir_datasets has no text; choose"
        ):
            read(kind)
    with pytest.raises(
        GradretError, match=r"^some/collection: a BrightQuery holds half of a surrogate pair: '\\ud83d'$"
    ):
        read(BrightQuery, text="\ud83d")


class Dataset(Damaged):
    """Two queries of BRIGHT's class and two documents, one of them judged; another judged one is missing."""

    def docs_iter(self):
        return iter([GenericDoc("a", "words"), GenericDoc("b", "other")])

    def docs_count(self):
        return 2

    def docs_store(self):
        return self

    def get_many(self, doc_ids):
        return {document.doc_id: document for document in self.docs_iter() if document.doc_id in doc_ids}

    def queries_iter(self):
        kind = ir_datasets.load("bright/biology").queries_cls()
        return [kind(i, f"query {i}", *[""] * (len(kind._fields) - 2)) for i in "qr"]

    def qrels_iter(self):
        return [SimpleNamespace(query_id=q, doc_id=d, relevance=1) for q, d in (("q", "a"), ("q", "gone"), ("s", "a"))]

    def has_docs(self):
        return True

    has_queries = has_qrels = has_docs


def test_two_grades_of_one_judgment_in_ir_datasets_are_refused(home, monkeypatch):
    class Twice(Dataset):
        def qrels_iter(self):
            return [SimpleNamespace(query_id="q", doc_id="a", relevance=grade) for grade in (1, 1, 2)]

    monkeypatch.setattr(gradret.data.collections, "load_dataset", lambda dataset_id: Twice())
    told = "^some/collection: in ir_datasets, document 'a' has grade 1 and grade 2 for query 'q'; choose another"
    with pytest.raises(GradretError, match=told):
        IrDatasetsCollection("some/collection")


def test_of_grades_for_subtopics_the_highest_counts(home, monkeypatch):
    class Diverse(Dataset):
        def qrels_iter(self):
            return [TrecSubQrel("q", "a", grade, str(i)) for i, grade in enumerate((1, 2, 0))]

    monkeypatch.setattr(gradret.data.collections, "load_dataset", lambda dataset_id: Diverse())
    assert IrDatasetsCollection("some/collection").qrels == {"q": {"a": 2}}


def test_what_is_missing_from_ir_datasets_is_told(home, monkeypatch, capsys):
    for module in (gradret.data.collections, gradret.generate.queries):
        monkeypatch.setattr(module, "load_dataset", lambda dataset_id: Dataset())
    assert [query.text for query in read_queries("some/collection")] == ["query q", "query r"]
    lists = MixedLists([Source("some/collection")])
    assert "1 judgment left out, whose documents are missing" in str(check_lists(lists, refuse_negative=True))
    collection = IrDatasetsCollection("some/collection")
    told = "some/collection: 1 of 2 judged queries are missing from it, such as 's'"
    assert capsys.readouterr().err.splitlines() == [told, told]

    def embed(texts, kind):
        return np.ones((len(texts), 2))

    for expected in ("some/collection: 1 of 2 judged documents are missing from it, such as 'gone'\n", ""):
        assert evaluate(embed, collection, measures="R@2").measures == {"R@2": 0.5}
        assert capsys.readouterr().err == expected

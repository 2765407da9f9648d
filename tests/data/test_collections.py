"""One process at a time where ir_datasets downloads and unpacks."""

import threading
from types import SimpleNamespace

import pytest

import gradret.data.collections
import gradret.generate.queries
import gradret.train.mining
from gradret.console import GradretError
from gradret.data.collections import LOCK_FILE, IrDatasetsCollection, iterate_documents, open_store, unpacking
from gradret.generate.queries import read_queries
from gradret.train.mining import open_pool


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

    def docs_store(self):
        raise EOFError("no more")


def test_what_a_damaged_file_raises_becomes_one_line(home):
    documents = iterate_documents(Damaged())
    assert [next(documents), next(documents)] == ["first", "second"]
    told = "^some/collection: ir_datasets could not provide it \\({}\\); if a file is damaged that it "
    with pytest.raises(
        GradretError, match=told.format("ValueError: corrupt input") + f"downloaded or made in {home}, remove that file"
    ):
        next(documents)
    with pytest.raises(GradretError, match=told.format("EOFError: no more")):
        open_store(Damaged())
    with unpacking():  # the lock was let go
        pass


@pytest.mark.parametrize("part", ["docs_count", "qrels_iter", "queries_iter", "get_many", "get"])
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

    for module in (gradret.data.collections, gradret.generate.queries, gradret.train.mining):
        monkeypatch.setattr(module, "load_dataset", lambda dataset_id: Whole())
    readers = {
        "docs_count": lambda: IrDatasetsCollection("some/collection"),
        "qrels_iter": lambda: IrDatasetsCollection("some/collection"),
        "queries_iter": lambda: read_queries("some/collection"),
        "get_many": lambda: IrDatasetsCollection("some/collection").read_documents(["a"]),
        "get": lambda: open_pool("some/collection").read(0),
    }
    with pytest.raises(GradretError, match=f"some/collection: ir_datasets could not provide it \\(EOFError: {part}\\)"):
        readers[part]()

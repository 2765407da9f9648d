"""One process at a time where ir_datasets downloads and unpacks."""

import threading

import pytest

from gradret.errors import GradretError
from gradret.ir_home import LOCK_FILE, iterate_documents, open_store, unpacking


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
    told = "^some/collection: ir_datasets could not provide it \\({}\\); if one of its files is damaged, "
    with pytest.raises(
        GradretError, match=told.format("ValueError: corrupt input") + f"remove its directory in {home}: it is made"
    ):
        next(documents)
    with pytest.raises(GradretError, match=told.format("EOFError: no more")):
        open_store(Damaged())
    with unpacking():  # the lock was let go
        pass


def test_errors_of_who_reads_documents_are_left_alone(home):
    with pytest.raises(ZeroDivisionError):
        for _ in iterate_documents(Damaged()):
            raise ZeroDivisionError

"""One process at a time where ir_datasets downloads and unpacks."""

import threading

import pytest

from gradret.ir_home import LOCK_FILE, unpacking


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

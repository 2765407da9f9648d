"""The output of a generation: what is appended stays, whatever ends the run."""

import fcntl
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import list_record

from gradret.console import GradretError
from gradret.data.lists import parse_list, read_lists
from gradret.generate.journal import Journal
from gradret.generate.queries import Query

RECORD = {"model": "m", "temperature": 0.7, "scale": {"1": "yes", "0": "no"}, "shape": (1, 2)}
MIX = "choose another --out, or pass --mix-settings to append all the same"


def make_list(query_id: str, text: str = "ü"):
    ranking_list = parse_list(list_record(query_id), "")
    ranking_list.passages[0].text = text
    return ranking_list


def open_journal(out: Path, record: dict, rejects: Path | None = None, **options) -> Journal:
    journal = Journal(out, rejects)
    try:
        journal.resume(record, **options)
    except BaseException:
        journal.close()
        raise
    return journal


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "new" / "lists.jsonl"


def test_lists_and_rejects_are_there_in_the_next_run(out):
    rejected, unfinished = Query("r", "no"), Query("u", "server gone")
    with open_journal(out, RECORD) as journal:
        assert (journal.done, journal.rejected) == (set(), set())
        assert json.loads((out.parent / "lists.gen.json").read_text())["settings"][0]["temperature"] == 0.7
        journal.add(make_list("a"))
        journal.reject(rejected, "length", "12 characters", ["raw \ud800 reply"])
        journal.reject(unfinished, "engine", "timed out", [], final=False)
        assert journal.rejected == {rejected.key}
    with open_journal(out, RECORD) as journal:
        assert journal.done == {Query("a", "what is a").key}
        assert journal.rejected == {rejected.key}
        with pytest.raises(ValueError, match="'a' has its list already"):
            journal.add(make_list("a"))
    assert [r.query_id for r in read_lists(out)] == ["a"]
    first, second = map(json.loads, (out.parent / "lists.rejects.jsonl").read_text().splitlines())
    assert first == {
        **{"query_id": "r", "query": "no", "reason": "length", "detail": "12 characters"},
        **{"replies": ["raw ? reply"], "final": True},
    }
    assert second["final"] is False


def test_rejects_can_be_retried_and_a_list_settles_one(out):
    query = Query("a", "what is a")
    with open_journal(out, RECORD) as journal:
        journal.reject(query, "echo", "", [])
    with open_journal(out, RECORD, retry_rejects=True) as journal:
        assert journal.rejected == set()
        journal.add(make_list("a"))
    with open_journal(out, RECORD) as journal:
        assert (journal.done, journal.rejected) == ({query.key}, set())


def test_a_name_without_suffix_and_rejects_elsewhere(tmp_path):
    with open_journal(tmp_path / "lists.v2", RECORD, tmp_path / "bad" / "r.jsonl") as journal:
        journal.add(make_list("a"))
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.*")} == {
        *("lists.v2", "lists.v2.gen.json", "bad/r.jsonl")
    }


def test_a_last_line_torn_anywhere_is_taken_away(out, capsys):
    with open_journal(out, RECORD) as journal:
        journal.add(make_list("a"))
        journal.reject(Query("x", "ü"), "echo", "", [])
    whole = {path: path.read_bytes() for path in (out, journal.rejects)}
    torn = {path: content.replace(b'"a"', b'"b"').replace(b'"x"', b'"y"') for path, content in whole.items()}
    for kept in range(1, max(map(len, torn.values())) - 1):
        for path, content in whole.items():
            path.write_bytes(content + torn[path][: min(kept, len(torn[path]) - 2)])
        with open_journal(out, RECORD) as journal:
            assert (len(journal.done), len(journal.rejected)) == (1, 1)
        assert {path: path.read_bytes() for path in whole} == whole
        said = capsys.readouterr().err
        for path in whole:
            assert f"{path}:2: was cut off when a run was stopped; removed, its query is asked again\n" in said


def test_a_whole_line_that_only_lacks_its_newline_is_kept(out, capsys):
    with open_journal(out, RECORD) as journal:
        journal.add(make_list("a"))
        journal.reject(Query("x", "x"), "echo", "", [])
    whole = {path: path.read_bytes() for path in (out, journal.rejects)}
    for path, content in whole.items():
        path.write_bytes(content[:-1])
    with open_journal(out, RECORD) as journal:
        assert (len(journal.done), len(journal.rejected)) == (1, 1)
        journal.add(make_list("b"))
    assert out.read_bytes().startswith(whole[out])
    assert [r.query_id for r in read_lists(out)] == ["a", "b"]
    assert journal.rejects.read_bytes() == whole[journal.rejects]
    assert f"{out}:1: was written whole but for its newline when a run was stopped; added\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"query_id": "b", "query"', "lists.jsonl:2: not valid JSON"),
        (json.dumps(list_record("b", ("x",))), "lists.jsonl:2: passage 1: grade 'x' is not a finite number"),
        (json.dumps(list_record("a")), "lists.jsonl:2: query id 'a' was already used in line 1; remove one of the two"),
    ],
)
def test_a_line_broken_elsewhere_is_named_and_left(out, line, message):
    with open_journal(out, RECORD) as journal:
        journal.add(make_list("a"))
    content = out.read_text() + line + "\n" + json.dumps(list_record("c"))[:9]
    out.write_text(content)
    with pytest.raises(GradretError, match=message):
        open_journal(out, RECORD)
    assert out.read_text() == content


def test_rejects_that_are_none(out):
    with open_journal(out, RECORD) as journal:
        journal.rejects.write_text('{"query_id": "a"}\n')
    with pytest.raises(
        GradretError, match=r"rejects\.jsonl:1: expected a rejected query with query_id, query and final"
    ):
        open_journal(out, RECORD)


def test_other_settings_are_refused_before_anything_is_touched(out):
    with open_journal(out, RECORD) as journal:
        journal.add(make_list("a"))
    out.write_bytes(out.read_bytes() + b'{"torn')
    before = {p: p.read_bytes() for p in out.parent.iterdir()}
    with pytest.raises(GradretError) as error:
        open_journal(out, RECORD | {"temperature": 0.8})
    assert str(error.value) == f"{out}: was written with temperature=0.7 where 0.8 is asked for; {MIX}"
    with pytest.raises(GradretError, match='was written with new=null where "x" is asked for'):
        open_journal(out, RECORD | {"new": "x"})
    assert {p: p.read_bytes() for p in out.parent.iterdir()} == before
    open_journal(out, RECORD | {"new": None}).close()  # an option of a later version, not used


def test_mixed_settings_are_all_recorded(out):
    settings = [RECORD | {"temperature": t} for t in (0.7, 0.8, 0.9)]
    for number, record in enumerate(settings):
        with open_journal(out, record, mix=True) as journal:
            journal.add(make_list(str(number)))
    stored = json.loads(journal.record_path.read_text())
    assert [record["temperature"] for record in stored["settings"]] == [0.7, 0.8, 0.9]
    for record in settings:  # each is known now
        open_journal(out, record).close()
    assert json.loads(journal.record_path.read_text()) == stored
    with pytest.raises(GradretError, match=r"temperature=0\.7 where 1\.0 is asked for"):
        open_journal(out, RECORD | {"temperature": 1.0})


def test_lists_without_a_record(out):
    with open_journal(out, RECORD) as journal:
        journal.add(make_list("a"))
    journal.record_path.unlink()
    with pytest.raises(GradretError) as error:
        open_journal(out, RECORD)
    assert str(error.value) == (
        f"{out}: holds lists, but lists.gen.json, the record of how they were written, is not there; {MIX}"
    )
    open_journal(out, RECORD, mix=True).close()
    assert json.loads(journal.record_path.read_text())["settings"][0] is None
    open_journal(out, RECORD).close()
    journal.record_path.write_text('{"a": 1}')
    with pytest.raises(
        GradretError, match=r"lists\.gen\.json: is not the record of a generation; choose another --out"
    ):
        open_journal(out, RECORD)


def test_files_without_a_list_take_new_settings_unless_something_was_rejected(out):
    open_journal(out, RECORD).close()
    with open_journal(out, RECORD | {"temperature": 0.1}) as journal:
        assert json.loads(journal.record_path.read_text())["settings"][0]["temperature"] == 0.1
        journal.reject(Query("a", "a"), "echo", "", [])
    with pytest.raises(GradretError, match="--mix-settings"):
        open_journal(out, RECORD)


def test_one_process_at_a_time(out):
    with open_journal(out, RECORD):
        with pytest.raises(GradretError, match=r"lists\.jsonl: another process is writing to it; wait for it"):
            open_journal(out, RECORD)
        with pytest.raises(GradretError, match=r"lists\.rejects\.jsonl: another process is writing to it"):
            Journal(out.with_name("other.jsonl"), out.with_name("lists.rejects.jsonl"))
    open_journal(out, RECORD).close()


def test_no_file_stays_open_or_held_after_a_refusal(out):
    with open_journal(out, RECORD) as journal:
        journal.add(make_list("a"))
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    with pytest.raises(GradretError):
        open_journal(out, {})
    assert (len(os.listdir("/proc/self/fd")) if before else 0) == before
    with open(out, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_places_that_can_not_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(GradretError, match=r"^--out -: lists are appended to a file"):
        Journal(Path("-"))
    with pytest.raises(GradretError, match="file: can ?not be written"):
        Journal(tmp_path / "file" / "lists.jsonl")
    with pytest.raises(GradretError, match=r"cannot be written \(Is a directory\)"):
        Journal(tmp_path)
    with pytest.raises(GradretError, match="/dev/null: is not a regular file"):
        Journal(Path("/dev/null"), tmp_path / "r")
    for name in ("lists.jsonl", "lists.gen.json"):
        with pytest.raises(GradretError, match=f"{name}: is taken by the lists or their record"):
            Journal(tmp_path / "lists.jsonl", tmp_path / name)


def test_an_id_with_other_words_is_refused(out):
    with open_journal(out, RECORD) as journal:
        journal.add(make_list("a"))
        journal.check_queries([Query("a", "what  is a"), Query("b", "anything")])
        with pytest.raises(GradretError) as error:
            journal.check_queries([Query("a", "another")])
    assert str(error.value) == (
        f"{out}: query 'a' has other words there than in the queries given; choose another --out"
    )


FULL = r"lists\.jsonl: cannot be written \(.*\); all lines before are kept: make room and run the same command again"


def fill(out: Path) -> None:
    """Write lists until it fails; what is left are whole lists, and the journal can go on."""
    with open_journal(out, RECORD) as journal:
        journal.add(make_list("0"))
        with pytest.raises(GradretError, match=FULL):
            for number in range(1, 1000):
                journal.add(make_list(str(number), "x" * 5000))
        assert out.read_bytes().endswith(b"\n")
        assert {r.query_id for r in read_lists(out)} == {str(i) for i in range(number)}
        assert len(journal.done) == number


def test_a_file_that_may_not_grow(out):
    """The system's limit cuts a write short, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (51234, before[1]))
    try:
        fill(out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    with open_journal(out, RECORD) as journal:
        journal.add(make_list("more", "x" * 5000))


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="needs root to mount a small file system")
def test_a_disk_that_is_really_full(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount here")
    try:
        fill(disk / "lists.jsonl")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_an_interruption_inside_a_write_leaves_nothing_half(out, monkeypatch):
    with open_journal(out, RECORD) as journal:
        journal.add(make_list("a"))
        write = os.write

        def interrupt(fd, data):
            if fd != journal._fds[journal.out]:
                return write(fd, data)
            write(fd, data[: len(data) // 2])
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "write", interrupt)
        with pytest.raises(KeyboardInterrupt):
            journal.add(make_list("b"))
        monkeypatch.undo()
        journal.add(make_list("b"))
    assert [r.query_id for r in read_lists(out)] == ["a", "b"]


WRITER = """
import sys
from pathlib import Path
from gradret.generate.journal import Journal
from gradret.data.lists import Passage, RankingList
from gradret.generate.queries import Query

with Journal(Path(sys.argv[1])) as journal:
    journal.resume({"seed": 0})
    print("ready", flush=True)
    for number in range(1500):
        query = Query(str(number), f"query {number}")
        if query.key in journal.done | journal.rejected:
            continue
        if number % 5 == 0:
            journal.reject(query, "echo", "", ["reply " * 2000])
        else:
            passages = [Passage(grade, f"{grade} " * 4000) for grade in (3, 2, 1, 0)]
            journal.add(RankingList(query.query_id, query.text, passages))
"""


def test_killed_again_and_again_nothing_is_lost_or_doubled(out):
    """Each time: what was whole before is still there, unchanged, at the start; the last run finishes the rest."""
    draw, runs, files = random.Random(0), 0, (out, out.with_name("lists.rejects.jsonl"))
    while True:
        before = [path.read_bytes() if path.exists() else b"" for path in files]
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(out)], stdout=subprocess.PIPE)
        runs += 1
        if runs <= 12:
            if draw.random() < 0.7:
                process.stdout.readline()
            time.sleep(draw.random() * 0.02)
            process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        for path, old in zip(files, before, strict=True):
            whole = old[: old.rfind(b"\n") + 1]
            assert (path.read_bytes() if path.exists() else b"").startswith(whole)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL
    assert runs >= 3
    ids = [r.query_id for r in read_lists(out)] + [json.loads(s)["query_id"] for s in files[1].read_text().splitlines()]
    assert sorted(ids, key=int) == [str(i) for i in range(1500)]

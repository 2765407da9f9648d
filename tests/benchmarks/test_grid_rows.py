"""The rows of a quality benchmark: appended whole, by several processes at once, and matched with runs."""

import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import REPOSITORY

import gradret
from gradret.bench.grid import Run
from gradret.bench.grid_rows import ROW_KEYS, GridRows, find_key, list_defaults
from gradret.console import GradretError
from gradret.files import open_folder
from gradret.settings import FitSettings


def make_row(seed: int = 0, **changes) -> dict:
    record = Run("fit", FitSettings(seed=seed, loss="kl")).record()
    row = {"run": record, "defaults": list_defaults(), "collections": {}, "versions": {"gradret": gradret.__version__}}
    return {**row, "device": "cpu", "fit_seconds": 1.5, "steps": 1, "lists": 4, **changes}


@pytest.fixture
def rows(tmp_path) -> GridRows:
    return GridRows(tmp_path / "rows.jsonl")


def test_processes_that_start_in_one_folder_leave_each_other_alone(tmp_path):
    def start(_):
        for _ in range(300):
            open_folder(str(tmp_path), "quality.json", "quality.png")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(start, range(4)))  # raises what one of them raised
    assert list(tmp_path.iterdir()) == []


def test_rows_come_back_under_their_runs_key_the_latest_first(rows):
    assert rows.read() == {}
    first, second, again = make_row(0), make_row(1), make_row(0, steps=2)
    for row in (first, second, again):
        rows.append(row)
    assert len(rows.path.read_text().splitlines()) == 3
    keys = [Run("fit", FitSettings(seed=seed, loss="kl")).key for seed in (0, 1)]
    assert rows.read() == {keys[0]: [again, first], keys[1]: [second]}


def test_a_last_line_cut_short_is_dropped_and_the_next_row_takes_its_place(rows):
    rows.append(make_row(0))
    line = json.dumps(make_row(1)).encode()
    for cut in (1, len(line) // 2, len(line) - 1):
        whole = rows.path.read_bytes()
        rows.path.write_bytes(whole + line[:cut])
        assert len(rows.read()) == 1
        rows.append(make_row(2))
        assert rows.path.read_bytes().startswith(whole) and len(rows.read()) == 2
        rows.path.write_bytes(whole)
    rows.path.write_bytes(whole + line)  # whole but for its newline
    assert len(rows.read()) == 2
    rows.append(make_row(2))
    assert len(rows.read()) == 3 and len(rows.path.read_text().splitlines()) == 3


def test_a_broken_line_in_the_middle_is_an_error(rows):
    whole = {"measures": {"AP": 0.5}, "per_query": {"AP": {"q": 0.5}}}
    other = [{"collections": {"a": 3}}, {"collections": {"a": {"measures": "x"}}}, {"run": {"settings": 3}}]
    other += [{"run": {}}, {"device": None}, {"steps": "many"}, {"defaults": 3}]
    spoilt = [
        {"measures": {"AP": "high"}},
        {"measures": {"AP": math.nan}},
        {"per_query": 3},
        {"per_query": {"AP": [1]}},
    ]
    other += [{"collections": {"a": {**whole, **part}}} for part in spoilt]
    lines = [("{", "not valid JSON"), ("{}", "is no row of gradret bench quality"), ("3", "is no row")]
    lines += [(json.dumps(make_row(**changes)), "is no row") for changes in other]
    lines += [(json.dumps({k: v for k, v in make_row().items() if k != key}), "is no row") for key in ROW_KEYS]
    rows.path.write_text(json.dumps(make_row(collections={"a": whole})))
    assert len(rows.read()) == 1
    for line, message in lines:
        rows.path.write_text(f"{line}\n{json.dumps(make_row())}\n")
        with pytest.raises(GradretError, match=f"^{rows.path}:1: {message}"):
            rows.read()


def test_rows_of_another_version_are_not_used_and_this_is_said(rows, capsys):
    rows.append(make_row(0, versions={"gradret": "0.0.9"}))
    rows.append(make_row(1))
    assert list(rows.read()) == [find_key(make_row(1))]
    told = capsys.readouterr().err
    assert told == f"{rows.path}: 1 row is of gradret 0.0.9 and not used; this is {gradret.__version__}\n"
    rows.read(tell=False)
    assert capsys.readouterr().err == ""


def test_a_row_stands_for_its_run_when_a_default_has_changed_since(rows):
    old = make_row(defaults={**list_defaults(), "learning_rate": 7e-5})
    assert find_key(old) == Run("fit", FitSettings(loss="kl", learning_rate=7e-5)).key
    assert find_key(old) != find_key(make_row())
    # A field that there was none of then had what is its default now.
    younger = {k: v for k, v in list_defaults().items() if k != "clip"}
    assert find_key(make_row(defaults=younger)) == find_key(make_row())
    # wasserstein had shares of other losses.
    before = {**list_defaults(), "loss": "wasserstein", "kl_share": 0.0, "contrast_share": 0.85}
    for settings, loss in (({}, "wasserstein:.15+contrast:.85"), ({"contrast_share": 0.0}, "wasserstein")):
        row = make_row(defaults=before, run={**make_row()["run"], "settings": settings})
        assert find_key(row) == Run("fit", FitSettings(loss=loss)).key
    row = make_row(defaults=before, run={**make_row()["run"], "settings": {"loss": "kl", "kl_share": 0.5}})
    assert find_key(row) == Run("fit", FitSettings(loss="kl")).key
    named = make_row(defaults={**list_defaults(), "loss": "kl"}, run={**make_row()["run"], "settings": {}})
    assert find_key(named) == find_key(make_row())


def test_dropping_keeps_the_other_rows_byte_by_byte(rows):
    assert rows.drop({"nothing"}) == 0 and not rows.path.exists()
    for seed in (0, 1, 0):
        rows.append(make_row(seed))
    line = rows.path.read_bytes().splitlines(keepends=True)[1]
    assert rows.drop({find_key(make_row(0))}) == 2
    assert rows.path.read_bytes() == line
    rows.append(make_row(0))
    assert len(rows.read()) == 2


def test_two_processes_append_to_one_file_while_a_third_replaces_it(rows):
    code = (
        "import sys; from test_grid_rows import *\n"
        "for i in range(40): GridRows(sys.argv[1]).append(make_row(int(sys.argv[2]) + i, filler='x' * 20_000))"
    )
    environment = {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}"}
    writers = [
        subprocess.Popen([sys.executable, "-c", code, rows.path, str(first)], env=environment) for first in (100, 200)
    ]
    rows.append(make_row(0))
    while any(writer.poll() is None for writer in writers):
        rows.drop({find_key(make_row(0))})
        rows.append(make_row(0))
    assert [writer.returncode for writer in writers] == [0, 0]
    seeds = [json.loads(line)["run"]["seed"] for line in rows.path.read_text().splitlines()]
    assert sorted(seeds) == [0, *range(100, 140), *range(200, 240)]


def test_a_folder_that_is_not_there_is_told(tmp_path):
    path = tmp_path / "no" / "rows.jsonl"
    with pytest.raises(GradretError, match=f"^{path}: can not be written \\(No such file or directory\\); the rows"):
        GridRows(path).append(make_row())

"""`python -m benchmarks.lists`: lists without the texts of their queries, and back."""

import json

from click.testing import CliRunner
from conftest import list_record

from benchmarks.lists import main
from gradret.data.lists import read_lists
from gradret.data.sources import open_lists, parse_source


def test_lists_are_trained_on_with_the_collections_own_queries(tmp_path):
    lists, folder = tmp_path / "lists.jsonl", tmp_path / "out"
    records = [list_record("a", (3, 1)) | {"meta": {"plan": {"near": "n"}}}, list_record("b", (2, 0))]
    lists.write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "lists.gen.json").write_text('{"settings": [{"model": "m"}]}')
    result = CliRunner().invoke(main, [str(lists), str(folder)])
    assert result.exit_code == 0, result.output
    written = "".join(path.read_text() for path in folder.rglob("*") if path.is_file())
    assert not any(record["query"] in written for record in records)
    assert [json.loads(line) for line in (folder / "plans.jsonl").read_text().splitlines()] == [
        {"query_id": "a", "plan": {"near": "n"}},
        {"query_id": "b"},
    ]
    queries = tmp_path / "queries.jsonl"
    queries.write_text("".join(json.dumps({"_id": r["query_id"], "text": r["query"]}) + "\n" for r in records))
    for found, record in zip(
        open_lists(parse_source(f"{folder}:train?query_file={queries}")), read_lists(lists), strict=True
    ):
        assert (found.query_id, found.query) == (record.query_id, record.query)
        assert sorted((p.grade, p.text) for p in found.passages) == sorted((p.grade, p.text) for p in record.passages)

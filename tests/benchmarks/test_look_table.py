"""The table of written lists, from what is committed."""

import json

from conftest import REPOSITORY, SAMPLE_FILE

from benchmarks.script import RESULTS
from benchmarks.tables import write_look
from gradret.data.lists import read_lists
from gradret.files import read_object

LISTS = sorted((RESULTS / "lists").glob("*/look.json"))


def test_the_page_shows_what_was_found():
    page = (REPOSITORY / "benchmarks" / "README.md").read_text()
    assert LISTS
    assert "\n".join(write_look({path.parent.name: read_object(path) for path in LISTS})) in page


def test_what_was_found_is_of_the_lists_committed():
    bundled = list(read_lists(SAMPLE_FILE))
    for path in LISTS:
        found, folder = read_object(path), path.parent
        if folder.name == "sample":
            assert (found["lists"], found["passages"]) == (len(bundled), sum(len(r.passages) for r in bundled))
            continue
        plans = (folder / "plans.jsonl").read_text(encoding="utf-8").splitlines()
        assert found["lists"] == len(plans)
        assert found["passages"] == len((folder / "corpus.jsonl").read_text(encoding="utf-8").splitlines())
        assert all(json.loads(plan)["plan"] for plan in plans)
        assert not (folder / "queries.jsonl").exists()

"""Real collections and the real encoder; skipped, visibly, where the shared data are not."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from gradret.data.collections import Collection
from gradret.data.lists import query_words
from gradret.data.sources import MixedLists, check_lists, open_collection, parse_source

UNPACKED = shutil.ignore_patterns("docs.pklz4", "*.qrels", "*.json", "*.txt")  # what another test has unpacked
CRANFIELD_GRADES = "-1=4,1=4,2=3,3=2,4=1"


pytestmark = pytest.mark.usefixtures("shared_home")


def gradret(*arguments) -> dict:
    result = subprocess.run(
        [sys.executable, "-m", "gradret", *map(str, arguments), "--json"],
        capture_output=True,
        text=True,
        env=os.environ,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def size(collection: Collection) -> tuple[int, int, int]:
    return collection.document_count, len(collection.queries), sum(1 for _ in collection.documents())


def test_collections_have_their_published_sizes():
    assert size(open_collection(parse_source("beir/scifact/test"))) == (5183, 300, 5183)
    cranfield = open_collection(parse_source(f"cranfield?queries=even&grades={CRANFIELD_GRADES}"))
    assert size(cranfield) == (1400, 112, 1400)
    assert {grade for grades in cranfield.qrels.values() for grade in grades.values()} == {1, 2, 3, 4}


def test_training_and_evaluation_queries_are_disjoint(shared_graded):
    evaluated = [open_collection(parse_source(s)) for s in ("beir/scifact/test", "cranfield?queries=even")]
    words = {query_words(text) for collection in evaluated for text in collection.queries.values()}
    lists = MixedLists([parse_source(str(path)) for path in shared_graded.values()])
    assert len(lists) == 417
    assert lists.colliding_ids == 33
    # SciFact itself has one claim in both of its splits, 871 in train and 870 in test.
    assert [r.query_id for r in lists if query_words(r.query) in words] == ["871"]
    summary = check_lists(lists, refuse_negative=True, exclude=words)
    assert (len(summary.kept), summary.excluded) == (416, 1)
    assert not words & {query_words(lists[int(i)].query) for i in summary.kept}


def test_real_positives_join_synthetic_passages(shared_graded):
    sources = [str(shared_graded["scifact"]), "beir/scifact/train?grades=1:3&sample=1"]
    lists = MixedLists([parse_source(s) for s in sources])
    summary = check_lists(lists, refuse_negative=True)
    assert len(lists) == 809
    joined = next(r for r in lists if r.query_id == "9")
    assert [(p.grade, bool(p.doc_id)) for p in joined.passages] == [
        (3, False),
        (2, False),
        (1, False),
        (0, False),
        (3, True),
    ]
    assert summary.passages == 304 * 4 + 809


@pytest.mark.nightly
def test_the_published_figures_of_scifact(tmp_path):
    document = gradret(
        *("bench", "eval", "--model", "sentence-transformers/all-MiniLM-L6-v2", "--dataset", "beir/scifact/test"),
        *("--cache", tmp_path),
    )
    assert 0.643 <= document["measures"]["nDCG@10"] <= 0.647
    assert document["measures"]["R@100"] == pytest.approx(0.925, abs=5e-4)


READ_ALL = """
import sys
from gradret.data.collections import IrDatasetsCollection
print("ready", flush=True)
sys.stdin.readline()
collection = IrDatasetsCollection("beir/scifact/test")
ids = [document.doc_id for document in collection.documents()]
print(collection.document_count, len(ids), len(collection.read_documents(ids)))
"""


@pytest.mark.nightly  # test_collections.py has the same by threads
def test_processes_that_start_together_unpack_a_collection_once(tmp_path):
    shutil.copytree(os.path.join(os.environ["IR_DATASETS_HOME"], "beir"), tmp_path / "beir", ignore=UNPACKED)
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"IR_DATASETS_HOME": str(tmp_path)}
    command = [sys.executable, "-c", READ_ALL]
    processes = [subprocess.Popen(command, env=environment, **options) for _ in range(3)]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 3
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        stdout, stderr = process.communicate()
        assert stdout == "5183 5183 5183\n", stderr

import json
import shutil
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import list_record
from hypothesis import given, settings
from hypothesis import strategies as st

from gradret.cli import main
from gradret.console import GradretError
from gradret.data.collections import BeirCollection
from gradret.data.sources import Source, open_collection
from gradret.encoder.load import load_encoder
from gradret.encoder.model import Encoder
from gradret.evaluation import search as searching
from gradret.evaluation.measures import evaluate
from gradret.evaluation.search import embed_corpus, search, top_k, write_run


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.integers(1, 70), st.sampled_from([1, 7, 100]))
def test_top_k_is_exact_and_ties_go_to_the_earlier_document(seed, count, k, block):
    rng = np.random.default_rng(seed)  # small whole numbers: many exact ties
    queries, documents = (rng.integers(-1, 2, (n, 3)).astype(np.float32) for n in (5, count))
    scores, positions = top_k(queries, documents, k, block=block)
    whole = queries @ documents.T
    expected = np.lexsort((np.broadcast_to(np.arange(count), whole.shape), -whole))[:, :k]
    np.testing.assert_array_equal(positions, expected)
    np.testing.assert_array_equal(scores, np.take_along_axis(whole, expected, 1))


@pytest.mark.parametrize(("bad", "value"), [("document", np.nan), ("document", np.inf), ("query", -np.inf)])
def test_embeddings_that_are_not_finite_are_refused_by_the_texts_id(beir_directory, bad, value):
    """Their scores have no order: what came out was the order of the documents' ids."""
    broken = {"document": "d2", "query": "q2"}

    def embed(texts, kind):
        found = np.ones((len(texts), 3))
        found[["bread" in text and kind == bad for text in texts], 1] = value
        return found

    with pytest.raises(ValueError, match=f"^the embedding of {bad} '{broken[bad]}' is not finite; expected numbers"):
        evaluate(embed, beir_directory, progress=False)


def test_an_encoder_with_broken_weights_measures_nothing(tiny_encoder, beir_directory, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_encoder, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["encoder.layer.1.output.dense.weight"][0, 0] = np.nan
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    run, cache = tmp_path / "run.txt", tmp_path / "cache"
    given = ["--model", tmp_path / "model", "--dataset", beir_directory, "--run", run, "--cache", cache]
    result = CliRunner().invoke(main, ["bench", "eval", *map(str, given)])
    assert (result.exit_code, result.stdout) == (1, "")
    assert "Error: the embedding of document 'd1' is not finite; expected numbers: look at the model's weights\n" in (
        result.stderr
    )
    assert not run.exists()
    assert [path.stat().st_size for path in cache.rglob("vectors.f32")] == []


def test_scores_above_what_a_float_holds(beir_directory):
    with pytest.raises(GradretError, match="scores of query 'q1' are not finite: the embeddings are too large"):
        evaluate(lambda texts, kind: np.full((len(texts), 3), 1e30), beir_directory, progress=False)


@pytest.mark.nightly
def test_top_k_memory_does_not_grow_with_the_corpus(tmp_path):
    code = """
import json, resource, sys, numpy as np
from gradret.evaluation.search import top_k
count = int(sys.argv[2])
np.memmap(sys.argv[1], np.float32, "w+", shape=(count, 64))[:] = 1 / 8
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
documents = np.memmap(sys.argv[1], np.float32, "r", shape=(count, 64))
top_k(np.ones((10, 64), np.float32), documents[:20000], 100)
open("/proc/self/clear_refs", "w").write("5")
status = lambda key: next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(key)) // 1024
before = status("RssAnon")
top_k(np.ones((10, 64), np.float32), documents, 100)
print(json.dumps([status("VmHWM") - status("RssFile"), before]))
"""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's /proc to measure memory")
    grown = {}
    for count in (40_000, 800_000):  # 10 and 200 MiB of vectors
        output = subprocess.run(
            [sys.executable, "-c", code, tmp_path / "vectors", str(count)], capture_output=True, text=True, check=True
        )
        peak, before = json.loads(output.stdout)
        grown[count] = peak - before
    assert grown[800_000] - grown[40_000] < 40


@pytest.fixture
def collection(write_jsonl):
    return open_collection(Source(str(write_jsonl("f.jsonl", [list_record(f"q{i}") for i in range(10)]))))


def count_encoded(monkeypatch) -> list[int]:
    counts = []
    encode = Encoder.encode
    monkeypatch.setattr(
        Encoder, "encode", lambda self, texts, *a, **k: counts.append(len(texts)) or encode(self, texts, *a, **k)
    )
    return counts


def test_embeddings_are_computed_once_for_a_model_and_a_corpus(tiny_encoder, collection, tmp_path, monkeypatch):
    encoder = load_encoder(str(tiny_encoder))
    counts = count_encoded(monkeypatch)
    first = embed_corpus(encoder, collection, tmp_path)
    assert [i.decode() for i in first.doc_ids] == [d.doc_id for d in collection.documents()]
    np.testing.assert_allclose(first.vectors, encoder.encode([d.content for d in collection.documents()]), atol=1e-6)
    counts.clear()
    assert np.array_equal(embed_corpus(encoder, collection, tmp_path).vectors, first.vectors)
    assert counts == []
    embed_corpus(load_encoder(str(tiny_encoder), document_prefix="x "), collection, tmp_path)  # other settings
    assert sum(counts) == 40
    counts.clear()
    collection._documents["q0/1"] += " changed"
    embed_corpus(encoder, collection, tmp_path)
    assert sum(counts) == 40


def test_an_interrupted_embedding_goes_on_where_it_was(tiny_encoder, collection, tmp_path, monkeypatch):
    encoder = load_encoder(str(tiny_encoder))
    whole = embed_corpus(encoder, collection, tmp_path / "whole")
    monkeypatch.setattr(searching, "ENCODE_BLOCK", 8)
    counts = count_encoded(monkeypatch)
    encode = Encoder.encode

    def fail_at_the_fourth(self, texts, *args, **kwargs):
        if len(counts) == 3:
            raise KeyboardInterrupt
        return encode(self, texts, *args, **kwargs)

    monkeypatch.setattr(Encoder, "encode", fail_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        embed_corpus(encoder, collection, tmp_path / "cut")
    monkeypatch.setattr(Encoder, "encode", encode)
    counts.clear()
    resumed = embed_corpus(encoder, collection, tmp_path / "cut")
    assert counts == [8, 8]  # blocks 4 and 5 of 5
    np.testing.assert_allclose(resumed.vectors, whole.vectors, atol=1e-6)
    assert np.array_equal(resumed.doc_ids, whole.doc_ids)


def test_a_second_one_waits_for_the_first_and_takes_what_it_wrote(tiny_encoder, collection, tmp_path, monkeypatch):
    """It would cut the file of the first short, whose missing vectors would be zeros."""
    whole = np.array(embed_corpus(load_encoder(str(tiny_encoder)), collection, tmp_path / "whole").vectors)
    monkeypatch.setattr(searching, "ENCODE_BLOCK", 8)
    encoders, found, told, waiting = [load_encoder(str(tiny_encoder)) for _ in range(2)], {}, [], threading.Event()
    encode, threads = Encoder.encode, []

    def embed(number: int) -> None:
        found[number] = embed_corpus(encoders[number], collection, tmp_path / "cache", progress=False)

    def encode_and_start_the_other(self, texts, *args, **kwargs):
        assert self is encoders[0]  # the other one finds all of it done
        if not threads:
            threads.append(threading.Thread(target=embed, args=(1,)))
            threads[0].start()
            assert waiting.wait(30)
        return encode(self, texts, *args, **kwargs)

    monkeypatch.setattr(Encoder, "encode", encode_and_start_the_other)
    monkeypatch.setattr("gradret.files.say", lambda line: told.append(line) or waiting.set())
    embed(0)
    threads[0].join(30)
    for number in range(2):
        np.testing.assert_allclose(found[number].vectors, whole, atol=1e-6)
    (folder,) = (tmp_path / "cache").iterdir()
    assert told == [f"waiting for another process that embeds the same documents ({folder / 'gradret.lock'})"]


def test_a_full_disk_is_one_line(tiny_encoder, collection, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(searching.os, "fsync", full)
    with pytest.raises(
        GradretError, match=r"could not be written \(No space left on device\); free space or set GRADRET_CACHE"
    ):
        embed_corpus(load_encoder(str(tiny_encoder)), collection, tmp_path)


def test_search_ranks_all_and_breaks_ties_as_trec_eval(tiny_encoder, tmp_path, write_jsonl):
    # Identical documents: the same vector, the same score.
    records = [
        {
            "query_id": "q",
            "query": "tea",
            "passages": [
                {"grade": 1, "text": "green tea", "doc_id": "a"},
                {"grade": 0, "text": "green  tea", "doc_id": "b"},
                {"grade": 0, "text": "the sea", "doc_id": "q"},
            ],
        }
    ]
    collection = open_collection(Source(str(write_jsonl("f.jsonl", records))))
    encoder = load_encoder(str(tiny_encoder))
    run = search(encoder, collection, embed_corpus(encoder, collection, tmp_path), depth=10)
    order = [doc_id for doc_id, _ in run["q"]]
    assert order.index("b") + 1 == order.index("a")
    collection.drop_self = True
    run = search(encoder, collection, embed_corpus(encoder, collection, tmp_path), depth=2)
    assert sorted(doc_id for doc_id, _ in run["q"]) == ["a", "b"]
    write_run(tmp_path / "run", run)
    with pytest.raises(GradretError, match="cannot hold the ids 'q' and 'a b': white space"):
        write_run(tmp_path / "spaces", {"q": [("a b", 1.0)]})
    for bad, message in (
        ({"q": [("a", np.nan)]}, "score nan of 'a' for 'q'"),
        ({"q": [(3, 1.0)]}, "the ids 'q' and '3'"),
    ):
        with pytest.raises(GradretError, match=message):
            write_run(tmp_path / "run", run | bad)
    with pytest.raises(ValueError, match="tag must be a word without white space, got 'my run'"):
        write_run(tmp_path / "run", run, "my run")
    first = (tmp_path / "run").read_text().splitlines()[0].split(" ")
    assert (first[:4], first[5]) == (["q", "Q0", "b", "1"], "gradret")
    assert np.float32(first[4]) == np.float32(run["q"][0][1])


def test_a_broken_record_of_progress_starts_over(tiny_encoder, collection, tmp_path):
    encoder = load_encoder(str(tiny_encoder))
    whole = np.array(embed_corpus(encoder, collection, tmp_path / "cache").vectors)
    (folder,) = (tmp_path / "cache").iterdir()
    for torn in ("{", "[]", '{"documents": "40"}', '{"documents": -1}'):
        (folder / "done.json").write_text(torn)
        assert np.array_equal(embed_corpus(encoder, collection, tmp_path / "cache").vectors, whole)
    (folder / "vectors.f32").write_bytes((folder / "vectors.f32").read_bytes()[:-1])
    assert np.array_equal(embed_corpus(encoder, collection, tmp_path / "cache").vectors, whole)


def test_without_a_cache_nothing_is_digested_and_nothing_kept(tiny_encoder, collection, tmp_path, monkeypatch):
    """A key could never be met again: an evaluation in training paid for it at every turn."""
    encoder = load_encoder(str(tiny_encoder))
    kept = evaluate(encoder, collection, cache=tmp_path / "cache", progress=False)

    def digest(*_, **__):
        raise AssertionError("a key was asked for")

    monkeypatch.setattr(Encoder, "fingerprint", digest)
    monkeypatch.setattr(searching, "find_store", digest)
    monkeypatch.setattr(searching.tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("GRADRET_CACHE", str(tmp_path / "elsewhere"))
    monkeypatch.setattr(searching, "ENCODE_BLOCK", 7)
    assert evaluate(encoder, collection, progress=False).run.keys() == kept.run.keys()
    found = embed_corpus(encoder, collection, None)
    assert found.doc_ids.tolist() == [d.doc_id.encode() for d in collection.documents()]
    expected = encoder.encode([d.content for d in collection.documents()])
    np.testing.assert_allclose(found.vectors, expected, atol=1e-6)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "f.jsonl", "tmp"]
    assert not any((tmp_path / "tmp").iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_without_a_cache_is_one_line(tiny_encoder, collection, monkeypatch):
    monkeypatch.setattr(searching.tempfile, "TemporaryFile", lambda **_: open("/dev/full", "r+b", buffering=0))
    with pytest.raises(GradretError, match=r"could not be written \(No space left .*\); free space or set TMPDIR"):
        evaluate(load_encoder(str(tiny_encoder)), collection, progress=False)


def test_a_collection_without_documents(tiny_encoder, collection, tmp_path, monkeypatch):
    monkeypatch.setattr(type(collection), "documents", lambda self, start=0, characters=None: iter(()))
    for cache in (None, tmp_path / "cache"):
        with pytest.raises(GradretError, match="no documents$"):
            embed_corpus(load_encoder(str(tiny_encoder)), collection, cache)


def write_long_document(directory, characters):
    """A BEIR directory whose only document with the word tides has so many characters more."""
    text = "the moon pulls the sea and bread needs yeast " * (characters // 45)
    documents = [
        {"_id": "d1", "title": "Tides", "text": text},
        {"_id": "d2", "text": "bread"},
        {"_id": "d3", "text": ""},
    ]
    (directory / "corpus.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))


def test_a_long_document_is_embedded_in_little_memory(beir_directory, tiny_encoder, tmp_path):
    """And as if it were read as a whole."""
    write_long_document(beir_directory, 10_000_000)
    encoder = load_encoder(str(tiny_encoder))
    collection = BeirCollection(beir_directory, "test")
    expected = encoder.encode([document.content for document in collection.documents()])
    tracemalloc.start()
    try:
        found = embed_corpus(encoder, collection, tmp_path / "cache", progress=False)
        assert tracemalloc.get_traced_memory()[1] < 30_000_000
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(found.vectors, expected)


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc to measure memory")
@pytest.mark.parametrize("form", ["beir", "lists"])
def test_a_document_of_40_megabytes_costs_50_mebibytes_at_most(
    beir_directory, tiny_encoder, write_jsonl, tmp_path, form
):
    """More than a short one does, of the most that the command ever takes."""
    peaks = []
    for characters in (45, 40_000_000):
        write_long_document(beir_directory, characters)
        passages = [{"grade": 1, "text": "tide " * (characters // 5)}, {"grade": 0, "text": "rye"}]
        lists = write_jsonl("lists.jsonl", [{"query_id": "q", "query": "tides", "passages": passages}])
        data = {"beir": beir_directory, "lists": lists}[form]
        options = ["--model", tiny_encoder, "--dataset", data, "--cache", tmp_path / f"cache{characters}"]
        code = "import re; from gradret.cli import main; main(standalone_mode=False); "
        code += "print(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])"
        command = [sys.executable, "-c", code, "bench", "eval", *options]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        peaks.append(int(output.split()[-1]) / 1024)
    assert peaks[1] < peaks[0] + 50

import json
import sys
from itertools import islice

import numpy as np
import pytest
import torch
from conftest import SAMPLE_FILE

from gradret.console import GradretError
from gradret.data.lists import ListFile, Passage, RankingList
from gradret.data.sources import MixedLists, parse_source
from gradret.encoder.load import load_encoder
from gradret.evaluation.search import embed_corpus
from gradret.train import mining as mining_module
from gradret.train.batches import collate
from gradret.train.mining import (
    MinedLists,
    Miner,
    Mining,
    content_key,
    index_bm25,
    open_pool,
    parse_mining,
    read_passages,
)

WORDS = ("tide", "bread", "moon", "yeast")


class CountingEncoder:
    """An embedding counts the words of WORDS; a score is their dot product."""

    device, dimension, longest_text = torch.device("cpu"), len(WORDS), None

    def __init__(self, signs=(1, 1, 1, 1)):
        self.signs, self.calls = np.array(signs, np.float32), []

    def encode(self, texts, kind="document", *, batch_size=32, precision="float32"):
        self.calls.append((kind, len(texts)))
        counts = np.array([[t.lower().split().count(w) for w in WORDS] for t in texts], np.float32).reshape(-1, 4)
        return counts * self.signs if kind == "query" else counts

    def search_vectors(self, embeddings):
        return embeddings

    def fingerprint(self, *, queries=True):
        return "counting"


def make_list(query_id: str, query: str, *passages) -> RankingList:
    return RankingList(query_id, query, [Passage(grade, text) for grade, text in passages])


@pytest.fixture
def write_corpus(tmp_path):
    def write(*contents, name: str = "corpus") -> str:
        directory = tmp_path / name
        directory.mkdir(exist_ok=True)
        records = [c if isinstance(c, dict) else {"_id": f"d{i}", "text": c} for i, c in enumerate(contents)]
        (directory / "corpus.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        return str(directory)

    return write


def mine(mining: Mining | str, lists, kept=None, encoder=None) -> np.ndarray:
    mining = parse_mining(mining) if isinstance(mining, str) else mining
    kept = np.arange(len(lists)) if kept is None else np.array(kept)
    return Miner(mining, lists, kept).mine(encoder or CountingEncoder(), progress=False)


LISTS = [
    make_list("q1", "tide moon", (3, "tide tide moon"), (0, "bread")),
    make_list("q2", "bread", (3, "bread yeast bread")),
]
# Scores of q1 and q2:  3, 0   2, 0   2, 0   0, 2             0, 1         0, 3
CORPUS = ("tide tide moon", "tide moon yeast", "moon moon", "bread yeast bread", "bread yeast", "bread bread bread")


def test_the_best_documents_that_a_list_lacks_in_order(write_corpus):
    # q1: d0 is its own; d1 and d2 tie, the earlier first. q2: d5 with 3, d3 is its own, d4 with 1.
    assert mine(f"k=2,grade=1,from={write_corpus(*CORPUS)}", LISTS).tolist() == [[1, 2], [5, 4]]


def test_all_documents_are_the_most_there_is(write_corpus):
    source = write_corpus(*CORPUS)
    found = mine(f"k={10**15},grade=1,from={source}", LISTS)
    assert found.shape == (len(LISTS), len(CORPUS))
    assert found.tolist() == mine(f"k={len(CORPUS)},grade=1,from={source}", LISTS).tolist()


def test_skip_leaves_out_the_best_of_what_remains(write_corpus):
    assert mine(f"k=2,grade=1,skip=1,from={write_corpus(*CORPUS)}", LISTS).tolist() == [[2, 3], [4, 0]]


def test_by_default_the_passages_of_the_kept_lists_are_mined():
    lists = [*LISTS, make_list("q3", "moon", (3, "moon moon moon"), (1, "tide"), (0, "BREAD "))]
    # positions: 0 tide tide moon, 1 bread, 2 bread yeast bread, 3 moon moon moon, 4 tide; the last is bread again,
    # which is q2's query, too
    assert mine("k=3,grade=1", lists).tolist() == [[3, 4, 2], [0, 3, 4], [0, 2, -1]]
    assert mine("k=3,grade=1", lists, kept=[0, 2]).tolist() == [[2, 3, -1], [0, -1, -1]]


def test_what_a_list_has_is_left_out_whatever_its_id_case_and_spaces(write_corpus):
    corpus = write_corpus("Tide  TIDE moon ", {"_id": "x", "title": "tide", "text": "tide moon"}, "yeast")
    pool = open_pool(corpus)
    assert pool.document_count == 2  # the first two are one
    assert mine(f"k=2,grade=1,from={corpus}", LISTS[:1]).tolist() == [[1, -1]]


def test_equal_contents_are_mined_once_and_skipped_together(write_corpus):
    corpus = write_corpus("tide", "moon moon", "tide", "MOON moon", "yeast")
    assert mine(f"k=3,grade=1,from={corpus}", LISTS[:1]).tolist() == [[1, 0, 2]]
    assert mine(f"k=3,grade=1,skip=1,from={corpus}", LISTS[:1]).tolist() == [[0, 2, -1]]


def test_documents_without_words_and_the_query_itself_are_left_out(write_corpus):
    corpus = write_corpus("", " \n", "Tide Moon", "yeast", {"_id": "t", "title": "moon", "text": ""})
    pool = open_pool(corpus)
    assert [d.content for d in pool.documents()] == ["Tide Moon", "yeast", "moon"]
    assert mine(f"k=4,grade=1,from={corpus}", LISTS[:1]).tolist() == [[2, 1, -1]]  # no more than there are documents


def test_with_drop_self_the_document_with_the_query_id_is_left_out(write_corpus):
    records = [{"_id": "q1", "title": "argument", "text": "tide moon"}, {"_id": "q2", "text": "moon"}]
    records += [{"_id": "q3", "text": "moon"}, {"_id": "q4", "text": "tide tide"}]
    lists = [make_list(f"q{i}", "tide moon", (3, f"own {i}")) for i in (1, 3)]
    corpus = write_corpus(*records)
    assert mine(f"k=3,grade=1,from={corpus}", lists).tolist() == [[0, 2, 1]] * 2
    # q3's document has the words of q2's, which stands for both
    assert mine(f"k=3,grade=1,from={corpus}?drop_self=yes", lists).tolist() == [[2, 1, -1], [0, 2, -1]]
    named = write_corpus(*records, name="arguana")
    assert mine(f"k=3,grade=1,from={named}", lists).tolist() == [[2, 1, -1], [0, 2, -1]]
    assert mine(f"k=3,grade=1,from={named}?drop_self=no", lists).tolist() == [[0, 2, 1]] * 2


def test_lists_with_one_query_share_what_is_left_out(write_corpus):
    lists = [make_list("a", "Tide  moon", (3, "moon moon")), make_list("b", "tide moon", (3, "tide tide moon"))]
    assert mine(f"k=1,grade=1,from={write_corpus(*CORPUS)}", lists).tolist() == [[1], [1]]


def test_positives_that_were_not_sampled_are_not_mined(write_corpus, write_jsonl):
    passages = [{"grade": 1, "text": t} for t in ("tide tide moon", "moon moon")] + [{"grade": 0, "text": "tide"}]
    path = write_jsonl("lists.jsonl", [{"query_id": "1", "query": "tide moon", "passages": passages}])
    lists = MixedLists([parse_source(f"{path}?grades=1:3&sample=1")])
    assert len(lists[0].passages) == 1
    corpus = write_corpus(*CORPUS, "tide")
    assert mine(f"k=2,grade=1,from={corpus}", lists).tolist() == [[1, 3]]


def test_blocks_of_queries_change_nothing(write_corpus, monkeypatch):
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, rng.integers(1, 6))) for _ in range(60)]
    lists = [make_list(str(i), f"{text} {i}", (3, texts[-i])) for i, text in enumerate(texts)]
    spec = f"k=3,grade=1,skip=1,from={write_corpus(*texts)}"
    whole = mine(spec, lists)
    monkeypatch.setattr(mining_module, "QUERY_BLOCK", 7)
    encoder = CountingEncoder()
    assert np.array_equal(mine(spec, lists, encoder=encoder), whole)
    assert [n for kind, n in encoder.calls if kind == "query"] == [7] * 8 + [4]


def test_mining_follows_the_encoder(write_corpus):
    miner = Miner(parse_mining(f"k=1,grade=1,every=0.5,from={write_corpus(*CORPUS)}"), LISTS, np.arange(2))
    assert miner.mine(CountingEncoder(), progress=False).tolist() == [[1], [5]]
    assert miner.mine(CountingEncoder((-1, -1, 1, 1)), progress=False).tolist() == [[2], [0]]


def test_mining_reads_the_documents_once_and_digests_nothing(write_corpus, monkeypatch):
    """A key for a cache would name an encoder that has changed by the next round."""
    miner, passes = Miner(parse_mining(f"k=1,grade=1,from={write_corpus(*CORPUS)}"), LISTS, np.arange(2)), []
    read = miner.pool.documents
    monkeypatch.setattr(miner.pool, "documents", lambda *start: passes.append(start) or read(*start))
    encoder = CountingEncoder()
    monkeypatch.setattr(encoder, "fingerprint", None)
    assert miner.mine(encoder, progress=False).tolist() == [[1], [5]]
    assert len(passes) == 1


def test_a_real_encoder_ranks_as_its_scores_do(tiny_encoder, write_corpus):
    encoder = load_encoder(str(tiny_encoder), device="cpu")
    lists = ListFile(SAMPLE_FILE)
    kept = np.arange(0, len(lists), 5)
    miner = Miner(Mining(4, 1.0), lists, kept)
    found = miner.mine(encoder, progress=False)
    contents = [d.content for d in miner.pool.documents()]
    assert found.shape == (len(kept), 4) and found.min() >= 0
    vectors = torch.from_numpy(encoder.encode(contents))
    for row, positions in zip(kept.tolist(), found, strict=True):
        own = {p.content for p in lists[row].passages}
        scores = encoder.score(torch.from_numpy(encoder.encode([lists[row].query], "query")), vectors)[0]
        ranking = [p for p in scores.argsort(descending=True).tolist() if contents[p] not in own]
        assert scores[positions].tolist() == pytest.approx(scores[ranking[:4]].tolist(), abs=1e-5)
        assert not own & {contents[p] for p in positions}


# The pool


def test_a_pool_has_every_content_once_in_order(write_corpus):
    corpus = open_pool(write_corpus("tide", {"_id": "b", "title": "Moon", "text": "moon"}, "tide", "yeast"))
    assert [d.doc_id for d in corpus.documents()] == ["0", "1", "2"]
    assert next(islice(corpus.passages(), 1, None)) == Passage(0, "moon", "Moon", "b")
    assert [d.content for d in corpus.documents(1)] == ["Moon moon", "yeast"]
    assert corpus.keys.tolist() == [content_key(t) for t in ("tide", "moon MOON", "yeast")]
    assert [p.text for p in read_passages(LISTS, [1, 0])] == ["bread yeast bread", "tide tide moon", "bread"]
    assert {p.grade for p in read_passages(LISTS, [0])} == {0} and LISTS[0].passages[0].grade == 3


def test_a_pool_of_lists_follows_the_options_of_its_source(write_jsonl):
    passages = [{"grade": g, "text": t} for g, t in ((3, "tide"), (1, "moon"), (0, "bread"))]
    path = write_jsonl("a,b.jsonl", [{"query_id": "1", "query": "x", "passages": passages}])
    assert [d.content for d in open_pool(str(path)).documents()] == ["tide", "moon", "bread"]
    assert [d.content for d in open_pool(f"{path}?grades=1,0").documents()] == ["moon", "bread"]


def test_a_pool_of_ir_datasets_needs_no_qrels(shared_home):
    pool = open_pool("beir/scifact")  # has none
    assert pool.document_count > 5000
    contents = [d.content for d in pool.documents()]
    assert len(contents) == pool.document_count == len(set(map(content_key, contents)))
    assert next(pool.documents(4000)).content == contents[4000]


def test_the_fingerprint_follows_the_content(write_corpus):
    def fingerprint(*contents):
        return Miner(parse_mining(f"k=1,grade=1,from={write_corpus(*contents)}"), LISTS, np.arange(2)).pool.fingerprint

    assert fingerprint("tide", "moon") == fingerprint("tide", "moon")
    assert len({fingerprint(*c) for c in (("tide", "moon"), ("moon", "tide"), ("tide",), ("tide", "Moon"))}) == 4
    by_default = Miner(Mining(1, 1.0), LISTS, np.arange(2)).pool.fingerprint
    assert by_default != Miner(Mining(1, 1.0), LISTS, np.arange(1)).pool.fingerprint


def test_embed_corpus_takes_a_pool(write_corpus, tmp_path):
    pool = open_pool(write_corpus(*CORPUS))
    found = embed_corpus(CountingEncoder(), pool, tmp_path / "embeddings", progress=False)
    assert found.vectors.shape == (6, 4) and [i.decode() for i in found.doc_ids] == list("012345")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nothing-here/at-all", "not an ir_datasets id"),
        ("missing.jsonl", "missing.jsonl: no such file"),
        ("CORPUS?grades=1:3,0&sample=2", "all documents of .* leave these options out"),
        ("EMPTY", "holds no document with words"),
        ("HERE", "corpus.jsonl: no such file"),
    ],
)
def test_a_source_that_can_not_be_mined_is_told(write_corpus, tmp_path, source, message):
    names = {"CORPUS": write_corpus("tide"), "EMPTY": write_corpus("", name="empty"), "HERE": str(tmp_path)}
    for name, path in names.items():
        source = source.replace(name, path)
    with pytest.raises(GradretError, match=message):
        open_pool(source)


# The spelling


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("k=2,grade=1", Mining(2, 1.0)),
        ("grade=0.5, k=1,skip=3,every=0.25", Mining(1, 0.5, skip=3, every=0.25)),
        ("k=1,grade=-1,by=bm25", Mining(1, -1.0, by="bm25")),
        ("k=2,grade=1,from=a/b.jsonl?grades=1:3,0&queries=even,by=bm25", None),
        ("from=a,b/c=d,k=2,grade=1", Mining(2, 1.0, source="a,b/c=d")),
    ],
)
def test_mining_is_parsed(text, expected):
    expected = expected or Mining(2, 1.0, source="a/b.jsonl?grades=1:3,0&queries=even", by="bm25")
    assert parse_mining(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "option '' is not known; use k=K,grade=GRADE"),
        ("k=2,grade=1,deep=3", "'deep=3' is not known"),
        ("k=2,grade=1,from=beir/scifact,foo=3", "'foo=3' is not known"),
        ("k=2,grade=1,", "grade '1,' is not"),
        ("grade=1", "k is missing"),
        ("k=1", "grade is missing"),
        ("k=1,grade=1,k=2", "k stands there twice"),
        ("k=0,grade=1", "k '0' is not a whole number above 0"),
        ("k=-1,grade=1", "k '-1' is not"),
        ("k=²,grade=1", "k '²' is not"),
        ("k=1,grade=high", "grade 'high' is not a finite number below 1000"),
        ("k=1,grade=nan", "grade 'nan' is not"),
        ("k=1,grade=1000", "grade '1000' is not"),
        ("k=1,grade=1,skip=-1", "skip '-1' is not a whole number of 0 or above"),
        ("k=1,grade=1,by=tfidf", "by 'tfidf' is not one of encoder, bm25"),
        ("k=1,grade=1,every=0", "every '0' is not a number of epochs from 0.001 on"),
        ("k=1,grade=1,every=inf", "every 'inf' is not"),
        ("k=1" + "0" * 5000 + ",grade=1", "is not a whole number above 0"),
        ("k=1,grade=1,by=bm25,every=1", "every is for by=encoder"),
        ("k=1,grade=1,from=", "from '' is not a file"),
        ("k=1,grade=1,from=x?colour=red", "option 'colour=red' is not known"),
    ],
)
def test_a_wrong_spelling_is_told_in_one_line(text, message):
    with pytest.raises(GradretError) as error:
        parse_mining(text)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_rounds_follow_the_epochs_done():
    assert [Mining(1, 1.0).count_rounds(e) for e in (0, 0.5, 7)] == [0, 0, 0]
    assert [Mining(1, 1.0, every=0.5).count_rounds(e) for e in (0, 0.49, 0.5, 0.99, 1, 3)] == [0, 0, 1, 1, 2, 6]
    assert Mining(1, 1.0, every=0.1).count_rounds(0.1 * 3) == 3


# BM25


def test_bm25_ranks_rare_words_above_common_ones(write_corpus):
    pytest.importorskip("bm25s")
    corpus = ("tide bread", "moon bread", "moon yeast", "moon rye", "oats oats")
    lists = [make_list("1", "Which tide has the moon?", (3, "moon yeast")), make_list("2", "unknown", (3, "x"))]
    # tide stands in one document, moon in three; the tied ones in order; oats shares no word
    assert mine(f"k=4,grade=1,by=bm25,from={write_corpus(*corpus)}", lists).tolist() == [[0, 1, 3, -1], [-1] * 4]
    assert mine(f"k=1,grade=1,by=bm25,skip=1,from={write_corpus(*corpus)}", lists).tolist() == [[1], [-1]]


def test_bm25_cuts_ties_at_the_earlier_document(write_corpus):
    pytest.importorskip("bm25s")
    rank = index_bm25(open_pool(write_corpus(*(f"moon word{i}" for i in range(9)), "moon moon moon")))
    assert [r.tolist() for r, _ in rank(["moon", "word7"], 3)] == [[9, 0, 1], [7]]


def test_bm25_of_documents_without_searchable_words_finds_nothing(write_corpus):
    pytest.importorskip("bm25s")
    corpus = write_corpus("the", "of a")
    assert mine(f"k=1,grade=1,by=bm25,from={corpus}", LISTS).tolist() == [[-1], [-1]]


def test_bm25_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(GradretError, match=r"needs the package bm25s: pip install 'gradret\[bm25\]'"):
        Miner(Mining(1, 1.0, by="bm25"), LISTS, np.arange(2))


# The lists with what was mined


def test_mined_passages_stand_in_the_batch_at_their_grade(write_corpus):
    miner = Miner(parse_mining(f"k=2,grade=1.5,from={write_corpus(*CORPUS)}"), LISTS, np.arange(2))
    lists = MinedLists(LISTS, np.arange(2), miner.pool, miner.mine(CountingEncoder(), progress=False), 1.5)
    assert [(p.grade, p.text) for p in lists[0].passages] == [
        (3, "tide tide moon"),
        (0, "bread"),
        (1.5, "tide moon yeast"),
        (1.5, "moon moon"),
    ]
    assert [p.doc_id for p in lists[1].passages] == [None, "d5", "d4"]
    assert [len(ranking_list.passages) for ranking_list in LISTS] == [2, 1]  # as before
    batch = collate(list(lists))
    assert batch.grades.tolist() == [[3, 0, 1.5, 1.5], [3, 1.5, 1.5, 0]]
    assert batch.mask.tolist() == [[True] * 4, [True, True, True, False]]
    assert [batch.documents[i] for i in batch.columns[1, :3].tolist()] == [CORPUS[3], CORPUS[5], CORPUS[4]]


def test_lists_that_were_not_mined_for_keep_their_own(write_corpus):
    pool = open_pool(write_corpus(*CORPUS))
    lists = MinedLists(LISTS, np.array([1]), pool, np.array([[4, -1]]), 1.0)
    assert len(lists) == 2
    assert lists[0] == LISTS[0]
    assert [p.text for p in lists[1].passages] == ["bread yeast bread", "bread yeast"]

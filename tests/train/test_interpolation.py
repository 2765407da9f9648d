"""How much of what was learnt is saved, where held-out lists choose it."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SAMPLE_FILE
from forked import run_group
from test_resume import assert_same_run, cut_at

from gradret import fit, read_lists, write_lists
from gradret.bench.quality import FIT, OpenedInputs, Run
from gradret.console import GradretError
from gradret.data.lists import query_words
from gradret.data.sources import MixedLists, check_lists, parse_source
from gradret.distributed import ALONE
from gradret.encoder.load import load_encoder
from gradret.evaluation.measures import Evaluation
from gradret.settings import FitSettings
from gradret.train import loop
from gradret.train.interpolation import SHARES, choose_share, make_held_out, measure_shares, share_held_out


def of(**means: float) -> dict[float, dict[str, float]]:
    """Measures of 40 queries with these means, which differ from query to query by the same."""
    noise = np.random.default_rng(0).normal(0, 0.05, 40)
    return {s: {str(i): m + noise[i] for i in range(40)} for s, m in zip(SHARES, means.values(), strict=True)}


def test_the_least_share_that_is_not_measurably_worse():
    assert choose_share(of(quarter=0.5, half=0.6, whole=0.7)) == 1.0
    assert choose_share(of(quarter=0.5, half=0.7, whole=0.6)) == 0.5
    assert choose_share(of(quarter=0.7, half=0.6, whole=0.5)) == 0.25
    assert choose_share(of(quarter=0.7, half=0.7, whole=0.7)) == 0.25
    found = of(quarter=0.5, half=0.6, whole=0.6)
    found[1.0]["0"] += 0.01  # one query alone
    assert choose_share(found) == 0.5
    few = {share: {"a": share, "b": share} for share in SHARES}  # two queries show nothing, whatever they say
    assert choose_share(few) == 0.25


def test_a_tenth_is_kept_apart_where_there_are_enough():
    auto = FitSettings()
    assert auto.interpolate == "auto"
    assert [share_held_out(auto, n) for n in (0, 99, 100, 2560, 25600)] == [0.0, 0.0, 0.1, 0.1, 0.01]
    assert share_held_out(replace(auto, interpolate=1.0), 1000) == 0.0


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> str:
    """192 lists; each query comes twice, under another id and in other capitals, on other passages."""
    lists = list(read_lists(SAMPLE_FILE))
    again = [replace(x, query_id=f"{x.query_id}-2", query=x.query.upper(), passages=x.passages[1:]) for x in lists]
    path = tmp_path_factory.mktemp("lists") / "many.jsonl"
    write_lists(path, [*lists, *again])
    return str(path)


def test_lists_of_one_query_are_kept_apart_together(tiny_encoder, many):
    settings = FitSettings(data=(many,), model=str(tiny_encoder), exclude=("sample?queries=odd",))
    inputs = loop.Inputs(settings, ALONE, "cpu")
    kept, apart = (
        {query_words(inputs.lists[i].query) for i in rows.tolist()}
        for rows in (inputs.summary.kept, inputs.summary.held_out)
    )
    assert len(apart) > 1 and not kept & apart and len(kept | apart) == 48
    assert len(inputs.summary.kept) + len(inputs.summary.held_out) == 96
    assert f"; {len(inputs.summary.held_out)} lists held out, to choose how far to go" in inputs.describe()
    whole = loop.Inputs(replace(settings, interpolate=0.5), ALONE, "cpu")
    assert whole.held_out is None and len(whole.summary.kept) == 96
    run = Run(FIT, settings, (), "a run")
    assert OpenedInputs([run]).lists[run.key] == len(inputs.summary.kept)  # bench counts what fit trains on


def test_documents_are_passages_of_both_and_queries_those_held_out(tmp_path):
    lists = list(read_lists(SAMPLE_FILE))
    for entry in lists[:2]:
        entry.passages[0].doc_id = "d1"  # of two sources
    write_lists(tmp_path / "one.jsonl", [lists[0], *lists[2:]])
    write_lists(tmp_path / "other.jsonl", [replace(lists[1], query_id=lists[0].query_id)])
    mixed = MixedLists([parse_source(str(tmp_path / name)) for name in ("one.jsonl", "other.jsonl")])
    summary = replace(
        check_lists(mixed, refuse_negative=True), kept=np.arange(1, 95), held_out=np.array([0, 95]), passages=376
    )
    found = make_held_out(mixed, summary)
    assert [*found.queries.values()] == [lists[0].query, lists[1].query]
    assert [[*grades.values()] for grades in found.qrels.values()] == [[3, 2, 1, 0]] * 2
    assert found.document_count == 384  # there is room for all
    few = make_held_out(mixed, replace(summary, passages=94 * 64))  # lists of 64: six others
    assert len(few.queries) == 2 and few.document_count == 4 * (2 + 6)
    assert make_held_out(mixed, replace(summary, held_out=np.array([], int))) is None


def test_the_share_chosen_is_the_one_saved_and_told(tiny_encoder, tmp_path, many, monkeypatch, capsys):
    trained = {}

    def measure(encoder, start, held_out, precision, processes):
        trained.update({name: p.detach().clone() for name, p in encoder.named_parameters()})
        real = measure_shares(encoder, start, held_out, precision, processes)
        assert all(values.keys() == held_out.queries.keys() for values in real.values())
        return {0.0: real[0.0]} | of(quarter=0.5, half=0.7, whole=0.6)

    monkeypatch.setattr(loop, "measure_shares", measure)
    settings = FitSettings(data=(many,), model=str(tiny_encoder), max_steps=3, learning_rate=1e-3, precision="float32")
    result = fit(settings, tmp_path / "out")
    start, saved = (dict(load_encoder(str(path)).named_parameters()) for path in (tiny_encoder, tmp_path / "out"))
    for name, parameter in saved.items():
        assert torch.equal(parameter, torch.lerp(start[name], trained[name], 0.5)), name
    assert result.share == 0.5
    assert json.loads((tmp_path / "out" / "gradret.json").read_text())["share"] == 0.5
    card = (tmp_path / "out" / "README.md").read_text()
    chosen = np.mean([*of(quarter=0.5, half=0.7, whole=0.6)[0.5].values()])
    assert "| share of the way saved | 0.5 |" in card and f"| **0.5 (saved)** | **{chosen:.4f}** |" in card
    assert "nDCG@10 of the held-out lists: " in capsys.readouterr().err
    assert fit(settings, tmp_path / "out", resume=True).share == 0.5  # finished


def test_each_measurement_on_dev_has_the_share_of_its_step(tiny_encoder, tmp_path, many, monkeypatch):
    shares, values = iter([0.25, 1.0, 0.5]), iter([0.3, 0.5, 0.4])
    monkeypatch.setattr(loop, "measure_shares", lambda *_: {0.0: {"q": 0.1}})
    monkeypatch.setattr(loop, "choose_share", lambda _: next(shares))
    monkeypatch.setattr(loop, "evaluate", lambda e, c, *, measures, **_: Evaluation({"m": next(values)}, {}, {}))
    settings = FitSettings(
        data=(many,), model=str(tiny_encoder), max_steps=4, dev="sample?queries=even", dev_every=2, precision="float32"
    )
    result = fit(settings, tmp_path / "out")
    assert (result.dev_step, result.share) == (2, 1.0)


def test_a_resumed_run_goes_as_far(tiny_encoder, tmp_path, many, monkeypatch):
    settings = FitSettings(
        data=(many,), model=str(tiny_encoder), max_steps=4, dev="sample?queries=even", dev_every=2, precision="float32"
    )
    fit(settings, tmp_path / "whole")
    with monkeypatch.context() as patch:
        cut_at(3, patch)
        with pytest.raises(GradretError, match="cut"):
            fit(settings, tmp_path / "out")
    fit(settings, tmp_path / "out", resume=True)
    assert_same_run(tmp_path / "out", tmp_path / "whole")


@pytest.mark.nightly
def test_processes_choose_it_together(tiny_encoder, tmp_path, many):
    line = f"-m gradret fit --data {many} --model {tiny_encoder} --max-steps 4 --precision float32 --json --out"
    told = []
    for size in (1, 2):
        result = run_group(size, [*line.split(), str(tmp_path / str(size))])
        assert result.returncode == 0, result.stderr
        told.append(json.loads(result.stdout)["share"])
    assert told[0] == told[1] in SHARES

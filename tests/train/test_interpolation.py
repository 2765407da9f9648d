"""How much of what was learnt is saved, where held-out lists choose it."""

import json
import os
import signal
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import SAMPLE_FILE
from forked import run_group
from test_resume import assert_same_run, cut_at

from gradret import fit, read_lists, write_lists
from gradret.bench.quality import FIT, OpenedInputs, Run
from gradret.cli import main
from gradret.console import GradretError
from gradret.data.lists import query_words
from gradret.data.sources import MixedLists, check_lists, open_collection, parse_source
from gradret.distributed import ALONE
from gradret.encoder.load import load_encoder
from gradret.evaluation.measures import Evaluation
from gradret.settings import FitSettings
from gradret.train import interpolation, loop
from gradret.train.interpolation import SHARES, choose_share, copy_trained, make_held_out, measure_share


def of(*, quarter: float, half: float, whole: float) -> dict[float, float]:
    return dict(zip(SHARES, (quarter, half, whole), strict=True))


def test_the_least_share_that_is_close_to_the_best():
    assert choose_share(of(quarter=0.5, half=0.6, whole=0.7)) == 1.0
    assert choose_share(of(quarter=0.5, half=0.7, whole=0.6)) == 0.5
    assert choose_share(of(quarter=0.7, half=0.6, whole=0.5)) == 0.25
    assert choose_share(of(quarter=0.7, half=0.7, whole=0.7)) == 0.25
    assert choose_share(of(quarter=0.5, half=0.6, whole=0.61)) == 0.5
    assert choose_share(of(quarter=0.59, half=0.6, whole=0.605)) == 0.25
    assert choose_share(of(quarter=0.5, half=0.6, whole=0.4) | {0.0: 0.9}) == 0.5  # the encoder as it came is no choice


def write_copies(path, number: int) -> str:
    """The sample so many times, each under other queries."""
    lists = list(read_lists(SAMPLE_FILE))
    copies = [replace(x, query_id=f"{x.query_id}-{n}", query=f"{x.query} {n}") for n in range(1, number) for x in lists]
    write_lists(path, [*lists, *copies])
    return str(path)


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> str:
    """192 lists."""
    return write_copies(tmp_path_factory.mktemp("lists") / "many.jsonl", 2)


def test_a_tenth_of_the_lists_that_are_there_to_train_on_is_held_out(many, tmp_path):
    mixed = MixedLists([parse_source(many)])
    found = check_lists(mixed, refuse_negative=True, hold_out=True)
    assert len(found.held_out) == 19
    assert sorted([*found.kept, *found.held_out]) == list(range(192))
    assert found.passages == sum(len(mixed[i].passages) for i in found.kept.tolist())
    assert str(found).endswith("; 19 lists held out, to choose the share of the way that is saved")
    again = MixedLists([parse_source("sample"), parse_source(many)])  # which lists depends on the queries alone
    other = check_lists(again, refuse_negative=True, hold_out=True)
    assert {again[i].query for i in other.held_out} == {mixed[i].query for i in found.held_out}
    for left, held in ((49, 0), (50, 10), (99, 10), (111, 11)):
        words = {query_words(mixed[i].query) for i in range(192 - left)}
        assert len(check_lists(mixed, refuse_negative=True, exclude=words, hold_out=True).held_out) == held
    assert not len(check_lists(mixed, refuse_negative=True).held_out)
    most = MixedLists([parse_source(write_copies(tmp_path / "most.jsonl", 27))])
    assert len(check_lists(most, refuse_negative=True, hold_out=True).held_out) == 256


def test_lists_of_one_query_are_held_out_together_or_not_at_all(tmp_path):
    lists = [replace(x, query=x.query.upper()) for x in read_lists(SAMPLE_FILE)]
    path = tmp_path / "twice.jsonl"
    write_lists(path, [*(replace(x, query_id=f"{x.query_id}-2") for x in lists), *read_lists(SAMPLE_FILE)])
    mixed = MixedLists([parse_source(str(path))])
    found = check_lists(mixed, refuse_negative=True, hold_out=True)
    kept, held = ({query_words(mixed[i].query) for i in rows.tolist()} for rows in (found.kept, found.held_out))
    assert len(found.held_out) == 18 and len(held) == 9 and not kept & held
    write_lists(path, [replace(lists[0], query_id=str(number)) for number in range(120)])
    same = check_lists(MixedLists([parse_source(str(path))]), refuse_negative=True, hold_out=True)
    assert len(same.kept) == 120 and not len(same.held_out)


def test_bench_counts_what_fit_trains_on(tiny_encoder, many):
    settings = FitSettings(data=(many,), model=str(tiny_encoder))
    assert settings.interpolate == "auto"
    runs = [Run(FIT, replace(settings, interpolate=share), (), str(share)) for share in ("auto", 0.5)]
    inputs = OpenedInputs(runs)
    assert [inputs.lists[run.key] for run in runs] == [173, 192]
    for run in runs:
        assert len(loop.Inputs(run.settings, ALONE, "cpu").summary.kept) == inputs.lists[run.key]


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


@pytest.mark.parametrize(
    ("grades", "measured"),
    [
        ((3, 2, 1, 0), [3, 2, 1, 0]),
        ((2, 1, 0, -1), [2, 1, 0, -1]),
        ((0.45, 0.3, 0.15, 0), [3, 2, 1, 0]),
        ((0, -1, -2, -3), [3, 2, 1, 0]),
    ],
)
def test_grades_that_are_no_measures_are_measured_by_their_ranks(tmp_path, many, grades, measured):
    lists = list(read_lists(many))
    for entry in lists:
        for passage, grade in zip(entry.passages, grades, strict=True):
            passage.grade = grade
    write_lists(tmp_path / "lists.jsonl", lists)
    mixed = MixedLists([parse_source(str(tmp_path / "lists.jsonl"))])
    found = make_held_out(mixed, check_lists(mixed, refuse_negative=False, hold_out=True))
    assert all([*of_query.values()] == measured for of_query in found.qrels.values())


def settings_of(tiny_encoder, many, **more) -> FitSettings:
    options = {"max_steps": 4, "learning_rate": 1e-3, "precision": "float32"}
    return FitSettings(data=(many,), model=str(tiny_encoder), **options | more)


def patch_measures(monkeypatch, **means: float) -> dict[str, torch.Tensor]:
    """Let held-out lists find these means, after a real measurement: the weights at the last one."""
    trained: dict[str, torch.Tensor] = {}
    said = of(**means)

    def measure(encoder, start, share, held_out, **options):
        trained.update({name: p.detach().clone() for name, p in encoder.named_parameters()})
        assert 0 < measure_share(encoder, start, share, held_out, **options) <= 1
        return said.get(share, 0.1)

    monkeypatch.setattr(loop, "measure_share", measure)
    return trained


def test_the_share_chosen_is_the_one_saved_and_told(tiny_encoder, tmp_path, many, monkeypatch, capsys):
    trained = patch_measures(monkeypatch, quarter=0.5, half=0.7, whole=0.6)
    settings, out = settings_of(tiny_encoder, many), tmp_path / "out"
    result = fit(settings, out)
    start, saved = (dict(load_encoder(str(path)).named_parameters()) for path in (tiny_encoder, out))
    for name, parameter in saved.items():
        assert torch.equal(parameter, torch.lerp(start[name], trained[name], 0.5)), name
    assert result.share == 0.5
    assert json.loads((out / "gradret.json").read_text())["share"] == 0.5
    card = (out / "README.md").read_text()
    assert "| share of the way saved | 0.5 |" in card and "| **0.5 (saved)** | **0.7000** |" in card
    assert "Nothing was measured" not in card
    assert "nDCG@10 of the held-out lists: 0.1000 at 0, " in capsys.readouterr().err
    assert fit(settings, out, resume=True).share == 0.5  # finished
    told = CliRunner().invoke(main, ["fit", "--resume", "--out", str(out), "--json"])
    assert json.loads(told.stdout)["share"] == 0.5


def test_dev_measures_what_would_be_saved(tiny_encoder, tmp_path, many, monkeypatch, capsys):
    shares, values, seen = iter([1.0, 0.5]), iter([0.3, 0.5, 0.4]), []

    def measure(encoder, collection, *, measures, **_):
        seen.append(encoder.fingerprint())
        return Evaluation({"m": next(values)}, {}, {})

    monkeypatch.setattr(loop, "measure_share", lambda *_, **__: 0.1)
    monkeypatch.setattr(loop, "choose_share", lambda _: next(shares))
    monkeypatch.setattr(loop, "evaluate", measure)
    settings = settings_of(tiny_encoder, many, dev="sample?queries=even", dev_every=2)
    result = fit(settings, tmp_path / "out")
    assert (result.dev_step, result.share) == (2, 1.0)
    assert load_encoder(str(tmp_path / "out")).fingerprint() == seen[1]
    assert "step 2: dev nDCG@10 0.5000 at 1 of the way, best 0.5000 at step 2" in capsys.readouterr().err


def test_a_resumed_run_goes_as_far(tiny_encoder, tmp_path, many, monkeypatch):
    values = iter([0.3, 0.5, 0.4] * 2)  # the best before the cut
    monkeypatch.setattr(loop, "evaluate", lambda *_, **__: Evaluation({"m": next(values)}, {}, {}))
    patch_measures(monkeypatch, quarter=0.5, half=0.7, whole=0.6)
    settings = settings_of(tiny_encoder, many, dev="sample?queries=even", dev_every=2)
    fit(settings, tmp_path / "whole")
    with monkeypatch.context() as patch:
        cut_at(3, patch)
        with pytest.raises(GradretError, match="cut"):
            fit(settings, tmp_path / "out")
    fit(settings, tmp_path / "out", resume=True)
    assert_same_run(tmp_path / "out", tmp_path / "whole")


def test_a_checkpoint_that_does_not_say_how_far_goes_as_far_as_the_settings_say(
    tiny_encoder, tmp_path, many, monkeypatch
):
    """One of an earlier version."""
    values = iter([0.3, 0.5, 0.4] * 2)
    monkeypatch.setattr(loop, "evaluate", lambda *_, **__: Evaluation({"m": next(values)}, {}, {}))
    settings = settings_of(tiny_encoder, many, interpolate=0.25, dev="sample?queries=even", dev_every=2)
    fit(settings, tmp_path / "whole")
    with monkeypatch.context() as patch:
        cut_at(3, patch)
        with pytest.raises(GradretError, match="cut"):
            fit(settings, tmp_path / "out")
    state = next((tmp_path / "out" / "checkpoints").glob("*/state.json"))
    kept = {k: v for k, v in json.loads(state.read_text()).items() if k not in ("share", "held_out_means")}
    state.write_text(json.dumps(kept))
    assert fit(settings, tmp_path / "out", resume=True).share == 0.25
    assert_same_run(tmp_path / "out", tmp_path / "whole")


def test_a_signal_while_held_out_lists_are_ranked_loses_no_step(tiny_encoder, tmp_path, many, monkeypatch):
    settings = settings_of(tiny_encoder, many)
    fit(settings, tmp_path / "whole")
    with monkeypatch.context() as patch:
        ranked = interpolation.evaluate

        def rank(*arguments, **options):
            os.kill(os.getpid(), signal.SIGTERM)
            return ranked(*arguments, **options)

        patch.setattr(interpolation, "evaluate", rank)
        with pytest.raises(GradretError, match="stopped by SIGTERM after step 4 of 4, all saved"):
            fit(settings, tmp_path / "out")
    monkeypatch.setattr(loop.Trainer, "train_step", None)  # nothing is left but to rank them
    fit(settings, tmp_path / "out", resume=True)
    first, second = (tmp_path / name / "model.safetensors" for name in ("whole", "out"))
    assert first.read_bytes() == second.read_bytes()


def test_a_signal_never_cuts_short_how_the_weights_are_put_back(tiny_encoder):
    encoder, seen = load_encoder(str(tiny_encoder)), []
    start = {name: tensor + 1 for name, tensor in copy_trained(encoder).items()}

    @contextmanager
    def give_up():
        seen.append(encoder.fingerprint())
        yield
        seen.append(encoder.fingerprint())

    own, lists = encoder.fingerprint(), open_collection(parse_source("sample?queries=odd"))
    measure_share(encoder, start, 0.5, lists, precision="float32", give_up=give_up)
    assert seen[0] == seen[1] != own == encoder.fingerprint()


@pytest.mark.nightly
def test_processes_choose_it_together(tiny_encoder, tmp_path, many):
    line = f"-m gradret fit --data {many} --model {tiny_encoder} --max-steps 6 --precision float32 --json"
    told = []
    for size in (1, 2):
        result = run_group(size, [*line.split(), "--learning-rate", "3e-3", "--out", str(tmp_path / str(size))])
        assert result.returncode == 0, result.stderr
        told.append(json.loads(result.stdout)["share"])
    assert told[0] == told[1] in SHARES

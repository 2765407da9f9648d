import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import SAMPLE_FILE, list_record, make_tiny_encoder

from gradret.console import GradretError
from gradret.data.lists import parse_list, read_lists, write_lists
from gradret.data.sources import Source, open_collection
from gradret.distributed import ALONE, Processes
from gradret.encoder.load import load_encoder
from gradret.evaluation.measures import Evaluation, evaluate
from gradret.loss.functions import mix_losses
from gradret.loss.kernels import describe_backend
from gradret.settings import DEFAULT_LOSS, FitSettings
from gradret.train import gradients as objective
from gradret.train import loop as trainer
from gradret.train.batches import collate, draw_batches, draw_positions
from gradret.train.gradients import BatchGradients
from gradret.train.loop import Inputs, count_steps, fit, learning_rate_at, make_optimizer


def test_every_list_comes_once_an_epoch_and_steps_are_full():
    drawn = [draw_positions(step, count=10, size=4, seed=0) for step in range(5)]
    assert all(len(d) == 4 for d in drawn)
    flat = [i for d in drawn for i in d]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert flat[:10] != flat[10:]
    assert draw_positions(0, count=10, size=4, seed=1) != drawn[0]
    wrapped = draw_positions(1, count=3, size=7, seed=0)  # places 7 to 13: the third list of epoch 2 to the second of 4
    assert len(wrapped) == 7
    assert sorted(wrapped[2:5]) == [0, 1, 2]


def test_a_batch_holds_every_document_once():
    first, second = (parse_list(list_record(q, grades), "") for q, grades in (("a", (3, 0, 0)), ("b", (2, 1))))
    first.passages[2].text = first.passages[0].text  # twice in one list: the first grade, 3, counts
    second.passages[1].text = first.passages[0].text  # in two lists, with the grades 3 and 1
    batch = collate([first, second])
    assert batch.documents == ["passage 0 about a", "passage 1 about a", "passage 0 about b"]
    assert batch.mask.tolist() == [[True, True], [True, True]]
    assert batch.spread_grades(-1).tolist() == [[3, 0, -1], [1, -1, 2]]
    assert batch.columns.tolist() == [[0, 1], [2, 0]]
    assert batch.spread_grades(-1, slice(1, 2)).tolist() == [[1, -1, 2]]
    assert [part.tolist() for part in batch.list_pairs(slice(1, 2))] == [[0, 0], [2, 0], [2, 1]]


def test_lists_of_one_query_grade_each_others_documents():
    """What answers a query is no irrelevant passage for its double; nor is the same text, however it is written."""
    records = [list_record("a", (3, 0)), list_record("b", (2,)), list_record("c", (1, 0))]
    for record, query in zip(records, ("caf\u00e9 tides", "other", "Cafe\u0301  tides"), strict=True):
        record["query"] = query
    records[1]["passages"][0]["text"] = "Passage 0  about a"
    records[2]["passages"][1]["text"] = "passage 1 about a"
    lists = [parse_list(record, "") for record in records]
    batch = collate(lists)
    assert batch.documents == ["passage 0 about a", "passage 1 about a", "passage 0 about c"]
    assert batch.spread_grades(-1).tolist() == [[3, 0, 1], [2, -1, -1], [3, 0, 1]]
    alone = collate(lists, in_batch=False)
    assert alone.spread_grades(-1).tolist() == [[3, 0, -1], [2, -1, -1], [-1, 0, 1]]


def test_lists_of_other_lengths_are_padded_and_masked():
    batch = collate([parse_list(list_record("a", (3, 2, 1)), ""), parse_list(list_record("b", (1,)), "")])
    assert batch.mask.tolist() == [[True] * 3, [True, False, False]]
    assert len(batch.documents) == 4


def test_schedule():
    settings = FitSettings(learning_rate=1.0, warmup=0.2)
    rates = [learning_rate_at(step, 10, settings) for step in range(10)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])
    cosine = FitSettings(learning_rate=1.0, warmup=0, schedule="cosine")
    assert learning_rate_at(5, 10, cosine) == pytest.approx(0.5)
    assert learning_rate_at(0, 1, settings) == 1.0


def test_steps():
    assert count_steps(FitSettings(batch_lists=16, epochs=1), 417) == 27
    assert count_steps(FitSettings(batch_lists=16, accumulate=2, epochs=2), 417) == 27
    assert count_steps(FitSettings(batch_lists=16, max_steps=5), 417) == 5
    assert count_steps(FitSettings(batch_lists=16, epochs=3), 6) == 3


@pytest.mark.parametrize(
    ("lists", "batch_lists", "steps"),
    # 2 epochs from 160 lists on, below 320 lists are read, below 40 every one eight times
    [(1000, 16, 125), (160, 16, 20), (96, 16, 20), (96, 64, 5), (40, 16, 20), (39, 16, 20), (6, 16, 8)],
)
def test_few_lists_are_read_more_often(lists, batch_lists, steps):
    assert count_steps(FitSettings(batch_lists=batch_lists), lists) == steps


def test_biases_and_norms_do_not_decay(tiny_encoder):
    encoder = load_encoder(str(tiny_encoder))
    decayed, kept = make_optimizer(encoder, 0.1).param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in encoder.named_parameters()}
    assert all("bias" in names[id(p)] or "LayerNorm" in names[id(p)] for p in kept["params"])
    assert not any("bias" in names[id(p)] or "LayerNorm" in names[id(p)] for p in decayed["params"])
    assert len(decayed["params"]) + len(kept["params"]) == len(names)


def test_accumulation_is_the_mean_over_micro_batches(tiny_encoder, tmp_path):
    """In-batch documents stay within a micro-batch: two of 4 lists, each with its own."""
    encoder = load_encoder(str(make_tiny_encoder(tmp_path, dropout=0.0)))
    lists = list(read_lists(SAMPLE_FILE))[:8]
    kept = torch.arange(8).numpy()
    batches = list(draw_batches(lists, kept, 0, batch_lists=4, accumulate=2, seed=0, in_batch=True))
    assert [len(b.queries) for b in batches] == [4, 4]
    assert [len(b.documents) for b in batches] == [16, 16]
    plain = {"order": 1, "temperature": 1.0, "targets": "gain", "ground": "grade"}
    settings = FitSettings(
        data=(str(SAMPLE_FILE) + "?queries=" + _ids(tmp_path, lists),), model=str(tmp_path), batch_lists=4,
        accumulate=2, max_steps=1, precision="float32", **plain,
        loss="wasserstein",
    )  # fmt: skip
    mean = 0
    for batch in batches:
        scores = encoder.score(encoder(batch.queries, "query"), encoder(batch.documents, "document"))
        mean = mean + mix_losses("wasserstein", scores, batch.spread_grades(0.0), **plain) / 2
    mean.backward()
    norm = torch.stack([p.grad.norm() for p in encoder.parameters() if p.grad is not None]).norm()
    fit(settings, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "metrics.jsonl").read_text())
    assert (record["loss"], record["passages"]) == (pytest.approx(mean.item(), rel=1e-5), 32)
    assert record["gradient_norm"] == pytest.approx(norm.item(), rel=1e-5)


def _ids(directory, lists) -> str:
    (directory / "ids").write_text("".join(f"{r.query_id}\n" for r in lists))
    return str(directory / "ids")


RARE_LOSSES = [
    pytest.param(loss, marks=pytest.mark.nightly) for loss in ("wasserstein", "gaussian", "kl", "contrast", "ranknet")
]


@pytest.mark.parametrize("loss", [DEFAULT_LOSS, "infonce", *RARE_LOSSES])
def test_a_handful_of_lists_is_learnt_by_heart(loss, tmp_path):
    model = make_tiny_encoder(tmp_path / "model", dropout=0.0)
    lists = list(read_lists(SAMPLE_FILE))[:6]
    write_lists(tmp_path / "six.jsonl", lists)
    settings = FitSettings(
        data=(str(tmp_path / "six.jsonl"),), model=str(model), loss=loss, batch_lists=6,
        epochs=60, learning_rate=1e-2, warmup=0.05, precision="float32", temperature=0.1, weight_decay=0.0,
        interpolate=1.0,
    )  # fmt: skip
    result = fit(settings, tmp_path / "out", progress=False)
    first = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    assert result.loss < 0.05 * first
    # infonce does not say how grades below the highest rank. SyCL's Gaussian does not change when the rows of the
    # scores alone are permuted: its minimum need not rank, and here does not.
    measure = {"infonce": "RR(rel=3)@10", "gaussian": None}.get(loss, "nDCG@10")
    if measure is not None:
        collection = open_collection(Source(str(tmp_path / "six.jsonl")))
        assert evaluate(load_encoder(str(result.out)), collection, measures=[measure]).measures[measure] > 0.999


def test_the_best_model_on_dev_is_kept(tiny_encoder, tmp_path, monkeypatch):
    values, seen = iter([0.3, 0.5, 0.2]), []

    def measure(encoder, collection, *, measures, **_):
        seen.append(encoder.fingerprint())
        return Evaluation({measures[0]: next(values)}, {}, {})

    monkeypatch.setattr(trainer, "evaluate", measure)
    settings = FitSettings(
        data=("sample?queries=odd",), model=str(tiny_encoder), batch_lists=6, max_steps=4, learning_rate=1e-3,
        dev="sample?queries=even", dev_every=2, checkpoint_every=1, precision="float32",
    )  # fmt: skip
    result = fit(settings, tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "dev.jsonl").read_text().splitlines()]
    assert lines == [{"step": s, "nDCG@10": v} for s, v in ((0, 0.3), (2, 0.5), (4, 0.2))]
    assert (result.dev, result.dev_step) == (0.5, 2)
    assert len(set(seen)) == 3
    assert load_encoder(str(result.out)).fingerprint() == seen[1]


def test_saved_and_measured_weights_lie_so_far_on_the_way_to_the_trained_ones(tiny_encoder, tmp_path, monkeypatch):
    values, seen = iter([0.3, 0.4, 0.5]), []

    def measure(encoder, collection, *, measures, **_):
        seen.append(encoder.fingerprint())
        return Evaluation({measures[0]: next(values)}, {}, {})

    monkeypatch.setattr(trainer, "evaluate", measure)
    settings = FitSettings(
        data=("sample?queries=odd",), model=str(tiny_encoder), batch_lists=6, max_steps=4, learning_rate=1e-3,
        precision="float32",
    )  # fmt: skip
    fit(replace(settings, interpolate=1.0), tmp_path / "whole")
    fit(replace(settings, interpolate=0.25, dev="sample?queries=even", dev_every=2), tmp_path / "part")
    encoders = [load_encoder(str(path)) for path in (tiny_encoder, tmp_path / "whole", tmp_path / "part")]
    start, whole, part = (dict(encoder.named_parameters()) for encoder in encoders)
    for name, parameter in part.items():
        assert torch.equal(parameter, torch.lerp(start[name], whole[name], 0.25)), name
    assert seen == [encoders[0].fingerprint(), seen[1], encoders[2].fingerprint()]
    assert len(set(seen)) == 3
    assert "| `--set interpolate` | 0.25 |" in (tmp_path / "part" / "README.md").read_text()


def test_patience_ends_a_run_that_no_longer_gets_better(tiny_encoder, tmp_path, monkeypatch):
    values = iter([0.3, 0.5, 0.4, 0.5, 0.9])
    monkeypatch.setattr(trainer, "evaluate", lambda e, c, *, measures, **_: Evaluation({"m": next(values)}, {}, {}))
    settings = FitSettings(
        data=("sample?queries=odd",), model=str(tiny_encoder), batch_lists=6, max_steps=40, epochs=9, patience=2,
        dev="sample?queries=even", dev_every=2, precision="float32",
    )  # fmt: skip
    result = fit(settings, tmp_path / "out")
    assert (result.steps, result.dev, result.dev_step) == (6, 0.5, 2)  # an equal value is no new best
    again = fit(settings, tmp_path / "out", resume=True)
    assert (again.was_finished, again.steps, again.dev, again.dev_step) == (True, 6, 0.5, 2)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| steps | 6 |" in card
    assert "| **2 (best, saved)** | **0.5000** |" in card


@pytest.mark.parametrize("every", ["", ",every=0.5"])
def test_mined_passages_join_the_lists_and_a_resumed_run_keeps_them(tiny_encoder, tmp_path, monkeypatch, every):
    settings = FitSettings(
        data=("sample?queries=odd",), model=str(tiny_encoder), batch_lists=6, max_steps=12, epochs=9,
        mine=f"k=2,grade=1{every}", in_batch=False, checkpoint_every=3, precision="float32", learning_rate=1e-3,
    )  # fmt: skip
    fit(settings, tmp_path / "whole", progress=False)
    assert not list((tmp_path / "whole").glob("mined-*"))
    metrics = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert all(24 < line["passages"] <= 36 for line in metrics)  # of 6 lists; some are mined twice, or are in the batch
    step, out = trainer.Trainer.train_step, tmp_path / "cut"

    def fail(self, bar):
        if self.state.step == 8:
            raise GradretError("cut")
        step(self, bar)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "train_step", fail)
        with pytest.raises(GradretError, match="cut"):
            fit(settings, out, progress=False)
    rounds = ["mined-0.npy", "mined-1.npy"] if every else ["mined-0.npy"]  # 48 lists: half an epoch is 4 steps
    assert sorted(p.name for p in out.glob("mined-*")) == [*rounds, *["mined-2.npy"] * bool(every)]
    fit(settings, out, resume=True, progress=False)
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_queries_to_be_measured_are_not_trained_on(tiny_encoder, tmp_path, capsys):
    settings = FitSettings(model=str(tiny_encoder), max_steps=1, exclude=("sample?queries=even",), batch_lists=4)
    fit(settings, tmp_path / "out")
    assert "data: 48 lists, 192 passages, grades 0 to 3; 48 lists left out, whose query is one to be measured" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("loss", "has_kernel"), [("kl", True), ("infonce", True), ("gaussian", False), ("ranknet:.5+contrast:.5", True)]
)
def test_the_path_of_a_loss_with_a_kernel_is_shown(tiny_encoder, tmp_path, capsys, loss, has_kernel):
    fit(small(tiny_encoder, loss=loss), tmp_path / "out")
    path = f" on {describe_backend('cpu')}" if has_kernel else ""
    assert f"fit: {FitSettings(loss=loss).loss}{path}, 0 of 1 steps done" in capsys.readouterr().err


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run(tiny_encoder, tmp_path, monkeypatch, value):
    def spoil(loss, scores, grades, **options):
        spoil.calls += 1
        return scores.sum() * (value if spoil.calls == 4 else 1.0)

    spoil.calls = 0
    monkeypatch.setattr(objective, "mix_losses", spoil)
    settings = FitSettings(
        model=str(tiny_encoder),
        loss="infonce",
        batch_lists=2,
        checkpoint_every=2,
        precision="float32",
        interpolate=1.0,
    )
    with pytest.raises(GradretError) as error:
        fit(settings, tmp_path / "out")
    kept = [r.query_id for r in read_lists(SAMPLE_FILE)]
    ids = ", ".join(kept[i] for i in draw_positions(3, count=96, size=2, seed=0))
    shown = "nan" if math.isnan(value) else str(value)
    assert str(error.value).replace("-inf", "inf") == (
        f"step 4: loss is {shown}; lists: {ids}; last good checkpoint: "
        f"{tmp_path / 'out' / 'checkpoints' / 'step-000000002'}; look at these lists, or lower --learning-rate"
    )
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 3


def test_wrong_settings():
    with pytest.raises(ValueError, match="epochs must be above 0, got 0"):
        FitSettings(epochs=0)
    with pytest.raises(ValueError, match="chunk must be a whole number or 'auto', got 'all'"):
        FitSettings(chunk="all")
    for share in (0.0, 1.5):
        with pytest.raises(ValueError, match="interpolate must be above 0 and at most 1"):
            FitSettings(interpolate=share)
    with pytest.raises(ValueError, match="--patience has no use without --dev; leave it out"):
        FitSettings(patience=3)
    with pytest.raises(ValueError, match="--set lora_targets has no use without --lora; leave it out"):
        FitSettings(lora_targets=("query",))
    with pytest.raises(ValueError, match="weights in bfloat16 need lora"):
        FitSettings(weights="bfloat16")


@pytest.mark.nightly
@pytest.mark.slow
def test_a_million_lists_train_in_600_mib_above_the_model(tiny_encoder, tmp_path):
    """The same two steps on a file of a million lists and on the sample: the peaks differ by the index alone."""
    path = tmp_path / "million.jsonl"
    passages = json.dumps([{"grade": g, "text": f"some words of grade {g} " * 8} for g in (3, 2, 1, 0)])
    with open(path, "w") as file:
        for i in range(1_000_000):
            file.write(f'{{"query_id": "q{i}", "query": "query {i}", "passages": {passages}}}\n')
    code = """
import resource, sys
from gradret.settings import FitSettings
from gradret.train.loop import fit
fit(FitSettings(data=(sys.argv[1],), model=sys.argv[2], max_steps=2), sys.argv[3])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""
    peaks = [
        int(
            subprocess.run(
                [sys.executable, "-c", code, str(data), str(tiny_encoder), str(tmp_path / name)],
                capture_output=True, text=True, check=True,
            ).stdout
        )
        for name, data in (("large", path), ("small", "sample"))
    ]  # fmt: skip
    assert peaks[0] - peaks[1] < 600


def small(tiny_encoder, **more) -> FitSettings:
    return FitSettings(**{"model": str(tiny_encoder), "batch_lists": 4, "max_steps": 1, "precision": "float32", **more})


def test_gradients_are_clipped(tiny_encoder, tmp_path, monkeypatch):
    norms = []
    step = torch.optim.AdamW.step

    def record(self, *args, **kwargs):
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.stack([g.norm() for g in grads]).norm().item())
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    fit(small(tiny_encoder, clip=0.01), tmp_path / "clipped")
    fit(small(tiny_encoder, clip=0), tmp_path / "free")
    recorded = json.loads((tmp_path / "clipped" / "metrics.jsonl").read_text())["gradient_norm"]
    assert norms == [pytest.approx(0.01, rel=1e-3), pytest.approx(recorded, rel=1e-4)]
    assert recorded > 0.02


def test_a_gradient_that_is_not_finite_stops_the_run(tiny_encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(objective, "mix_losses", lambda loss, scores, *a, **k: (scores * 0).sqrt().sum())
    with pytest.raises(
        GradretError, match=r"^step 1: gradient norm is nan; lists: sample-.*; last good checkpoint: none;"
    ):
        fit(small(tiny_encoder, loss="infonce"), tmp_path / "out")


def test_bfloat16_is_used_when_asked_for(tiny_encoder, tmp_path):
    found = [fit(small(tiny_encoder, loss="infonce", precision=p), tmp_path / p).loss for p in ("float32", "bfloat16")]
    assert found[0] != found[1]
    assert found[1] == pytest.approx(found[0], rel=0.05)


def test_lists_in_which_nothing_is_above_another_are_refused(tiny_encoder, tmp_path, write_jsonl):
    data = (f"{write_jsonl('flat.jsonl', [list_record('a', (2, 2)), list_record('b', (2,))])}",)
    message = "no passage is more relevant than another, the highest grade is 2; give lists with other grades"
    for options in ({"in_batch": False}, {"batch_lists": 1}, {"in_batch_grade": 2.0}):
        with pytest.raises(GradretError, match=message):
            fit(small(tiny_encoder, data=data, max_steps=1, **options), tmp_path / "out")
    fit(small(tiny_encoder, data=data, in_batch=False, max_steps=1, mine="k=1,grade=0"), tmp_path / "mined")
    fit(small(tiny_encoder, data=data, max_steps=1), tmp_path / "others")
    softmax = {"targets": "softmax", "in_batch_grade": 1.0, "loss": "contrast"}  # every document has target mass
    fit(small(tiny_encoder, data=data, max_steps=1, **softmax), tmp_path / "softmax")


def test_settings_of_another_kind_are_named(tmp_path):
    with pytest.raises(ValueError, match="loss must be text, such as .*, got None"):
        FitSettings(loss=None)
    for settings, out in ((None, tmp_path / "out"), (FitSettings(), None), ("model", "out")):
        with pytest.raises(TypeError, match="expected FitSettings and a directory, got "):
            fit(settings, out)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("field", ["temperature", "epochs", "clip", "warmup", "weight_decay", "in_batch_grade"])
def test_settings_are_finite(field):
    with pytest.raises(ValueError, match=f"{field} must be a finite number, got nan"):
        FitSettings(**{field: math.nan})


def test_mined_grades_are_held_to_the_rules_of_grades(tiny_encoder, tmp_path):
    with pytest.raises(GradretError) as error:
        fit(small(tiny_encoder, mine="k=1,grade=-1"), tmp_path / "out")
    assert str(error.value) == (
        "mine 'k=1,grade=-1': targets of 2^grade - 1 or sqrt(grade) give the negative grade -1 nothing; "
        "use a grade of 0 or above, or use --targets softmax"
    )
    fit(small(tiny_encoder, mine="k=1,grade=-1", targets="softmax", loss="wasserstein"), tmp_path / "out")
    with pytest.raises(GradretError, match=r"grade 3 is no lower than the best of the lists, 3; give a lower grade"):
        fit(small(tiny_encoder, mine="k=1,grade=3"), tmp_path / "best")
    with pytest.raises(GradretError, match=r"grade 1 is no lower than --positive-from 1; give a lower grade"):
        fit(small(tiny_encoder, loss="infonce", positive_from=1, mine="k=1,grade=1"), tmp_path / "positive")


def test_positives_from_a_grade_that_no_passage_has_are_refused(tiny_encoder, tmp_path):
    with pytest.raises(GradretError) as error:
        fit(small(tiny_encoder, loss="infonce", positive_from=5), tmp_path / "out")
    assert str(error.value) == (
        "loss infonce: no passage has grade 5 or above; the highest is 3; lower --positive-from"
    )
    assert fit(small(tiny_encoder, loss="infonce", positive_from=3), tmp_path / "out").loss > 0


def test_lists_without_a_better_grade_get_no_mined_passages(tiny_encoder, tmp_path, write_jsonl, capsys):
    """What is mined would be as good as their best, so a positive."""
    names = {"a": (3, 0), "b": (1, 0), "c": (3, 1), "d": (0, 0), "e": (0.5,)}
    path = write_jsonl("lists.jsonl", [list_record(name, grades) for name, grades in names.items()])
    settings = small(tiny_encoder, data=(str(path),), mine="k=9,grade=1", loss="infonce", batch_lists=5)
    fit(settings, tmp_path / "out", progress=False)
    said = capsys.readouterr().err
    assert "; no mined passages: 3 lists without a grade above 1" in said
    # "b", "d" and "e" keep their own; of all 9 passages "a" and "c" get the 7 that are not theirs.
    assert "step 0: 14 passages mined, as grade 1" in said
    job = Inputs(settings, ALONE, "cpu")
    assert job.miner.rows.tolist() == [0, 2]


@pytest.mark.parametrize(
    ("size", "resume", "advice"),
    [
        (4, False, "try --batch-lists 8"),
        (4, True, "start a number of them that divides it"),
    ],
)
def test_advice_where_processes_can_not_share_a_batch(size, resume, advice):
    with pytest.raises(GradretError) as error:
        Inputs(FitSettings(batch_lists=6), Processes(0, size), "cpu", resume=resume)
    assert str(error.value) == f"--batch-lists 6 is not a multiple of the {size} processes that share it; {advice}"


def test_settings_have_their_ranges():
    with pytest.raises(ValueError, match="lora_dropout must be 0 or above and below 1, got 1"):
        FitSettings(lora=2, lora_dropout=1)
    for field in ("clip", "weight_decay", "warmup"):
        with pytest.raises(ValueError, match=f"{field} must be 0"):
            FitSettings(**{field: -0.5})
    with pytest.raises(ValueError, match="max_steps must be 1 or above, got 0"):
        FitSettings(max_steps=0)
    with pytest.raises(ValueError, match="--positive-from is for --loss infonce, not kl"):
        FitSettings(loss="kl", positive_from=2)


def test_out_of_memory_ends_with_the_chunk_to_try(tiny_encoder, tmp_path, monkeypatch):
    """And the run goes on with it, from then on."""

    def fail(self, batch, seed, scale):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 9 bytes")

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(BatchGradients, "accumulate", fail)
        with pytest.raises(GradretError) as error:
            fit(small(tiny_encoder), out)
        assert str(error.value) == (
            f"step 1: out of memory with 20 texts at once; try half: gradret fit --out {out} --resume --chunk 10"
        )
        with pytest.raises(GradretError, match="step 1: out of memory with 10 texts at once; .* --chunk 5$"):
            fit(small(tiny_encoder, chunk=10), out, resume=True)
        assert json.loads((out / "gradret.json").read_text())["settings"]["chunk"] == 10
        patch.setattr(BatchGradients, "accumulate", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):  # other errors stay what they are
            fit(small(tiny_encoder, chunk=10), out, resume=True)
    assert fit(small(tiny_encoder, chunk=5), out, resume=True).steps == 1


def test_dev_may_be_measured_under_another_name(tiny_encoder, tmp_path):
    settings = small(tiny_encoder, data=("sample?queries=odd",), dev="sample?queries=even", dev_measure="MRR@10")
    assert fit(settings, tmp_path / "out").dev > 0
    assert all("MRR@10" in line for line in (tmp_path / "out" / "dev.jsonl").read_text().splitlines())


def test_curves_for_tensorboard_survive_a_resume(tiny_encoder, tmp_path, monkeypatch):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    settings = FitSettings(
        data=("sample?queries=odd",), dev="sample?queries=even", model=str(tiny_encoder), max_steps=4
    )
    settings = replace(settings, checkpoint_every=2, dev_every=4)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:  # killed in the third step, after the second one's checkpoint
        steps = iter([trainer.Trainer.train_step] * 3)
        patched.setattr(trainer.Trainer, "train_step", lambda self, bar: next(steps, stop)(self, bar))
        with pytest.raises(KeyboardInterrupt):
            fit(settings, tmp_path / "run", progress=False, tensorboard=True)
    fit(settings, tmp_path / "run", progress=False, resume=True)  # what has curves goes on with them
    curves = event_accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    curves.Reload()
    written = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "learning_rate", "gradient_norm", "passages", "step_ms", "epoch"):
        points = [(event.step, event.value) for event in curves.Scalars(f"train/{name}")]
        assert points == [(line["step"], pytest.approx(line[name])) for line in written]
    dev = [json.loads(line) for line in (tmp_path / "run" / "dev.jsonl").read_text().splitlines()]
    (tag,) = (tag for tag in curves.Tags()["scalars"] if tag.startswith("dev/"))
    assert [event.step for event in curves.Scalars(tag)] == [line["step"] for line in dev] == [0, 4]
    shutil.rmtree(tmp_path / "run" / "tensorboard")
    assert fit(settings, tmp_path / "run", progress=False, resume=True, tensorboard=True).was_finished
    curves = event_accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    curves.Reload()
    assert len(curves.Scalars("train/loss")) == 4


def test_tensorboard_has_to_be_installed(tiny_encoder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(GradretError, match=r"--tensorboard needs .* pip install 'gradret\[tensorboard\]'"):
        fit(FitSettings(model=str(tiny_encoder)), tmp_path / "run", tensorboard=True)
    assert not (tmp_path / "run").exists()

"""The training benchmark: made lists, equal losses of both sides, both in the same precision, what is written."""

import io
import json
import sys
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from conftest import list_record, make_tiny_encoder

from benchmarks.speed import fit as fit_speed
from benchmarks.speed import fit_memory, fit_rivals
from benchmarks.speed.fit_lists import choose_lists, draw_fit_batches, make_lists, passage_texts
from benchmarks.speed.fit_report import SYSTEMS, describe_lengths, format_fit_speed, summarize_times
from benchmarks.speed.fit_rivals import Rival, find_losses, open_trainer, split_positive, time_trainer
from gradret.console import GradretError
from gradret.data.lists import Passage, RankingList, write_lists
from gradret.encoder.load import load_encoder
from gradret.settings import FitSettings

CPU = torch.device("cpu")
ROWS = [
    "sentence-transformers",
    "gradret infonce",
    "gradret default loss",
    "sentence-transformers, cached",
    "gradret infonce, cached",
    "gradret default loss, cached",
]
SPEED_RATIOS = [f"{ours} / {ROWS[0] if i < 2 else ROWS[3]}" for i, ours in enumerate(ROWS[1:3] + ROWS[4:])]
STEP_RATIOS = [f"{ROWS[2]} / {ROWS[1]}", f"{ROWS[5]} / {ROWS[4]}"]


@pytest.fixture
def trainer():
    """Skips where sentence-transformers' trainer is not installed."""
    for name in fit_rivals.PACKAGES:
        pytest.importorskip(name)


@pytest.fixture
def make_rival(tmp_path, trainer):
    """(encoder, Rival) of a tiny encoder without dropout, on three batches of four made lists."""

    def make(config: dict | None = None, **changes):
        encoder = load_encoder(str(make_tiny_encoder(tmp_path / "tiny", dropout=0.0)), device="cpu")
        encoder.config = replace(encoder.config, **(config or {}))
        encoder.save(tmp_path / "model")
        lists = make_lists(12)
        write_lists(tmp_path / "lists.jsonl", lists)
        settings = FitSettings(
            data=(str(tmp_path / "lists.jsonl"),),
            model=str(tmp_path / "model"),
            batch_lists=4,
            max_steps=2,
            **{"precision": "float32", "warmup": 0.0} | changes,
        )
        batches = draw_fit_batches(lists, 3, 4, settings.seed)
        return encoder, Rival(tmp_path / "model", encoder.config, settings, CPU, batches)

    return make


def invoke(*arguments):
    return CliRunner().invoke(fit_speed.main, [*map(str, arguments)])


def spread(value: float) -> dict:
    return {"median": value, "p20": value, "p80": value}


# Two rounds of two steps, milliseconds; a batch of 8 passages.
TIMES = {
    "sentence-transformers": [[100, 300], [200, 200]],
    "gradret infonce": [[50, 50], [100, 100]],
    "gradret default loss": [[50, 60], [100, 110]],
    "sentence-transformers, cached": [[400, 400], [400, 400]],
    "gradret infonce, cached": [[200, 200], [200, 200]],
    "gradret default loss, cached": [[200, 202], [202, 202]],
}


def make_result(memory=()) -> dict:
    return {
        "model": "tiny",
        "precision": "float32",
        "device": "cpu",
        "threads": 2,
        "batch_lists": 2,
        "passages_a_list": 4,
        "chunk": 3,
        "tokens": {"mean": 51.6, "p10": 12.0, "p50": 40.0, "p90": 99.4, "max": 128},
        "other_load": 0.034,
        "loss_alone": {"infonce": spread(0.75), "default loss": spread(1.5)},
        "memory": list(memory),
        **summarize_times(TIMES, 8),
    }


MEMORY = [
    {"lists": 16, "chunk": None, "peak_mib": 800.0, "ratio": 1.0},
    {"lists": 1024, "chunk": 3, "peak_mib": 1000.4, "ratio": 1.2505},
]


def test_times_by_hand():
    found = summarize_times(TIMES, 8)
    rows = {row["row"]: row for row in found["rows"]}
    assert list(rows) == ROWS == [system.name for system in SYSTEMS]
    # 8 passages in a mean of 200 ms, in both rounds
    assert rows["sentence-transformers"]["passages_per_s"] == spread(40.0)
    # 8 in 50 ms, 8 in 100 ms: 160 and 80 a second
    assert rows["gradret infonce"]["passages_per_s"] == pytest.approx({"median": 120, "p20": 96, "p80": 144})
    # 100, 200, 200, 300, sorted: the 20 % place is 0.6 of the way from the first to the second
    assert rows["sentence-transformers"]["step_ms"] == pytest.approx({"median": 200, "p20": 160, "p80": 240})
    assert list(found["speed_ratios"]) == SPEED_RATIOS
    # within a round: 200 / 50 = 4 and 200 / 100 = 2
    ratio = found["speed_ratios"]["gradret infonce / sentence-transformers"]
    assert ratio == pytest.approx({"median": 3, "p20": 2.4, "p80": 3.6})
    assert found["speed_ratios"]["gradret infonce, cached / sentence-transformers, cached"] == spread(2.0)
    assert list(found["step_ratios"]) == STEP_RATIOS
    # step by step: 1, 1.2, 1, 1.1
    assert found["step_ratios"][STEP_RATIOS[0]]["median"] == pytest.approx(1.05)
    # 1, 1.01, 1.01, 1.01
    assert found["step_ratios"][STEP_RATIOS[1]]["median"] == pytest.approx(1.01)


def test_lengths_by_hand():
    assert describe_lengths([10, 20, 30, 40, 51]) == {"mean": 30.2, "p10": 14.0, "p50": 30.0, "p90": 46.6, "max": 51}
    assert describe_lengths([7]) == {"mean": 7.0, "p10": 7.0, "p50": 7.0, "p90": 7.0, "max": 7}


def test_what_a_terminal_shows():
    lines = format_fit_speed(make_result(MEMORY)).splitlines()
    assert lines[0] == "tiny, float32 on cpu, 2 threads, 2 lists of 4 passages per batch, chunks of 3"
    assert lines[1] == (
        "tokens per passage: mean 52, 10 % 12, median 40, 90 % 99, longest 128; "
        "3% of the processors' time went to others"
    )
    cells = [line.split() for line in lines[4:10]]
    assert cells[0] == ["sentence-transformers", "40.0", "[40.0-40.0]", "200"]
    assert cells[1] == ["gradret", "infonce", "120.0", "[96.0-144.0]", "75", "3.00", "[2.40-3.60]"]
    assert cells[4] == ["gradret", "infonce,", "cached", "40.0", "[40.0-40.0]", "200", "2.00", "[2.00-2.00]"]
    assert lines[10].startswith("time of a step, gradret default loss / gradret infonce: 1.050 [1.000-")
    # of the 75 ms of a step of gradret infonce
    assert lines[12] == (
        "of it the loss alone, forward and backward: infonce 0.75 ms (1.00%), default loss 1.50 ms (2.00%)"
    )
    assert [line.split() for line in lines[-2:]] == [
        ["16", "lists", "none", "800", "1.00"],
        ["1024", "lists", "3", "1000", "1.25"],
    ]
    assert "one step" not in format_fit_speed(make_result())
    assert "went to others" not in format_fit_speed(make_result() | {"other_load": None})


def test_the_readmes_tables(tmp_path):
    path = tmp_path / "fit.json"
    path.write_text(json.dumps(make_result(MEMORY)))
    from benchmarks.tables import write_fit as make_tables

    assert make_tables(json.loads(path.read_text())) == [
        "| passages/s, 2 lists of 4 a batch | plain | gradient caching, 3 at once |",
        "|---|---:|---:|",
        "| sentence-transformers | 40.0 | 20.0 |",
        "| gradret infonce | 120.0 | 40.0 |",
        "| gradret default loss | 110.8 | 39.7 |",
        "| gradret infonce / sentence-transformers | 3.00 | 2.00 |",
        "| gradret default loss / sentence-transformers | 2.77 | 1.99 |",
        "| gradret default loss / gradret infonce, time of a step | 1.050 | 1.010 |",
        "",
        "| one step | peak MiB | ratio |",
        "|---|---:|---:|",
        "| 16 lists, plain | 800 | 1.00 |",
        "| 1024 lists, gradient caching, 3 at once | 1000 | 1.25 |",
    ]
    assert len(make_tables(make_result())) == 8


def test_made_lists_are_distinct_in_bounds_and_depend_on_the_seed():
    lists = make_lists(200, 3)
    assert lists == make_lists(200, 3)
    assert lists[0] != make_lists(1, 4)[0]
    texts = passage_texts(lists)
    assert len(set(texts)) == len(texts) == 800
    assert len({entry.query_id for entry in lists}) == 200
    words = [len(text.split()) for text in texts]
    assert min(words) >= 12 and max(words) <= 200
    # log-uniform: as many below the geometric mean of the bounds as above
    assert 0.4 < sum(count < (12 * 200) ** 0.5 for count in words) / 800 < 0.6
    assert all(4 <= len(entry.query.split()) <= 12 for entry in lists)
    assert all([passage.grade for passage in entry.passages] == [3, 2, 1, 0] for entry in lists)


def test_lists_of_a_source_are_drawn_and_read_as_the_encoder_reads_them(write_jsonl):
    records = [list_record(f"q{i}") for i in range(6)]
    records[0]["passages"][0]["title"] = "Title"
    path = str(write_jsonl("lists.jsonl", records))
    every = choose_lists([path], 100)
    assert [entry.query for entry in every] == [record["query"] for record in records]
    assert every[0].passages[0] == Passage(3, "Title passage 0 about q0")
    assert [p.grade for p in every[0].passages] == [3, 2, 1, 0]
    few = choose_lists([path], 4, seed=1)
    assert len(few) == 4 and few == choose_lists([path], 4, seed=1)
    assert {entry.query for entry in few} < {entry.query for entry in every}


@pytest.mark.parametrize(
    ("grades", "message"),
    [
        ([(3, 2, 1), (3, 2)], "lists.jsonl:2: list 'q1' has 2 passages, 1 of its highest grade; expected 3 with one"),
        ([(3, 3, 1)], "has 3 passages, 2 of its highest grade; expected 3 with one of the highest"),
        ([(3,)], "has 1 passage, 1 of its highest grade; expected 2 with one of the highest"),
        ([(3, -1)], "has the negative grade -1"),
    ],
)
def test_lists_that_do_not_suit_both_sides_are_refused(write_jsonl, grades, message):
    path = write_jsonl("lists.jsonl", [list_record(f"q{i}", g) for i, g in enumerate(grades)])
    with pytest.raises(GradretError) as error:
        choose_lists([str(path)], 10)
    assert message in str(error.value)


def test_batches_are_those_of_fit_and_hold_no_passage_twice():
    lists = make_lists(6)
    batches = draw_fit_batches(lists, 3, 2, 0)
    assert [len(batch) for batch in batches] == [2, 2, 2]
    assert sorted(entry.query_id for batch in batches for entry in batch) == [f"made-{i}" for i in range(6)]
    with pytest.raises(GradretError, match="6 lists are too few for a batch of 7"):
        draw_fit_batches(lists, 1, 7, 0)
    lists[1].passages[2] = lists[4].passages[0]
    with pytest.raises(GradretError, match="stands twice in a batch of 6 lists, .*there are 6"):
        draw_fit_batches(lists, 1, 6, 0)


def test_the_positive_is_the_passage_of_the_highest_grade():
    entry = RankingList("q", "what", [Passage(0, "a"), Passage(3, "b"), Passage(1, "c"), Passage(2, "d")])
    row = split_positive(entry)
    assert row == {"query": "what", "positive": "b", "negative_1": "a", "negative_2": "c", "negative_3": "d"}
    assert list(row) == ["query", "positive", "negative_1", "negative_2", "negative_3"]  # the loss goes by the order


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"query_max_length": 8, "document_max_length": 24},
        {"query_prefix": "which sea: ", "document_prefix": "the moon "},
        {"pooling": "cls", "normalize": False, "similarity": "dot"},
    ],
)
def test_both_sides_compute_the_same_loss(make_rival, tmp_path, config):
    temperature = 5.0 if config.get("similarity") == "dot" else 0.05
    encoder, rival = make_rival(config, temperature=temperature)
    assert fit_speed.compare_losses(encoder, rival, 3, tmp_path) < 1e-5


@pytest.mark.parametrize("change", ["temperature", "weights", "order of lists"])
def test_losses_that_differ_are_refused(make_rival, tmp_path, monkeypatch, change):
    encoder, rival = make_rival()
    if change == "temperature":

        def open_other(rival, *arguments):
            return open_trainer(replace(rival, settings=replace(rival.settings, temperature=0.06)), *arguments)

        monkeypatch.setattr(fit_rivals, "open_trainer", open_other)
    elif change == "weights":
        with torch.no_grad():
            next(encoder.parameters()).mul_(1.5)
    else:
        other = replace(rival, batches=rival.batches[::-1])
        monkeypatch.setattr(fit_speed, "find_losses", lambda _, *arguments: find_losses(other, *arguments))
    with pytest.raises(GradretError, match="do not read the encoder alike, and nothing was timed"):
        fit_speed.compare_losses(encoder, rival, 3, tmp_path)


def test_a_loss_that_is_not_a_number_is_refused(make_rival, tmp_path):
    encoder, rival = make_rival()
    with torch.no_grad():
        next(encoder.parameters()).fill_(torch.nan)
    with pytest.raises(GradretError, match="nan where"):
        fit_speed.compare_losses(encoder, rival, 3, tmp_path)


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_other_trainer_trains_in_the_same_precision_with_the_same_settings(make_rival, tmp_path, chunk, precision):
    _, rival = make_rival(precision=precision, learning_rate=3e-3, weight_decay=0.02, clip=0.5)
    trainer = open_trainer(rival, chunk, 2, tmp_path / "trainer")
    linear = next(m for m in trainer.model.modules() if isinstance(m, torch.nn.Linear))
    before, seen = linear.weight.detach().clone(), []
    linear.register_forward_hook(lambda module, inputs, output: seen.append((output.dtype, output.requires_grad)))
    trainer.train()
    assert {dtype for dtype, _ in seen} == {getattr(torch, precision)}  # in gradient caching's second pass, too
    assert {graph for _, graph in seen} == ({True} if chunk is None else {False, True})
    assert linear.weight.dtype == torch.float32 and not torch.equal(linear.weight, before)
    optimizer = trainer.optimizer
    assert optimizer.defaults["lr"] == 3e-3
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.02, 0.0]
    assert trainer.args.max_grad_norm == 0.5 and trainer.args.per_device_train_batch_size == 4
    assert list(tmp_path.glob("trainer/*")) == []


def test_on_a_cpu_the_other_loss_embeds_one_column_at_a_time(make_rival, tmp_path, monkeypatch):
    _, rival = make_rival()
    rows = []

    def open_watched(*arguments):
        trainer = open_trainer(*arguments)
        linear = next(m for m in trainer.model.modules() if isinstance(m, torch.nn.Linear))
        linear.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
        return trainer

    monkeypatch.setattr(fit_rivals, "open_trainer", open_watched)
    time_trainer(rival, None, 1, tmp_path / "trainer")
    assert rows == [4] * 5 * 2  # a query and four passages of each of four lists, in two steps
    rows.clear()
    monkeypatch.setattr(fit_rivals, "merges_columns", lambda device: True)
    time_trainer(rival, None, 1, tmp_path / "trainer")
    assert rows == [4, 16] * 2


def test_both_trainers_end_at_the_same_weights(make_rival, tmp_path, monkeypatch):
    """Without dropout, two steps of AdamW on the same batches; to what float32 loses in another order of sums."""
    encoder, rival = make_rival(learning_rate=1e-3)
    trainer = open_trainer(rival, None, 2, tmp_path / "trainer")
    start = {name: value.clone() for name, value in encoder.transformer.state_dict().items()}
    trainer.train()
    theirs = {name.split(".", 2)[-1]: value for name, value in trainer.model.state_dict().items()}
    ours = {}

    class Kept(fit_speed.Trainer):
        def loop(self):
            super().loop()
            ours.update(self.encoder.transformer.state_dict())

    monkeypatch.setattr(fit_speed, "Trainer", Kept)
    assert len(fit_speed.time_fit(replace(rival.settings, loss="infonce"), "cpu")) == 1
    assert ours.keys() == start.keys()
    for name, value in ours.items():
        (other,) = (v for key, v in theirs.items() if key == name or key.endswith("." + name))
        if value.is_floating_point():
            assert (value - other).norm() <= 0.05 * (value - start[name]).norm() + 1e-6, name


def test_steps_are_counted_after_the_first(make_rival, tmp_path):
    _, rival = make_rival()
    assert len(time_trainer(rival, None, 1, tmp_path / "trainer")) == 1
    times = fit_speed.time_fit(replace(rival.settings, loss="infonce", max_steps=3, epochs=1.0), "cpu")
    assert len(times) == 2 and all(0 < ms < 60_000 for ms in times)


@pytest.mark.nightly
def test_command_prints_and_writes_every_row(tmp_path, tiny_encoder, trainer):
    options = ["--model", tiny_encoder, "--batch-lists", 3, "--steps", 1, "--rounds", 2, "--chunk", 4]
    result = invoke(*options, "--device", "cpu", "--memory", "2,8", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "fit.json").read_text())
    assert [row["row"] for row in found["rows"]] == ROWS
    assert list(found["speed_ratios"]) == SPEED_RATIOS and list(found["step_ratios"]) == STEP_RATIOS
    for row in found["rows"]:
        assert 0 < row["passages_per_s"]["p20"] <= row["passages_per_s"]["median"] <= row["passages_per_s"]["p80"]
    assert found["loss_error"] < fit_speed.SAME_LOSS
    assert found["loss_alone"].keys() == {"infonce", "default loss"}
    shape = ("batch_lists", "passages_a_list", "chunk", "steps", "rounds", "device")
    assert [found[name] for name in shape] == [3, 4, 4, 1, 2, "cpu"]
    assert found["tokens"]["max"] == 64 and found["encoder"]["document_max_length"] == 64
    assert {"sentence_transformers", "datasets", "accelerate", "torch"} <= found["versions"].keys()
    assert [(row["lists"], row["chunk"]) for row in found["memory"]] == [(2, None), (2, 4), (8, 4)]
    assert found["memory"][0]["ratio"] == 1 and all(50 < row["peak_mib"] < 5000 for row in found["memory"])
    assert "gradret infonce, cached" in result.stdout and "8 lists" in result.stdout
    assert result.stderr.count("round 2 of 2") == 6 and "data:" not in result.stderr


def test_json_is_one_document(tmp_path, tiny_encoder, monkeypatch, trainer):
    def time_rounds(rival, chunk, steps, rounds, device, folder):
        assert rival.config.document_max_length == 20 and rival.settings.precision == "float32"
        return {name: [[1.0] * steps] * rounds for name in ROWS}

    monkeypatch.setattr(fit_speed, "_time_rounds", time_rounds)
    options = ["--model", tiny_encoder, "--batch-lists", 2, "--steps", 1, "--max-length", 20, "--device", "cpu"]
    result = invoke(*options, "--precision", "float32", "--out", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found == json.loads((tmp_path / "fit.json").read_text())
    assert found["memory"] == [] and found["settings"]["temperature"] == FitSettings().temperature
    assert found["rows"][0]["passages_per_s"] == spread(8000.0)


@pytest.mark.parametrize("name", ["sentence_transformers", "datasets", "accelerate"])
def test_a_package_that_is_missing_is_one_line(monkeypatch, tmp_path, name):
    find = fit_rivals.importlib.util.find_spec
    monkeypatch.setattr(fit_rivals.importlib.util, "find_spec", lambda n, *a: None if n == name else find(n, *a))
    result = invoke("--out", tmp_path, "--device", "cpu")
    assert result.exit_code == 1
    assert f"{name.replace('_', '-')} is not installed" in result.stderr
    assert "pip install 'sentence-transformers[train]'" in result.stderr


def test_an_old_version_or_several_gpus_are_one_line(monkeypatch, trainer):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(GradretError, match="2 CUDA devices are visible.*CUDA_VISIBLE_DEVICES=0"):
        fit_rivals.require_trainer(torch.device("cuda"))
    fit_rivals.require_trainer(CPU)
    monkeypatch.setattr(fit_rivals.metadata, "version", lambda name: "5.2.0")
    with pytest.raises(GradretError, match=r"sentence-transformers 5\.2\.0 is not compared with; install 6 or newer"):
        fit_rivals.require_trainer(CPU)


def test_bad_lists_end_the_command_with_one_line(write_jsonl, tmp_path, tiny_encoder, trainer):
    unequal = write_jsonl("unequal.jsonl", [list_record("a"), list_record("b", (1, 0))])
    few = write_jsonl("few.jsonl", [list_record("a"), list_record("b")])
    for path, message in ((unequal, "list 'b' has 2 passages"), (few, "2 lists are too few for a batch of 16")):
        result = invoke("--data", path, "--model", tiny_encoder, "--device", "cpu", "--out", tmp_path)
        assert result.exit_code == 1 and message in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_memory_on_a_system_that_does_not_show_it(monkeypatch, tmp_path, tiny_encoder, trainer):
    monkeypatch.setattr(fit_memory, "STATUS", tmp_path / "none")
    result = invoke("--memory", "2,8", "--model", tiny_encoder, "--device", "cpu", "--out", tmp_path)
    assert result.exit_code == 1 and "--memory: peak memory on cpu is not measured on this system" in result.stderr
    with pytest.raises(GradretError, match="peak memory on mps"):
        fit_memory.check_memory(torch.device("mps"))
    fit_memory.check_memory(torch.device("cuda"))


def test_a_memory_run_that_fails_says_why(tmp_path):
    settings = FitSettings(data=(str(tmp_path / "none.jsonl"),))
    with pytest.raises(GradretError, match=r"--memory: a step of 4 lists failed \(.*none\.jsonl.*\); take smaller"):
        fit_memory.measure_memory(settings, [4], 2, "cpu", tmp_path)


def test_the_measured_process_by_itself_ends_with_one_line(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    with pytest.raises(SystemExit, match=r"^expected a request as JSON on stdin.*fit --memory SIZES$"):
        fit_memory.main()


@pytest.mark.parametrize("value", ["0", "2,", "a", "2,-1"])
def test_wrong_sizes_exit_with_2(tmp_path, value):
    result = invoke("--memory", value, "--out", tmp_path)
    assert result.exit_code == 2 and "--memory" in result.stderr
